"""Rollouts of SmolLM2 as they are scored: the request that the method makes of them, for every engine."""

from __future__ import annotations

import asyncio
from pathlib import Path

from scoring_cases import query_of
from verl.utils.siop.scorer.engines.base import RolloutQuery
from verl.utils.siop.scorer.engines.nli import AnswerGroup, LexicalNli
from verl.utils.siop.siop_process_reward import SiopConfig, SupportRequest, compute_group_rewards

from examples.real_world.agent import Search, Transcript, call_text
from examples.real_world.rollouts import chat_of, rollout_of
from examples.real_world.world import questions

ANSWERS = ("Paris", "paris.", "France")


class Asked:
    """A scorer that compares words, and keeps the requests for support."""

    def __init__(self) -> None:
        self.requests: list[SupportRequest] = []
        self._nli = LexicalNli()

    async def cluster(self, question: str, answers: list[str]) -> list[int]:
        return self._nli.cluster([AnswerGroup(question, answers)])[0]

    async def entailment(self, pairs: list[tuple[str, str]]) -> list[float]:
        return self._nli.entailment(pairs)

    async def support(self, rollouts: list[SupportRequest]) -> list[list[list[float]]]:
        self.requests += rollouts
        return [[[-1.0 for _ in rollout.references] for _ in rollout.boundaries] for rollout in rollouts]


def real_request(model: Path) -> list[RolloutQuery]:
    """Three rollouts of two searches at most, of one question; two of them mean the same answer."""
    chat, asked = chat_of(str(model)), Asked()
    question = next(question for question in questions() if question.chain[1:] == ("France", "Paris"))
    first, second = (
        Search(query, f"[1] {fact.passage}\n[2] Bissau is the capital of Guinea-Bissau.")
        for query, fact in zip(question.queries, question.facts, strict=True)
    )
    played = [Transcript("", searches, answer) for searches, answer in zip(
        ((first, second), (first, second), (first,)), ANSWERS, strict=True
    )]  # fmt: skip
    assert call_text(question.queries[0]) in chat.tokenizer.decode(
        rollout_of(question, played[0], chat, "q").response_ids
    )
    rollouts = [rollout_of(question, transcript, chat, "q") for transcript in played]
    asyncio.run(compute_group_rewards(rollouts, chat.tokenizer, SiopConfig(), asked))
    assert any(any(request.openings) for request in asked.requests)
    assert max(len(request.references) for request in asked.requests) == 2
    return [query_of(request) for request in asked.requests]
