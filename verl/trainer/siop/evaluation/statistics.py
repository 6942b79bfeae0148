"""Intervals over questions and McNemar's test."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95
_CELLS = 2**22  # drawn at a time


def bootstrap(values: Mapping[str, np.ndarray], seed: int = 0) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """95 % percentile intervals of means: of each set, and of the unweighted average over the sets.

    Every one of ``RESAMPLES`` resamples draws, in each set apart, as many questions as it has, with replacement
    (stratified bootstrap, Efron & Tibshirani 1993). An interval depends on the values, the set's name and the seed
    alone, not on the order of the questions or on other sets.

    Args:
        values: set -> [N, M], of each of N questions M metrics. For paired differences B - A, these differences.
        seed: of the draws.

    Returns:
        set -> [2, M] lower and upper ends, and [2, M] of the average. NaN where the values of a metric do not differ:
        resampling them says nothing about others.
    """
    ends, means, varying = {}, [], []
    for name, values_NM in values.items():
        means_RM = _resampled_means(values_NM, np.random.default_rng([seed, *name.encode()]))
        varying_M = (values_NM != values_NM[:1]).any(axis=0)
        ends[name] = _ends(means_RM, varying_M)
        means.append(means_RM)
        varying.append(varying_M)
    if not means:
        return {}, np.full((2, 0), np.nan)
    return ends, _ends(np.mean(means, axis=0), np.any(varying, axis=0))


def _resampled_means(values_NM: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    # How often a resample draws each distinct row is multinomial: the same as drawing questions, with fewer numbers.
    distinct_UM, counts_U = np.unique(values_NM, axis=0, return_counts=True)
    total, step = len(values_NM), max(1, _CELLS // len(distinct_UM))
    return np.concatenate(
        [
            rng.multinomial(total, counts_U / total, size=min(step, RESAMPLES - done)) @ distinct_UM / total
            for done in range(0, RESAMPLES, step)
        ]
    )


def _ends(means_RM: np.ndarray, varying_M: np.ndarray) -> np.ndarray:
    tail = (1 - LEVEL) / 2
    ends_2M = np.quantile(means_RM, [tail, 1 - tail], axis=0, method="inverted_cdf")
    return np.where(varying_M, ends_2M, np.nan)


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p of McNemar's test: min(1, 2·P(X <= min)), X binomial over the discordant pairs with p = 1/2.

    Args:
        only_a: questions that A alone answers rightly.
        only_b: those that B alone does.

    >>> mcnemar(1, 5)
    0.21875
    """
    total, term, tail = only_a + only_b, 1, 0
    for k in range(min(only_a, only_b) + 1):
        tail += term
        term = term * (total - k) // (k + 1)
    return min(1.0, 2 * tail / 2**total)


def finite(value: float) -> float | None:
    """None in the place of NaN, which JSON does not have."""
    return None if math.isnan(value) else float(value)
