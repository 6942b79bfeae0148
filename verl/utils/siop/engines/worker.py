"""Ray actor of the scorer: one language-model engine and one NLI backend on one device.

Imports neither torch nor transformers before it loads its models, so that the HTTP front can import it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ray
from verl.utils.siop.engines.base import NO_MODEL, EngineInfo, NoEngine, RolloutQuery, SupportResult

if TYPE_CHECKING:
    from verl.utils.siop.engines.base import ScoringEngine
    from verl.utils.siop.engines.nli import AnswerGroup, NliBackend

ENGINES = ("transformers",)
NLI_BACKENDS = ("lexical", "transformers")
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker loads, and where.

    Attributes:
        model: scorer model, directory or hub id; ``NO_MODEL`` for none.
        engine: one of ``ENGINES``; ``NO_MODEL`` without a model.
        nli_model: NLI model; not used by the lexical backend.
        nli_backend: one of ``NLI_BACKENDS``.
        device: ``cpu`` or ``cuda`` (Ray shows each worker its own GPU only).
        dtype: ``auto`` or a torch dtype name.
        max_model_len: longest sequence, None for the model's own limit.
        trust_remote_code: run Python code that comes with the models.
        threads: CPU threads.
    """

    model: str
    engine: str = "transformers"
    nli_model: str | None = None
    nli_backend: str = "lexical"
    device: str = "cpu"
    dtype: str = "auto"
    max_model_len: int | None = None
    trust_remote_code: bool = False
    threads: int = 1


@dataclass(frozen=True)
class WorkerInfo:
    """A loaded worker: limits and identity of its models."""

    engine: EngineInfo
    nli: str


class ScoringWorker:
    """Loads its models on first use, so that a failure is an ordinary exception of :meth:`load` with its own type,
    and so that a worker that Ray restarted loads them again by itself."""

    def __init__(self, settings: WorkerSettings) -> None:
        logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
        for noisy in ("httpx", "ray"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        self._settings = settings
        self._engine: ScoringEngine | None = None
        self._nli: NliBackend | None = None

    def load(self) -> WorkerInfo:
        """Load the models if that has not happened yet.

        Raises:
            SiopConfigError: a model cannot be loaded or used.
        """
        engine, nli = self._loaded()
        return WorkerInfo(engine=engine.info, nli=nli.name)

    def _loaded(self) -> tuple[ScoringEngine, NliBackend]:
        if self._engine is None or self._nli is None:
            import torch
            from verl.utils.siop.engines.nli import LexicalNli, TransformersNli
            from verl.utils.siop.engines.transformers_engine import TransformersEngine

            settings = self._settings
            torch.set_num_threads(settings.threads)
            # The NLI model first: it is the smaller one, and its mistakes show at once.
            if settings.nli_backend == "transformers":
                assert settings.nli_model is not None
                self._nli = TransformersNli.from_pretrained(
                    settings.nli_model, settings.device, trust_remote_code=settings.trust_remote_code
                )
            else:
                self._nli = LexicalNli()
            if settings.engine == NO_MODEL:
                self._engine = NoEngine()
            else:
                self._engine = TransformersEngine.from_pretrained(
                    settings.model,
                    device=settings.device,
                    dtype=settings.dtype,
                    max_model_len=settings.max_model_len,
                    trust_remote_code=settings.trust_remote_code,
                )
        return self._engine, self._nli

    @ray.method(concurrency_group="health")
    def ping(self) -> int:
        """Process id; answers while a long request runs."""
        return os.getpid()

    def support(self, rollouts: Sequence[RolloutQuery]) -> SupportResult:
        """See :class:`ScoringEngine`."""
        return self._loaded()[0].support(rollouts)

    def cluster(self, groups: Sequence[AnswerGroup]) -> list[list[int]]:
        """See :class:`NliBackend`."""
        return self._loaded()[1].cluster(groups)

    def entailment(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """See :class:`NliBackend`."""
        return self._loaded()[1].entailment(pairs)
