"""From turn rewards to turn advantages: the functions behind ``siop_baseline``.

Every function is the same bit for bit in whatever order the rows come. ``docs/credit_assignment.md`` compares them.
Suffixes: B rows, T turns (padded), N the turns that exist, flat.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from verl.utils.siop.credit.registry import register_baseline

if TYPE_CHECKING:
    from verl.utils.siop.credit.config import SiopConfig

STD_FLOOR = 1e-6
# TRACE's K, and its weight of the outcome at the end of the gains.
TRACE_HORIZON, TRACE_FILL = 3, 2.0
# Rewards that differ by the scorer's noise alone: their returns have a standard deviation of up to three times it, with
# eight rollouts sometimes five times.
NOISE_STDS = 5.0


def signal(std: Any, noise: float) -> Any:
    """How much of a spread counts as signal: 0 up to five times the scorer's noise, 1 from ten times on.

    Without it a division by the standard deviation makes an update of full size from noise, where all rollouts agree.

    Args:
        std: standard deviations, an array or a tensor.
        noise: that of the scorer in a turn reward (:attr:`SiopConfig.reward_noise`).
    """
    return (std / (NOISE_STDS * noise) - 1.0).clip(0.0, 1.0) if noise > 0 else (std * 0.0 + 1.0)


@dataclass(frozen=True)
class Turns:
    """The turns of a batch.

    Args:
        rewards_BT: turn rewards, 0 where a row has no such turn.
        reached_BT: whether the row has this turn; every row has one or more.
        group_B: the row's question, as a number from 0.
        gamma: discount from turn to turn.
        scale: divide by a standard deviation (``norm_adv_by_std_in_grpo``).
        config: the ``siop_*`` keys.
    """

    rewards_BT: np.ndarray
    reached_BT: np.ndarray
    group_B: np.ndarray
    gamma: float
    scale: bool
    config: SiopConfig

    @property
    def noise(self) -> float:
        """The scorer's noise in a turn reward."""
        return self.config.reward_noise

    @property
    def outcome_noise(self) -> float:
        """That in the reward of a last turn, which is F1 with a gold reference, and exact."""
        return 0.0 if self.config.siop_use_gold_ref else self.noise

    @property
    def at(self) -> tuple[np.ndarray, np.ndarray]:
        """Row and turn of the N turns that exist."""
        rows_N, turns_N = np.nonzero(self.reached_BT)
        return rows_N, turns_N

    @property
    def group_and_turn_BT(self) -> np.ndarray:
        """One number for each question and turn index, the same for the rollouts of the question."""
        return self.group_B[:, None] * self.reached_BT.shape[1] + np.arange(self.reached_BT.shape[1])

    @property
    def last_BT(self) -> np.ndarray:
        """Whether this is the row's last turn."""
        return self.reached_BT & ~np.pad(self.reached_BT[:, 1:], ((0, 0), (0, 1)))

    def returns(self, rewards_BT: np.ndarray | None = None) -> np.ndarray:
        """What a turn is worth by the rewards from it on (those of the batch, or others), 0 where there is no turn.

        ``siop_return=sum``: the return-to-go G_t = r_t + gamma·G_{t+1}. ``siop_return=min``: V_t = min_{s≥t} r_s,
        without discount; PURE (arXiv 2504.15275), whose code approximates it by weights softmin(r_s / 0.1).
        """
        values_BT = np.array(self.rewards_BT if rewards_BT is None else rewards_BT)
        if self.config.siop_return == "min":
            values_BT[~self.reached_BT] = np.inf
            values_BT = np.minimum.accumulate(values_BT[:, ::-1], axis=1)[:, ::-1]
            return np.where(self.reached_BT, values_BT, 0.0)
        for turn in range(values_BT.shape[1] - 2, -1, -1):
            values_BT[:, turn] += self.gamma * values_BT[:, turn + 1]
        return values_BT

    def spread(self, values_N: np.ndarray) -> np.ndarray:
        """[B, T] from one value for each of the N turns that exist, 0 elsewhere."""
        values_BT = np.zeros_like(self.rewards_BT)
        values_BT[self.at] = values_N
        return values_BT


def _sum_by(group_N: np.ndarray, values_N: np.ndarray, groups: int) -> np.ndarray:
    """Sum of the values of each group, the same bit for bit in whatever order they come."""
    order = np.lexsort((values_N, group_N))
    return np.bincount(group_N[order], weights=values_N[order], minlength=groups)


def _minus_lowest(values_N: np.ndarray, group_N: np.ndarray, groups: int) -> np.ndarray:
    """Values minus the lowest of their group, so that differences of equal values are exactly 0."""
    lowest = np.full(groups, np.inf)
    np.minimum.at(lowest, group_N, values_N)
    return values_N - lowest[group_N]


def _centred(values_N: np.ndarray, group_N: np.ndarray, groups: int) -> np.ndarray:
    """Values minus their group's mean, exactly 0 where all values of a group are equal."""
    shifted_N = _minus_lowest(values_N, group_N, groups)
    mean = _sum_by(group_N, shifted_N, groups) / np.maximum(np.bincount(group_N, minlength=groups), 1)
    return shifted_N - mean[group_N]


def _variance(centred_N: np.ndarray, group_N: np.ndarray, groups: int, lost: int) -> np.ndarray:
    """Variance of each group; ``lost`` degrees of freedom (1: sample, 0: population)."""
    freedom = np.maximum(np.bincount(group_N, minlength=groups) - lost, 1)
    return _sum_by(group_N, centred_N**2, groups) / freedom


def _sample_normalised(values_N: np.ndarray, group_N: np.ndarray, scale: bool, noise: float = 0.0) -> np.ndarray:
    """(x − mean) / (std + 1e-6) within each group, sample standard deviation, 1 in place of one below 1e-6.

    Times :func:`signal`, if there is noise.
    """
    groups = int(group_N.max()) + 1
    centred_N = _centred(values_N, group_N, groups)
    if not scale:
        return centred_N
    std = np.sqrt(_variance(centred_N, group_N, groups, lost=1))
    return centred_N / (np.where(std < STD_FLOOR, 1.0, std) + STD_FLOOR)[group_N] * signal(std, noise)[group_N]


def _minus_sibling_mean(values_N: np.ndarray, group_N: np.ndarray, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Values minus the mean of the others in their group, and whether there are others (0 where not).

    Exactly 0 where all values of a group are equal.
    """
    shifted_N = _minus_lowest(values_N, group_N, groups)
    others_N = np.bincount(group_N, minlength=groups)[group_N] - 1
    sibling_sum_N = _sum_by(group_N, shifted_N, groups)[group_N] - shifted_N
    return np.where(others_N > 0, shifted_N - sibling_sum_N / np.maximum(others_N, 1), 0.0), others_N > 0


@register_baseline("leave_one_out")
def leave_one_out(turns: Turns) -> np.ndarray:
    """A_{i,t} = G_{i,t} − mean of G_{j,t} over the siblings j ≠ i that reach turn t; unbiased.

    If no sibling reaches turn t: minus the siblings' mean full return G_{j,1}. Without siblings: 0. The scale is one
    sample standard deviation (+ 1e-6) over the turn advantages of the whole batch, times :func:`signal` of it.
    """
    rows_N, turns_N = turns.at
    returns_BT = turns.returns()
    groups = int(turns.group_B.max()) + 1
    values_N = returns_BT[rows_N, turns_N]
    key_N = turns.group_and_turn_BT[rows_N, turns_N]
    advantages_N, found_N = _minus_sibling_mean(values_N, key_N, groups * returns_BT.shape[1])
    # G_{i,t} − mean_j G_{j,1} = (G_{i,1} − mean_j G_{j,1}) + (G_{i,t} − G_{i,1})
    full_B, siblings_B = _minus_sibling_mean(returns_BT[:, 0], turns.group_B, groups)
    alone_N = full_B[rows_N] + (values_N - returns_BT[rows_N, 0])
    advantages_N = np.where(found_N, advantages_N, np.where(siblings_B[rows_N], alone_N, 0.0))
    if turns.scale and len(advantages_N) > 1:
        # Sorted: the same scale in whatever order the rows come.
        std = np.sort(advantages_N).std(ddof=1)
        advantages_N = advantages_N / (std + STD_FLOOR) * signal(std, turns.noise)
    return turns.spread(advantages_N)


@register_baseline("pooled")
def pooled(turns: Turns) -> np.ndarray:
    """Return-to-go of rewards that are normalised over all (rollout, turn) of a question.

    (r − mean) / (std + 1e-6) with the sample standard deviation, 1 in place of one below 1e-6. A question with a single
    reward stays at 0. This baseline depends on when a rollout stops, so the gradient is biased (verl issue 7244).
    Source: SIOP's first release; GRPO with process supervision (arXiv 2402.03300, section 4.1.3).
    """
    rows_N, turns_N = turns.at
    normalised_N = _sample_normalised(turns.rewards_BT[rows_N, turns_N], turns.group_B[rows_N], turns.scale)
    return turns.returns(turns.spread(normalised_N))


@register_baseline("turn_index")
def turn_index(turns: Turns) -> np.ndarray:
    """Return-to-go, normalised over the question's rollouts at the same turn index.

    A_{i,t} = (G_{i,t} − mean_j G_{j,t}) / (std_j G_{j,t} + 1e-6) over the rollouts j (i among them) that reach turn t;
    sample standard deviation, 1 in place of one below 1e-6, times :func:`signal` of it; 0 for a turn that no other
    rollout reaches. Nothing is summed after the mean is subtracted, so unlike ``pooled`` no baseline depends on when a
    rollout stops; but turns that few rollouts reach are shrunk (n rollouts: by (n − 1)/n) and each turn index has a
    scale of its own.

    Source: the turn-level advantage of MatchTIR (arXiv 2601.10712). Its code, not this, leaves the return of a turn
    that one rollout alone reaches as it is, and averages the result with GRPO's outcome advantage.
    """
    rows_N, turns_N = turns.at
    key_N = turns.group_and_turn_BT[rows_N, turns_N]
    return turns.spread(_sample_normalised(turns.returns()[rows_N, turns_N], key_N, turns.scale, turns.noise))


@register_baseline("turn_group")
def turn_group(turns: Turns) -> np.ndarray:
    """A²TGPO: A_t = w·D_t + Ô before the last turn, Ô on the last turn (arXiv 2605.06200).

    ÎG_t: the reward of a turn before the last, normalised over the question's rollouts that have such a turn t.
    D_t = Σ_{j≥t} gamma^{j−t}·ÎG_j / sqrt(number of terms), j over the turns before the last. Ô: the reward of the last
    turn (here: all of it), normalised over the question's rollouts. w is ``siop_turn_weight``. Normalised is
    (x − mean) / (sqrt(variance + 1e-8) + 1e-6), population variance, times :func:`signal`; 0 for a value without
    another to compare with.

    The released code agrees with this form (its alpha is w, 0.3 in its recipe), except that it takes a turn whose
    reward is exactly 0 for no turn. The method's clipping range by turn is the policy loss ``turn_clip``.
    """
    last_BT = turns.last_BT
    before_last_BT = turns.reached_BT & ~last_BT
    gain_BT = np.zeros_like(turns.rewards_BT)
    if before_last_BT.any():
        key_N = turns.group_and_turn_BT[before_last_BT]
        gain_BT[before_last_BT] = _population_normalised(
            turns.rewards_BT[before_last_BT], key_N, turns.scale, turns.noise
        )
    outcome_B = _population_normalised(turns.rewards_BT[last_BT], turns.group_B, turns.scale, turns.outcome_noise)
    sum_BT = gain_BT
    for turn in range(gain_BT.shape[1] - 2, -1, -1):
        sum_BT[:, turn] += turns.gamma * sum_BT[:, turn + 1]
    terms_BT = before_last_BT[:, ::-1].cumsum(axis=1)[:, ::-1]
    weighted_BT = turns.config.siop_turn_weight * sum_BT / np.sqrt(np.maximum(terms_BT, 1))
    return np.where(turns.reached_BT, weighted_BT + outcome_B[:, None], 0.0)


@register_baseline("trace")
def trace(turns: Turns) -> np.ndarray:
    """TRACE: Ô + w·(D_t + F_t) before the last turn, Ô on the last turn (arXiv 2607.13988, algorithm 1).

    Ô: the reward of the last turn, normalised over the question's rollouts as in ``turn_group``. D_t, the mean of the
    next K = 3 gains δ before the last turn, weighted by gamma^j: Σ_j gamma^j·δ_{t+j} / Σ_j gamma^j, as far as there are
    any. F_t = 2·gamma^{T−t}·Ô where these reach turn T − 1, else 0. w is ``siop_turn_weight``; the paper has w = .2 and
    gamma = .8. Not scaled any further.
    """
    last_BT = turns.last_BT
    outcome_B = _population_normalised(turns.rewards_BT[last_BT], turns.group_B, turns.scale, turns.outcome_noise)
    outcome_B1 = outcome_B[:, None]
    left_BT = np.where(turns.reached_BT, turns.reached_BT.sum(axis=1)[:, None] - 1 - np.arange(last_BT.shape[1]), 0)
    gain_BT = np.where(left_BT > 0, turns.rewards_BT, 0.0)
    sum_BT, weight_BT = np.zeros_like(gain_BT), np.zeros_like(gain_BT)
    for step in range(TRACE_HORIZON):
        sum_BT += turns.gamma**step * np.pad(gain_BT, ((0, 0), (0, step)))[:, step:]
        weight_BT += turns.gamma**step * (left_BT > step)
    fill_BT = np.where(left_BT <= TRACE_HORIZON, TRACE_FILL * turns.gamma**left_BT * outcome_B1, 0.0)
    credit_BT = np.where(left_BT > 0, sum_BT / np.maximum(weight_BT, 1.0) + fill_BT, 0.0)
    return np.where(turns.reached_BT, outcome_B1 + turns.config.siop_turn_weight * credit_BT, 0.0)


def _population_normalised(values_N: np.ndarray, group_N: np.ndarray, scale: bool, noise: float) -> np.ndarray:
    groups = int(group_N.max()) + 1
    centred_N = _centred(values_N, group_N, groups)
    if not scale:
        return centred_N
    variance = _variance(centred_N, group_N, groups, lost=0)
    normalised_N = centred_N / (np.sqrt(variance + 1e-8) + STD_FLOOR)[group_N]
    return normalised_N * signal(np.sqrt(variance), noise)[group_N]
