"""Statistics of right and wrong answers: intervals, paired tests and calibration. Knows nothing of models or tasks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

Z95 = 1.959964  # the normal distribution's 97.5% point


def wilson(correct: int, total: int) -> tuple[float, float]:
    """Wilson (1927) score interval of a proportion at 95%; counts the answers as independent."""
    n, p = total, correct / total
    centre = (p + Z95 * Z95 / (2 * n)) / (1 + Z95 * Z95 / n)
    half = Z95 / (1 + Z95 * Z95 / n) * math.sqrt(p * (1 - p) / n + Z95 * Z95 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def cluster_bootstrap(
    values: Sequence[float], *factors: Sequence[Hashable], resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean at 95% when values come in clusters.

    Each resample draws, for every factor by itself, as many of its clusters as there are, with replacement; a value
    counts as often as the product of its clusters' draws (Owen 2007, "The pigeonhole bootstrap"; one factor is the
    ordinary cluster bootstrap). A factor with one cluster adds nothing. Where every value is the same the interval is
    a point: read it beside Wilson's.

    Args:
        values: at least one.
        factors: at least one; for each value its cluster.
        resamples: drawn; those that miss every value are left out.
        seed: of the draws.

    Raises:
        ValueError: no values, or a factor of another length.
    """
    if not values or not factors or any(len(factor) != len(values) for factor in factors):
        raise ValueError(
            f"factors: expected clusters for {len(values)} values, at least one, got {[*map(len, factors)]}"
        )
    rng = np.random.default_rng(seed)
    first, *others = map(_numbered, factors)
    # Clusters of the first factor whose values and other clusters are the same are drawn as one kind, which is the same
    # distribution: a hundred thousand questions of one answer each are two kinds.
    contents: dict[int, list[tuple[Any, ...]]] = {}
    for cluster, *content in zip(first, values, *others, strict=True):
        contents.setdefault(cluster, []).append(tuple(content))
    kinds = Counter(tuple(sorted(content)) for content in contents.values())
    share = np.array([*kinds.values()]) / len(contents)
    weight = rng.multinomial(len(contents), share, size=resamples)
    kind_of, value, *crossed = zip(*((k, *cell) for k, kind in enumerate(kinds) for cell in kind), strict=True)
    weight = weight[:, kind_of].astype(np.float64)
    for factor in crossed:
        n = max(factor) + 1
        weight *= rng.multinomial(n, np.full(n, 1 / n), size=resamples)[:, factor]
    totals = weight.sum(1)
    means = (weight @ np.asarray(value, dtype=np.float64))[totals > 0] / totals[totals > 0]
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _numbered(names: Sequence[Hashable]) -> list[int]:
    """The clusters' names as numbers from 0."""
    number = {name: i for i, name in enumerate(dict.fromkeys(names))}
    return [number[name] for name in names]


def sign_flip_test(differences: Sequence[int]) -> float:
    """Exact two-sided p-value of a sum of differences when each sign could as well have been the other.

    A difference is that of two arms' correct answers in one cluster of questions. With single questions for clusters
    this is McNemar's exact test. The distribution is the Fourier transform of its characteristic function, a product of
    cosines, so p-values are exact to 1e-12 or so: O(sum of |differences| * log).
    """
    reach, far = sum(map(abs, differences)), abs(sum(differences))
    angle = 2 * np.pi * np.arange(2 * reach + 1) / (2 * reach + 1)
    characteristic = np.ones(2 * reach + 1)
    for size, number in Counter(map(abs, differences)).items():
        characteristic *= np.cos(size * angle) ** number
    probability = np.fft.fftshift(np.fft.fft(characteristic).real) / (2 * reach + 1)  # [s + reach] of the sum s
    tails = probability[: reach - far + 1].sum() + probability[reach + far :].sum()
    return min(1.0, max(0.0, float(tails)))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p-values, in the order given: a family of tests at once."""
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = least
    return adjusted


def expected_calibration_error(confidence: Sequence[float], is_correct: Sequence[bool], *, bins: int = 10) -> float:
    """Mean |accuracy - confidence| over equal-width bins of confidence, weighted by their answers (Naeini et al. 2015).

    Confidence is the probability of the predicted choice, in [0, 1]; a bin holds its upper edge.
    """
    given, right = np.asarray(confidence, dtype=np.float64), np.asarray(is_correct, dtype=np.float64)
    index = np.clip(np.ceil(given * bins).astype(int) - 1, 0, bins - 1)
    gaps = np.bincount(index, weights=right - given, minlength=bins)
    return float(np.abs(gaps).sum() / len(given))


def brier(probability: Sequence[float], correct: Sequence[int]) -> float:
    """Squared error of one question's choice probabilities, 0 to 2; choices that are all correct count as one."""
    right = math.fsum(probability[c] for c in correct)
    return (1 - right) ** 2 + math.fsum(p * p for c, p in enumerate(probability) if c not in correct)
