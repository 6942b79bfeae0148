"""Variants of SIOP that are tried by training, as ``algorithm.siop_import=benchmarks.toy_variants``; none is a key.

Other votes, with the default's gains and end (``siop_reward_mode=``):

- ``vote_path``: q(c) ∝ Σ of the query agreement of the cluster's rollouts; ``vote_path_mean``: of its mean over turns;
  ``vote_last_query``: of that of the last turn with a query
- ``vote_judge``: q(c) ∝ Σ over all rollouts with several turns of max(0, p_T(c) − p_0(c)), the support that their
  searches brought to the cluster's first reference, whatever they answered themselves

Where all weights of a question are 0, clusters are counted.

- ``vote_pairwise``: informed votes (``siop_vote=informed``), but answers are compared in pairs by those who know of
  both: n(d, c) of them answer d, n(c, d) answer c, and a vote for c passes on with probability max over d of
  b(d, c) = max(0, 2·P(Beta(n(d, c) + 1, n(c, d) + 1) > 1/2) − 1), to d in proportion to n(d, c)·b(d, c). Who never
  heard of d is not asked, so a single rollout that goes too far outvotes all others.

Aligned credit, for ``siop_boundary=observation``, in which the turn that made a search has what its result brought:

- ``aligned``: r_t = q(c)·gain_t, the last turn + (1 − lambda)·q(c)·(P_T − p_0) with P_T = max p; nothing for support
  that was there before the first search. ``aligned_end2``, ``aligned_end4``: two and four times this end.

An answer makes itself certain, so that a search is worth nothing by itself:

- ``complete``: r_t = q(c)·gain_t, the last turn + q(c)·(1 − P_T) + (1 − lambda)·q(c). A rollout has
  q(c)·(1 − p_0) + (1 − lambda)·q(c) in all, however many turns it takes, one included (``siop_gain=peak``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from verl.utils.siop.credit.batch import Cluster, CreditBatch
from verl.utils.siop.credit.methods import pay_gains, process, query_agreement
from verl.utils.siop.credit.votes import certainty, passed_on
from verl.utils.siop.siop_process_reward import GroupRewards, register_credit


def set_by_weight(questions: Sequence[Sequence[Cluster]], weight_of: Callable[[Cluster], float]) -> None:
    """q(c) ∝ weight of the cluster, or its mass where all weights of the question are 0."""
    for clusters in questions:
        weights = [weight_of(cluster) for cluster in clusters]
        total = math.fsum(weights)
        for cluster, weight in zip(clusters, weights, strict=True):
            cluster.target = weight / total if total > 0 else cluster.mass


async def _by_path(batch: CreditBatch, weigh: Callable[[list[float]], float]) -> GroupRewards:
    questions = await batch.clusters()
    weights: Mapping[int, float] = {
        index: weigh(agreement)
        for members in batch.questions
        for index, agreement in query_agreement(batch, members).items()
    }
    set_by_weight(questions, lambda cluster: math.fsum(weights[index] for index in cluster.members))
    return await pay_gains(batch, questions)


@register_credit("vote_path")
async def vote_path(batch: CreditBatch) -> GroupRewards:
    return await _by_path(batch, math.fsum)


@register_credit("vote_path_mean")
async def vote_path_mean(batch: CreditBatch) -> GroupRewards:
    return await _by_path(batch, lambda agreement: math.fsum(agreement[:-1]) / max(len(agreement) - 1, 1))


@register_credit("vote_last_query")
async def vote_last_query(batch: CreditBatch) -> GroupRewards:
    return await _by_path(batch, lambda agreement: agreement[-2] if len(agreement) > 1 else 0.0)


@register_credit("vote_judge")
async def vote_judge(batch: CreditBatch) -> GroupRewards:
    questions = await batch.clusters()
    brought: dict[int, float] = {}  # by a member of the cluster
    # The first cluster of every question in one call, then the second of each, ...
    for rank in range(max(map(len, questions), default=0)):
        asked = {
            clusters[rank].members[0]: (clusters[rank], members)
            for clusters, members in zip(questions, batch.questions, strict=True)
            if len(clusters) > max(rank, 1)
        }
        support = await batch.supports(
            {index: cluster.references[:1] for cluster, members in asked.values() for index in members}
        )
        for key, (_, members) in asked.items():
            values = [support[index] for index in members if index in support]
            brought[key] = math.fsum(max(0.0, after[-1] - after[0]) for after in values)
    set_by_weight(questions, lambda cluster: brought.get(cluster.members[0], 0.0))
    return await pay_gains(batch, questions)


@register_credit("vote_pairwise")
async def vote_pairwise(batch: CreditBatch) -> GroupRewards:
    questions = await batch.clusters()
    for clusters in questions:
        for cluster, share in zip(clusters, pairwise_votes(batch.known(clusters)), strict=True):
            cluster.mass = share
    await batch.set_targets(questions)
    return await pay_gains(batch, questions)


def pairwise_votes(known: Sequence[Sequence[set[int]]]) -> list[float]:
    """Shares of the votes; ``known`` as for :func:`~verl.utils.siop.credit.votes.informed_votes`."""
    answers = range(len(known))
    wins_CC = np.array(
        [[sum({c, d} <= knows for knows in known[c]) if c != d else 0 for d in answers] for c in answers]
    )
    passing_CC = np.zeros((len(known), len(known)))
    for c in answers:
        beats_C = np.array([certainty(int(wins_CC[d, c]) + 1, int(wins_CC[c, d]) + 1) for d in answers])
        if (weights_C := wins_CC[:, c] * beats_C).any():
            passing_CC[c] = beats_C.max() * weights_C / weights_C.sum()
    return passed_on([len(rollouts) for rollouts in known], passing_CC)


@register_credit("aligned")
async def aligned(batch: CreditBatch) -> GroupRewards:
    return await _aligned(batch, 1.0)


@register_credit("aligned_end2")
async def aligned_end2(batch: CreditBatch) -> GroupRewards:
    return await _aligned(batch, 2.0)


@register_credit("aligned_end4")
async def aligned_end4(batch: CreditBatch) -> GroupRewards:
    return await _aligned(batch, 4.0)


@register_credit("complete")
async def complete(batch: CreditBatch) -> GroupRewards:
    questions = await batch.clusters()
    await batch.set_targets(questions)
    # Of a single turn the two boundaries are the prompt, and there is no gain.
    result = await pay_gains(batch, questions, least_turns=1)
    for rewards, target, support in zip(result.turn_rewards, result.target_mass, result.support, strict=True):
        if rewards:
            rewards[-1] += target * (1 - max(support))
    return result


async def _aligned(batch: CreditBatch, end_weight: float) -> GroupRewards:
    result = await process(batch)
    for rewards, target, support in zip(result.turn_rewards, result.target_mass, result.support, strict=True):
        if rewards:
            found = max(support) - support[0] if support else 0.0
            rewards[-1] += (1 - batch.config.siop_lambda) * target * (end_weight * found - 1)
    return result
