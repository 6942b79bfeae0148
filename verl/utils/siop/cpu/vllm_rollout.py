"""``actor_rollout_ref.rollout.name=vllm`` without a GPU: verl's own vLLM rollout, on vLLM for CPUs."""

from __future__ import annotations

from typing import Any

import ray
from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica


class CpuVllmServer(vLLMHttpServer):
    """verl's server, whose worker processes can take new weights on a CPU too."""

    def _get_worker_extension_cls(self) -> str:
        return "verl.utils.siop.cpu.vllm_worker.CpuWorkerExtension"


class CpuVllmReplica(vLLMReplica):
    """verl's replica with this server."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.server_class = ray.remote(CpuVllmServer)
