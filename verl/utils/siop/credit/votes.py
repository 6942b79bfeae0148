"""Votes that pass from an answer to what those say who know of it and answer otherwise (``siop_vote=informed``).

The most frequent answer of a question may be the one at which many rollouts stop: the entity on the way. Most of those
who have read of it search on and say something else, but not all the same. Counting sees that they disagree with each
other, not that they agree in rejecting it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np

# No vote passes for sure: where answers pass theirs in a circle, they stay somewhere.
_MOST = 1 - 1e-6


def informed_votes(known: Sequence[Sequence[Collection[int]]]) -> list[float]:
    """The shares of the votes once they have been passed on.

    Of the rollouts that know of answer c, k(c) give it and n(c) give another one. The share of such rollouts that would
    give another one is unknown; a rollout reads of many answers and gives one, so its prior is Beta(2, 1), and with its
    posterior Beta(n(c) + 2, k(c) + 1) those who know of c reject it by

        b(c) = max(0, 2·P(share > 1/2) − 1)

    which is 3/8 for one against one, 5/8 for two against one, 0 for one against two. A vote for c passes with
    probability b(c) to the answers of those who know of c and of their own answer d, in proportion to their number
    n(d, c), and so on from there until it stays: with P(c, d) = b(c)·n(d, c) / Σ_d n(d, c), v = (1 − P·1)∘(I − Pᵀ)⁻¹·m.

    Source: this project.

    Args:
        known: ``known[c]`` has for each rollout that answers c the answers that it knows of.

    Returns:
        C shares v(c) above 0, which add up to 1; the masses where nobody knows of another answer.
    """
    answers = range(len(known))
    passing_CC = np.zeros((len(known), len(known)))
    for c in answers:
        keep = sum(c in knows for knows in known[c])
        reject = sum(c in knows for d in answers if d != c for knows in known[d])
        to_C = np.array([sum(c in knows and d in knows for knows in known[d]) if d != c else 0 for d in answers])
        if to_C.any():
            passing_CC[c] = certainty(reject + 2, keep + 1) * to_C / to_C.sum()
    return passed_on([len(rollouts) for rollouts in known], passing_CC)


def passed_on(sizes: Sequence[int], passing_CC: np.ndarray) -> list[float]:
    """The shares v = (1 − P·1)∘(I − Pᵀ)⁻¹·m of C answers.

    Args:
        sizes: rollouts that give each answer; m is their share.
        passing_CC: P, with which probability a vote for the row's answer passes to the column's; rows add up to less
            than 1.
    """
    visits_C = np.linalg.solve(np.eye(len(sizes)) - passing_CC.T, np.array(sizes) / max(sum(sizes), 1))
    return (visits_C * (1 - passing_CC.sum(axis=1))).tolist()


def certainty(a: int, b: int) -> float:
    """max(0, 2·P(Beta(a, b) > 1/2) − 1), below 1; that P is the one of fewer than a heads in a + b − 1 throws of a
    coin."""
    throws = a + b - 1
    return min(max(0.0, 2 * sum(math.comb(throws, heads) for heads in range(a)) / 2**throws - 1), _MOST)
