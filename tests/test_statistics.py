"""Statistics against closed forms, enumeration, or another definition of the same."""

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from icl_ft_fast.study.statistics import brier, cluster_bootstrap, expected_calibration_error, holm, sign_flip_test


def binomial_quantile(p, n, q):
    """The least k with P(at most k of n) >= q."""
    total = 0.0
    for k in range(n + 1):
        total += math.comb(n, k) * p**k * (1 - p) ** (n - k)
        if total >= q:
            return k
    return n


@pytest.mark.parametrize(("right", "clusters"), [(3, 10), (12, 40), (39, 40)])
def test_clusters_of_equal_answers_bootstrap_to_a_binomial(right, clusters):
    """Answers that only repeat within their cluster add nothing to it."""
    for repeats in (1, 5):
        values = [float(c < right) for c in range(clusters) for _ in range(repeats)]
        names = [c for c in range(clusters) for _ in range(repeats)]
        low, high = cluster_bootstrap(values, names, resamples=20_000)
        expected = [binomial_quantile(right / clusters, clusters, q) / clusters for q in (0.025, 0.975)]
        assert (low, high) == pytest.approx(
            expected, abs=1.01 / clusters
        )  # a step of the binomial, where q falls on it


def test_two_factors_bootstrap_to_all_their_draws():
    values, rows, columns = [1, 0, 0, 1, 1, 0, 1], "aabbccc", "xyxyxyy"
    means, weights = [], []
    for drawn_rows in itertools.product("abc", repeat=3):
        for drawn_columns in itertools.product("xy", repeat=2):
            count = [drawn_rows.count(r) * drawn_columns.count(c) for r, c in zip(rows, columns, strict=True)]
            if sum(count):
                means.append(sum(v * n for v, n in zip(values, count, strict=True)) / sum(count))
                weights.append(1)
    low, high = np.quantile(np.repeat(means, weights), [0.025, 0.975])
    assert cluster_bootstrap(values, rows, columns, resamples=20_000) == pytest.approx((low, high), abs=0.02)


def test_bootstrap_intervals_cover_and_clusters_widen_them():
    rng, covered = random.Random(0), 0
    for seed in range(200):
        right = [rng.random() < 0.6 for _ in range(50)]
        values, names = [float(r) for r in right for _ in range(4)], [c for c in range(50) for _ in range(4)]
        low, high = cluster_bootstrap(values, names, resamples=400, seed=seed)
        covered += low <= 0.6 <= high
        narrow = cluster_bootstrap(values, range(200), resamples=400, seed=seed)
        assert narrow[1] - narrow[0] < 0.75 * (high - low)
    assert 0.88 < covered / 200 < 0.99


def test_a_factor_of_one_cluster_adds_nothing():
    values, names = [1.0, 0.0, 1.0, 1.0], [0, 1, 2, 2]
    alone = cluster_bootstrap(values, names, resamples=20_000)
    assert cluster_bootstrap(values, names, [7] * 4, resamples=20_000) == alone
    assert cluster_bootstrap([1, 1], [0, 1]) == (1.0, 1.0)
    assert alone == cluster_bootstrap(values, names, resamples=20_000, seed=0)


@pytest.mark.parametrize(("values", "factors"), [([], [[]]), ([1.0], []), ([1.0], [[1, 2]])])
def test_a_bootstrap_without_clusters(values, factors):
    with pytest.raises(ValueError, match=r"^factors: expected clusters for \d values, at least one, got"):
        cluster_bootstrap(values, *factors)


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
