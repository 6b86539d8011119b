"""Statistics of right and wrong answers: intervals, paired tests and calibration. Knows nothing of models or tasks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from functools import cache, lru_cache
from typing import Any

import numpy as np

Z95 = 1.959964  # the normal distribution's 97.5% point


FEWEST = 6  # clusters that differ, of a mid-p test
SEEDS_AS_UNIT = 4  # with fewer seeds nothing is said about other training runs: statistics are about these weights


def accuracy_interval(
    right: Sequence[bool],
    clusters: Sequence[Hashable],
    seeds: Sequence[Hashable] | None = None,
    weights: Sequence[float] | None = None,
) -> tuple[float, float]:
    """Interval at 95% of an accuracy whose answers come in clusters: the binomial's mid-p one at an effective number.

    Args:
        right: whether each answer is right; at least one.
        clusters: for each answer what it rests on: answers of one cluster may be right or wrong together.
        seeds: for each answer its training run, where the interval is to hold for other runs too; needs SEEDS_AS_UNIT.
        weights: what each answer counts, where the accuracy is that of a mix of kinds; None for all alike.

    Answers are divided by the design effect, the variance of the mean over clusters by that of independent answers
    (Kish 1965), and by the square of Student's quantile over the normal one (Korn and Graubard 1998). Student's degrees
    of freedom are those that the design effect is known with, not the clusters': where every cluster has one answer, or
    answers that are all alike, the design effect is no estimate. The effective number is no more than the answers and
    no less than the clusters, less the same. Where all answers are equal there is no variance to estimate, and each
    cluster counts as one answer. `python -m benchmarks statistics` has the coverage.
    """
    share = _shares_of(weights, len(right))
    effective = _effective(right, clusters, seeds, share)
    return _mid_p_interval(_share_where(right, True, share), effective)


def gap_interval(
    differences: Sequence[int],
    clusters: Sequence[Hashable],
    seeds: Sequence[Hashable] | None = None,
    weights: Sequence[float] | None = None,
) -> tuple[float, float]:
    """Interval at 95% of the difference of two accuracies on the same questions, which come in clusters.

    Args:
        differences: 1, 0 or -1 a question: right in the first alone, in both or neither, in the second alone.
        clusters: as in accuracy_interval().
        seeds: as in accuracy_interval().
        weights: as in accuracy_interval().

    The difference is that of two shares of the questions, those that the first alone has right and those that the
    second alone has. Each has the interval of accuracy_interval(), at the effective number of the differences; the two
    are put together by their distances from the shares (Newcombe 1998; Zou and Donner 2008), with the correlation that
    two shares of one multinomial have. It has a width where no answer differs, too.
    """
    share = _shares_of(weights, len(differences))
    effective = _effective(differences, clusters, seeds, share)
    first, second = (_share_where(differences, sign, share) for sign in (1, -1))
    (low, high), (other_low, other_high) = (_mid_p_interval(part, effective) for part in (first, second))
    neither = (1 - first) * (1 - second)
    correlation = -math.sqrt(min(1.0, first * second / neither)) if neither > 0 else 0.0

    def reach(own: float, other: float) -> float:
        return math.sqrt(max(0.0, own * own + other * other - 2 * correlation * own * other))

    down, up = reach(first - low, other_high - second), reach(high - first, second - other_low)
    return max(-1.0, first - second - down), min(1.0, first - second + up)


def wilson(correct: int, total: int) -> tuple[float, float]:
    """Wilson (1927) score interval of a proportion at 95%; counts the answers as independent."""
    p, n = correct / total, total
    centre = (p + Z95 * Z95 / (2 * n)) / (1 + Z95 * Z95 / n)
    half = Z95 / (1 + Z95 * Z95 / n) * math.sqrt(p * (1 - p) / n + Z95 * Z95 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


@lru_cache(4096)
def _mid_p_interval(p: float, n: float) -> tuple[float, float]:
    """Clopper and Pearson's interval with half of the observed outcome's probability; n need not be whole."""
    x = p * n
    ways = math.lgamma(n + 1) - math.lgamma(x + 1) - math.lgamma(n - x + 1)

    def above(q: float) -> float:
        """The probability of more than x right ones at an accuracy q, 0 < q < 1, and half that of x."""
        observed = math.exp(ways + x * math.log(q) + (n - x) * math.log1p(-q))
        return (_beta_below(q, x + 1, n - x) if x < n else 0.0) + observed / 2

    def where(level: float, low: float, high: float) -> float:
        below, over = -level, 1 - level  # at the ends of [0, 1], or beyond what is there
        side = 0
        for _ in range(200):
            q = (low * over - high * below) / (over - below)  # false position, with Illinois' halving
            q = min(max(q, low + 1e-3 * (high - low)), high - 1e-3 * (high - low))
            miss = above(q) - level
            if miss < 0:
                low, below, over, side = q, miss, over / 2 if side < 0 else over, -1
            else:
                high, over, below, side = q, miss, below / 2 if side > 0 else below, 1
            if high - low < 1e-9 or abs(miss) < 1e-12:
                break
        return q

    return (0.0 if x <= 0 else where(0.025, 0.0, p)), (1.0 if x >= n else where(0.975, p, 1.0))


def _beta_below(q: float, a: float, b: float) -> float:
    """The regularised incomplete beta function I_q(a, b), by its continued fraction (Lentz)."""
    if q <= 0 or q >= 1:
        return float(q >= 1)
    if q > (a + 1) / (a + b + 2):
        return 1 - _beta_below(1 - q, b, a)
    front = a * math.log(q) + b * math.log1p(-q) - math.log(a) - math.lgamma(a) - math.lgamma(b) + math.lgamma(a + b)
    value = c = 1.0
    d = 0.0
    for i in range(400):
        k = i // 2
        if i == 0:
            term = 1.0
        elif i % 2:
            term = -(a + k) * (a + b + k) * q / ((a + i - 1) * (a + i))
        else:
            term = k * (b - k) * q / ((a + i - 1) * (a + i))
        d, c = 1 / (1 + term * d or 1e-300), 1 + term / c or 1e-300
        value *= c * d
        if abs(c * d - 1) < 1e-13 and i > 0:
            break
    return math.exp(front) * (value - 1)


def _shares_of(weights: Sequence[float] | None, n: int) -> Any:
    """What each of n answers counts of 1."""
    share = np.ones(n) if weights is None else np.asarray(weights, dtype=np.float64)
    return share / share.sum() if n else share


def _share_where(values: Sequence[float], value: float, share: Any) -> float:
    """What the values that are `value` count of 1: exactly 0 or 1 where none or all are."""
    is_so = np.asarray(values) == value
    return float(is_so[0]) if is_so.all() or not is_so.any() else float(share @ is_so)


def _effective(
    values: Sequence[float], clusters: Sequence[Hashable], seeds: Sequence[Hashable] | None, share: Any
) -> float:
    """How many independent values, of which the variance is known, would tell as much about the mean."""
    value = np.asarray(values, dtype=np.float64)
    if not len(value) or len(clusters) != len(value):
        raise ValueError(f"clusters: expected one for each of {len(value)} values, at least one, got {len(clusters)}")
    spread, most = (value - share @ value) * share, 1 / float((share**2).sum())
    of_cluster = _numbered(clusters)
    num_clusters, variance = _clustered_variance(spread, of_cluster)
    units = 1 / float((np.bincount(of_cluster, weights=share) ** 2).sum()) if np.ptp(share) > 1e-12 else num_clusters
    if not np.ptp(value):
        return float(units)
    alone = share * (value - share @ value) ** 2
    total, df = float(alone.sum()), num_clusters - 1
    if seeds is not None and len(set(seeds)) >= SEEDS_AS_UNIT:
        of_seed = _numbered(seeds)
        num_seeds, between = _clustered_variance(spread, of_seed)
        cells = _numbered(list(zip(of_cluster, of_seed, strict=True)))
        num_cells, within = _clustered_variance(spread, cells)
        crossed = num_cells > num_clusters  # two-way (Cameron, Gelbach and Miller 2011), where topics recur under seeds
        variance = max(variance, between, variance + between - within if crossed else 0.0)
        df, fewest = min(num_clusters, num_seeds) - 1, min(units, num_seeds)
        known = least = _known(df)
    else:
        least, fewest = _known(df), units
        known = _known(max(df, _freedom(spread, alone, of_cluster))) if variance else least
    if not variance:  # one cluster, or all of them alike
        return float(fewest * least)
    # Squares around the values' own mean are too small by one part in the number that is looked for.
    return float(min(max((total / variance + 1) * known, fewest * least), most))


def _known(df: int) -> float:
    """What an answer is worth whose variance is estimated with so many degrees of freedom."""
    return (Z95 / t_quantile(max(1, df))) ** 2


def _freedom(spread: Any, alone: Any, of_cluster: Any) -> int:
    """The degrees of freedom that the ratio of the clusters' variance to that of independent values is known with."""
    between, within = np.bincount(of_cluster, weights=spread) ** 2, np.bincount(of_cluster, weights=alone)
    n, off = len(between), between / between.sum() - within / within.sum()
    return int(2 / max(1e-12, float((off**2).sum()) * n / max(1, n - 1)))


def _clustered_variance(spread: Any, names: Any) -> tuple[int, float]:
    """The number of clusters, and the variance of the mean that they show."""
    sums = np.bincount(names, weights=spread)
    n = len(sums)
    return n, float((sums**2).sum()) * n / max(1, n - 1)


def _numbered(names: Sequence[Hashable]) -> Any:
    """The clusters' names as numbers from 0."""
    number = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return np.array([number[name] for name in names])


def t_test(means: Sequence[float]) -> float:
    """Two-sided p-value of Student's test that the mean of these differences is 0; 1.0 where they are all 0."""
    n, mean = len(means), math.fsum(means) / len(means)
    spread = math.sqrt(math.fsum((x - mean) ** 2 for x in means) / (n - 1))
    if not spread:
        return 1.0 if mean == 0 else 0.0
    return _t_outside(abs(mean) / spread * math.sqrt(n), n - 1)


def _t_outside(t: float, df: int) -> float:
    """The probability that Student's t is beyond +-t (Abramowitz and Stegun 26.7.3 and 26.7.4)."""
    angle = math.atan2(t, math.sqrt(df))
    sine, cosine, term, total = math.sin(angle), math.cos(angle), 1.0, 0.0
    if df % 2 == 0:
        for k in range(0, df - 1, 2):
            total += term
            term *= cosine * cosine * (k + 1) / (k + 2)
        return max(0.0, 1 - sine * total)
    term = cosine
    for k in range(1, df - 1, 2):
        total += term
        term *= cosine * cosine * (k + 1) / (k + 2)
    return max(0.0, 1 - 2 / math.pi * (angle + sine * total))


@cache
def t_quantile(df: int) -> float:
    """The 97.5% point of Student's t; for more than 200 degrees of freedom by its series (Cornish and Fisher)."""
    if df > 200:
        return Z95 + (Z95**3 + Z95) / (4 * df)
    low, high = 1.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_outside(middle, df) > 0.05 else (low, middle)
    return low


def sign_flip_test(differences: Sequence[int], *, mid: bool = False) -> float:
    """Two-sided p-value of a sum of differences when each sign could as well have been the other.

    A difference is that of two arms' correct answers in one cluster of questions. With single questions for clusters
    this is McNemar's exact test. `mid` counts half of the outcomes that are as extreme as the observed one (Lancaster
    1961): the exact test's level lies far below its nominal one, the mid-p test's near it. With fewer than FEWEST
    differences that are not 0 it is the exact test all the same, as one outcome decides then. The distribution is the
    Fourier transform of its characteristic function, a product of cosines: O(sum of |differences| * log).
    """
    reach, far = sum(map(abs, differences)), abs(sum(differences))
    if not far:
        return 1.0
    angle = 2 * np.pi * np.arange(2 * reach + 1) / (2 * reach + 1)
    characteristic = np.ones(2 * reach + 1)
    for size, number in Counter(map(abs, differences)).items():
        characteristic *= np.cos(size * angle) ** number
    probability = np.fft.fftshift(np.fft.fft(characteristic).real) / (2 * reach + 1)  # [s + reach] of the sum s
    tails = probability[: reach - far + 1].sum() + probability[reach + far :].sum()
    number = sum(difference != 0 for difference in differences)
    mid = mid and number >= FEWEST
    if mid:
        tails -= (probability[reach - far] + probability[reach + far]) / 2
    least = 2.0**-number  # the transform rounds by 1e-16 or so
    return min(1.0, max(least if mid else 2 * least, float(tails)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p-values, in the order given: a family of tests at once."""
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = least
    return adjusted


def expected_calibration_error(confidence: Sequence[float], is_correct: Sequence[bool], *, bins: int = 10) -> float:
    """Mean |accuracy - confidence| over equal-width bins of confidence, weighted by their answers (Naeini et al. 2015).

    Confidence is the probability of the predicted choice, in [0, 1]; a bin holds its upper edge. Few answers raise it:
    see calibrated_error().
    """
    given, right = np.asarray(confidence, dtype=np.float64), np.asarray(is_correct, dtype=np.float64)
    gaps = np.bincount(_bins(given, bins), weights=right - given, minlength=bins)
    return float(np.abs(gaps).sum() / len(given))


def calibrated_error(confidence: Sequence[float], *, bins: int = 10, draws: int = 400, seed: int = 0) -> float:
    """The expected calibration error that a perfectly calibrated model would have on so few answers, by simulation."""
    given, rng = np.asarray(confidence, dtype=np.float64), np.random.default_rng(seed)
    index, errors = _bins(given, bins), []
    for _ in range(draws):
        gaps = np.bincount(index, weights=(rng.random(len(given)) < given) - given, minlength=bins)
        errors.append(float(np.abs(gaps).sum() / len(given)))
    return math.fsum(errors) / draws


def _bins(confidence: Any, bins: int) -> Any:
    return np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)


def brier(probability: Sequence[float], correct: Sequence[int]) -> float:
    """Squared error of one question's choice probabilities, 0 to 2; choices that are all correct count as one."""
    right = math.fsum(probability[c] for c in correct)
    return (1 - right) ** 2 + math.fsum(p * p for c, p in enumerate(probability) if c not in correct)
