"""The ``siop`` advantage estimator: turn-level advantages from the return-to-go over turns.

Importing this module registers it with verl (``algorithm.adv_estimator=siop``).
Suffixes: B rows, L response tokens, T assistant turns (padded).
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
from verl.utils.siop.baselines import Turns
from verl.utils.siop.config import SiopConfig
from verl.utils.siop.credit import BASELINES
from verl.utils.siop.errors import SiopError


class AdvantageInputError(SiopError, ValueError):
    """The estimator was called without what it needs."""


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

    The reward r_t of a turn is the sum of the token rewards from its first token up to the next turn; the returns are
    those of ``siop_return`` (:meth:`~verl.utils.siop.baselines.Turns.returns`), and ``siop_baseline`` names the
    function of :mod:`verl.utils.siop.baselines` that makes advantages of them. With ``siop_advantage_mode=broadcast``
    or ``siop_enable_two_pass=false``: GRPO's outcome advantage, whatever these two say. Rows whose mask is all zero
    (padding) count nowhere. The result does not depend on the order of the rows, and but for the scale of
    ``leave_one_out``, which is one for the whole batch, not on the other questions of the batch.

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
                advantages_BL[rows], returns_BL[rows] = _turn_level(rewards_BL, mask_BL, index_B, siop, discount, scale)
    return advantages_BL.to(torch.float32), returns_BL.to(torch.float32)


def _turn_level(
    rewards_BL: torch.Tensor, mask_BL: torch.Tensor, index_B: np.ndarray, siop: SiopConfig, gamma: float, scale: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Advantages and returns-to-go on the tokens of each turn, for rows that all have a turn."""
    previous_BL = torch.nn.functional.pad(mask_BL[:, :-1], (1, 0))
    # The turn that a token belongs to or follows; -1 before the first turn.
    turn_BL = (mask_BL & ~previous_BL).cumsum(dim=-1) - 1
    turns_B = turn_BL[:, -1] + 1
    rewards_BT = torch.zeros(len(rewards_BL), int(turns_B.max()), dtype=torch.float64, device=rewards_BL.device)
    at_BL = turn_BL.clamp(min=0)
    rewards_BT.scatter_add_(1, at_BL, torch.where(turn_BL >= 0, rewards_BL, 0.0))

    group_of: dict[Any, int] = {}
    turns = Turns(
        rewards_BT=rewards_BT.cpu().numpy(),
        reached_BT=np.arange(rewards_BT.shape[1])[None, :] < turns_B.cpu().numpy()[:, None],
        group_B=np.array([group_of.setdefault(uid, len(group_of)) for uid in index_B]),
        gamma=gamma,
        scale=scale,
        config=siop,
    )
    advantages_BT = np.asarray(BASELINES[siop.siop_baseline](turns), dtype=np.float64)
    if advantages_BT.shape != turns.rewards_BT.shape or not np.isfinite(advantages_BT).all():
        raise AdvantageInputError(
            f"the baseline {siop.siop_baseline!r} must return finite numbers of shape {turns.rewards_BT.shape}, "
            f"got shape {advantages_BT.shape}"
            + ("" if np.isfinite(advantages_BT).all() else " with numbers that are not finite")
        )

    def on_tokens(values_BT: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values_BT).to(rewards_BL.device).gather(1, at_BL) * mask_BL

    return on_tokens(advantages_BT), on_tokens(turns.returns())
