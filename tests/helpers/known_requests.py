"""Distinct scoring requests with the answers that the models give when they are called directly."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scoring_cases import query_of
from tiny_models import VOCAB_SIZE
from verl.utils.siop.scorer.engines.nli import AnswerGroup
from verl.utils.siop.scorer.engines.nli_model import TransformersNli
from verl.utils.siop.scorer.engines.transformers_engine import TransformersEngine
from verl.utils.siop.scoring_client import ScoringClient
from verl.utils.siop.siop_process_reward import Reference, SupportRequest


@dataclass(frozen=True)
class Known:
    """A call of the client and its right result."""

    ask: Callable[[ScoringClient], Awaitable[Any]]
    answer: np.ndarray

    async def check(self, client: ScoringClient) -> None:
        """Ask, and fail unless the result is the right one."""
        given = np.asarray(await self.ask(client))
        assert given.shape == self.answer.shape, (given, self.answer)
        np.testing.assert_allclose(given, self.answer, atol=1e-4)


def rollouts(seed: int, size: int = 3) -> list[SupportRequest]:
    """A group of random rollouts with one prompt, three boundaries and two references."""
    rng = np.random.default_rng(seed)

    def draw(n: int) -> list[int]:
        return rng.integers(0, VOCAB_SIZE, n).tolist()

    prompt, references = draw(10), [Reference("r", draw(6), 2, 5), Reference("s", draw(3), 0, 3)]
    openings = [[], draw(3), []] if seed % 2 else []
    return [SupportRequest(prompt, draw(40), [0, 12, 40], references, openings) for _ in range(size)]


class KnownRequests:
    """Computes right results without the service.

    Args:
        lm: directory of the scorer model.
        nli: directory of the NLI model.
    """

    def __init__(self, lm: Path, nli: Path) -> None:
        self._engine = TransformersEngine.from_pretrained(str(lm))
        self._nli = TransformersNli.from_pretrained(str(nli))

    def support(self, seed: int, size: int = 3) -> Known:
        """Support of :func:`rollouts`."""
        asked = rollouts(seed, size)
        queries = [query_of(rollout) for rollout in asked]
        return Known(lambda client: client.support(asked), np.array(self._engine.support(queries).support))

    def cluster(self, seed: int) -> Known:
        """Clusters of six answers."""
        question = f"question {seed}?"
        answers = [f"answer {word}" for word in np.random.default_rng(seed).integers(0, 100, 6)]
        ids = self._nli.cluster([AnswerGroup(question, answers)])[0]
        return Known(lambda client: client.cluster(question, answers), np.array(ids))

    def entailment(self, seed: int) -> Known:
        """Entailment of four pairs."""
        words = np.random.default_rng(seed).integers(0, 10_000, (4, 2))
        pairs = [(f"premise {p}", f"claim {h}") for p, h in words]
        return Known(lambda client: client.entailment(pairs), np.array(self._nli.entailment(pairs)))

    def mixed(self, seed: int) -> Known:
        """One of the three, in turn; more support, as in training."""
        return (self.support, self.cluster, self.support, self.entailment)[seed % 4](seed)
