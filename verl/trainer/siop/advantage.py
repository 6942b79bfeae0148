"""The ``siop`` advantage estimator: turn-level advantages from the return-to-go over turns.

Importing this module registers it with verl (``algorithm.adv_estimator=siop``).
Suffixes: B rows, L response tokens, T assistant turns (padded), N the turns that exist, flat.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from verl.trainer.ppo.core_algos import (
    ADV_ESTIMATOR_REGISTRY,
    compute_grpo_outcome_advantage,
    register_adv_est,
)
from verl.utils.reward_score.siop_reward import turn_spans
from verl.utils.siop.credit.baselines import Turns, signal
from verl.utils.siop.credit.config import SiopConfig, finite_number
from verl.utils.siop.credit.registry import BASELINES
from verl.utils.siop.errors import SiopConfigError, SiopError


class AdvantageInputError(SiopError, ValueError):
    """The estimator was called without what it needs."""


class _Spans:
    """Where the N assistant turns of a batch lie, row by row; rows without a turn (padding) are left out of [B, T].

    Args:
        mask_BL: bool, true on the policy's tokens.
    """

    def __init__(self, mask_BL: np.ndarray) -> None:
        self.shape = mask_BL.shape
        # Indices into the flat [B·L] tokens.
        self.rows_N, self.starts_N, ends_N = turn_spans(mask_BL)
        # Tokens before the first turn, of it, up to the second turn, of that, …, after the last turn: [2N + 1].
        edges = np.column_stack((self.starts_N, ends_N)).ravel()
        self.lengths = np.diff(edges, prepend=0, append=mask_BL.size)
        turns_B = np.bincount(self.rows_N, minlength=len(mask_BL))
        turn_N = np.arange(len(self.starts_N)) - (np.cumsum(turns_B) - turns_B)[self.rows_N]
        self.rows = np.flatnonzero(turns_B)  # those with a turn
        # Row and turn in [B, T].
        self.at = (np.cumsum(turns_B > 0) - 1)[self.rows_N], turn_N

    def sums(self, values_BL: np.ndarray) -> np.ndarray:
        """For each turn the sum in double precision from its first token up to the next turn, [N]."""
        flat = np.flatnonzero(values_BL != 0)
        turn = np.searchsorted(self.starts_N, flat, side="right") - 1
        # Not what stands before the first turn of its row.
        inside = (turn >= 0) & (self.rows_N[turn] == flat // self.shape[1])
        weights = values_BL.reshape(-1)[flat[inside]].astype(np.float64)
        return np.bincount(turn[inside], weights=weights, minlength=len(self.starts_N))

    def by_turn(self, values_N: np.ndarray) -> np.ndarray:
        """[B, T] from [N], 0 where a row has no such turn."""
        values_BT = np.zeros((self.at[0][-1] + 1, self.at[1].max() + 1))
        values_BT[self.at] = values_N
        return values_BT

    def flat(self, values_BT: np.ndarray) -> np.ndarray:
        """[N] from [B, T]."""
        return values_BT[self.at]

    def on_tokens(self, values_VN: np.ndarray) -> np.ndarray:
        """V values of each turn on its tokens, 0 elsewhere, [V, B, L] float32."""
        values = np.zeros((len(values_VN), len(self.lengths)), dtype=np.float32)
        values[:, 1::2] = values_VN
        return np.repeat(values, self.lengths, axis=1).reshape(-1, *self.shape)


def _broadcast(
    rewards_BL: torch.Tensor,
    response_mask: torch.Tensor,
    uid_B: np.ndarray,
    rows: np.ndarray,
    scale: bool,
    noise: float,
) -> torch.Tensor:
    """verl's GRPO outcome advantage of the total rewards of ``rows`` (those with a turn), 0 in the others.

    Scaled, it counts as far as the totals of a question differ by more than ``noise`` (:func:`signal`). A question's
    only rollout is compared with nothing, and keeps its total.
    """
    # One running sum per row, and the rows in the order of their totals: the result depends neither on the padded width
    # nor on the order of the rows.
    totals_B1 = rewards_BL.to(torch.float64).cumsum(dim=-1)[:, -1:]
    kept = torch.from_numpy(rows).to(rewards_BL.device)
    order = kept[torch.argsort(totals_B1[kept, 0], stable=True)]
    group = torch.from_numpy(_numbered(uid_B[order.cpu().numpy()])).to(rewards_BL.device)
    sorted_BL, _ = compute_grpo_outcome_advantage(
        token_level_rewards=totals_B1[order],
        response_mask=response_mask[order] != 0,
        index=uid_B[order.cpu().numpy()],
        norm_adv_by_std_in_grpo=scale,
    )
    if scale:
        totals = totals_B1[order, 0]
        counts = torch.stack(
            [
                signal(totals[group == g].std(), noise) if (group == g).sum() > 1 else torch.ones_like(totals[0])
                for g in group.unique()
            ]
        )
        sorted_BL = sorted_BL * counts[group][:, None]
    advantages_BL = torch.zeros_like(rewards_BL, dtype=torch.float32)
    advantages_BL[order] = sorted_BL.to(torch.float32)
    return advantages_BL


def _check_trainer(algorithm: Mapping[Any, Any] | None) -> None:
    """Refuse rewards of another trainer: where ours writes turn rewards, it leaves exact match with the gold answer.

    A trainer hands over the ``algorithm`` section of its whole configuration, which says what trainer it is. Whoever
    calls the estimator from Python with a section of its own, a dict or nothing brings his own rewards.
    """
    root = algorithm._get_root() if isinstance(algorithm, DictConfig) else None
    if root is None or root is algorithm or OmegaConf.select(root, "trainer") is None:
        return
    mode, v1 = OmegaConf.select(root, "trainer.v1.trainer_mode"), OmegaConf.select(root, "trainer.use_v1")
    if mode != "siop" or not v1:
        found = f"trainer.v1.trainer_mode={mode}" if v1 else f"trainer.use_v1={str(v1).lower()}"
        raise SiopConfigError(
            f"algorithm.adv_estimator=siop is not allowed with {found}: that trainer writes no turn rewards, so that "
            "the update would follow exact match with the gold answers. Train with python -m verl.trainer.siop.main "
            "(train_siop.sh), or choose another adv_estimator"
        )


def _checked(gamma: Any, scale: Any) -> tuple[float, bool]:
    discount = finite_number(gamma)
    if discount is None or discount < 0:
        raise SiopConfigError(f"gamma={gamma!r} is not allowed; choose a number from 0")
    if scale not in (True, False):
        raise SiopConfigError(f"norm_adv_by_std_in_grpo={scale!r} is not allowed; choose true or false")
    return discount, bool(scale)


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
    those of ``siop_return`` (:meth:`~verl.utils.siop.credit.baselines.Turns.returns`), and ``siop_baseline`` names the
    function of :mod:`verl.utils.siop.credit.baselines` that makes advantages of them. With
    ``siop_advantage_mode=broadcast`` or ``siop_enable_two_pass=false``: GRPO's outcome advantage, whatever these two
    say. Rows whose mask is all zero (padding) count nowhere. The result does not depend on the order of the rows, and
    but for the scale of ``leave_one_out``, which is one for the whole batch, not on the other questions of the batch.

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
        AdvantageInputError: no uids, shapes that do not match, rewards that are not finite, or a mask of other numbers
            than 0 and 1.
        SiopConfigError: a wrong ``siop_*`` key or value, a wrong ``gamma`` or ``norm_adv_by_std_in_grpo``, or a trainer
            that writes no turn rewards.
    """
    _check_trainer(config)
    if index is None:
        raise AdvantageInputError("the siop estimator compares the rollouts of a question: it needs their uids (index)")
    if token_level_rewards.shape != response_mask.shape or len(index) != len(response_mask):
        raise AdvantageInputError(
            f"shapes do not match: token_level_rewards {tuple(token_level_rewards.shape)}, "
            f"response_mask {tuple(response_mask.shape)}, index {len(index)}"
        )
    siop = SiopConfig.from_algorithm(config)
    options = config if config is not None else {}
    discount, scale = _checked(
        gamma if gamma is not None else options.get("gamma", 1.0),
        norm_adv_by_std_in_grpo
        if norm_adv_by_std_in_grpo is not None
        else options.get("norm_adv_by_std_in_grpo", True),
    )

    if not ((response_mask == 0) | (response_mask == 1)).all():
        raise AdvantageInputError("response_mask holds numbers other than 0 and 1")
    spans = _Spans((response_mask != 0).cpu().numpy())
    if not len(spans.starts_N):
        zeros_BL = torch.zeros_like(token_level_rewards, dtype=torch.float32)
        return zeros_BL, zeros_BL.clone()
    if token_level_rewards.dtype == torch.bfloat16:  # which numpy has not
        token_level_rewards = token_level_rewards.float()
    rewards_BL = token_level_rewards.cpu().numpy()
    broken = spans.rows[~np.isfinite(rewards_BL).all(axis=1)[spans.rows]]
    if len(broken):
        raise AdvantageInputError(f"token_level_rewards holds numbers that are not finite in row {broken[0]}")
    uid_B = np.asarray(index, dtype=object)
    with torch.no_grad():
        if siop.outcome_advantage:
            advantages_BL = _broadcast(token_level_rewards, response_mask, uid_B, spans.rows, scale, siop.reward_noise)
            return advantages_BL, advantages_BL.clone()
        turns = Turns(
            rewards_BT=spans.by_turn(spans.sums(rewards_BL)),
            reached_BT=spans.by_turn(np.ones(len(spans.starts_N))) > 0,
            group_B=_numbered(uid_B[spans.rows]),
            gamma=discount,
            scale=scale,
            config=siop,
        )
        values_VN = np.stack([spans.flat(values_BT) for values_BT in (_advantages(turns), turns.returns())])
        advantages_BL, returns_BL = torch.from_numpy(spans.on_tokens(values_VN)).to(token_level_rewards.device)
        return advantages_BL, returns_BL


def _numbered(uids: np.ndarray) -> np.ndarray:
    number_of: dict[Any, int] = {}
    return np.array([number_of.setdefault(uid, len(number_of)) for uid in uids])


def _advantages(turns: Turns) -> np.ndarray:
    """What the baseline makes of the turns, [B, T] in double precision, checked."""
    advantages_BT = np.asarray(BASELINES[turns.config.siop_baseline](turns), dtype=np.float64)
    expected = turns.rewards_BT.shape
    if advantages_BT.shape != expected or not np.isfinite(advantages_BT).all():
        found = f"shape {advantages_BT.shape}" if advantages_BT.shape != expected else "numbers that are not finite"
        raise AdvantageInputError(
            f"the baseline {turns.config.siop_baseline!r} must return finite numbers of shape {expected}, got {found}"
        )
    return advantages_BT
