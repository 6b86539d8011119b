"""Break-even numbers, their intervals, fits and decisions, against brute force."""

import math
from bisect import bisect

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from icl_ft_fast.study.amortise import Line, Samples, Way, break_even, break_even_interval, decide, fit

COSTS = st.integers(0, 40).map(float)


LINES = st.builds(Line, COSTS, COSTS, COSTS, st.sampled_from([1.0, 2.0, 5.0, 16.0, math.inf]))


@settings(max_examples=300)
@given(LINES, LINES)
@example(Line(0, 30, 29, 16), Line(0, 40, 27, 5))  # cheaper on both sides of 5, where they meet
def test_break_even_is_the_last_time_that_the_rival_is_no_dearer(line, rival):
    found = break_even(line, rival)
    n = np.arange(0, 4000) / 4
    cheaper = np.array([line.cost(x) < rival.cost(x) for x in n])
    if found is None:
        assert not (line.slope < rival.slope)
        assert line.slope > rival.slope or line.cost(1e6) >= rival.cost(1e6)
    else:
        assert found >= 0
        assert line.cost(found) <= rival.cost(found) + 1e-9
        assert cheaper[n > found + 1e-6].all()
        assert found == 0 or line.cost(found) == pytest.approx(rival.cost(found))  # they cross or, at least, meet


def test_reading_for_every_query_is_a_slope_and_a_kept_context_a_constant():
    every, kept, forever = (Line(0, 3, 1, reuse) for reuse in (1, 10, math.inf))
    assert [line.cost(20) for line in (every, kept, forever)] == [80, 26, 23]
    assert [line.cost(1) for line in (every, kept, forever)] == [4, 4, 4]
    tuned = Line(30, 0, 1)
    assert break_even(tuned, every) == 10
    assert break_even(tuned, kept) == pytest.approx(100)
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
    assert [(round(n), way.name) for n, way in decision.switches] == [(1, "ICL"), (1, "ICL cached"), (33333, "tuned")][
        1:
    ]
    assert [(round(gap), way.name) for gap, way in decision.tolerances] == [(26, "poor"), (46, "base")]


def test_every_crossing_is_found():
    """Against the cheapest way at many numbers of queries, in 10,000 random settings; two ways may cross twice."""
    rng, wrong = np.random.default_rng(0), 0
    n = np.geomspace(1, 1e5, 80)
    for _ in range(10_000):
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
    """The audit's example: trained, then a cached context, then trained again."""
    ways = [Way("trained", 1.0, Line(90, 0, 1)), Way("cached", 1.0, Line(0, 100, 0.5, 100.0))]
    switches = decide(ways, 100, 2).switches
    assert [(round(n), way.name) for n, way in switches] == [(1, "trained"), (20, "cached"), (180, "trained")]


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
