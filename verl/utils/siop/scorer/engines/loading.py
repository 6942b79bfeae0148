"""What loading a model has in common: its options, its log line and its failures. No torch here."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from verl.utils.siop.errors import SiopConfigError

logger = logging.getLogger(__name__)

# What transformers and peft raise for a model that is not there, or not what it should be.
LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError, UserWarning)


def one_line(error: BaseException) -> str:
    """The message of an error, short enough for a log line."""
    return " ".join(str(error).split())[:400] or type(error).__name__


@contextmanager
def as_config_error(what: str, errors: type[Exception] | tuple[type[Exception], ...] = LOAD_ERRORS) -> Iterator[None]:
    """Turn ``errors`` into a :class:`SiopConfigError` that begins with ``what``."""
    try:
        yield
    except SiopConfigError:
        raise
    except errors as error:
        raise SiopConfigError(f"{what}: {one_line(error)}") from error


def is_cpu(device: str) -> bool:
    """Whether a torch device is the CPU."""
    return device.partition(":")[0] == "cpu"


def dtype_on(device: str, dtype: str, on_gpu: str = "auto") -> str:
    """``dtype``, where ``auto`` is float32 on CPU and ``on_gpu`` on GPU."""
    return dtype if dtype != "auto" else "float32" if is_cpu(device) else on_gpu


def log_loaded(model: str, started: float) -> None:
    """Log a model that has been loading since ``started``, as ``time.monotonic`` counts."""
    logger.info("%s, loaded in %.1f s", model, time.monotonic() - started)
