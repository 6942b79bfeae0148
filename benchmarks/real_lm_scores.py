"""Support by a real language model in this process, with every number kept in a file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from verl.utils.siop.scorer.engines.base import Probe, RolloutQuery
from verl.utils.siop.scorer.engines.nli import AnswerGroup, LexicalNli
from verl.utils.siop.scorer.engines.transformers_engine import TransformersEngine
from verl.utils.siop.siop_process_reward import SupportRequest

_FORMAT = 1
# Stands for a number that is not there yet, so that the method runs through and asks for all it wants.
_PLACEHOLDER = -1.0


class SupportStore:
    """Mean log-probs of references, by (context, reference), in a JSON-lines file that only grows.

    Args:
        file: made if it is not there. What a killed process left half written is dropped.
        scorer: what the numbers depend on, the first line of the file.

    Raises:
        ValueError: the file holds numbers of another scorer.
    """

    def __init__(self, file: Path, scorer: dict[str, Any]) -> None:
        self.file, self.known, self.greedy = file, dict[str, float](), dict[str, str]()
        head = {"format": _FORMAT, **scorer}
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(head) + "\n", encoding="utf-8")
            return
        text = file.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]
        lines = [json.loads(line) for line in whole.split("\n") if line]
        if not lines or lines[0] != head:
            raise ValueError(f"{file} holds numbers of {lines[0] if lines else 'nothing'}, not of {head}; remove it")
        if whole != text:
            file.write_text(whole, encoding="utf-8")
        for line in lines[1:]:
            self.known.update(line.get("support", {}))
            self.greedy.update(line.get("greedy", {}))

    def add(self, support: dict[str, float], greedy: dict[str, str]) -> None:
        """Keep numbers and greedy answers."""
        self.known.update(support)
        self.greedy.update(greedy)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"support": support, "greedy": greedy}, ensure_ascii=False) + "\n")


def context_key(tokens: Sequence[int]) -> str:
    """Digest of token ids."""
    return hashlib.blake2b(np.asarray(tokens, dtype=np.int64).tobytes(), digest_size=12).hexdigest()


def keys_of(request: SupportRequest) -> list[list[str]]:
    """Key of each number of a request, [boundary][reference]."""
    keys = []
    for boundary, opening in request.opened():
        context = [*request.prompt_ids, *request.response_ids[:boundary], *opening]
        keys.append([context_key([*context, -1, r.start, r.end, *r.token_ids]) for r in request.references])
    return keys


class StoredScorer:
    """A :class:`~verl.utils.siop.siop_process_reward.SiopScorer` that looks support up, and compares words otherwise.

    Args:
        store: the numbers.

    Attributes:
        missing: requests with a number that the store lacks; it is answered with a placeholder.
    """

    def __init__(self, store: SupportStore) -> None:
        self.store, self.missing = store, list[SupportRequest]()
        self._nli = LexicalNli()

    async def cluster(self, question: str, answers: list[str]) -> list[int]:
        return self._nli.cluster([AnswerGroup(question, answers)])[0]

    async def entailment(self, pairs: list[tuple[str, str]]) -> list[float]:
        return self._nli.entailment(pairs)

    async def support(self, rollouts: list[SupportRequest]) -> list[list[list[float]]]:
        return [self.look_up(rollout) for rollout in rollouts]

    def look_up(self, request: SupportRequest) -> list[list[float]]:
        """Mean log-probs of one rollout, [boundary][reference]."""
        keys = keys_of(request)
        if any(key not in self.store.known for row in keys for key in row):
            self.missing.append(request)
        return [[self.store.known.get(key, _PLACEHOLDER) for key in row] for row in keys]

    def compute(self, engine: TransformersEngine) -> tuple[dict[str, float], int]:
        """The numbers of all missing requests in one call, and the tokens that went through the model."""
        if not self.missing:
            return {}, 0
        queries = [
            RolloutQuery(
                prompt_ids=np.array(request.prompt_ids),
                response_ids=np.array(request.response_ids),
                boundaries=request.boundaries,
                probes=[Probe(np.array(r.token_ids), r.start, r.end) for r in request.references],
                openings=[np.array(opening, dtype=np.int64) for opening in request.openings],
            )
            for request in self.missing
        ]
        result = engine.support(queries)
        if result.errors:
            raise ValueError(f"rollouts that the model cannot take: {result.errors}")
        found = {
            key: score
            for request, rows in zip(self.missing, result.support, strict=True)
            for keys, scores in zip(keys_of(request), rows, strict=True)
            for key, score in zip(keys, scores, strict=True)
        }
        self.missing.clear()
        return found, result.computed_tokens
