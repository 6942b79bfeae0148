"""What the credit methods share: parsing rollouts, clusters, targets, support and the form of the result.

A credit method gets a :class:`CreditBatch` and returns what :meth:`CreditBatch.result` makes of its turn rewards.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import numbers
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from verl.utils.siop.credit.config import GAP_OFFSET, finite_number
from verl.utils.siop.credit.probe import Prober
from verl.utils.siop.credit.rollouts import GroupRewards, Rollout, SiopScorer, SupportRequest
from verl.utils.siop.credit.votes import informed_votes
from verl.utils.siop.errors import RolloutError, ScorerError
from verl.utils.siop.nli_clustering import mentions, words
from verl.utils.siop.turn_utils import boundaries, extract_answer, extract_observations, get_assistant_turn_ranges

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from verl.utils.siop.credit.config import SiopConfig

OBSERVATION_CHARACTERS = 2000
# Log-probs are at most 0; a scorer in half precision may round a probability of 1 to slightly above.
LOG_PROB_TOLERANCE = 1e-3


@dataclass
class ParsedRollout:
    """A rollout with its turns and its answer."""

    rollout: Rollout
    turns: list[tuple[int, int]]
    answer: str


@dataclass
class Cluster:
    """Answers of one question that mean the same; ``members`` index the batch, in rollout order.

    ``mass`` is m(c), ``target`` q(c), ``evidence`` rho(c), ``votes`` v(c), once votes have been passed on.
    """

    cluster_id: int
    members: list[int]
    references: list[str]
    mass: float
    target: float = 0.0
    evidence: float | None = None
    votes: float | None = None


class CreditBatch:
    """Rollouts of any number of questions, and what a credit method can ask about them.

    Args:
        rollouts: in any order; those with the same uid are the rollouts of a question, in list order.
        tokenizer: the policy's fast tokenizer.
        config: the method's parameters.
        scorer: answers questions about clusters, evidence and support.

    Attributes:
        parsed: each rollout with its turns and its answer, in the order given; methods refer to a rollout by its index.

    Raises:
        RolloutError: a malformed rollout, or one uid with two questions.
    """

    def __init__(
        self, rollouts: Sequence[Rollout], tokenizer: PreTrainedTokenizerBase, config: SiopConfig, scorer: SiopScorer
    ) -> None:
        self.tokenizer, self.config, self.scorer = tokenizer, config, scorer
        self.parsed = [_parse(rollout, tokenizer) for rollout in rollouts]
        self.questions = _group_by_question(self.parsed)
        self._observed: dict[int, list[str]] = {}

    async def clusters(self) -> list[list[Cluster]]:
        """Clusters of every question, in the order in which its rollouts open them; mass m(c) = |c| / K_valid.

        Only rollouts with an answer are members. The questions are asked concurrently.
        """
        tasks = [asyncio.ensure_future(self._cluster_question(members)) for members in self.questions]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:  # one has failed: the others need not go on
                task.cancel()

    async def _cluster_question(self, members: Sequence[int]) -> list[Cluster]:
        valid = [index for index in members if self.parsed[index].answer]
        answers = [self.parsed[index].answer for index in valid]
        if len(answers) > 1:
            question = self.parsed[valid[0]].rollout.question
            ids = _checked_cluster_ids(await self.scorer.cluster(question, answers), question, len(answers))
        else:
            ids = [0] * len(answers)
        by_id: dict[int, list[int]] = {}
        for index, cluster_id in zip(valid, ids, strict=True):
            by_id.setdefault(cluster_id, []).append(index)
        return [
            Cluster(
                cluster_id=cluster_id,
                members=indices,
                references=list(dict.fromkeys(self.parsed[i].answer for i in indices))[: self.config.siop_num_refs],
                mass=len(indices) / len(valid),
            )
            for cluster_id, indices in by_id.items()
        ]

    async def set_targets(self, questions: Sequence[Sequence[Cluster]]) -> None:
        """Set q(c) ∝ v(c)·exp(eta·rho(c)), normalised over the question; q = v where evidence cannot matter.

        v(c) is by ``siop_vote`` the mass m(c), or what it is once votes have passed on
        (:func:`~verl.utils.siop.credit.votes.informed_votes`).
        """
        contested = [cluster for clusters in questions if len(clusters) > 1 for cluster in clusters]
        if self.config.siop_vote == "informed":
            for clusters in questions:
                self._set_votes(clusters)
        if self.config.siop_eta > 0:
            await self._set_evidence(contested)
        for clusters in questions:
            # Relative to the strongest evidence, so that a large eta cannot overflow.
            top = max((cluster.evidence or 0.0 for cluster in clusters), default=0.0)
            votes = [cluster.mass if cluster.votes is None else cluster.votes for cluster in clusters]
            weights = [
                share * math.exp(self.config.siop_eta * ((cluster.evidence or 0.0) - top))
                for share, cluster in zip(votes, clusters, strict=True)
            ]
            total = math.fsum(weights)
            for cluster, weight in zip(clusters, weights, strict=True):
                cluster.target = weight / total

    def _set_votes(self, clusters: Sequence[Cluster]) -> None:
        shares = informed_votes(self.known(clusters)) if len(clusters) > 1 else [1.0 for _ in clusters]
        for cluster, share in zip(clusters, shares, strict=True):
            cluster.votes = share

    def known(self, clusters: Sequence[Cluster]) -> list[list[set[int]]]:
        """For each member of each cluster of a question the clusters of which it knows, by their place: some answer of
        theirs stands, word for word, in the question or in what the rollout's tools said."""
        answers = [{self.parsed[index].answer for index in cluster.members} for cluster in clusters]
        in_text: dict[str, set[int]] = {}

        def stand_in(text: str) -> set[int]:
            if text not in in_text:
                form = words(text)
                in_text[text] = {place for place, own in enumerate(answers) if any(mentions(form, one) for one in own)}
            return in_text[text]

        return [
            [
                set().union(*map(stand_in, (self.parsed[index].rollout.question, *self._observations(index))))
                for index in cluster.members
            ]
            for cluster in clusters
        ]

    def _observations(self, index: int) -> list[str]:
        """What the tools said, where a call was executed: what is said of a malformed one is no result."""
        if index not in self._observed:
            item = self.parsed[index]
            executed = item.rollout.executed_calls
            self._observed[index] = [
                text
                for turn in range(len(item.turns) - 1)
                if executed is None or executed[turn : turn + 1] != [[]]
                for text in self._observation(index, turn)
            ]
        return self._observed[index]

    def _observation(self, index: int, turn: int) -> list[str]:
        """What stands between a turn, from 0, and the next one: a text, or none."""
        item = self.parsed[index]
        return extract_observations(item.rollout.response_ids, item.turns[turn : turn + 2], self.tokenizer)

    async def _set_evidence(self, clusters: Sequence[Cluster]) -> None:
        """Set rho(c): mean over members with observations of their mean or (``siop_evidence``) maximal evidence.

        The evidence of an observation is P(first 2,000 characters entail the cluster's first reference); rho is 0 if no
        member has an observation. One call for all, each distinct pair once.
        """
        pairs: dict[tuple[str, str], None] = {}
        pairs_of_member: dict[int, list[tuple[str, str]]] = {}
        for cluster in clusters:
            for index in cluster.members:
                texts = self._observations(index)
                member_pairs = [(text[:OBSERVATION_CHARACTERS], cluster.references[0]) for text in texts]
                pairs_of_member[index] = member_pairs
                pairs.update(dict.fromkeys(member_pairs))
        answered: Any = await self.scorer.entailment(list(pairs)) if pairs else []
        scores = _returned(answered, len(pairs), "entailment", "pairs", "scores ")
        score_of = {
            pair: _checked_number(score, f"entailment of hypothesis {pair[1]!r}", 0.0, 1.0)
            for pair, score in zip(pairs, scores, strict=True)
        }
        over_observations = max if self.config.siop_evidence == "max" else _mean
        for cluster in clusters:
            by_member = [
                over_observations([score_of[pair] for pair in pairs_of_member[index]])
                for index in cluster.members
                if pairs_of_member[index]
            ]
            cluster.evidence = _mean(by_member) if by_member else 0.0

    async def supports(
        self, references_of: Mapping[int, Sequence[str]], least_turns: int = 2
    ) -> dict[int, list[float]]:
        """Support p_t = Σ_r alpha_r · exp(mean log-prob of reference r), alpha uniform, of the rollouts named.

        One call for all.

        Args:
            references_of: rollout index -> reference texts.
            least_turns: of a rollout that is asked for; with one turn nothing happened before its answer.

        Returns:
            Rollout index -> p at its T + 1 boundaries (``siop_boundary``).
        """
        indices = [index for index in sorted(references_of) if len(self.parsed[index].turns) >= least_turns]
        if not indices:
            return {}
        prober = Prober(self.tokenizer, self.config)
        requests = [self._request(self.parsed[index], references_of[index], prober) for index in indices]
        log_probs = _returned(await self.scorer.support(requests), len(requests), "support", "rollouts")
        return {
            index: _probabilities(log_probs_TR, request, self.parsed[index].rollout.uid)
            for index, request, log_probs_TR in zip(indices, requests, log_probs, strict=True)
        }

    def _request(self, item: ParsedRollout, references: Sequence[str], prober: Prober) -> SupportRequest:
        prompt, response = list(item.rollout.prompt_ids), list(item.rollout.response_ids)
        where = boundaries(item.turns, self.config.siop_boundary)
        return SupportRequest(
            prompt_ids=prompt,
            response_ids=response,
            boundaries=where,
            references=[prober.reference(text, prompt) for text in references],
            openings=prober.openings(prompt, response, [end for _, end in item.turns], where),
        )

    def gains(self, support: Sequence[float]) -> list[float]:
        """:func:`gains` by the keys of this batch."""
        return gains(support, self.config)

    def terminal(self, questions: Sequence[Sequence[Cluster]]) -> dict[int, list[float]]:
        """The target of each answered rollout on its last turn, 0 before."""
        return {
            index: [0.0] * (len(self.parsed[index].turns) - 1) + [cluster.target]
            for clusters in questions
            for cluster in clusters
            for index in cluster.members
        }

    def result(
        self,
        rewards: Mapping[int, list[float]],
        questions: Sequence[Sequence[Cluster]] = (),
        support: Mapping[int, list[float]] | None = None,
    ) -> GroupRewards:
        """Results by rollout, in the order given; what a rollout does not have is empty, 0 or None.

        Args:
            rewards: rollout index -> T turn rewards.
            questions: the clusters, if the method has any.
            support: rollout index -> p at its boundaries, if the method measured it.
        """
        of = {index: cluster for clusters in questions for cluster in clusters for index in cluster.members}
        indices = range(len(self.parsed))
        return GroupRewards(
            turn_rewards=[rewards.get(index, []) for index in indices],
            target_mass=[of[index].target if index in of else 0.0 for index in indices],
            references=[list(of[index].references) if index in of else [] for index in indices],
            cluster_ids=[of[index].cluster_id if index in of else None for index in indices],
            support=[(support or {}).get(index, []) for index in indices],
            answers=[item.answer for item in self.parsed],
            evidence=[of[index].evidence if index in of else None for index in indices],
            masses=[of[index].mass if index in of else None for index in indices],
            votes=[of[index].votes if index in of else None for index in indices],
        )


def gains(support: Sequence[float], config: SiopConfig) -> list[float]:
    """Gain of each turn t = 1 … T, from the support p_0 … p_T of one rollout, by ``siop_gain``.

    - ``peak``: P_t − P_{t−1} with P_t = max(p_0, …, p_t), in [0, 1]. Support that was lost and comes back is no gain,
      so an answer held from the start earns nothing by a detour. Source: this project.
    - ``prob``: p_t − p_{t−1}, in [−1, 1]
    - ``log``: log(p_t + eps) − log(p_{t−1} + eps), in nats
    - ``gap``: log(g_{t−1} / g_t) with g_t = 0.1 − log p_t, what is missing of a certain reference in nats. Source:
      TRACE (arXiv 2607.13988)
    """
    values = list(support)
    if config.siop_gain == "peak":
        values = list(itertools.accumulate(values, max))
    elif config.siop_gain == "log":
        values = [math.log(value + config.siop_epsilon) for value in values]
    elif config.siop_gain == "gap":
        values = [-math.log(GAP_OFFSET - math.log(max(value, sys.float_info.min))) for value in values]
    return [after - before for before, after in itertools.pairwise(values)]


def _parse(rollout: Rollout, tokenizer: PreTrainedTokenizerBase) -> ParsedRollout:
    if len(rollout.response_ids) != len(rollout.response_mask):
        raise RolloutError(
            f"rollout of question {rollout.uid!r}: {len(rollout.response_ids)} response tokens, "
            f"but a mask of {len(rollout.response_mask)}"
        )
    turns = get_assistant_turn_ranges(rollout.response_mask)
    return ParsedRollout(rollout, turns, extract_answer(rollout.response_ids, turns, tokenizer, rollout.prompt_ids))


def _group_by_question(parsed: Sequence[ParsedRollout]) -> list[list[int]]:
    """Indices of the rollouts of each question, in list order."""
    groups: dict[str, list[int]] = {}
    for index, item in enumerate(parsed):
        group = groups.setdefault(item.rollout.uid, [])
        group.append(index)
        first = parsed[group[0]].rollout.question
        if item.rollout.question != first:
            raise RolloutError(
                f"uid {item.rollout.uid!r} has two different questions: {first!r} and {item.rollout.question!r}"
            )
    return list(groups.values())


def _returned(values: Any, sent: int, what: str, unit: str, noun: str = "") -> Sequence[Any]:
    """What a scorer returned for ``sent`` things, one value for each; ScorerError if it is no list of that length."""
    sequence = isinstance(values, Sequence) and not isinstance(values, str | bytes)
    if not sequence and not getattr(values, "ndim", 0):  # an array is one too
        raise ScorerError(f"{what}: {sent} {unit} sent, which gives a list of {sent}, got {values!r:.80}")
    if len(values) != sent:
        raise ScorerError(f"{what}: {sent} {unit} sent, {len(values)} {noun}returned")
    return values


def _checked_cluster_ids(ids: Any, question: str, expected: int) -> list[int]:
    ids = _returned(ids, expected, f"cluster of {question!r}", "answers", "cluster ids ")
    for value in ids:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise ScorerError(f"cluster of {question!r}: cluster ids are whole numbers, got {value!r}")
    return [int(value) for value in ids]


def _checked_number(value: object, what: str, low: float, high: float) -> float:
    number = finite_number(value)
    if number is None or not low <= number <= high:
        raise ScorerError(f"{what} must be a finite number from {low} to {high}, got {value!r}")
    return number


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _probabilities(log_probs_TR: Any, request: SupportRequest, uid: str) -> list[float]:
    """p at each boundary from one rollout's mean log-probs [boundary][reference], checked."""
    of = f"support of a rollout of question {uid!r}"
    log_probs_TR = _returned(log_probs_TR, len(request.boundaries), of, "boundaries")
    support = []
    for boundary, log_probs_R in zip(request.boundaries, log_probs_TR, strict=True):
        values = _returned(log_probs_R, len(request.references), f"{of} at boundary {boundary}", "references")
        what = f"mean log-prob of a reference of question {uid!r} at boundary {boundary}"
        checked = [_checked_number(value, what, -math.inf, LOG_PROB_TOLERANCE) for value in values]
        support.append(_mean([math.exp(value) for value in checked]))
    return support
