"""Intervals and tests against all resamples, and all outcomes, of cases that are small enough to count them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from verl.trainer.siop.evaluation.statistics import LEVEL, bootstrap, finite, mcnemar

# A share of 0.025 counted over 10,000 resamples has a standard error of 0.0016.
TOLERANCE = 0.008
VALUES = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=2, max_size=4)


def column(values: Sequence[float] | np.ndarray) -> np.ndarray:
    return np.array(values, dtype=float)[:, None]


def all_means(sets: Sequence[Sequence[float]]) -> np.ndarray:
    """The average over the sets of every resample, each as likely as every other."""
    by_set = [[np.mean(chosen) for chosen in itertools.product(values, repeat=len(values))] for values in sets]
    return np.array([np.mean(means) for means in itertools.product(*by_set)])


def assert_is_interval_of(ends: np.ndarray, means: np.ndarray) -> None:
    low, high = ends[:, 0]
    tail = (1 - LEVEL) / 2
    assert np.mean(means < low - 1e-9) <= tail + TOLERANCE and np.mean(means <= low + 1e-9) >= tail - TOLERANCE
    assert np.mean(means > high + 1e-9) <= tail + TOLERANCE and np.mean(means >= high - 1e-9) >= tail - TOLERANCE


@settings(max_examples=25)
@given(st.lists(VALUES, min_size=1, max_size=2))
def test_intervals_are_those_of_all_resamples(sets: list[list[float]]) -> None:
    ends, average = bootstrap({str(i): column(values) for i, values in enumerate(sets)})
    for i, values in enumerate(sets):
        if len(set(values)) > 1:
            assert_is_interval_of(ends[str(i)], all_means([values]))
        else:
            assert np.isnan(ends[str(i)]).all()
    if any(len(set(values)) > 1 for values in sets):
        assert_is_interval_of(average, all_means(sets))
    else:
        assert np.isnan(average).all()


def test_an_interval_depends_on_neither_the_order_nor_the_other_sets() -> None:
    values = np.random.default_rng(0).random((60, 2)).round(1)
    alone, _ = bootstrap({"nq": values})
    beside, _ = bootstrap({"hotpotqa": values[:30], "nq": values[::-1]})
    np.testing.assert_array_equal(alone["nq"], beside["nq"])
    again, _ = bootstrap({"nq": values}, seed=1)
    assert not np.array_equal(alone["nq"], again["nq"])
    np.testing.assert_allclose(alone["nq"], again["nq"], atol=0.02)


def test_an_interval_is_as_wide_as_the_standard_error_says() -> None:
    right = np.repeat([1.0, 0.0], [460, 540])
    ends, _ = bootstrap({"nq": column(right)})
    error = math.sqrt(0.46 * 0.54 / 1000)
    np.testing.assert_allclose(ends["nq"][:, 0], [0.46 - 1.96 * error, 0.46 + 1.96 * error], atol=0.002)


def test_a_large_set_is_drawn_in_parts() -> None:
    values = np.random.default_rng(0).random((1000, 3))  # all rows are distinct
    ends, _ = bootstrap({"nq": values})
    error = values.std(axis=0) / math.sqrt(1000)
    np.testing.assert_allclose(ends["nq"], values.mean(axis=0) + np.outer([-1.96, 1.96], error), atol=0.002)


def test_what_does_not_differ_has_no_interval() -> None:
    ends, average = bootstrap({"a": np.array([[1.0, 0.0], [0.0, 0.0]]), "b": np.array([[1.0, 0.5]])})
    assert np.isfinite(ends["a"][:, 0]).all() and np.isnan(ends["a"][:, 1]).all() and np.isnan(ends["b"]).all()
    # The set of one question moves the average, and adds nothing to its width.
    np.testing.assert_allclose(average[:, 0], (ends["a"][:, 0] + 1) / 2)
    assert np.isnan(average[:, 1]).all()
    assert bootstrap({})[0] == {}
    assert finite(math.nan) is None and finite(0.5) == 0.5


@given(st.integers(0, 6), st.integers(0, 6))
def test_mcnemar_counts_the_outcomes_that_are_no_less_uneven(only_a: int, only_b: int) -> None:
    total = only_a + only_b
    uneven = abs(only_a - only_b)
    outcomes = [abs(total - 2 * sum(coins)) >= uneven for coins in itertools.product((0, 1), repeat=total)]
    assert mcnemar(only_a, only_b) == pytest.approx(sum(outcomes) / len(outcomes), abs=1e-12)
    assert mcnemar(only_a, only_b) == mcnemar(only_b, only_a)


def test_mcnemar_of_many_questions() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(10_000, 10_000) == 1.0
    # As the normal distribution has it, with the correction for continuity.
    assert mcnemar(4800, 5200) == pytest.approx(math.erfc((400 - 1) / math.sqrt(10_000) / math.sqrt(2)), rel=1e-2)
