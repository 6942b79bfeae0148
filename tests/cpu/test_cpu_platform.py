"""The CPU platform: what it registers, that it leaves other machines alone, and that its patches are still needed."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys

import pytest
import torch

LOOK = """
import json, os, verl
from verl.plugin.platform import PlatformRegistry, get_platform
import verl.utils.distributed as distributed
from verl.workers.rollout.replica import RolloutReplicaRegistry
print(json.dumps({
    "platform": get_platform().device_name,
    "registered": "cpu" in PlatformRegistry.registered_names(),
    "rollout": "hf_cpu" in RolloutReplicaRegistry._registry,
    "patched": distributed.initialize_global_process_group_ray.__module__ != "verl.utils.distributed",
    "engine": os.environ.get("VERL_ENGINE_DEVICE"),
}))
"""


def _look(**env: str) -> dict:
    clean = {k: v for k, v in os.environ.items() if k not in ("VERL_PLATFORM", "VERL_ENGINE_DEVICE")}
    output = subprocess.check_output([sys.executable, "-c", LOOK], env={**clean, **env}, text=True, timeout=120)
    return json.loads(output.strip().splitlines()[-1])


def test_active_only_when_asked_for() -> None:
    assert _look(VERL_PLATFORM="cpu") == {
        "platform": "cpu",
        "registered": True,
        "rollout": True,
        "patched": True,
        "engine": "cuda",
    }
    other = _look()
    assert other["platform"] != "cpu"
    assert other == {
        "platform": other["platform"],
        "registered": False,
        "rollout": False,
        "patched": False,
        "engine": None,
    }


def test_upstream_still_names_the_cpu_twice_and_torch_still_refuses_it() -> None:
    import verl.utils.distributed as distributed

    source = inspect.getsource(sys.modules[distributed.__name__])
    assert 'f"cpu:gloo,{get_device_name()}:{get_nccl_backend()}"' in source
    with pytest.raises(ValueError, match=r"[Dd]uplicate"):
        torch.distributed.init_process_group(
            "cpu:gloo,cpu:gloo", rank=0, world_size=1, store=torch.distributed.HashStore()
        )


@pytest.mark.skipif(torch.accelerator.is_available(), reason="pinning works where there is an accelerator")
def test_upstream_still_pins_and_pinning_still_needs_an_accelerator() -> None:
    import verl.workers.engine.fsdp.transformer_impl as transformer_impl

    assert "CPUOffloadPolicy(pin_memory=True)" in inspect.getsource(transformer_impl)
    with pytest.raises(RuntimeError):
        torch.zeros(1).pin_memory()
    from verl.utils.siop.cpu import engine

    assert engine._upstream.CPUOffloadPolicy(pin_memory=True).pin_memory is False
