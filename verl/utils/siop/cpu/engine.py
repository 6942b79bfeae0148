"""Loaded by verl through ``actor_rollout_ref.model.external_lib`` before a training engine exists; CPU only."""

from __future__ import annotations

from typing import Any

import verl.workers.engine.fsdp.transformer_impl as transformer_impl
from torch.distributed.fsdp import CPUOffloadPolicy


def _offload_without_pinning(pin_memory: bool = False) -> CPUOffloadPolicy:
    return CPUOffloadPolicy(pin_memory=False)


# Upstream pins the memory of a forward-only model (the reference policy), and pinning needs an accelerator.
_upstream: Any = transformer_impl
_upstream.CPUOffloadPolicy = _offload_without_pinning
