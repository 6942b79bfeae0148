"""The machine: Python and packages, GPUs, shared memory, disk. For the doctor; nothing is started or changed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from omegaconf import DictConfig, OmegaConf
from packaging.requirements import Requirement
from packaging.version import Version
from verl.utils.siop.errors import SiopError

GIB = 2**30
PROJECT = "siop-verl"
# The trainer writes the weights with their optimizer in float32, and a copy: so many times a file of bfloat16 weights.
CHECKPOINT_SIZE = 7
FULL_BYTES = 32 * 2**20
# Packages of verl's rollout engines.
ENGINES = {"vllm": "vllm", "sglang": "sglang", "trtllm": "tensorrt-llm"}


class MachineError(SiopError, RuntimeError):
    """Something about this machine or its packages would end a run; the message says what to do."""


def check_packages(config: DictConfig) -> str:
    """Check Python, and that every package of this project's requirements is there in a version that they allow.

    Raises:
        MachineError: naming what is missing or wrong, and the command that repairs it.
    """
    if not (3, 10) <= sys.version_info[:2] <= (3, 12):
        raise MachineError(f"Python {sys.version.split()[0]} in {sys.executable}: take 3.10, 3.11 or 3.12")
    wrong = []
    for text in importlib.metadata.requires(PROJECT) or []:
        requirement = Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        found = _version(requirement.name)
        if found is None or not requirement.specifier.contains(Version(found), prereleases=True):
            wrong.append(f"{requirement.name} {found or 'missing'}, needs {requirement.specifier or 'any version'}")
    needed = ["torch", "transformers", "ray", "TransferQueue"]
    if engine := ENGINES.get(config.actor_rollout_ref.rollout.name):
        needed.append(engine)
    wrong += [f"{name} missing" for name in needed if _version(name) is None]
    if wrong:
        raise MachineError(
            f"in {sys.executable}: {'; '.join(wrong)}. Install with pip install -r requirements.txt (GPU) or bash "
            "scripts/setup_env.sh (CPU)"
        )
    versions = ", ".join(f"{name} {_version(name)}" for name in ("verl", *needed))
    return f"Python {sys.version.split()[0]} ({sys.executable}), {versions}"


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_plugin(config: DictConfig) -> str:
    """Check that verl knows what this project registers; see ``require_registered``."""
    from verl.trainer.siop.plugin import require_registered

    require_registered()
    return "the estimator siop is registered with verl"


# ---------------------------------------------------------------------- GPUs
def check_gpus(config: DictConfig, warn: Callable[[str], None]) -> str:
    """Check that the GPUs that the run asks for are there, that torch can use them, and that enough memory is free.

    Raises:
        MachineError: naming the numbers.
    """
    gpus = _gpus()
    if config.trainer.device == "cpu":
        if gpus:
            warn(f"{len(gpus)} GPU(s) here, but trainer.device=cpu (N_GPUS_PER_NODE=0): the run uses the CPU")
        return "not used"
    import torch

    if gpus and (torch.version.cuda or torch.version.hip) is None:
        raise MachineError(
            f"torch {torch.__version__} in {sys.executable} is a CPU build, and this machine has {len(gpus)} GPU(s): "
            "install the build for them (pip install -r requirements.txt), or activate the environment that has it"
        )
    if OmegaConf.select(config, "ray_kwargs.ray_init.address") not in (None, "local"):
        return f"{len(gpus)} here; those of the Ray cluster are not looked at"
    asked = config.trainer.n_gpus_per_node
    if asked > len(gpus):
        raise MachineError(
            f"trainer.n_gpus_per_node={asked} (N_GPUS_PER_NODE), but {len(gpus)} GPU(s) can be seen: nvidia-smi and "
            "CUDA_VISIBLE_DEVICES say which; set N_GPUS_PER_NODE=0 for the CPU"
        )
    share = float(config.actor_rollout_ref.rollout.gpu_memory_utilization)
    for index, free, total in gpus[:asked]:
        if free < share * total:
            raise MachineError(
                f"GPU {index} has {free / GIB:.0f} of {total / GIB:.0f} GiB free, and the rollout engine asks for "
                f"{share * total / GIB:.0f} (gpu_memory_utilization={share}): lower ROLLOUT_GPU_MEM, stop what holds "
                "the rest, or name other GPUs (CUDA_VISIBLE_DEVICES)"
            )
    return f"{asked} used, {', '.join(f'{free / GIB:.0f} of {total / GIB:.0f} GiB free' for _, free, total in gpus)}"


def _gpus() -> list[tuple[int, int, int]]:
    """(index, free bytes, all bytes) of each GPU that a process started here sees."""
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=index,memory.free,memory.total", "--format=csv,noheader,nounits"]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES", "").replace(" ", ""):
        query += ["-i", visible]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    except subprocess.TimeoutExpired as error:
        raise MachineError("nvidia-smi does not answer within 30 s: the driver hangs; restart the machine") from error
    rows = [line.split(",") for line in done.stdout.splitlines()] if done.returncode == 0 else []
    return [
        (int(row[0]), int(row[1]) * 2**20, int(row[2]) * 2**20)
        for row in rows
        if len(row) == 3 and all(cell.strip().isdigit() for cell in row)
    ]


def check_attention(config: DictConfig) -> str:
    """Check that the kernels of the attention that the run asks for are installed.

    Raises:
        MachineError: flash-attn is missing where it is asked for.
    """
    name = OmegaConf.select(config, "actor_rollout_ref.model.override_config.attn_implementation")
    asked = name or "flash_attention_2"
    if config.trainer.device == "cpu" or not asked.startswith("flash_attention"):
        return asked
    if importlib.util.find_spec("flash_attn") is None:
        raise MachineError(
            "flash-attn is not installed, and the actor asks for it: pip install flash-attn --no-build-isolation, or "
            "++actor_rollout_ref.model.override_config.attn_implementation=sdpa (slower on long rollouts)"
        )
    return f"{asked}, flash-attn {_version('flash-attn') or '?'}"


# ---------------------------------------------------------------------- Ray and space
def check_ray(config: DictConfig, warn: Callable[[str], None]) -> str:
    """Check that Ray can be imported, that its cluster can be reached if one is named, and its shared memory.

    Raises:
        MachineError: nothing listens at the cluster's address.
    """
    import ray

    address = OmegaConf.select(config, "ray_kwargs.ray_init.address")
    if address not in (None, "local", "auto") and "://" not in str(address):
        host, _, port = str(address).rpartition(":")
        try:
            socket.create_connection((host, int(port)), timeout=5).close()
        except (OSError, ValueError) as error:
            raise MachineError(
                f"ray_kwargs.ray_init.address={address} (RAY_ADDRESS): no connection: {error}; start Ray there (ray "
                "start --head), or unset RAY_ADDRESS"
            ) from error
        return f"Ray {ray.__version__}, cluster at {address}"
    shared = Path("/dev/shm")
    if not shared.is_dir():
        return f"Ray {ray.__version__}, private"
    free = shutil.disk_usage(shared).free
    wanted = OmegaConf.select(config, "ray_kwargs.ray_init.object_store_memory") or 2 * GIB
    if free < wanted:
        warn(
            f"/dev/shm has {free / GIB:.1f} GiB free, Ray's object store takes {wanted / GIB:.1f}: it falls back to "
            "the disk and is slow; give the container more (docker run --shm-size)"
        )
    return f"Ray {ray.__version__}, private; /dev/shm {free / GIB:.1f} GiB free"


def full_disk(folder: Path) -> str | None:
    """That the disk of this folder has next to nothing free; None if it has."""
    free = shutil.disk_usage(_existing(folder)).free
    return f"the disk of {folder} is full ({free / 2**20:.0f} MiB free)" if free < FULL_BYTES else None


def _existing(folder: Path) -> Path:
    return next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())


def check_disk(config: DictConfig, warn: Callable[[str], None]) -> str:
    """Check that the folder of the checkpoints can be written, and that one fits.

    Raises:
        MachineError: it cannot, or it does not.
    """
    folder = Path(config.trainer.default_local_dir).expanduser().absolute()
    place = _existing(folder)
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise MachineError(f"trainer.default_local_dir={folder} (OUTPUT_DIR): {place} cannot be written")
    free = shutil.disk_usage(place).free
    weights = Path(str(config.actor_rollout_ref.model.path)).expanduser()
    need = CHECKPOINT_SIZE * sum(file.stat().st_size for file in weights.glob("*.safetensors"))
    found = f"{folder}: {free / GIB:.0f} GiB free"
    if not need or config.trainer.save_freq <= 0 or config.trainer.get("val_only", False):
        return found
    if free < need:
        raise MachineError(f"{found}, one checkpoint takes about {need / GIB:.0f}: set OUTPUT_DIR to another disk")
    if free < 3 * need:
        warn(f"{found}, of which a checkpoint takes about {need / GIB:.0f}, and three are there while one is written")
    return f"{found}, a checkpoint takes about {need / GIB:.1f}"
