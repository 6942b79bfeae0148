"""Turn rewards of a step: the questions go to the scorer, one by one while others still generate, or all at the end."""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import math
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Coroutine, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from verl.trainer.siop.policy_scorer import PolicyScorer
from verl.utils.siop.errors import ScorerError, ScorerUnavailable, SiopError
from verl.utils.siop.scoring_client import LEXICAL, ScoringClient
from verl.utils.siop.siop_process_reward import (
    GroupRewards,
    Rollout,
    SiopConfig,
    SiopScorer,
    SupportRequest,
    build_reference,
    compute_group_rewards,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")
_NOISE_TEXTS = 8


class EveryGroupDropped(SiopError, RuntimeError):
    """The scorer failed on every question of a batch, so there is nothing to learn from."""


@dataclass
class TimedScorer:
    """A :class:`SiopScorer` that measures the wall seconds during which at least one call of a kind is waited for."""

    scorer: ScoringClient | PolicyScorer
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    _waiting: Counter[str] = field(default_factory=Counter)

    async def timed(self, kind: str, call: Awaitable[T]) -> T:
        """What ``call`` gives; the time goes to ``seconds[kind]``, that of calls at the same time once."""
        if not self._waiting[kind]:
            self.seconds[kind] -= time.perf_counter()
        self._waiting[kind] += 1
        try:
            return await call
        finally:
            self._waiting[kind] -= 1
            if not self._waiting[kind]:
                self.seconds[kind] += time.perf_counter()

    async def cluster(self, question: str, answers: list[str]) -> list[int]:
        return await self.timed("cluster", self.scorer.cluster(question, answers))

    async def entailment(self, pairs: list[tuple[str, str]]) -> list[float]:
        return await self.timed("entailment", self.scorer.entailment(pairs))

    async def support(self, rollouts: list[SupportRequest]) -> list[list[list[float]]]:
        return await self.timed("support", self.scorer.support(rollouts))

    def metrics(self) -> dict[str, float]:
        """``siop/seconds/…`` by kind of call and ``siop/tokens/…``: computed, and requested as full sequences."""
        return {
            **{f"siop/seconds/{kind}": value for kind, value in self.seconds.items()},
            "siop/tokens/computed": float(self.scorer.computed_tokens),
            "siop/tokens/requested": float(self.scorer.requested_tokens),
        }


@dataclass
class Scores:
    """What became of the rollouts of a step.

    Args:
        rewards: of the rows that could be scored.
        rows: those rows, in the order of ``rewards``.
        dropped: uids of the questions that could not be scored (``siop_on_scorer_error=drop_group``).
        cost: metrics: seconds and tokens, and who gave the evidence.
    """

    rewards: GroupRewards
    rows: list[int]
    dropped: set[str]
    cost: dict[str, float]


def open_client(siop: SiopConfig) -> ScoringClient:
    """A client of the scorer that the configuration names."""
    return ScoringClient(siop.siop_scorer_url, strict=siop.siop_strict_entailment, timeout_s=siop.siop_scorer_timeout_s)


def evidence_backend(scorer: SiopScorer) -> dict[str, float]:
    """``siop/evidence_backend``: 0 if words were compared, 1 if a model was asked; none if the scorer does not say."""
    nli = getattr(scorer, "nli", None)
    return {} if nli is None else {"siop/evidence_backend": float(nli != LEXICAL)}


async def measure_noise(scorer: SiopScorer, tokenizer: Any, siop: SiopConfig, sample: str) -> float:
    """The scorer's noise: how much its mean log-probabilities depend on what else is scored with them.

    Some texts are scored one by one, then all in one request with a longer one beside them. Rounding makes the
    difference: about 3e-6 in float32, 1,000 times as much in bfloat16.

    Args:
        scorer: the service's client, or the policy as its own scorer.
        tokenizer: the policy's, whose ids are sent.
        siop: the texts around a reference.
        sample: words of the data.

    Returns:
        Root mean square of the differences; see :attr:`SiopConfig.reward_noise`.
    """
    words = sample.split()
    texts = [" ".join(words[turn:] + words[:turn]) for turn in range(min(len(words), _NOISE_TEXTS))]
    reference = build_reference(sample, tokenizer, siop)
    requests = [
        SupportRequest(tokenizer(text, add_special_tokens=False)["input_ids"], [], [0], [reference])
        for text in [*texts, " ".join([sample] * 8)]
    ]
    alone = [(await scorer.support([request]))[0][0][0] for request in requests[:-1]]
    together = [row[0][0] for row in (await scorer.support(requests))[:-1]]
    return math.sqrt(sum((one - other) ** 2 for one, other in zip(alone, together, strict=True)) / len(alone))


async def score_batch(rollouts: Sequence[Rollout], tokenizer: Any, siop: SiopConfig, scorer: TimedScorer) -> Scores:
    """Score all rollouts in one pass.

    The rows go to the scorer in the order of their prompts: what shares a request with what, and so the last bits of a
    score, must depend neither on the order of the rows nor on the uids, which are new in every run.

    Raises:
        ScorerError, ScorerUnavailable: with ``siop_on_scorer_error=raise``.
        EveryGroupDropped: with ``drop_group``, if no question could be scored.
    """
    rows = sorted(range(len(rollouts)), key=lambda row: rollouts[row].prompt_ids)
    kept = [rollouts[row] for row in rows]
    dropped: set[str] = set()
    try:
        rewards = await compute_group_rewards(kept, tokenizer, siop, scorer)
    except (ScorerError, ScorerUnavailable) as error:
        if siop.siop_on_scorer_error == "raise":
            raise
        logger.error("the scorer failed on the batch, asking question by question: %s", error)
        dropped = await _unscorable(kept, tokenizer, siop, scorer)
        rows = [row for row in rows if rollouts[row].uid not in dropped]
        if not rows:
            raise EveryGroupDropped(f"the scorer failed on all {len(dropped)} questions: {error}") from error
        rewards = await compute_group_rewards([rollouts[row] for row in rows], tokenizer, siop, scorer)
    return Scores(rewards, rows, dropped, {**scorer.metrics(), **evidence_backend(scorer.scorer)})


async def _unscorable(rollouts: Sequence[Rollout], tokenizer: Any, siop: SiopConfig, scorer: SiopScorer) -> set[str]:
    failed = set()
    for uid in dict.fromkeys(rollout.uid for rollout in rollouts):
        group = [rollout for rollout in rollouts if rollout.uid == uid]
        try:
            await compute_group_rewards(group, tokenizer, siop, scorer)
        except (ScorerError, ScorerUnavailable) as error:
            logger.error("question dropped (%r): %s", group[0].question, error)
            failed.add(uid)
    return failed


class RewardStream:
    """Scores the questions of one step as they come, in a thread with an event loop of its own.

    Use: :meth:`add` a question as soon as its last rollout has ended, then :meth:`collect` once, at the end of the
    step. The rewards are those of one pass over all: a question depends on its own rollouts alone.

    Args:
        siop: where the scorer is, and what to do if it fails.
        tokenizer: the policy's.
    """

    def __init__(self, siop: SiopConfig, tokenizer: Any) -> None:
        self._siop, self._tokenizer = siop, tokenizer
        self._client = open_client(siop)
        self._scorer = TimedScorer(self._client)
        self._groups: dict[str, tuple[list[Rollout], concurrent.futures.Future[GroupRewards]]] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="rewards", daemon=True)
        self._thread.start()

    def add(self, rollouts: Sequence[Rollout]) -> None:
        """Begin to score one question; its rollouts in the order of their sessions.

        Raises:
            ScorerError, ScorerUnavailable: an earlier question failed, and ``siop_on_scorer_error=raise``: the step
                need not go on.
        """
        if self._siop.siop_on_scorer_error == "raise":
            for _, future in self._groups.values():
                if future.done() and (error := future.exception()) is not None:
                    self.close()
                    raise error
        group = list(rollouts)
        self._groups[group[0].uid] = group, self._submit(self._scorer.timed("busy", self._score(group)))

    def collect(self, rollouts: Sequence[Rollout]) -> Scores:
        """Wait for the rewards of these rollouts, which are whole questions; those not added, or changed since, are
        scored now. Ends the stream.

        Raises:
            ScorerError, ScorerUnavailable: with ``siop_on_scorer_error=raise``.
            EveryGroupDropped: with ``drop_group``, if no question could be scored.
        """
        start = time.perf_counter()
        rows_of: dict[str, list[int]] = {}
        for row, rollout in enumerate(rollouts):
            rows_of.setdefault(rollout.uid, []).append(row)
        try:
            for uid, rows in rows_of.items():
                group = [rollouts[row] for row in rows]
                if uid not in self._groups or self._groups[uid][0] != group:
                    self.add(group)
            found: dict[int, tuple[GroupRewards, int]] = {}
            dropped: dict[str, Exception] = {}
            for uid, rows in rows_of.items():
                try:
                    rewards = self._groups[uid][1].result()
                except (ScorerError, ScorerUnavailable) as error:
                    if self._siop.siop_on_scorer_error == "raise":
                        raise
                    logger.error("question dropped (%r): %s", rollouts[rows[0]].question, error)
                    dropped[uid] = error
                    continue
                found.update({row: (rewards, index) for index, row in enumerate(rows)})
            if not found:
                first = next(iter(dropped.values()))
                raise EveryGroupDropped(f"the scorer failed on all {len(dropped)} questions: {first}") from first
        finally:
            self.close()
        kept = sorted(found)
        self._scorer.seconds["exposed"] += time.perf_counter() - start
        cost = {**self._scorer.metrics(), **evidence_backend(self._client)}
        return Scores(_merged([found[row] for row in kept]), kept, set(dropped), cost)

    def close(self) -> None:
        """End the thread; what is still being scored is given up."""
        if self._thread.is_alive():
            self._submit(self._end()).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def _submit(self, call: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        return asyncio.run_coroutine_threadsafe(call, self._loop)

    async def _score(self, group: list[Rollout]) -> GroupRewards:
        return await compute_group_rewards(group, self._tokenizer, self._siop, self._scorer)

    async def _end(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._client.aclose()


def _merged(parts: Sequence[tuple[GroupRewards, int]]) -> GroupRewards:
    """The rewards of single rollouts, each a row of its question's, as those of one batch."""
    names = [spec.name for spec in fields(GroupRewards)]
    return GroupRewards(**{name: [getattr(rewards, name)[index] for rewards, index in parts] for name in names})
