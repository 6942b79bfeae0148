"""Runs inside the worker process of vLLM for CPUs; see :mod:`verl.utils.siop.cpu.vllm_rollout`."""

from __future__ import annotations

from typing import Any

import vllm.model_executor.layers.utils as layers
from verl.workers.rollout.vllm_rollout.utils import vLLMColocateWorkerExtension


def keep_linear_weights() -> None:
    """Let linear layers keep their weights beside the packed copy that they compute with.

    vLLM drops them after packing, so that nothing is left into which new weights could be loaded. verl packs again
    after each load.
    """
    upstream = layers.dispatch_cpu_unquantized_gemm
    if getattr(upstream, "siop_keeps", False):
        return

    def dispatch_cpu_unquantized_gemm(layer: Any, remove_weight: bool) -> None:
        upstream(layer, remove_weight=False)

    dispatch_cpu_unquantized_gemm.siop_keeps = True  # type: ignore[attr-defined]
    layers.dispatch_cpu_unquantized_gemm = dispatch_cpu_unquantized_gemm


class CpuWorkerExtension(vLLMColocateWorkerExtension):
    """verl's extension of the worker, which exists before the model is loaded."""

    def __new__(cls, **kwargs: Any) -> CpuWorkerExtension:
        keep_linear_weights()
        return super().__new__(cls, **kwargs)
