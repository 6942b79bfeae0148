"""What the tests of the method share: rollouts written as text, scorers without a model, a run of the method."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Sequence
from functools import cache
from typing import Any

from tiny_models import BYTE_TOKENIZER
from transformers import AutoTokenizer
from verl.utils.siop.errors import ScorerError
from verl.utils.siop.nli_clustering import greedy_clusters
from verl.utils.siop.siop_process_reward import (
    GroupRewards,
    Rollout,
    SiopConfig,
    SupportRequest,
    compute_group_rewards,
)


@cache
def byte_tokenizer() -> Any:
    """One token per byte; the tokenizer of the golden files."""
    return AutoTokenizer.from_pretrained(BYTE_TOKENIZER)


def tool_result(text: str) -> str:
    """What the chat template puts between two assistant turns for a result of a tool."""
    return f"\n<|im_start|>user\n<tool_response>\n{text}\n</tool_response><|im_end|>\n<|im_start|>assistant\n"


def rollout(
    uid: str,
    turns: Sequence[str],
    observations: Sequence[str] = (),
    *,
    gold: list[str] | None = None,
    tokenizer: Any = None,
) -> Rollout:
    """A rollout of ``turns`` with raw ``observations`` between them; its question is ``Q <uid>``."""
    tokenizer = tokenizer or byte_tokenizer()

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    response_ids: list[int] = []
    response_mask: list[int] = []
    for number, turn in enumerate(turns):
        for text, value in ((turn, 1), (observations[number] if number < len(observations) else "", 0)):
            response_ids += ids(text)
            response_mask += [value] * len(ids(text))
    prompt = f"<|im_start|>user\nQ {uid}<|im_end|>\n<|im_start|>assistant\n"
    return Rollout(uid, f"Q {uid}", ids(prompt), response_ids, response_mask, gold)


def search_rollout(uid: str, answer: str | None, results: Sequence[str] = (), gold: list[str] | None = None) -> Rollout:
    """One search turn per result, then an answer turn (without an answer if it is None)."""
    turns = [f"<think>step {n}</think><tool_call>search {n}</tool_call><|im_end|>" for n in range(len(results))]
    turns.append("<think>done</think>" + ("" if answer is None else f"<answer> {answer} </answer>") + "<|im_end|>")
    return rollout(uid, turns, [tool_result(text) for text in results], gold=gold)


def query_rollout(uid: str, answer: str | None, *turns: str | list[str]) -> Rollout:
    """One turn per query or list of queries, then an answer turn (empty if it is None)."""
    calls = [
        "".join(
            f'<tool_call>\n{{"name": "search", "arguments": {{"query": "{query}"}}}}\n</tool_call>'
            for query in ([turn] if isinstance(turn, str) else turn)
        )
        for turn in turns
    ]
    last = "done<|im_end|>" if answer is None else f"<answer>{answer}</answer><|im_end|>"
    return rollout(uid, [*calls, last], [tool_result("Doc")] * len(turns))


def mixed_batch() -> list[Rollout]:
    """Two questions, interleaved: clusters of several spellings, a rollout of one turn, one without an answer."""
    return [
        search_rollout("a", "Paris", ["Doc 1", "Doc 2"]),
        search_rollout("b", "blue", ["Doc 9"]),
        search_rollout("a", "Lyon", ["Doc 3"]),
        search_rollout("a", "paris", ["Doc 1", "Doc 4", "Doc 5"]),
        search_rollout("b", None, ["Doc 8"]),
        search_rollout("a", "Nice"),
        search_rollout("b", "Blue", ["Doc 7", "Doc 6"]),
    ]


def query_batch() -> list[Rollout]:
    """Two questions whose rollouts share queries in several spellings."""
    return [
        query_rollout("a", "Paris", "the capital!", "Capital", "river"),
        query_rollout("a", "paris", "CAPITAL", "mayor"),
        query_rollout("a", "Lyon", ["capital", "river"]),
        query_rollout("a", None, "river", "capital"),
        query_rollout("b", "blue", "capital"),
        query_rollout("a", "Nice"),
    ]


def _pseudo_random(*parts: object) -> float:
    """A number in (0, 1) that depends on the parts only."""
    return (zlib.crc32(repr(parts).encode()) + 0.5) / 2**32


class Scorer:
    """Answers from the content of the request alone and records every call.

    Answers are equivalent if they are identical once normalised.
    """

    def __init__(self) -> None:
        self.cluster_calls: list[tuple[str, list[str]]] = []
        self.entailment_calls: list[list[tuple[str, str]]] = []
        self.support_calls: list[list[SupportRequest]] = []

    async def cluster(self, question: str, answers: list[str]) -> list[int]:
        self.cluster_calls.append((question, answers))
        return greedy_clusters(answers, lambda i, j: False)

    async def entailment(self, pairs: list[tuple[str, str]]) -> list[float]:
        self.entailment_calls.append(pairs)
        return [self.entails(*pair) for pair in pairs]

    @staticmethod
    def entails(premise: str, hypothesis: str) -> float:
        return _pseudo_random(premise, hypothesis)

    async def support(self, rollouts: list[SupportRequest]) -> list[list[list[float]]]:
        self.support_calls.append(rollouts)
        return [
            [[self.log_prob(r, boundary, reference.text) for reference in r.references] for boundary in r.boundaries]
            for r in rollouts
        ]

    @staticmethod
    def log_prob(request: SupportRequest, boundary: int, reference: str) -> float:
        return -3 * _pseudo_random(request.prompt_ids, request.response_ids[:boundary], reference)


class FailingScorer(Scorer):
    """Stands in for the scoring client; refuses ``bad`` questions, as a scorer does that runs out of length for one."""

    bad: tuple[str, ...] = ()
    computed_tokens = requested_tokens = 7

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    async def __aenter__(self) -> FailingScorer:
        return self

    async def __aexit__(self, *exception: Any) -> None:
        return None

    async def aclose(self) -> None:
        return None

    async def cluster(self, question: str, answers: list[str]) -> list[int]:
        if question in self.bad:
            raise ScorerError(f"cannot score {question}")
        return await super().cluster(question, answers)


def run(rollouts: Sequence[Rollout], scorer: Any = None, tokenizer: Any = None, **keys: Any) -> GroupRewards:
    """``compute_group_rewards`` with the given ``siop_*`` keys."""
    return asyncio.run(
        compute_group_rewards(rollouts, tokenizer or byte_tokenizer(), SiopConfig(**keys), scorer or Scorer())
    )
