"""Break-even numbers, their intervals, fits and decisions, against brute force."""

import math
from bisect import bisect

import numpy as np
import pytest

from icl_ft_fast.study.amortise import (
    Line,
    Lines,
    Samples,
    Way,
    break_even,
    break_even_interval,
    break_evens,
    decide,
    fit,
    turns,
)


def random_lines(rng):
    """Two lines whose costs are exact in floating point."""
    lifetimes = (1.0, 2.0, 5.0, 16.0, 37.0, 100.0, math.inf)
    return [Line(*(float(x) / 4 for x in rng.integers(0, 200, 3)), float(rng.choice(lifetimes))) for _ in range(2)]


def test_break_even_and_costs_equal_brute_force_in_ten_thousand_settings():
    """Every turn of the order up to 600 queries, and from where on one is the cheaper for good."""
    rng, n, wrong = np.random.default_rng(0), np.arange(1, 601.0), []
    for _ in range(10_000):
        line, rival = random_lines(rng)
        mine, theirs = (
            a.setup + a.reading * np.ceil(n / min(a.cache_lifetime, 1e9)) + a.query * n for a in (line, rival)
        )
        cheaper = mine < theirs
        turned = (np.nonzero(cheaper[1:] != cheaper[:-1])[0] + 2).tolist()
        first, found, is_endless = turns(line, rival)
        even = break_even(line, rival)
        ok = (
            first == cheaper[0]
            and line.cost(599) == mine[598]
            and [x for x in found if x <= 600] in ((turned[: len(found)],) if is_endless else (turned,))
        )
        if is_endless:
            ok &= even is None and len(turned) > 2
        elif not found or found[-1] < 600:
            ok &= even == ((turned[-1] - 1 if turned else 0) if cheaper[-1] else None)
        wrong += [] if ok else [(line, rival)]
    assert wrong == []


@pytest.mark.parametrize("lifetime", [1e6, 977.5])
def test_far_break_evens_are_found_too(lifetime):
    """Where brute force does not reach: just before it the line is no cheaper, just after it is."""
    line, rival = Line(5e5, 0, 1.0), Line(0, 60.0, 1.0 - 1e-5, lifetime)
    even = break_even(line, rival)
    assert line.cost(even) >= rival.cost(even)
    for n in (even + 1, even + 2, even + lifetime, 3 * even):
        assert line.cost(math.floor(n)) < rival.cost(math.floor(n))


def test_resampled_break_evens_are_those_of_single_lines():
    rng = np.random.default_rng(1)
    for lifetimes in ((math.inf, math.inf), (1.0, math.inf), (math.inf, 37.0), (16.0, math.inf), (16.0, 100.0)):
        one, two = (Lines(*(rng.integers(0, (4000, 99, 99), (300, 3)).T / 4), lifetime) for lifetime in lifetimes)
        found = break_evens(one, two)
        expected = [break_even(one[i], two[i]) for i in range(300)]
        ends = np.array([one[i].slope == two[i].slope for i in range(300)])  # there, which one is the last is rounding
        same = found == [math.inf if even is None else even for even in expected]
        assert (same | ends).all()
        assert 0.1 < np.isinf(found).mean() < 0.9
        assert (np.isfinite(found) & (found > 0)).any()


def test_reading_for_every_query_is_a_slope_and_a_kept_context_a_constant():
    every, kept, forever = (Line(0, 3, 1, reuse) for reuse in (1, 10, math.inf))
    assert [line.cost(20) for line in (every, kept, forever)] == [80, 26, 23]
    assert [kept.cost(n) for n in (10, 11)] == [13, 17]  # whole readings
    assert [line.cost(1) for line in (every, kept, forever)] == [4, 4, 4]
    tuned = Line(30, 0, 1)
    assert break_even(tuned, every) == 10
    assert break_even(tuned, kept) == 100  # ten readings cost as much; the eleventh falls due at 101
    assert break_even(tuned, forever) is None


def test_an_interval_of_equal_measurements_is_a_point():
    tuned, icl = Samples((30.0,) * 3, (), (1.0,) * 5), Samples((), (3.0,) * 5, (1.0,) * 5, 1.0)
    found = break_even_interval(tuned, icl)
    assert (found.queries, found.low, found.high, found.never) == (10, 10, 10, 0)


def test_an_interval_covers_what_it_estimates_and_says_never():
    rng, covered = np.random.default_rng(0), 0
    for trial in range(60):
        reading = tuple(3 + 0.3 * rng.standard_normal(15))
        found = break_even_interval(
            Samples((30.0,), (), (1.0,)), Samples((), reading, (1.0,), 1.0), draws=300, seed=trial
        )
        covered += found.low <= 10 <= found.high
    assert covered >= 50
    noisy = tuple(1 + 0.1 * rng.standard_normal(15))
    found = break_even_interval(Samples((30.0,), (), noisy), Samples((), (3.0,), noisy[::-1]), draws=300)
    assert math.isinf(found.high)
    assert 0.1 < found.never < 0.9


def test_a_fit_finds_a_polynomial_and_shows_what_it_misses():
    lengths = [0, 512, 1024, 2048, 4096]
    exact = fit(lengths, [1 + 0.01 * c + 1e-6 * c * c for c in lengths], 2)
    assert exact.coefficients == pytest.approx((1, 0.01, 1e-6))
    assert max(map(abs, exact.residuals)) < 1e-9
    assert exact(8192) == pytest.approx(1 + 81.92 + 67.108864)
    bent = fit(lengths, [1, 2, 1, 2, 1], 1)
    assert max(map(abs, bent.residuals)) > 0.2
    assert fit([512, 512], [2.0, 2.0], 2).coefficients == pytest.approx((2.0,))


WAYS = [
    Way("base", 0.5, Line(0, 0, 1)),
    Way("ICL", 0.96, Line(0, 3, 1, 1)),
    Way("ICL cached", 0.96, Line(0, 3, 1, 100)),
    Way("tuned", 0.95, Line(1000, 0, 1)),
    Way("poor", 0.7, Line(10, 0, 1)),
]


@pytest.mark.parametrize(
    ("queries", "points", "chosen"),
    [
        (10, 2, "ICL cached"),
        (1e6, 2, "tuned"),
        (1e6, 0.5, "ICL cached"),
        (1e6, 50, "base"),
    ],
)
def test_the_decision_is_the_cheapest_accurate_way(queries, points, chosen):
    decision = decide(WAYS, queries, points)
    assert decision.chosen.name == chosen
    accurate = [way for way in WAYS if 0.96 - way.accuracy <= points / 100 + 1e-9]
    assert decision.chosen.line.cost(queries) == min(way.line.cost(queries) for way in accurate)
    assert decision.best.accuracy == 0.96
    for (n, way), (after, _) in zip(decision.switches, [*decision.switches[1:], (1e9, None)], strict=True):
        for between in np.geomspace(n * 1.001, after * 0.999, 5):
            assert way.line.cost(between) == min(other.line.cost(between) for other in accurate)


def test_what_would_change_the_decision():
    decision = decide(WAYS, 1e6, 2)
    assert [(round(n), way.name) for n, way in decision.switches] == [(1, "ICL"), (1, "ICL cached"), (33301, "tuned")][
        1:
    ]
    assert [(round(gap), way.name) for gap, way in decision.tolerances] == [(26, "poor"), (46, "base")]


def test_every_crossing_is_found():
    """Against the cheapest way at many numbers of queries, in 2,000 random settings; two ways may cross twice."""
    rng, wrong = np.random.default_rng(0), 0
    n = np.unique(np.geomspace(1, 1e5, 60).round())
    for _ in range(2_000):
        lines = [
            Line(*(float(x) for x in rng.integers(0, 100, 3)), float(rng.choice([1, 8, 100, math.inf])))
            for _ in range(3)
        ]
        decision = decide([Way(str(i), 1.0, line) for i, line in enumerate(lines)], 1.0, 2.0)
        starts = [start for start, _ in decision.switches]
        chosen = [decision.switches[max(0, bisect(starts, x) - 1)][1].line for x in n]
        costs = np.array([[line.cost(x) for x in n] for line in lines])
        wrong += bool((np.array([line.cost(x) for line, x in zip(chosen, n, strict=True)]) > costs.min(0) + 1e-6).any())
    assert wrong == 0


def test_two_ways_that_cross_twice():
    """The audit's example: trained, then a cached context, then trained again, when readings are whole."""
    ways = [Way("trained", 1.0, Line(90, 0, 1)), Way("cached", 1.0, Line(0, 100, 0.5, 100.0))]
    switches = decide(ways, 100, 2).switches
    assert [(round(n), way.name) for n, way in switches] == [
        (1, "trained"),
        (20, "cached"),  # as dear as trained at 20, cheaper from 21 on
        (101, "trained"),  # the second reading
    ]


def test_of_the_most_accurate_the_cheapest_is_the_best():
    ways = [
        Way("dear", 1.0, Line(0, 60, 1, 1.0)),
        Way("cheap", 1.0, Line(0, 60, 1, 1000.0)),
        Way("x", 0.5, Line(0, 0, 1)),
    ]
    assert decide(ways, 1000, 2).best.name == "cheap"


def test_never_is_told_from_below_and_from_not_resolved():
    icl = Samples((), (60.0,), (0.1,), 1000.0)
    below = break_even_interval(Samples((10.0,), (), (0.5,)), icl)
    assert math.isinf(below.queries)
    assert below.below == pytest.approx(125.0)  # 10 + .5 n = 60 + .1 n
    noisy = tuple(0.1 + 0.02 * (i % 7 - 3) for i in range(9))
    unsure = break_even_interval(Samples((100.0,), (), noisy), Samples((), (0.001,), noisy[::-1]))
    assert not unsure.is_resolved
    assert below.is_resolved


def test_documents_that_change_are_paid_for_anew():
    """Three versions cost three times what a third of the queries costs."""
    samples = Samples((40.0, 60.0), (7.0,), (0.25,), 10.0)
    for n in (30, 60, 300, 303):
        assert samples.repeated(3).line.cost(n) == pytest.approx(3 * samples.line.cost(n / 3))
    assert samples.repeated(1) is samples


class Stairs:
    """A machine for each thousand queries."""

    def cost(self, n):
        return 100 * math.ceil(n / 1000)


def test_ways_that_are_billed_in_steps_are_searched():
    ways = [Way("held", 1.0, Stairs()), Way("by use", 1.0, Line(0, 0, 0.15))]
    switches = [(n, way.name) for n, way in decide(ways, 500, 2).switches]
    assert switches[:2] == [(1, "by use"), (667, "held")]
    assert (1001, "by use") in switches


def test_a_price_of_wrong_answers_makes_accuracy_a_cost():
    cheap, good = Way("cheap", 0.5, Line(0, 0, 1.0), 0.5 * 4), Way("good", 0.9, Line(50, 0, 1.0), 0.1 * 4)
    decision = decide([cheap, good], 10, 100)
    assert decision.chosen.name == "cheap"
    assert [(n, way.name) for n, way in decision.switches] == [(1, "cheap"), (32, "good")]  # 50 + .4 n < 2 n
    assert good.total(100) == pytest.approx(50 + 100 + 40)


def test_few_setups_have_students_t():
    """Two seeds' setups of 90 and 110 s: the mean's interval is 100 +- 12.7 * 10, not 90 to 110."""
    found = break_even_interval(Samples((90.0, 110.0), (), (1.0,)), Samples((), (1.0,), (1.0,), 1.0), draws=4000)
    assert found.queries == 100
    assert found.low == 0
    assert found.high == pytest.approx(100 + 12.706 * 10, rel=0.15)
    one = break_even_interval(Samples((90.0,), (), (1.0,)), Samples((), (1.0,), (1.0,), 1.0))
    assert (one.low, one.high) == (90, 90)  # nothing is known of other seeds
