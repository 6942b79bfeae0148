"""What the tests of the method share: rollouts written as text, and a deterministic scorer that records its calls."""

from __future__ import annotations

import asyncio
import json
import zlib
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer
from verl.utils.siop.nli_clustering import greedy_clusters
from verl.utils.siop.siop_process_reward import (
    GroupRewards,
    Rollout,
    SiopConfig,
    SupportRequest,
    compute_group_rewards,
)

GOLDEN = Path(__file__).parents[1] / "golden"


@cache
def byte_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(GOLDEN / "byte_tokenizer")


@cache
def golden(name: str) -> Any:
    return json.loads((GOLDEN / name).read_text())


def tool_result(text: str) -> str:
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


def _pseudo_random(*parts: object) -> float:
    """A number in (0, 1) that depends on the parts only."""
    return (zlib.crc32(repr(parts).encode()) + 0.5) / 2**32


class Scorer:
    """Answers from the content of the request alone and records every call.

    Answers are equivalent if they are identical once normalised, or if ``same_meaning`` says so.
    """

    def __init__(self, same_meaning: Callable[[str, str], bool] = lambda a, b: False) -> None:
        self.same_meaning = same_meaning
        self.cluster_calls: list[tuple[str, list[str]]] = []
        self.entailment_calls: list[list[tuple[str, str]]] = []
        self.support_calls: list[list[SupportRequest]] = []

    async def cluster(self, question: str, answers: list[str]) -> list[int]:
        self.cluster_calls.append((question, answers))
        return greedy_clusters(answers, lambda i, j: self.same_meaning(answers[i], answers[j]))

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


def run(rollouts: Sequence[Rollout], scorer: Any = None, tokenizer: Any = None, **keys: Any) -> GroupRewards:
    """``compute_group_rewards`` with the given ``siop_*`` keys."""
    return asyncio.run(
        compute_group_rewards(rollouts, tokenizer or byte_tokenizer(), SiopConfig(**keys), scorer or Scorer())
    )
