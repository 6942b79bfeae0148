"""Credit for games that VPR is compared with: ``algorithm.siop_import=benchmarks.game_controls``.

- ``siop_reward_mode=outcome``: the success on the last turn, with SIOP's baselines in the place of GRPO's
- ``siop_reward_mode=shuffled``: the scores of a board's turns, dealt out among them anew: nothing can be learnt from it
"""

from __future__ import annotations

import dataclasses
import random

from verl.utils.siop.credit.batch import CreditBatch
from verl.utils.siop.credit.methods import verifiable
from verl.utils.siop.siop_process_reward import GroupRewards, register_credit


@register_credit("outcome", needs_scorer=False)
async def outcome(batch: CreditBatch) -> GroupRewards:
    """r_T = the outcome, r_t = 0 before."""
    scored = [
        dataclasses.replace(item.rollout, turn_scores=[0.0] * (len(item.turns) - 1) + [item.rollout.outcome or 0.0])
        for item in batch.parsed
    ]
    return await verifiable(CreditBatch(scored, batch.tokenizer, batch.config, batch.scorer))


@register_credit("shuffled", needs_scorer=False)
async def shuffled(batch: CreditBatch) -> GroupRewards:
    """:func:`~verl.utils.siop.credit.methods.verifiable` with the scores of each question in another order."""
    result = await verifiable(batch)
    for members in batch.questions:
        values = [value for index in members for value in result.turn_rewards[index]]
        random.Random(repr([batch.parsed[index].rollout.response_ids for index in members])).shuffle(values)
        for index in members:
            count = len(result.turn_rewards[index])
            result.turn_rewards[index], values = values[:count], values[count:]
    return result
