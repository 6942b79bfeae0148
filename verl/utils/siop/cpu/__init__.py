"""verl on a machine without an accelerator: platform, rollout replica, and the two places where upstream assumes a GPU.

Nothing here is active unless ``VERL_PLATFORM=cpu``.
"""

from __future__ import annotations

import os


def is_active() -> bool:
    """Whether this process runs verl on the CPU platform."""
    return os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu"


def activate() -> None:
    """Register the CPU platform and its rollouts, ``hf_cpu`` and ``vllm``, with verl, in this process."""
    import verl.utils.distributed as distributed
    from verl.workers.rollout.base import _ROLLOUT_REGISTRY
    from verl.workers.rollout.replica import RolloutReplicaRegistry

    from . import (
        platform,  # noqa: F401  (registers itself)
        vllm_distribution,
    )

    # verl registers its FSDP engines for "cuda" and "npu" only; the engine code itself is device-agnostic.
    os.environ.setdefault("VERL_ENGINE_DEVICE", "cuda")

    def load_hf() -> type:
        from .rollout import HfReplica

        return HfReplica

    def load_vllm() -> type:
        from .vllm_rollout import CpuVllmReplica

        return CpuVllmReplica

    vllm_distribution.register()
    RolloutReplicaRegistry.register("vllm", load_vllm)
    RolloutReplicaRegistry.register("hf_cpu", load_hf)
    _ROLLOUT_REGISTRY[("hf_cpu", "async")] = f"{__name__}.rollout.HfServerAdapter"

    upstream_init = distributed.initialize_global_process_group_ray
    if getattr(upstream_init, "siop_cpu", False):
        return

    def initialize_global_process_group_ray(timeout_second: int | None = None, backend: str | None = None) -> None:
        # Upstream chooses a free port, closes it and binds it seconds later, when another process of this machine may
        # have it. A worker alone in its group needs to tell nobody: the system gives it one as it binds.
        if os.environ.get("WORLD_SIZE", "1") == "1":
            os.environ["MASTER_PORT"] = "0"
        # Upstream's default, "cpu:gloo,<device>:<backend>", names the cpu twice here, which torch refuses.
        upstream_init(timeout_second, backend or "cpu:gloo")

    initialize_global_process_group_ray.siop_cpu = True  # type: ignore[attr-defined]
    distributed.initialize_global_process_group_ray = initialize_global_process_group_ray
