"""The built-in credit methods (``siop_reward_mode``): SIOP, TTRL, EMPO, query consensus; IGPO, with labels; and VPR,
with a verifier of turns."""

from __future__ import annotations

import json
import math

from verl.utils.siop.credit.answers import f1_score
from verl.utils.siop.credit.batch import Cluster, CreditBatch, ParsedRollout
from verl.utils.siop.credit.config import finite_number
from verl.utils.siop.credit.registry import register_credit
from verl.utils.siop.credit.rollouts import GroupRewards
from verl.utils.siop.errors import RolloutError
from verl.utils.siop.turn_utils import Query, extract_queries, query_of


@register_credit("process")
async def process(batch: CreditBatch) -> GroupRewards:
    """SIOP: r_t = q(c)·gain_t, the last turn + (1 − lambda)·q(c); with one turn that alone (arXiv 2605.04984)."""
    questions = await batch.clusters()
    await batch.set_targets(questions)
    return await pay_gains(batch, questions)


async def pay_gains(batch: CreditBatch, questions: list[list[Cluster]], least_turns: int = 2) -> GroupRewards:
    """The rewards of :func:`process` with the targets that the clusters have.

    Args:
        batch: the rollouts.
        questions: their clusters, with targets.
        least_turns: of a rollout whose support is measured, see :meth:`CreditBatch.supports`.
    """
    clusters = _cluster_of(questions)
    support = await batch.supports({index: cluster.references for index, cluster in clusters.items()}, least_turns)
    rewards = {}
    for index, cluster in clusters.items():
        gains = batch.gains(support[index]) if index in support else [0.0]
        rewards[index] = [cluster.target * gain for gain in gains]
        rewards[index][-1] += (1 - batch.config.siop_lambda) * cluster.target
    return batch.result(rewards, questions, support)


@register_credit("majority_binary")
async def majority_binary(batch: CreditBatch) -> GroupRewards:
    """TTRL: 1 on the last turn of every member of the question's largest cluster, else 0 (arXiv 2504.16084).

    Among clusters of equal size the one that was opened first wins. The target is this 0 or 1.
    """
    questions = await batch.clusters()
    for clusters in questions:
        if clusters:
            max(clusters, key=lambda cluster: len(cluster.members)).target = 1.0
    return batch.result(batch.terminal(questions), questions)


@register_credit("cluster_frequency")
async def cluster_frequency(batch: CreditBatch) -> GroupRewards:
    """EMPO: the mass m(c) of the rollout's cluster on its last turn (arXiv 2504.05812). The target is m(c)."""
    questions = await batch.clusters()
    for clusters in questions:
        for cluster in clusters:
            cluster.target = cluster.mass
    return batch.result(batch.terminal(questions), questions)


@register_credit("query_consensus")
async def query_consensus(batch: CreditBatch) -> GroupRewards:
    """Query consensus: a turn earns the agreement of the question's other rollouts with its query; no labels.

    r_t = (number of other rollouts of the question that issue the query of turn t at any turn) / (number of other
    rollouts), in [0, 1]; 0 for a turn without a query, for a query that the rollout issued before, and if there is no
    other rollout. With several queries in a turn: the mean over the distinct ones. Only calls that were executed count
    (``Rollout.executed_calls``; where that is not recorded, all well-formed calls in the text), compared as
    :func:`~verl.utils.siop.turn_utils.parse_queries` normalises them.

    The last turn also gets, if the rollout has an answer, by ``siop_consensus_terminal``:

    - ``frequency``: the mass m(c) of its cluster, in [0, 1] (as EMPO); the target is m(c)
    - ``support``: q(c)·Σ_t gain_t, SIOP's gains in one sum, so that the support that an answer had before any search
      earns nothing: q(c)·(max p − p_0) with ``siop_gain=peak``, q(c)·(p_T − p_0) with ``prob``, the difference of logs
      with ``log`` and ``gap``; 0 for a rollout of one turn

    Source: this project.
    """
    rewards = {
        index: rewards for members in batch.questions for index, rewards in query_agreement(batch, members).items()
    }
    questions = await batch.clusters()
    support: dict[int, list[float]] = {}
    if batch.config.siop_consensus_terminal == "support":
        await batch.set_targets(questions)
        clusters = _cluster_of(questions)
        support = await batch.supports({index: cluster.references for index, cluster in clusters.items()})
        for index, values in support.items():
            rewards[index][-1] += clusters[index].target * math.fsum(batch.gains(values))
    else:
        for index, cluster in _cluster_of(questions).items():
            cluster.target = cluster.mass
            rewards[index][-1] += cluster.mass
    return batch.result(rewards, questions, support)


def query_agreement(batch: CreditBatch, members: list[int]) -> dict[int, list[float]]:
    """The query part of the turn rewards of one question's rollouts; padded rows are no rollouts."""
    items = {index: batch.parsed[index] for index in members if batch.parsed[index].turns}
    queries = {index: _queries(item, batch) for index, item in items.items()}
    issued_by: dict[Query, int] = {}
    for turns in queries.values():
        for query in {query for turn in turns for query in turn}:
            issued_by[query] = issued_by.get(query, 0) + 1
    rewards: dict[int, list[float]] = {}
    for index, turns in queries.items():
        own: set[Query] = set()
        rewards[index] = []
        for turn in turns:
            distinct = dict.fromkeys(turn)
            agreeing = sum(issued_by[query] - 1 for query in distinct if query not in own)
            rewards[index].append(agreeing / (max(len(distinct), 1) * max(len(items) - 1, 1)))
            own.update(distinct)
    return rewards


def _queries(item: ParsedRollout, batch: CreditBatch) -> list[list[Query]]:
    executed = item.rollout.executed_calls
    if executed is None:
        return extract_queries(item.rollout.response_ids, item.turns, batch.tokenizer)
    if len(executed) != len(item.turns):
        raise RolloutError(
            f"rollout of question {item.rollout.uid!r}: {len(item.turns)} assistant turns in its mask, but executed "
            f"calls of {len(executed)}"
        )
    try:
        return [[query_of(name, json.loads(arguments)) for name, arguments in turn] for turn in executed]
    except (ValueError, TypeError, RecursionError) as error:
        raise RolloutError(
            f"rollout of question {item.rollout.uid!r}: executed calls are pairs of a name and its arguments in JSON, "
            f"for each turn: {error}"
        ) from error


async def gold_reference(batch: CreditBatch) -> GroupRewards:
    """IGPO: the gold answer (first alias) is the only reference, q = 1 (arXiv 2510.14967); ``siop_use_gold_ref``.

    Turns before the last: r_t = gain_t, also for rollouts without an answer, since the information gain of a search
    does not depend on what is answered in the end. The last turn: token F1 of the answer with the gold aliases, 0
    without an answer, instead of a gain and of (1 − lambda)·q. No clusters are needed, so none are asked for.

    The paper's gain of a search has its own result in it, so the presets set ``siop_boundary=observation``. With
    ``before_answer`` a result counts one turn later, and that of the last search, next to the answer, nowhere.

    Raises:
        RolloutError: a rollout has no gold answer, or something else than a list of texts.
    """
    for item in batch.parsed:
        gold = item.rollout.gold or []
        if isinstance(gold, str) or not all(isinstance(alias, str) for alias in gold):
            raise RolloutError(
                f"gold answers are a list of texts, but a rollout of question {item.rollout.uid!r} has {gold!r}"
            )
        if not gold or not gold[0].strip():
            raise RolloutError(
                f"siop_use_gold_ref=True needs a gold answer, but a rollout of question {item.rollout.uid!r} has none"
            )
    gold_of = {index: list(item.rollout.gold or ()) for index, item in enumerate(batch.parsed) if item.turns}
    references_of = {index: [gold[0].strip()] for index, gold in gold_of.items()}
    support = await batch.supports(references_of)
    rewards = {
        index: [*batch.gains(support.get(index, []))[:-1], f1_score(batch.parsed[index].answer, gold)]
        for index, gold in gold_of.items()
    }
    result = batch.result(rewards, support=support)
    result.target_mass = [1.0 if index in gold_of else 0.0 for index in range(len(batch.parsed))]
    result.references = [references_of.get(index, []) for index in range(len(batch.parsed))]
    return result


@register_credit("verifiable", needs_scorer=False)
async def verifiable(batch: CreditBatch) -> GroupRewards:
    """VPR: a turn earns what the environment's verifier says of it (arXiv 2605.10325); no answers, clusters, support.

    r_t = ``Rollout.turn_scores[t]``; the last turn + ``siop_outcome_weight``·``Rollout.outcome``. The paper's objective
    is this with ``siop_baseline=turn_index`` and ``algorithm.gamma=0``, per question.

    Raises:
        RolloutError: a rollout has no scores, another number of them than turns, or one that is not a finite number;
            or no finite outcome although it has a weight.
    """
    rewards = {}
    for index, item in enumerate(batch.parsed):
        if not item.turns:  # a padded row
            continue
        rewards[index] = _turn_scores(item)
        if batch.config.siop_outcome_weight:
            outcome = _finite(item.rollout.outcome, f"outcome of a rollout of question {item.rollout.uid!r}")
            rewards[index][-1] += batch.config.siop_outcome_weight * outcome
    return batch.result(rewards)


def _turn_scores(item: ParsedRollout) -> list[float]:
    scores, what = item.rollout.turn_scores, f"rollout of question {item.rollout.uid!r}"
    if scores is None:
        raise RolloutError(
            f"{what}: siop_reward_mode=verifiable needs a score of every turn, but its agent loop gave none "
            "(extra_fields['turn_scores']); use one that verifies turns, as verified_game"
        )
    if len(scores) != len(item.turns):
        raise RolloutError(f"{what}: {len(item.turns)} assistant turns in its mask, but {len(scores)} turn scores")
    return [_finite(score, f"score of turn {turn} of a {what}") for turn, score in enumerate(scores, start=1)]


def _finite(value: object, what: str) -> float:
    number = finite_number(value)
    if number is None:
        raise RolloutError(f"{what} must be a finite number, got {value!r}")
    return number


def _cluster_of(questions: list[list[Cluster]]) -> dict[int, Cluster]:
    """Rollout index -> its cluster."""
    return {index: cluster for clusters in questions for cluster in clusters for index in cluster.members}
