"""The policy loss ``turn_clip``: one importance ratio per turn and A²TGPO's clipping range by turn (arXiv 2605.06200).

Importing this module registers it with verl (``actor_rollout_ref.actor.policy_loss.loss_mode=turn_clip``).
Suffixes: B rows, L response tokens, T assistant turns (padded).
"""

from __future__ import annotations

from typing import Any

import torch
from verl.trainer.ppo.core_algos import agg_loss, register_policy_loss
from verl.utils.torch_functional import masked_mean

# Of the method's released code.
CLIP_SLOPE = 0.3
# siop_turn_weight with which the advantages were made, as its default; the checks before the start see to it.
TURN_WEIGHT = 0.3


def _turn_of(mask_BL: torch.Tensor) -> torch.Tensor:
    """Index of the turn of each token; outside the mask, that of the turn before (0 before the first)."""
    starts_BL = mask_BL & ~torch.nn.functional.pad(mask_BL[:, :-1], (1, 0))
    return (starts_BL.cumsum(dim=-1) - 1).clamp(min=0)


def _turn_means(values_BL: torch.Tensor, mask_BL: torch.Tensor, turn_BL: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens of each turn, [B, T]."""
    turns = int(turn_BL.max()) + 1
    sums_BT = torch.zeros(len(values_BL), turns, dtype=values_BL.dtype, device=values_BL.device)
    tokens_BT = sums_BT.clone().scatter_add_(1, turn_BL, mask_BL.to(values_BL.dtype))
    sums_BT.scatter_add_(1, turn_BL, values_BL * mask_BL)
    return sums_BT / tokens_BT.clamp(min=1)


def clip_scale(advantages_BL: torch.Tensor, mask_BL: torch.Tensor) -> torch.Tensor:
    """Factor c_t of the clipping range of each token, from advantages of ``siop_baseline=turn_group``.

    c_t = 1 + 0.3·(2·sigmoid(ÎG_t) − 1), in (0.7, 1.3), for a turn before the last; 1 for the last. verl hands a policy
    loss the advantages and no other field of its own choosing, so ÎG_t is read back from them: with
    S_t = sqrt(T − t)·(A_t − A_T) / w, t = 1 … T, ÎG_t = S_t − S_{t+1} (gamma = 1, w = 0.3).

    Args:
        advantages_BL: [B, L], one value per turn.
        mask_BL: [B, L] bool, whole rows: every turn of a rollout.

    Returns:
        [B, L].
    """
    turn_BL = _turn_of(mask_BL)
    advantages_BT = _turn_means(advantages_BL.double(), mask_BL, turn_BL)
    last_B1 = torch.where(mask_BL, turn_BL, 0).amax(dim=1, keepdim=True)
    # Turns that still come before the last, this one among them; 0 from the last on.
    terms_BT = (last_B1 - torch.arange(advantages_BT.shape[1], device=last_B1.device)).clamp(min=0)
    sums_BT = terms_BT.sqrt() * (advantages_BT - advantages_BT.gather(1, last_B1)) / TURN_WEIGHT
    gains_BT = sums_BT - torch.nn.functional.pad(sums_BT[:, 1:], (0, 1))
    scale_BT = torch.where(terms_BT > 0, 1 + CLIP_SLOPE * (2 * torch.sigmoid(gains_BT) - 1), 1.0)
    return scale_BT.gather(1, turn_BL).to(advantages_BL.dtype)


@register_policy_loss("turn_clip")  # type: ignore[arg-type]
def turn_clip_loss(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """PPO's clipped loss with one ratio per turn, rho_t = exp(mean over the turn's tokens of log pi − log pi_old).

    Loss of a token: max(−A·rho, −A·clip(rho, 1 − c_t·clip_ratio_low, 1 + c_t·clip_ratio_high)), c_t of
    :func:`clip_scale`. The gradient of rho reaches the token's own log-prob, as in GSPO's token form. While pi = pi_old
    (one update per batch) nothing is clipped, and the gradient is that of verl's ``vanilla`` loss.

    Args:
        old_log_prob, log_prob, advantages, response_mask: [B, L].
        loss_agg_mode: see verl's ``agg_loss``.
        config: verl's ActorConfig: ``clip_ratio``, ``clip_ratio_low``, ``clip_ratio_high``, ``global_batch_info``.
        rollout_is_weights: [B, L] importance weights of verl's rollout correction, or None.

    Returns:
        The loss and verl's three metrics of a policy loss.
    """
    mask_BL = response_mask.bool()
    low = config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low
    high = config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high
    log_ratio_BL = log_prob - old_log_prob
    turn_BL = _turn_of(mask_BL)
    turn_log_ratio_BL = _turn_means(log_ratio_BL.detach(), mask_BL, turn_BL).gather(1, turn_BL)
    # At most e^10, so that one wild token cannot overflow.
    ratio_BL = torch.exp((log_prob - log_prob.detach() + turn_log_ratio_BL).clamp(max=10.0))
    scale_BL = clip_scale(advantages, mask_BL)
    clipped_BL = torch.minimum(torch.maximum(ratio_BL, 1 - low * scale_BL), 1 + high * scale_BL)
    free_BL, bounded_BL = -advantages * ratio_BL, -advantages * clipped_BL
    losses_BL = torch.maximum(free_BL, bounded_BL)
    if rollout_is_weights is not None:
        losses_BL = losses_BL * rollout_is_weights
    loss = agg_loss(loss_mat=losses_BL, loss_mask=mask_BL, loss_agg_mode=loss_agg_mode, **config.global_batch_info)
    return loss, {
        "actor/pg_clipfrac": masked_mean((bounded_BL > free_BL).float(), mask_BL).item(),
        "actor/ppo_kl": masked_mean(-log_ratio_BL.detach(), mask_BL).item(),
        "actor/pg_clipfrac_lower": 0.0,
    }
