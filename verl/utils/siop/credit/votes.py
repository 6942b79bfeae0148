"""Votes that pass from an answer to what those say who knew of it and answered otherwise (``siop_vote=informed``).

The most frequent answer of a question may be the one at which most rollouts stop: the entity on the way. Who searched
on knows of it too and gives another one, while who stopped never heard of that. Counting gives both the same vote.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import numpy as np

# No vote passes for sure: where answers beat each other in a circle, it stays somewhere.
_MOST = 1 - 1e-6


def preferences(known: Sequence[Sequence[Collection[int]]]) -> list[list[int]]:
    """How many rollouts know of two answers and give the one.

    Args:
        known: ``known[c]`` has for each rollout that answers c the answers that it knows of: those that stand in its
            question or in its tool results. One that does not know of its own answer prefers it to none.

    Returns:
        C x C: in row c, column d the rollouts that know of c and d and answer c; 0 on the diagonal.
    """
    answers = range(len(known))
    return [
        [sum(c in places and d in places for places in known[c]) if c != d else 0 for d in answers] for c in answers
    ]


def informed_votes(masses: Sequence[float], preferred: Sequence[Sequence[int]]) -> list[float]:
    """The shares of the votes after they have been passed on.

    n(c, d) rollouts know of both c and d and answer c. The share of such rollouts that would answer d is unknown: with
    a uniform prior it has the posterior Beta(n(d, c) + 1, n(c, d) + 1), and d beats c by

        b(d, c) = max(0, 2·P(share > 1/2) − 1)

    which is 1/2 for one witness, 3/4 for two, 7/8 for three that nobody contradicts, and 0 for as many on either side.
    A vote for c passes with probability max_d b(d, c), to d in proportion to n(d, c)·b(d, c), and so on from there
    until it stays: with P the C x C probabilities of passing, v = (1 − P·1)∘(I − Pᵀ)⁻¹·m.

    Source: this project.

    Args:
        masses: C shares m(c), which add up to 1.
        preferred: C x C numbers n, see :func:`preferences`.

    Returns:
        C shares v(c) above 0, which add up to 1; the masses where nobody knows of two answers.
    """
    answers = range(len(masses))
    passing_CC = np.zeros((len(masses), len(masses)))
    for c in answers:
        beats = [_beats(preferred[d][c], preferred[c][d]) for d in answers]
        weights = np.array([preferred[d][c] * by for d, by in enumerate(beats)])
        if weights.any():
            passing_CC[c] = min(max(beats), _MOST) * weights / weights.sum()
    visits_C = np.linalg.solve(np.eye(len(masses)) - passing_CC.T, np.array(masses))
    return (visits_C * (1 - passing_CC.sum(axis=1))).tolist()


def _beats(wins: int, losses: int) -> float:
    """P(Beta(wins + 1, losses + 1) > 1/2) is that of at most ``wins`` heads in wins + losses + 1 throws of a coin."""
    throws = wins + losses + 1
    return max(0.0, 2 * sum(math.comb(throws, heads) for heads in range(wins + 1)) / 2**throws - 1)
