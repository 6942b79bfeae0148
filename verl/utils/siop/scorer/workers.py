"""Ray actors of the scorer: one holds a language-model engine, the other an NLI model.

Imports neither torch nor transformers before it loads its models, so that the HTTP front can import it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import ray
from verl.utils.siop.errors import EngineFailed
from verl.utils.siop.scorer.engines.base import NO_MODEL, EngineInfo, NoEngine, RolloutQuery, SupportResult
from verl.utils.siop.tokenizer_digest import tokenizer_digest

if TYPE_CHECKING:
    from verl.utils.siop.scorer.engines.base import ScoringEngine
    from verl.utils.siop.scorer.engines.nli import AnswerGroup
    from verl.utils.siop.scorer.engines.nli_model import TransformersNli

logger = logging.getLogger(__name__)

T = TypeVar("T")

ENGINES = ("transformers", "vllm")
NLI_BACKENDS = ("lexical", "transformers")
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


@dataclass(frozen=True)
class WorkerSettings:
    """What the workers load, and where.

    Attributes:
        model: scorer model, directory or hub id; ``NO_MODEL`` for none.
        engine: one of ``ENGINES``; ``NO_MODEL`` without a model.
        nli_model: NLI model; not used by the lexical backend.
        nli_backend: one of ``NLI_BACKENDS``.
        nli_self_test: refuse an NLI model that gets two plain pairs wrong.
        device: ``cpu`` or ``cuda`` (Ray shows each worker its own GPU only).
        dtype: ``auto`` or a torch dtype name.
        max_model_len: longest sequence, None for the model's own limit.
        lora_path: LoRA adapter on top of the scorer model.
        tensor_parallel_size: GPUs that share one scorer model.
        gpu_memory: share of each GPU's memory that a scorer model may take, None for the engine's default.
        trust_remote_code: run Python code that comes with the models.
        threads: CPU threads of each worker.
        nli_device: ``cpu`` or ``cuda`` for the NLI model, None for ``device``.
    """

    model: str
    engine: str = "transformers"
    nli_model: str | None = None
    nli_backend: str = "lexical"
    nli_self_test: bool = True
    device: str = "cpu"
    dtype: str = "auto"
    max_model_len: int | None = None
    lora_path: str | None = None
    tensor_parallel_size: int = 1
    gpu_memory: float | None = None
    trust_remote_code: bool = False
    threads: int = 1
    nli_device: str | None = None


@dataclass(frozen=True)
class WorkerInfo:
    """Loaded workers: limits and identity of their models."""

    engine: EngineInfo
    nli: str


@dataclass(frozen=True)
class NliResult(Generic[T]):
    """Values by group or pair, how many pairs of texts were asked for, and how many of them went through the model."""

    values: list[T]
    asked: int = 0
    computed: int = 0


class _Worker:
    """Loads its model on first use, so that a failure is an ordinary exception of ``load`` with its own type, and so
    that a worker that Ray restarted loads it again by itself."""

    def __init__(self, settings: WorkerSettings) -> None:
        logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
        for noisy in ("httpx", "ray"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        self._settings = settings
        self._model: Any = None

    def _create(self) -> Any:
        raise NotImplementedError

    def _loaded(self) -> Any:
        if self._model is None:
            import torch

            torch.set_num_threads(self._settings.threads)
            self._model = self._create()
        return self._model

    @ray.method(concurrency_group="health")
    def ping(self) -> int:
        """Process id; answers while a long request runs."""
        return os.getpid()


class ScoringWorker(_Worker):
    """Holds the scorer language model."""

    def _create(self) -> ScoringEngine:
        settings = self._settings
        if settings.engine == NO_MODEL:
            return NoEngine()
        names = ("device", "dtype", "max_model_len", "trust_remote_code", "gpu_memory", "lora_path")
        options = {name: getattr(settings, name) for name in names}
        if settings.engine == "vllm":
            from verl.utils.siop.scorer.engines.vllm_engine import VllmEngine

            return VllmEngine.from_pretrained(
                settings.model, tensor_parallel_size=settings.tensor_parallel_size, **options
            )
        from verl.utils.siop.scorer.engines.transformers_engine import TransformersEngine

        return TransformersEngine.from_pretrained(settings.model, **options)

    def load(self) -> EngineInfo:
        """Load the model if that has not happened yet.

        Raises:
            SiopConfigError: it cannot be loaded or used.
        """
        info: EngineInfo = self._loaded().info
        if info.engine == NO_MODEL:
            return info
        return replace(info, tokenizer=_digest(self._settings.model, self._settings.trust_remote_code))

    def support(self, rollouts: Sequence[RolloutQuery]) -> SupportResult:
        """See :class:`ScoringEngine`."""
        try:
            return self._loaded().support(rollouts)
        except EngineFailed:
            logger.exception("the engine failed; this worker ends so that Ray starts another")
            os._exit(1)


def _digest(model: str, trust_remote_code: bool) -> str | None:
    """Digest of the tokenizer that comes with a model, or None if there is none: requests bring ids, never text."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        logger.warning("%s: no tokenizer, so that trainers cannot compare theirs with it: %s", model, error)
        return None
    # Of a folder without any file of a tokenizer transformers makes an empty one.
    if Path(model).is_dir() and not any(
        (Path(model) / name).is_file() for name in tokenizer.vocab_files_names.values()
    ):
        logger.warning("%s: no tokenizer, so that trainers cannot compare theirs with it", model)
        return None
    return tokenizer_digest(tokenizer)


class NliWorker(_Worker):
    """Holds the NLI model."""

    def _create(self) -> TransformersNli:
        from verl.utils.siop.scorer.engines.nli_model import TransformersNli

        settings = self._settings
        assert settings.nli_model is not None
        return TransformersNli.from_pretrained(
            settings.nli_model,
            settings.device,
            trust_remote_code=settings.trust_remote_code,
            self_test=settings.nli_self_test,
        )

    def load(self) -> str:
        """Load the model if that has not happened yet, and return its name.

        Raises:
            SiopConfigError: it cannot be loaded or used.
        """
        return self._loaded().name

    def cluster(self, groups: Sequence[AnswerGroup]) -> NliResult[list[int]]:
        """See :class:`NliBackend`."""
        return self._counted(lambda nli: nli.cluster(groups))

    def entailment(self, pairs: Sequence[tuple[str, str]]) -> NliResult[float]:
        """See :class:`NliBackend`."""
        return self._counted(lambda nli: nli.entailment(pairs))

    def _counted(self, ask: Callable[[TransformersNli], list[T]]) -> NliResult[T]:
        nli = self._loaded()
        asked, computed = nli.asked, nli.computed
        values = ask(nli)
        return NliResult(values, nli.asked - asked, nli.computed - computed)
