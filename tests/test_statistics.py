"""Statistics against closed forms, enumeration, or another definition of the same."""

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from icl_ft_fast.study.statistics import (
    _mid_p_interval,
    accuracy_interval,
    brier,
    calibrated_error,
    expected_calibration_error,
    gap_interval,
    holm,
    sign_flip_test,
    t_quantile,
    t_test,
    wilson,
)


def simulated(rng, clusters, each, shared, p):
    """Right or wrong: in each cluster some answers are the cluster's, the others their own."""
    right, names = [], []
    for cluster in range(clusters):
        common = rng.random() < p
        for _ in range(each):
            right.append(common if rng.random() < shared else rng.random() < p)
            names.append(cluster)
    return right, names


@pytest.mark.parametrize(("shared", "each"), [(0.0, 1), (0.0, 4), (0.7, 4), (1.0, 4)])
def test_intervals_cover_correlated_answers(shared, each):
    rng, accuracy, gap = random.Random(0), 0, 0
    for _ in range(400):
        (right, names), (other, _) = (simulated(rng, 20, each, shared, 0.8) for _ in range(2))
        low, high = accuracy_interval(right, names)
        accuracy += low <= 0.8 <= high
        low, high = gap_interval([a - b for a, b in zip(right, other, strict=True)], names)
        gap += low <= 0 <= high
    assert 0.92 < accuracy / 400 <= 1
    assert 0.92 < gap / 400 <= 1


def test_answers_that_repeat_add_nothing():
    right, names = [True, False, True, True, False, True], list(range(6))
    assert accuracy_interval(right * 5, names * 5) == pytest.approx(accuracy_interval(right, names), abs=1e-9)
    assert accuracy_interval([True] * 40, [i // 4 for i in range(40)]) == (pytest.approx(0.05**0.1), 1)  # never a point
    low, high = gap_interval([0] * 40, range(40))
    assert (low, high) == (pytest.approx(0.05 ** (1 / 40) - 1), pytest.approx(1 - 0.05 ** (1 / 40)))
    assert gap_interval([0] * 80, list(range(40)) * 2) == (low, high)


def test_students_quantile_is_for_what_clusters_estimate():
    """Clusters of answers that are alike are so many answers; of clusters that differ the design effect is a guess."""
    right = [True, True, False, True, True, False]
    alike = accuracy_interval([one for one in right for _ in range(4)], [i // 4 for i in range(24)])
    assert alike == pytest.approx(_mid_p_interval(4 / 6, 6.0), abs=1e-9)
    mixed = [True, True, True, True, True, True, False, False] * 2 + [False] * 4 + [True] * 4
    low, high = accuracy_interval(mixed, [i // 4 for i in range(24)])
    assert high - low > 1.05 * np.diff(_mid_p_interval(sum(mixed) / 24, _design_number(mixed, 6)))[0]


def _design_number(right, clusters):
    """Kish's effective number of equal clusters, from the analysis of variance."""
    value = np.reshape(right, (clusters, -1)).astype(float)
    between = ((value.mean(1) - value.mean()) ** 2).sum() / (clusters - 1) / clusters
    return value.var() / between + 1


def test_a_difference_has_the_two_shares_limits():
    """Of 20 single questions 6 are right in the first alone and 1 in the second alone: Zou and Donner's equation."""
    (low, high), (other_low, other_high) = _mid_p_interval(6 / 20, 20.0), _mid_p_interval(1 / 20, 20.0)
    r = -math.sqrt(6 * 1 / (14 * 19))
    down, up = 6 / 20 - low, high - 6 / 20
    below = math.sqrt(down**2 + (other_high - 1 / 20) ** 2 - 2 * r * down * (other_high - 1 / 20))
    above = math.sqrt(up**2 + (1 / 20 - other_low) ** 2 - 2 * r * up * (1 / 20 - other_low))
    found = gap_interval([1] * 6 + [-1] + [0] * 13, range(20))
    assert found == pytest.approx((0.25 - below, 0.25 + above), abs=1e-9)
    assert gap_interval([-1] * 6 + [1] + [0] * 13, range(20)) == pytest.approx((-found[1], -found[0]))


def test_seeds_widen_an_interval_only_from_four_on():
    right = [seed % 2 == 0 for seed in range(4) for _ in range(10)]
    names, seeds = list(range(10)) * 4, [seed for seed in range(4) for _ in range(10)]
    low, high = accuracy_interval(right, names, seeds)
    assert high - low > 0.6
    assert accuracy_interval(right[:30], names[:30], seeds[:30]) == accuracy_interval(right[:30], names[:30])


@pytest.mark.parametrize(("right", "clusters"), [([], []), ([True], []), ([True], [1, 2])])
def test_an_interval_without_clusters(right, clusters):
    with pytest.raises(ValueError, match=r"^clusters: expected one for each of \d values, at least one, got"):
        accuracy_interval(right, clusters)


@pytest.mark.parametrize(
    ("df", "quantile"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (9, 2.2622), (30, 2.0423), (200, 1.9719), (500, 1.9647)],
)
def test_students_quantiles_that_are_in_every_table(df, quantile):
    assert t_quantile(df) == pytest.approx(quantile, abs=2e-4)


def test_students_test():
    assert t_test([1.0, 2.0, 3.0, 4.0]) == pytest.approx(0.0305, abs=2e-4)  # t = 2.5 / (1.291 / 2) with 3 df
    assert (t_test([0.0] * 4), t_test([0.5] * 4)) == (1.0, 0.0)
    assert t_test([1.0, -1.0, 1.0, -1.0]) == pytest.approx(1.0)


def test_a_mid_p_value_counts_half_of_what_is_as_extreme():
    assert sign_flip_test([1] * 8, mid=True) == pytest.approx(1 / 256)
    assert sign_flip_test([1] * 8) == pytest.approx(2 / 256)
    assert sign_flip_test([1, -1], mid=True) == 1.0
    assert sign_flip_test([1] * 80) == pytest.approx(2.0**-79)  # not 0
    tails = {s: sum(abs(sum(signs)) >= s for signs in itertools.product((1, -1), repeat=6)) / 64 for s in (4, 6)}
    assert sign_flip_test([1, 1, 1, 1, 1, -1], mid=True) == pytest.approx((tails[4] + tails[6]) / 2)


def test_how_much_calibration_error_few_answers_bring():
    rng = random.Random(0)
    for n, most in ((16, 0.3), (1000, 0.05)):
        confidence = [rng.uniform(0.5, 1.0) for _ in range(n)]
        expected = calibrated_error(confidence)
        assert 0.01 < expected < most
        errors = [expected_calibration_error(confidence, [rng.random() < c for c in confidence]) for _ in range(200)]
        assert np.mean(errors) == pytest.approx(expected, rel=0.1)


@given(st.lists(st.integers(-1, 1), max_size=60))
def test_the_sign_flip_test_of_single_questions_is_mcnemars(differences):
    b, c = differences.count(1), differences.count(-1)
    tail = sum(math.comb(b + c, k) for k in range(min(b, c) + 1)) / 2 ** (b + c)
    assert sign_flip_test(differences) == pytest.approx(min(1.0, 2 * tail), rel=1e-9)


@given(st.lists(st.integers(-5, 5), max_size=9))
def test_the_sign_flip_test_is_the_enumeration(differences):
    sums = [sum(signs) for signs in itertools.product(*((d, -d) for d in differences))]
    far = sum(abs(s) >= abs(sum(differences)) for s in sums)
    assert sign_flip_test(differences) == pytest.approx(far / len(sums), rel=1e-9)


@given(st.lists(st.floats(0, 1), max_size=6))
def test_holm_is_closed_testing_by_bonferroni(p_values):
    """An adjusted p-value is the largest Bonferroni p-value of any family that its test belongs to."""
    tests = range(len(p_values))
    families = [family for size in range(1, len(p_values) + 1) for family in itertools.combinations(tests, size)]
    expected = [
        max(min(1.0, len(family) * min(p_values[j] for j in family)) for family in families if i in family)
        for i in tests
    ]
    assert holm(p_values) == pytest.approx(expected)


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=40), st.integers(1, 12))
def test_calibration_error_bin_by_bin(rows, bins):
    expected = 0.0
    for b in range(bins):
        mine = [(c, r) for c, r in rows if min(max(math.ceil(c * bins) - 1, 0), bins - 1) == b]
        if mine:
            accuracy = sum(r for _, r in mine) / len(mine)
            expected += len(mine) / len(rows) * abs(accuracy - sum(c for c, _ in mine) / len(mine))
    confidence, right = zip(*rows, strict=True)
    assert expected_calibration_error(confidence, right, bins=bins) == pytest.approx(expected, abs=1e-9)


def test_calibration_by_hand():
    assert expected_calibration_error([0.9, 0.9, 0.9, 0.9], [True, True, True, False]) == pytest.approx(0.15)
    assert expected_calibration_error([0.3, 0.8], [True, False]) == pytest.approx(0.75)
    assert expected_calibration_error([0.0, 1.0], [False, True]) == 0.0
    rng = random.Random(0)
    drawn = [rng.random() for _ in range(20_000)]
    assert expected_calibration_error(drawn, [rng.random() < p for p in drawn]) < 0.02


def test_brier_by_hand():
    assert brier((0.7, 0.2, 0.1), (0,)) == pytest.approx(0.09 + 0.04 + 0.01)
    assert brier((0.5, 0.3, 0.2), (0, 1)) == pytest.approx(0.04 + 0.04)
    assert brier((0.0, 1.0), (0,)) == 2.0
    assert brier((1.0, 0.0), (0,)) == 0.0


def test_rare_answers_have_the_binomials_interval():
    """One wrong answer of ten: by enumeration of the binomial's outcomes, each end has a mid-p of 2.5%."""
    right = [True] * 9 + [False]
    low, high = accuracy_interval(right, range(10))
    assert high > 0.99 > wilson(9, 10)[1]  # Wilson's does not reach an accuracy that has one wrong of ten often
    assert (low, high) == pytest.approx(_mid_p_interval(0.9, 10.0))  # single answers: no design effect
    # whole numbers: against the sum of the binomial's terms
    whole = _mid_p_interval(0.75, 8)
    for q, side in zip(whole, (1, -1), strict=True):
        terms = [math.comb(8, k) * q**k * (1 - q) ** (8 - k) for k in range(9)]
        tail = sum(terms[7:]) if side == 1 else sum(terms[:6])
        assert tail + terms[6] / 2 == pytest.approx(0.025, abs=1e-9)
    # a fraction: between its neighbours
    assert _mid_p_interval(0.9, 9.0)[0] < _mid_p_interval(0.9, 9.5)[0] < low
    flipped = accuracy_interval([not one for one in right], range(10))
    assert flipped == pytest.approx((1 - high, 1 - low))


def test_five_clusters_show_nothing_by_a_half():
    """All five differences alike happen in 6.25% of studies of equal arms."""
    assert sign_flip_test([1] * 5, mid=True) == sign_flip_test([1] * 5) == 2 / 32
    assert sign_flip_test([1] * 6, mid=True) == 1 / 64


def test_a_mix_counts_each_answer_by_its_weight():
    right, names = [True, False] * 20, [i // 2 for i in range(40)]
    low, high = accuracy_interval(right, names, weights=[3.0, 1.0] * 20)
    assert low < 0.75 < high
    alike = accuracy_interval(right, names, weights=[2.5] * 40)
    assert alike == pytest.approx(accuracy_interval(right, names))
    # three answers that count twice are as six, of the same clusters
    twice = gap_interval([1, -1, 0] * 2, [0, 1, 2] * 2)
    assert gap_interval([1, -1, 0], [0, 1, 2], weights=[2.0] * 3) == pytest.approx(twice)
