"""Between turns and the [B, L] tensors of verl: rewards of turns as a batch, and values of a batch by turn."""

from __future__ import annotations

import numpy as np
import torch
from verl.utils.siop.turn_utils import get_assistant_turn_ranges


def batch_of(
    turn_rewards: list[list[float]], uids: list[str], width: int = 0
) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Rewards, mask and uids of rollouts whose turns are 1, 2, 3, … tokens long, one observation token between them."""
    rows, masks = [], []
    for rewards in turn_rewards:
        row: list[float] = []
        mask: list[int] = []
        for number, reward in enumerate(rewards):
            row += [0.0] * number + [reward, 0.0]
            mask += [1] * (number + 1) + [0]
        rows.append(torch.tensor(row, dtype=torch.float64))
        masks.append(torch.tensor(mask, dtype=torch.int64))
    pad = torch.nn.utils.rnn.pad_sequence
    rewards_BL, mask_BL = pad(rows, batch_first=True), pad(masks, batch_first=True)
    extra = max(width - rewards_BL.shape[1], 0)
    rewards_BL, mask_BL = (torch.nn.functional.pad(x, (0, extra)) for x in (rewards_BL, mask_BL))
    return rewards_BL, mask_BL, np.array(uids, dtype=object)


def by_turn(values_BL: torch.Tensor, mask_BL: torch.Tensor) -> list[list[float]]:
    """The value of each turn; fails unless it is the same on all its tokens and 0 outside the mask."""
    assert torch.equal(values_BL * mask_BL, values_BL)
    found = []
    for values, mask in zip(values_BL, mask_BL, strict=True):
        turns = get_assistant_turn_ranges(mask)
        assert all(len(set(values[start:end].tolist())) == 1 for start, end in turns)
        found.append([values[start].item() for start, _ in turns])
    return found
