"""Answers against gold answers: exact match, F1 and the forms in which data sets hold aliases. For labels only."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from verl.utils.siop.nli_clustering import normalize_answer

ALIAS_SEPARATOR = "<|answer_split|>"
_ALIAS_KEYS = ("target", "ground_truth")
_PUNCTUATION_TO_SPACE = str.maketrans(string.punctuation, " " * len(string.punctuation))


def exact_match(answer: str, aliases: Sequence[str]) -> float:
    """1.0 if the normalised answer equals a normalised alias, else 0.0 (SQuAD v1.1). An empty answer scores 0.0."""
    if not answer.strip():
        return 0.0
    normalized = normalize_answer(answer)
    return float(any(normalized == normalize_answer(alias) for alias in aliases))


def _f1(answer: str, alias: str) -> float:
    predicted, gold = normalize_answer(answer).split(), normalize_answer(alias).split()
    if not predicted or not gold:
        return float(predicted == gold)
    common = sum((Counter(predicted) & Counter(gold)).values())
    return 2 * common / (len(predicted) + len(gold))


def f1_score(answer: str, aliases: Sequence[str]) -> float:
    """Best F1 over the aliases, 2·common / (answer tokens + alias tokens), counting repeated tokens (SQuAD v1.1).

    Text that normalises to nothing matches only its like, as in SQuAD v2.0. An empty answer scores 0.0.
    """
    if not answer.strip():
        return 0.0
    return max((_f1(answer, alias) for alias in aliases), default=0.0)


def f1_release(response: str, aliases: Sequence[str]) -> float:
    """F1 as the first release measures it: best over the aliases of 2·|P ∩ G| / (|P| + |G|) over **sets** of tokens.

    Tokens are lower case, ASCII punctuation separates them, articles count; P is of the **first** ``<answer>`` of the
    whole response, tool results included. Without an answer, or if either set is empty, 0.0.

    Args:
        response: a decoded response, not only its answer.
        aliases: the gold answers.

    >>> f1_release("<answer>The U.S.A.</answer>", ["USA", "U.S.A"])
    0.8571428571428571
    """
    answer, closed, _ = response.partition("<answer>")[2].partition("</answer>")
    predicted = _token_set(answer) if closed else set()
    pairs = ((predicted & gold, len(predicted) + len(gold)) for gold in map(_token_set, aliases))
    return max((2 * len(common) / total for common, total in pairs if common), default=0.0)


def _token_set(text: str) -> set[str]:
    return set(text.lower().translate(_PUNCTUATION_TO_SPACE).split())


def parse_aliases(ground_truth: Any) -> list[str]:
    """Gold answers from the forms that data sets use.

    Args:
        ground_truth: a string, with aliases joined by ``<|answer_split|>`` or not; a number (1969.0 is 1969); a list,
            tuple or numpy array of these; a mapping with ``target`` or ``ground_truth``, nested or not, of which the
            first that holds an alias counts; or None or NaN, which are no label.

    Returns:
        The distinct aliases in order, without surrounding white space; empty if there is no label.

    Raises:
        ValueError: a mapping without these keys, or another type.

    >>> parse_aliases({"ground_truth": {"target": ["New York<|answer_split|>NYC"]}})
    ['New York', 'NYC']
    """
    if ground_truth is None:
        return []
    if isinstance(ground_truth, str):
        parts = [part.strip() for part in ground_truth.split(ALIAS_SEPARATOR)]
    elif isinstance(ground_truth, Mapping):
        present = [key for key in _ALIAS_KEYS if key in ground_truth]
        if not present:
            raise ValueError(
                f"a ground truth mapping needs the key {' or '.join(_ALIAS_KEYS)}, got {sorted(map(str, ground_truth))}"
            )
        parts = next(filter(None, (parse_aliases(ground_truth[key]) for key in present)), [])
    elif isinstance(ground_truth, np.ndarray | list | tuple):
        items = np.atleast_1d(np.asarray(ground_truth, dtype=object))
        parts = [part for item in items for part in parse_aliases(item)]
    elif isinstance(ground_truth, float | np.floating):
        whole = int(ground_truth) if ground_truth.is_integer() else ground_truth
        parts = [] if np.isnan(ground_truth) else [str(whole)]
    elif isinstance(ground_truth, int | np.number):
        parts = [str(ground_truth)]
    else:
        raise ValueError(
            "a ground truth is a string, a number, a list of these, a mapping or None, "
            f"got {type(ground_truth).__name__}: {ground_truth!r}"
        )
    return list(dict.fromkeys(part for part in parts if part))
