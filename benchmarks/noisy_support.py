"""SIOP with noise on the support, for trainings that ask whether it matters: ``algorithm.siop_reward_mode=noisy``.

PYTHONPATH=. bash train_siop.sh -- algorithm.siop_import=benchmarks.noisy_support algorithm.siop_reward_mode=noisy
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from verl.utils.siop.credit.batch import CreditBatch
from verl.utils.siop.credit.methods import process
from verl.utils.siop.siop_process_reward import GroupRewards, register_credit

NOISE = 1e-3


class _Noisy(CreditBatch):
    """Support p + N(0, 1e-3), kept in [0, 1]; equal supports of a batch get different noise."""

    async def supports(
        self, references_of: Mapping[int, Sequence[str]], least_turns: int = 2
    ) -> dict[int, list[float]]:
        exact = await super().supports(references_of, least_turns)
        noisy = {}
        for index, values in exact.items():
            seed = hashlib.sha256(repr((index, values)).encode()).digest()[:8]
            drawn = np.random.default_rng(int.from_bytes(seed, "little")).normal(0.0, NOISE, len(values))
            noisy[index] = np.clip(np.add(values, drawn), 0.0, 1.0).tolist()
        return noisy


@register_credit("noisy")
async def noisy(batch: CreditBatch) -> GroupRewards:
    """:func:`~verl.utils.siop.credit.methods.process` with noise on every support."""
    rollouts = [item.rollout for item in batch.parsed]
    return await process(_Noisy(rollouts, batch.tokenizer, batch.config, batch.scorer))
