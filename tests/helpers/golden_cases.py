"""The golden files, and a scorer that answers from them; ``tests/golden/README.md`` says what is in them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from method_helpers import byte_tokenizer
from verl.utils.siop.siop_process_reward import Rollout, SupportRequest

GOLDEN = Path(__file__).parents[1] / "golden"


@cache
def golden(name: str) -> Any:
    """The cases of one golden file."""
    return json.loads((GOLDEN / name).read_text())


class GoldenScorer:
    """Answers from the golden tables; anything else that is asked is a KeyError."""

    def __init__(self, case: dict[str, Any]) -> None:
        self.ids = {tuple(entry["answers"]): entry["semantic_ids"] for entry in case["clusters"].values()}
        self.scores = {(entry["premise"], entry["hypothesis"]): entry["score"] for entry in case["nli"]}
        self.log_probs = {(e["sample"], e["turn"], e["ref"]): e["mean_logprob"] for e in case["scores"]}
        self.samples = {tuple(s["prompt_ids"] + s["response_ids"]): n for n, s in enumerate(case["samples"])}

    async def cluster(self, question: str, answers: list[str]) -> list[int]:
        return list(self.ids[tuple(answers)])

    async def entailment(self, pairs: list[tuple[str, str]]) -> list[float]:
        return [self.scores[pair] for pair in pairs]

    async def support(self, rollouts: list[SupportRequest]) -> list[list[list[float]]]:
        return [
            [
                [
                    self.log_probs[self.samples[tuple(r.prompt_ids + r.response_ids)], turn - 1, reference.text]
                    for reference in r.references
                ]
                for turn in range(len(r.boundaries))
            ]
            for r in rollouts
        ]


def golden_rollouts(case: dict[str, Any]) -> list[Rollout]:
    """The rollouts of a case of ``pipeline.json``."""
    return [
        Rollout(
            sample["uid"],
            byte_tokenizer().decode(sample["prompt_ids"]),
            sample["prompt_ids"],
            sample["response_ids"],
            sample["response_mask"],
        )
        for sample in case["samples"]
    ]
