"""Text encoders of sentence-transformers, and what makes two of them the same."""

from __future__ import annotations

import hashlib
import logging
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from verl.utils.siop.errors import SiopError

# It logs every load and, through its dependencies, every request to the hub.
for _name in ("sentence_transformers", "httpx"):
    logging.getLogger(_name).setLevel(logging.WARNING)

logger = logging.getLogger(__name__)

DEFAULT_MODEL = "intfloat/e5-base-v2"
MAX_TOKENS = 256
DTYPES = ("float16", "bfloat16", "float32")
# The E5 models of 2022 to 2024 were trained with these, but their files do not say so.
_E5 = re.compile(r"(models--)?(intfloat(--|-|_))?(multilingual-)?e5-(small|base|large)(-v2|-unsupervised)?", re.I)
_LIKE_E5 = re.compile(r"(?<![a-z0-9])e5(?![a-z0-9])", re.I)
_MIN_TOKENS = 3  # two are special, at the beginning and the end
E5_PROMPTS = ("query: ", "passage: ")


class EncoderError(SiopError, ValueError):
    """The encoder cannot be loaded, is another one than expected, or gives vectors that cannot be used."""


class EncoderIdentity(BaseModel):
    """What an encoder's vectors depend on.

    Attributes:
        model: folder, or name on the Hugging Face hub.
        revision: commit on the hub; None of a folder.
        weights_sha256: over shape, dtype and bytes of all parameters in their order.
        dimension: of its vectors.
        pooling: of token vectors to one, such as mean or cls.
        query_prompt, passage_prompt: texts that are put in front.
        max_query_tokens, max_passage_tokens: longer texts are cut; prompt and special tokens count.
        dtype: that it computed the passages in.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    revision: str | None
    weights_sha256: str
    dimension: int
    pooling: str
    query_prompt: str
    passage_prompt: str
    max_query_tokens: int
    max_passage_tokens: int
    dtype: str


class Encoder:
    """Makes unit vectors of texts; the inner product of two is their similarity. Safe to share between threads.

    Attributes:
        identity: what its vectors depend on.
        device: where it computes, as ``cuda:0``.
    """

    def __init__(self, model: Any, identity: EncoderIdentity, device: str) -> None:
        self._model, self.identity, self.device = model, identity, device
        # Tokenizers and max_seq_length are no threads' private state.
        self._lock = threading.Lock()

    @classmethod
    def load(
        cls,
        model: str,
        *,
        revision: str | None = None,
        query_prompt: str | None = None,
        passage_prompt: str | None = None,
        max_query_tokens: int = MAX_TOKENS,
        max_passage_tokens: int = MAX_TOKENS,
        dtype: str | None = None,
        device: str = "cpu",
    ) -> Encoder:
        """Loads a model from a folder or the hub; code that comes with a model is not run.

        Args:
            model: folder, or name on the hub.
            revision: branch, tag or commit on the hub.
            query_prompt, passage_prompt: None for the model's own (those that E5 was trained with, for its models).
            max_query_tokens, max_passage_tokens: the model's own limit holds too.
            dtype: None for float16 on a GPU and float32 on a CPU.
            device: as ``cpu`` or ``cuda:0``.

        Raises:
            EncoderError: sentence-transformers is not installed, or there is no such model.
        """
        for name, value in (("max_query_tokens", max_query_tokens), ("max_passage_tokens", max_passage_tokens)):
            if value < _MIN_TOKENS:
                option = f"--{name.replace('_', '-')}"
                raise EncoderError(f"{option} is at least {_MIN_TOKENS}, special tokens included, got {value}")
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            raise EncoderError(
                f"dense retrieval needs the extra 'retrieval' (pip install 'siop-verl[retrieval]'): {error}"
            ) from error
        try:
            loaded = SentenceTransformer(
                model, revision=revision, device="cpu", model_kwargs={"dtype": "auto"}, trust_remote_code=False
            )
        except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
            why = " ".join(str(error).split())[:300]
            raise EncoderError(
                f"cannot load the encoder {model}: {why}; name a folder or a model of the Hugging Face hub that this "
                "machine can reach"
            ) from error
        weights = _weights_sha256(loaded)
        dtype = dtype or ("float32" if device == "cpu" else "float16")
        loaded = loaded.to(device=device, dtype=getattr(torch, dtype)).eval()
        own = loaded.prompts or {}
        e5, unnamed = E5_PROMPTS if _is_e5(model) else ("", ""), query_prompt is None and passage_prompt is None
        if query_prompt is None:
            query_prompt = own.get("query") or e5[0]
        if passage_prompt is None:
            passage_prompt = own.get("document") or own.get("passage") or e5[1]
        if unnamed and not (query_prompt or passage_prompt) and _LIKE_E5.search("/".join(_names(model))):
            logger.warning(
                "the encoder %s is perhaps one of E5, which needs prefixes, and gets none: it is not named as such a "
                "model, as e5-base-v2; give --query-prefix and --passage-prefix", model,
            )  # fmt: skip
        limit = loaded.max_seq_length or max(max_query_tokens, max_passage_tokens)
        probe = loaded.encode(["a"], convert_to_numpy=True, show_progress_bar=False)
        identity = EncoderIdentity(
            model=str(Path(model).resolve()) if Path(model).is_dir() else model,
            revision=_revision(loaded),
            weights_sha256=weights,
            dimension=int(probe.shape[1]),
            pooling=_pooling(loaded),
            query_prompt=query_prompt,
            passage_prompt=passage_prompt,
            max_query_tokens=min(max_query_tokens, limit),
            max_passage_tokens=min(max_passage_tokens, limit),
            dtype=dtype,
        )
        return cls(loaded, identity, device)

    @classmethod
    def load_same(cls, identity: EncoderIdentity, *, model: str | None = None, device: str = "cpu") -> Encoder:
        """The encoder with this identity; on a CPU it computes in float32.

        Args:
            identity: of the encoder that is expected.
            model: where it is, if it has moved.
            device: as ``cpu`` or ``cuda:0``.

        Raises:
            EncoderError: what is there is another encoder; all that differs is named.
        """
        found = cls.load(
            model or identity.model,
            revision=None if model else identity.revision,
            query_prompt=identity.query_prompt,
            passage_prompt=identity.passage_prompt,
            max_query_tokens=identity.max_query_tokens,
            max_passage_tokens=identity.max_passage_tokens,
            dtype="float32" if device == "cpu" else identity.dtype,
            device=device,
        )
        fields = ("weights_sha256", "dimension", "pooling", "max_query_tokens", "max_passage_tokens")
        differing = [
            f"{field} is {getattr(found.identity, field)}, not {getattr(identity, field)}"
            for field in fields
            if getattr(found.identity, field) != getattr(identity, field)
        ]
        if differing:
            raise EncoderError(
                f"the encoder {model or identity.model} is not the one that the index was built with "
                f"({identity.model}): {'; '.join(differing)}"
            )
        return found

    @contextmanager
    def pool(self, devices: Sequence[str]) -> Iterator[Any]:
        """For :meth:`encode_passages`: a process per device with a copy of the model; None if there is one device."""
        if len(devices) < 2:
            yield None
            return
        self._model.max_seq_length = self.identity.max_passage_tokens  # what the copies are made with
        pool = self._model.start_multi_process_pool(list(devices))
        try:
            yield pool
        finally:
            self._model.stop_multi_process_pool(pool)
            self._model.to(self.device)  # the pool has left it on the CPU

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
        """[texts, dimension] float32 unit vectors.

        Raises:
            EncoderError: a vector has no direction or is not finite.
        """
        identity = self.identity
        # On a CPU a few of similar length: what a batch pads costs more there than its size saves.
        batch_size = 8 if self.device == "cpu" else 64
        return self._encode(texts, identity.query_prompt, identity.max_query_tokens, batch_size, None)

    def encode_passages(self, texts: Sequence[str], *, batch_size: int = 32, pool: Any = None) -> np.ndarray:
        """[texts, dimension] float32 unit vectors.

        Args:
            texts: the passages.
            batch_size: passages that go through the model at once.
            pool: of :meth:`pool`.

        Raises:
            EncoderError: a vector has no direction or is not finite, or a process of the pool has died.
        """
        identity = self.identity
        return self._encode(texts, identity.passage_prompt, identity.max_passage_tokens, batch_size, pool)

    def encode_with(self, prompt: str, texts: Sequence[str]) -> np.ndarray:
        """[texts, dimension] float32 unit vectors, as of passages with this prompt in place of their own."""
        return self._encode(texts, prompt, self.identity.max_passage_tokens, 32, None)

    def _encode(self, texts: Sequence[str], prompt: str, max_tokens: int, batch_size: int, pool: Any) -> np.ndarray:
        # Equal texts once: what else is in a batch changes a vector's last digits, and so would order them by chance.
        places = {text: place for place, text in enumerate(dict.fromkeys(texts))}
        with self._lock:
            self._model.max_seq_length = max_tokens
            try:
                found = self._model.encode(
                    list(places),
                    prompt=prompt,
                    batch_size=batch_size,
                    show_progress_bar=False,
                    pool=pool,
                    device=None if pool else self.device,
                )
            except RuntimeError as error:
                if pool is None:
                    raise
                raise EncoderError(f"a process that encodes has failed: {error}") from error
        vectors = np.asarray(found, dtype=np.float32).reshape(-1, self.identity.dimension)
        vectors = vectors[[places[text] for text in texts]]
        # Here rather than in the model: in float16 it would lose three digits of the length.
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        good = np.isfinite(lengths[:, 0]) & (lengths[:, 0] > 0)
        if not good.all():
            raise EncoderError(
                f"the encoder {self.identity.model} in {self.identity.dtype} gives no usable vector for "
                f"{texts[int(np.argmin(good))][:80]!r}; a --dtype of wider range may help"
            )
        return vectors / lengths


def visible_devices(names: Sequence[str] | None = None) -> list[str]:
    """Devices to compute on: those named, or all visible GPUs, or the CPU.

    Raises:
        EncoderError: one of those named is not there.
    """
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if not names:
        return gpus or ["cpu"]
    devices = ["cuda:0" if name == "cuda" else name for name in names]
    if missing := [name for name in devices if name != "cpu" and name not in gpus]:
        raise EncoderError(f"--devices {','.join(missing)}: this machine has {', '.join([*gpus, 'cpu'])}")
    return devices


def _is_e5(model: str) -> bool:
    """Whether the name is that of an E5 model: on the hub, of its folder, or of its folder in the hub's cache."""
    names = _names(model)
    return bool(_E5.fullmatch(names[0] if len(names) == 3 and names[1] == "snapshots" else names[-1]))


def _names(model: str) -> tuple[str, ...]:
    """The last names of its path."""
    path = Path(model).resolve() if Path(model).is_dir() else Path(model)
    return path.parts[-3:] or ("",)


def _weights_sha256(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for parameter in model.parameters():
        digest.update(f"{tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(parameter.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _revision(model: Any) -> str | None:
    config = getattr(getattr(model[0], "auto_model", None), "config", None)
    return getattr(config, "_commit_hash", None)


def _pooling(model: Any) -> str:
    for module in model:
        mode = getattr(module, "pooling_mode", None)
        if mode is not None:
            return mode if isinstance(mode, str) else "+".join(mode)
        if hasattr(module, "get_pooling_mode_str"):  # sentence-transformers 5
            return module.get_pooling_mode_str()
    return "none"
