"""The ``siop`` advantage estimator: turn-level advantages from the return-to-go over turns.

Importing this module registers it with verl (``algorithm.adv_estimator=siop``).
Suffixes: B rows, L response tokens, T assistant turns (padded), N the turns that exist, flat.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from verl.trainer.ppo.core_algos import (
    ADV_ESTIMATOR_REGISTRY,
    compute_grpo_outcome_advantage,
    register_adv_est,
)
from verl.utils.siop.errors import SiopError
from verl.utils.siop.siop_process_reward import SiopConfig

_STD_FLOOR = 1e-6


class AdvantageInputError(SiopError, ValueError):
    """The estimator was called without what it needs."""


def _sum_by(group_N: np.ndarray, values_N: np.ndarray, groups: int) -> np.ndarray:
    """Sum of the values of each group, the same bit for bit in whatever order they come."""
    order = np.lexsort((values_N, group_N))
    return np.bincount(group_N[order], weights=values_N[order], minlength=groups)


def _min_by(group_N: np.ndarray, values_N: np.ndarray, groups: int) -> np.ndarray:
    lowest = np.full(groups, np.inf)
    np.minimum.at(lowest, group_N, values_N)
    return lowest


def _minus_group_mean(values_N: np.ndarray, group_N: np.ndarray, groups: int) -> np.ndarray:
    """Values minus their group's mean, exactly 0 where all values of a group are equal."""
    shifted_N = values_N - _min_by(group_N, values_N, groups)[group_N]
    mean = _sum_by(group_N, shifted_N, groups) / np.maximum(np.bincount(group_N, minlength=groups), 1)
    return shifted_N - mean[group_N]


def _minus_sibling_mean(values_N: np.ndarray, group_N: np.ndarray, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Values minus the mean of the others in their group, and whether there are others (0 where not).

    Exactly 0 where all values of a group are equal.
    """
    shifted_N = values_N - _min_by(group_N, values_N, groups)[group_N]
    others_N = np.bincount(group_N, minlength=groups)[group_N] - 1
    sibling_sum_N = _sum_by(group_N, shifted_N, groups)[group_N] - shifted_N
    return np.where(others_N > 0, shifted_N - sibling_sum_N / np.maximum(others_N, 1), 0.0), others_N > 0


def _return_to_go(rewards_BT: np.ndarray, gamma: float) -> np.ndarray:
    """G_t = r_t + gamma·G_{t+1} over turns; turns that a row does not reach have reward 0."""
    returns_BT = rewards_BT.copy()
    for turn in range(rewards_BT.shape[1] - 2, -1, -1):
        returns_BT[:, turn] += gamma * returns_BT[:, turn + 1]
    return returns_BT


def _pooled(
    rewards_BT: np.ndarray, reached_BT: np.ndarray, group_B: np.ndarray, gamma: float, scale: bool
) -> np.ndarray:
    """Return-to-go of rewards that are normalised over all (rollout, turn) of a question.

    (r − mean) / (std + 1e-6) with the sample standard deviation, 1 in place of one below 1e-6. A question with a single
    reward stays at 0. This baseline depends on when a rollout stops, so the gradient is biased.
    """
    rows_N, turns_N = np.nonzero(reached_BT)
    group_N = group_B[rows_N]
    groups = int(group_B.max()) + 1
    centred_N = _minus_group_mean(rewards_BT[rows_N, turns_N], group_N, groups)
    if scale:
        freedom = np.maximum(np.bincount(group_N, minlength=groups) - 1, 1)
        std = np.sqrt(_sum_by(group_N, centred_N**2, groups) / freedom)
        centred_N = centred_N / (np.where(std < _STD_FLOOR, 1.0, std) + _STD_FLOOR)[group_N]
    normalised_BT = np.zeros_like(rewards_BT)
    normalised_BT[rows_N, turns_N] = centred_N
    return _return_to_go(normalised_BT, gamma)


def _leave_one_out(returns_BT: np.ndarray, reached_BT: np.ndarray, group_B: np.ndarray, scale: bool) -> np.ndarray:
    """A_{i,t} = G_{i,t} − mean of G_{j,t} over the siblings j ≠ i that reach turn t; unbiased.

    If no sibling reaches turn t: minus the siblings' mean full return G_{j,1}. Without siblings: 0. The scale is one
    sample standard deviation (+ 1e-6) over the turn advantages of the whole batch.
    """
    rows_N, turns_N = np.nonzero(reached_BT)
    groups, turns = int(group_B.max()) + 1, reached_BT.shape[1]
    values_N = returns_BT[rows_N, turns_N]
    advantages_N, found_N = _minus_sibling_mean(values_N, group_B[rows_N] * turns + turns_N, groups * turns)
    # G_{i,t} − mean_j G_{j,1} = (G_{i,1} − mean_j G_{j,1}) + (G_{i,t} − G_{i,1})
    full_B, siblings_B = _minus_sibling_mean(returns_BT[:, 0], group_B, groups)
    alone_N = full_B[rows_N] + (values_N - returns_BT[rows_N, 0])
    advantages_N = np.where(found_N, advantages_N, np.where(siblings_B[rows_N], alone_N, 0.0))
    if scale and len(advantages_N) > 1:
        # Sorted: the same scale in whatever order the rows come.
        advantages_N = advantages_N / (np.sort(advantages_N).std(ddof=1) + _STD_FLOOR)
    advantages_BT = np.zeros_like(returns_BT)
    advantages_BT[rows_N, turns_N] = advantages_N
    return advantages_BT


def _broadcast(rewards_BL: torch.Tensor, mask_BL: torch.Tensor, index_B: np.ndarray, scale: bool) -> torch.Tensor:
    """verl's GRPO outcome advantage of the rows' total rewards."""
    # One running sum per row, and the rows in the order of their totals: the result depends neither on the padded width
    # nor on the order of the rows.
    totals_B1 = rewards_BL.cumsum(dim=-1)[:, -1:]
    order = torch.argsort(totals_B1[:, 0], stable=True)
    sorted_BL, _ = compute_grpo_outcome_advantage(
        token_level_rewards=totals_B1[order],
        response_mask=mask_BL[order],
        index=index_B[order.cpu().numpy()],
        norm_adv_by_std_in_grpo=scale,
    )
    advantages_BL = torch.empty_like(sorted_BL)
    advantages_BL[order] = sorted_BL
    return advantages_BL


# verl refuses a second function under the same name, also when this very module is loaded again.
if getattr(ADV_ESTIMATOR_REGISTRY.get("siop"), "__module__", None) == __name__:
    del ADV_ESTIMATOR_REGISTRY["siop"]


@register_adv_est("siop")
def compute_siop_advantage(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    index: np.ndarray | None = None,
    config: Mapping[Any, Any] | None = None,
    gamma: float | None = None,
    norm_adv_by_std_in_grpo: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn-level advantage, broadcast to the tokens of each turn.

    G_t = r_t + gamma·G_{t+1}, r_t being the sum of the token rewards from the first token of turn t up to the next
    turn; minus the baseline ``siop_baseline`` (:func:`_leave_one_out`, :func:`_pooled`). With
    ``siop_advantage_mode=broadcast`` or ``siop_enable_two_pass=false``: GRPO's outcome advantage. Rows whose mask is
    all zero (padding) count nowhere. The result does not depend on the order of the rows.

    Args:
        token_level_rewards: [B, L].
        response_mask: [B, L], 1 on the policy's tokens; a turn is a maximal run of 1.
        index: B uids; rows with the same uid are rollouts of one question.
        config: verl's ``algorithm`` section (DictConfig, dict, AlgoConfig): the ``siop_*`` keys, ``gamma`` (1.0) and
            ``norm_adv_by_std_in_grpo`` (True).
        gamma, norm_adv_by_std_in_grpo: win over ``config`` if given.
        **kwargs: what verl passes to every estimator; not used.

    Returns:
        Advantages and returns-to-go, [B, L] float32, 0 outside the mask. Computed in double precision.

    Raises:
        AdvantageInputError: no uids, or shapes that do not match.
        SiopConfigError: a wrong ``siop_*`` key or value.
    """
    if index is None:
        raise AdvantageInputError("the siop estimator compares the rollouts of a question: it needs their uids (index)")
    if token_level_rewards.shape != response_mask.shape or len(index) != len(response_mask):
        raise AdvantageInputError(
            f"shapes do not match: token_level_rewards {tuple(token_level_rewards.shape)}, "
            f"response_mask {tuple(response_mask.shape)}, index {len(index)}"
        )
    siop = SiopConfig.from_algorithm(config)
    options = config if config is not None else {}
    discount = float(gamma if gamma is not None else options.get("gamma", 1.0))
    scale = bool(
        norm_adv_by_std_in_grpo if norm_adv_by_std_in_grpo is not None else options.get("norm_adv_by_std_in_grpo", True)
    )

    advantages_BL = torch.zeros_like(token_level_rewards, dtype=torch.float64)
    returns_BL = torch.zeros_like(advantages_BL)
    rows = (response_mask != 0).any(dim=-1).nonzero()[:, 0]
    if len(rows):
        with torch.no_grad():
            mask_BL = response_mask[rows] != 0
            rewards_BL = token_level_rewards[rows].to(torch.float64)
            index_B = np.asarray(index, dtype=object)[rows.cpu().numpy()]
            if siop.siop_advantage_mode == "broadcast" or not siop.siop_enable_two_pass:
                advantages_BL[rows] = returns_BL[rows] = _broadcast(rewards_BL, mask_BL, index_B, scale)
            else:
                advantages_BL[rows], returns_BL[rows] = _turn_level(
                    rewards_BL, mask_BL, index_B, siop.siop_baseline, discount, scale
                )
    return advantages_BL.to(torch.float32), returns_BL.to(torch.float32)


def _turn_level(
    rewards_BL: torch.Tensor, mask_BL: torch.Tensor, index_B: np.ndarray, baseline: str, gamma: float, scale: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns-to-go on the tokens of each turn, for rows that all have a turn."""
    previous_BL = torch.nn.functional.pad(mask_BL[:, :-1], (1, 0))
    # The turn that a token belongs to or follows; -1 before the first turn.
    turn_BL = (mask_BL & ~previous_BL).cumsum(dim=-1) - 1
    turns_B = turn_BL[:, -1] + 1
    rewards_BT = torch.zeros(len(rewards_BL), int(turns_B.max()), dtype=torch.float64, device=rewards_BL.device)
    at_BL = turn_BL.clamp(min=0)
    rewards_BT.scatter_add_(1, at_BL, torch.where(turn_BL >= 0, rewards_BL, 0.0))

    rewards = rewards_BT.cpu().numpy()
    reached_BT = np.arange(rewards.shape[1])[None, :] < turns_B.cpu().numpy()[:, None]
    group_of: dict[Any, int] = {}
    group_B = np.array([group_of.setdefault(uid, len(group_of)) for uid in index_B])
    returns_BT = _return_to_go(rewards, gamma)
    if baseline == "pooled":
        advantages_BT = _pooled(rewards, reached_BT, group_B, gamma, scale)
    else:
        advantages_BT = _leave_one_out(returns_BT, reached_BT, group_B, scale)

    def on_tokens(values_BT: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values_BT).to(rewards_BL.device).gather(1, at_BL) * mask_BL

    return on_tokens(advantages_BT), on_tokens(returns_BT)
