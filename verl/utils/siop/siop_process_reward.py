"""Turn rewards without a verifier: rollouts → clusters → target → support → turn rewards.

The public face of the method. Nothing here knows how the scorer answers: any object with the three coroutines of
:class:`SiopScorer` will do. Source: Self-Induced Outcome Potential (arXiv 2605.04984).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from verl.utils.siop.credit.batch import LOG_PROB_TOLERANCE, OBSERVATION_CHARACTERS, CreditBatch
from verl.utils.siop.credit.config import SiopConfig
from verl.utils.siop.credit.methods import gold_reference
from verl.utils.siop.credit.probe import build_reference
from verl.utils.siop.credit.registry import CREDIT_METHODS, register_baseline, register_credit
from verl.utils.siop.credit.rollouts import GroupRewards, Reference, Rollout, SiopScorer, SupportRequest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "LOG_PROB_TOLERANCE",
    "OBSERVATION_CHARACTERS",
    "CreditBatch",
    "GroupRewards",
    "Reference",
    "Rollout",
    "SiopConfig",
    "SiopScorer",
    "SupportRequest",
    "build_reference",
    "compute_group_rewards",
    "register_baseline",
    "register_credit",
]


async def compute_group_rewards(
    rollouts: Sequence[Rollout], tokenizer: PreTrainedTokenizerBase, config: SiopConfig, scorer: SiopScorer
) -> GroupRewards:
    """Turn rewards of a batch of rollouts.

    The rewards of a question depend on its own rollouts alone: a batch may be split by question.

    Args:
        rollouts: rollouts of any number of questions in any order; grouped by uid, list order within a uid.
        tokenizer: the policy's fast tokenizer; the scorer model must share it.
        config: the method and its parameters.
        scorer: answers for all of the batch at once: one call each of ``entailment`` and ``support`` (if needed at
            all), and one ``cluster`` call per question with more than one answer, concurrently.

    Returns:
        One entry per rollout, in the order given. Floats in double precision.

    Raises:
        RolloutError: a malformed rollout, or a missing gold answer where one is needed.
        ScorerError: the scorer returned something that is not valid; nothing is ever filled in.
        ScorerUnavailable: as raised by the scorer.
    """
    method = gold_reference if config.siop_use_gold_ref else CREDIT_METHODS[config.siop_reward_mode]
    return await method(CreditBatch(rollouts, tokenizer, config, scorer))
