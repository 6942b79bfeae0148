"""Settings without effect are refused by name; those that have one pass."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import DictConfig, OmegaConf, open_dict
from preflight_world import MULTI_TURN, config_of
from verl.trainer.siop.checks.settings import REFUSALS, check_settings
from verl.utils.siop.errors import SiopConfigError
from verl.utils.siop.siop_process_reward import SiopConfig

ROOT = Path(__file__).parents[2]
ROLLOUT = "actor_rollout_ref.rollout"
MODEL = "actor_rollout_ref.model"
ACTOR, REF = "actor_rollout_ref.actor", "actor_rollout_ref.ref"
GRPO = {"algorithm.adv_estimator": "grpo"}
VPR = {"algorithm.siop_reward_mode": "verifiable"}


@pytest.fixture(scope="module")
def default() -> DictConfig:
    return config_of("actor_rollout_ref.model.path=m", "data.train_files=t", "data.val_files=v")


def _checked(default: DictConfig, changes: dict[str, Any]) -> str:
    config = copy.deepcopy(default)
    with open_dict(config):
        for key, value in changes.items():
            OmegaConf.update(config, key, value)
    return check_settings(config, SiopConfig.from_algorithm(config.algorithm))


# What is changed, and what the message must say beside the first of the keys with its value.
WITHOUT_EFFECT: list[tuple[dict[str, Any], str]] = [
    ({"algorithm.filter_groups.enable": True}, "set it to false"),
    ({"algorithm.filter_groups.enable": True, **GRPO}, "trainer.v1.trainer_mode=sync"),
    ({"trainer.v1.sampler.sync_refill_failed_groups": True}, "set it to false"),
    ({"trainer.v1.sampler.max_off_policy_threshold": 2}, "leave it at 8"),
    ({"trainer.v1.sampler.max_off_policy_strategy": "wait"}, "leave it at drop"),
    ({"trainer.use_v1": False}, "set it to true"),
    ({"trainer.val_only": True}, "trainer.val_before_train=true"),
    ({"data.gen_batch_size": 100}, "does not divide data.train_batch_size"),
    ({"reward.reward_model.enable": True}, "turn rewards replace every other reward"),
    ({"reward.reward_manager.name": "dapo"}, "set it to naive"),
    ({"reward.sandbox_fusion.url": "http://sandbox"}, "set it to null"),
    ({"critic.enable": True}, "set it to null"),
    ({"algorithm.lam": 0.95}, "set it to 1.0"),
    ({"algorithm.siop_outcome_weight": 0.5}, "siop_reward_mode=process"),
    ({"algorithm.siop_outcome_weight": 0.5, **GRPO}, "algorithm.adv_estimator=grpo"),
    ({"algorithm.siop_streaming": False, **VPR}, "which asks no scorer"),
    ({"algorithm.siop_strict_entailment": False, **VPR}, "which asks no scorer"),
    ({"algorithm.siop_gain": "prob", **VPR}, "measures no support"),
    ({"algorithm.siop_scorer": "policy", **VPR}, "measures no support"),
    ({"algorithm.siop_lambda": 1.0, **VPR}, "siop_reward_mode=verifiable"),
    ({"algorithm.use_pf_ppo": True}, "adv_estimator=gae only"),
    ({"algorithm.kl_ctrl.kl_coef": 0.01}, "actor_rollout_ref.actor.kl_loss_coef"),
    ({"algorithm.kl_ctrl.type": "adaptive"}, "algorithm.use_kl_in_reward=false"),
    ({"algorithm.kl_ctrl.target_kl": 0.2}, "algorithm.kl_ctrl.type=adaptive"),
    ({"algorithm.kl_ctrl.horizon": 5}, "algorithm.kl_ctrl.type=adaptive"),
    ({"algorithm.kl_penalty": "k3"}, "leave it at kl"),
    ({"algorithm.pf_ppo.reweight_method": "max_min"}, "leave it at pow"),
    ({"algorithm.pf_ppo.weight_pow": 3.0}, "leave it at 2.0"),
    ({"algorithm.filter_groups.metric": "acc"}, "leave it at reward"),
    ({"algorithm.filter_groups.max_num_gen_batches": 3}, "leave it at 0"),
    ({"algorithm.filter_groups.max_inflight_gen_batches": 3}, "leave it at 1"),
    ({f"{ACTOR}.kl_loss_coef": 0.05}, "use_kl_loss=false"),
    ({f"{ACTOR}.kl_loss_type": "k3"}, "use_kl_loss=false"),
    ({f"{ACTOR}.grad_clip": 0.5}, "actor_rollout_ref.actor.optim.clip_grad"),
    ({f"{ACTOR}.freeze_vision_tower": True}, "set it to false"),
    ({f"{ACTOR}.use_prefix_grouper": True}, "set it to false"),
    ({f"{ACTOR}.ppo_micro_batch_size": 4}, "ppo_micro_batch_size_per_gpu"),
    ({f"{ACTOR}.ppo_micro_batch_size_per_gpu": 4}, f"{ACTOR}.use_dynamic_bsz=false"),
    ({f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu": 4}, f"{ACTOR}.use_dynamic_bsz=false"),
    ({f"{ROLLOUT}.log_prob_use_dynamic_bsz": False}, "or neither"),
    ({f"{REF}.log_prob_micro_batch_size_per_gpu": 4}, "(REF_LOGPROB_MICRO_BATCH_SIZE_PER_GPU) has no effect"),
    ({f"{REF}.log_prob_micro_batch_size_per_gpu": 4, f"{ACTOR}.use_kl_loss": True}, "log_prob_use_dynamic_bsz=false"),
    ({"trainer.balance_batch": False}, "set it to true"),
    ({f"{ROLLOUT}.multi_stage_wake_up": True}, "set it to false"),
    ({f"{ROLLOUT}.tensor_model_parallel_size": 4}, "ROLLOUT_TP_SIZE) has no effect on a CPU"),
    ({f"{ROLLOUT}.gpu_memory_utilization": 0.4}, "ROLLOUT_GPU_MEM) has no effect on a CPU"),
    ({"critic.optim.lr": 0.5}, "there is no critic with algorithm.adv_estimator=siop; leave it at 1e-05"),
    ({"critic.optim.lr": 0.5, **GRPO}, "there is no critic with algorithm.adv_estimator=grpo"),
    ({"critic.model.path": "m"}, "there is no critic"),
    ({f"{MULTI_TURN}.enable": False}, "tool_config_path=null"),
    ({f"{ROLLOUT}.agent.default_agent_loop": "single_turn_agent"}, "set it to tool_agent"),
    ({f"{ROLLOUT}.temperature": 0}, "set it above 0"),
    ({f"{ROLLOUT}.do_sample": False}, "leave it at true"),
    ({f"{ROLLOUT}.over_sample_rate": 0.2}, "set it to 0"),
    ({f"{MULTI_TURN}.use_inference_chat_template": True}, "set it to false"),
    ({f"{MULTI_TURN}.tokenization_sanity_check_mode": "disable"}, "leave it at strict"),
    ({f"{MULTI_TURN}.num_repeat_rollouts": 4}, "actor_rollout_ref.rollout.n"),
    ({f"{ROLLOUT}.val_kwargs.n": 4, f"{ROLLOUT}.val_kwargs.temperature": 0}, "equal rollouts"),
    ({f"{ROLLOUT}.val_kwargs.do_sample": False, f"{ROLLOUT}.val_kwargs.temperature": 1.0}, "val_kwargs.temperature=0"),
    ({f"{MODEL}.lora_rank": 8}, "hf_cpu"),
    ({f"{MODEL}.lora.rank": 8}, "hf_cpu"),
    ({f"{MODEL}.lora_adapter_path": "adapter"}, "hf_cpu"),
    ({"data.return_raw_chat": False}, "set it to true"),
    ({"data.return_raw_input_ids": True}, "set it to false"),
    ({"data.return_full_prompt": True}, "set it to false"),
    ({"data.truncation": "left"}, "data.filter_overlong_prompts=true"),
    ({"data.tokenizer": "other"}, "actor_rollout_ref.model.tokenizer_path"),
    ({"data.trust_remote_code": True}, "actor_rollout_ref.model.trust_remote_code"),
    ({"data.reward_fn_key": "ability"}, "leave it at data_source"),
    ({"trainer.esi_redundant_time": 60}, "set it to 0"),
    ({"custom_reward_function.path": "mine.py"}, "set reward.custom_reward_function.path"),
    ({"reward_model.reward_manager": "dapo"}, "set reward.reward_model.reward_manager"),
    # --- of the method
    ({"algorithm.siop_eta": 2.0, "algorithm.siop_reward_mode": "cluster_frequency"}, "measures no support"),
    ({"algorithm.siop_gain": "log", "algorithm.siop_reward_mode": "majority_binary"}, "leave it at peak"),
    ({"algorithm.siop_scorer": "policy", "algorithm.siop_reward_mode": "majority_binary"}, "leave it at server"),
    ({"algorithm.siop_lambda": 0.3, "algorithm.siop_reward_mode": "query_consensus"}, "leave it at 0.5"),
    ({"algorithm.siop_num_refs": 2, "algorithm.siop_reward_mode": "query_consensus"}, "siop_consensus_terminal=frequ"),
    ({"algorithm.siop_consensus_terminal": "support"}, "siop_reward_mode=process"),
    ({"algorithm.siop_eta": 2.0, "algorithm.siop_use_gold_ref": True}, "siop_use_gold_ref=true"),
    ({"algorithm.siop_evidence": "max", "algorithm.siop_eta": 0}, "siop_eta=0"),
    ({"algorithm.siop_vote": "informed", "algorithm.siop_reward_mode": "cluster_frequency"}, "leave it at count"),
    ({"algorithm.siop_vote": "informed", "algorithm.siop_use_gold_ref": True}, "siop_use_gold_ref=true"),
    ({"algorithm.siop_epsilon": 1e-4}, "siop_gain=peak"),
    ({"algorithm.siop_turn_weight": 0.5}, "siop_baseline=leave_one_out"),
    ({"algorithm.siop_scorer_noise": 0.1, "algorithm.siop_baseline": "pooled"}, "siop_baseline=pooled"),
    ({"algorithm.siop_scorer_noise": 0.1, "algorithm.siop_reward_mode": "verifiable"}, "measures no support"),
    ({"algorithm.siop_baseline": "pooled", "algorithm.siop_advantage_mode": "broadcast"}, "siop_advantage_mode=broad"),
    ({"algorithm.siop_return": "min", "algorithm.siop_enable_two_pass": False}, "siop_enable_two_pass=false"),
    ({"algorithm.gamma": 0.5, "algorithm.siop_advantage_mode": "broadcast"}, "set it to 1.0"),
    ({"algorithm.gamma": 0.5, "algorithm.siop_enable_two_pass": False}, "siop_enable_two_pass=false"),
    ({"algorithm.siop_boundary": "assistant", "algorithm.siop_use_gold_ref": True}, "set it to observation"),
    ({"algorithm.siop_lambda": 0.3, **GRPO}, "algorithm.adv_estimator=grpo"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), WITHOUT_EFFECT, ids=[next(iter(row[0])) for row in WITHOUT_EFFECT])
def test_a_setting_without_effect_is_refused_by_name(
    default: DictConfig, changes: dict[str, Any], message: str
) -> None:
    key, value = next(iter(changes.items()))
    shown = re.escape(str(value).lower() if isinstance(value, bool) else str(value))
    with pytest.raises(SiopConfigError, match=rf"^{re.escape(key)}={shown} .*{re.escape(message)}"):
        _checked(default, changes)


def test_every_row_of_the_table_is_tried() -> None:
    assert {refusal.key for refusal in REFUSALS} <= {key for changes, _ in WITHOUT_EFFECT for key in changes}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        GRPO,
        # verl's own sampler honours it
        {"algorithm.filter_groups.enable": True, "trainer.v1.trainer_mode": "sync", **GRPO}
        | {f"trainer.v1.sampler.custom_sampler.{key}": None for key in ("path", "name")},
        {"trainer.val_only": True, "trainer.val_before_train": True},
        {"data.gen_batch_size": 64},
        {"reward.reward_manager.name": "dapo", **GRPO},
        {f"{MULTI_TURN}.enable": False, f"{MULTI_TURN}.tool_config_path": None},
        {f"{ROLLOUT}.agent.default_agent_loop": "single_turn_agent", f"{MULTI_TURN}.tool_config_path": None},
        {f"{ROLLOUT}.val_kwargs.{key}": value for key, value in (("n", 4), ("temperature", 1.0), ("do_sample", True))},
        {f"{ROLLOUT}.val_kwargs.do_sample": False, f"{ROLLOUT}.val_kwargs.temperature": 0},
        {f"{MODEL}.lora_rank": 8, f"{ROLLOUT}.name": "vllm"},
        {"data.trust_remote_code": True, f"{MODEL}.trust_remote_code": True},
        {"algorithm.kl_ctrl.kl_coef": 0.01, "algorithm.use_kl_in_reward": True, "algorithm.kl_penalty": "k3"},
        {f"{ACTOR}.kl_loss_coef": 0.05, f"{ACTOR}.kl_loss_type": "k3", f"{ACTOR}.use_kl_loss": True},
        {f"{ACTOR}.kl_loss_coef": 0, f"{ACTOR}.use_kl_loss": False},
        {f"{ACTOR}.ppo_micro_batch_size_per_gpu": 4, f"{ACTOR}.use_dynamic_bsz": False}
        | {f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu": 4, f"{ROLLOUT}.log_prob_use_dynamic_bsz": False},
        {f"{REF}.log_prob_micro_batch_size_per_gpu": 4, f"{REF}.log_prob_use_dynamic_bsz": False}
        | {f"{ACTOR}.use_kl_loss": True},
        {"critic.optim.lr": 0.5, "algorithm.adv_estimator": "gae"},
        {"actor_rollout_ref.actor.ppo_mini_batch_size": 4},  # which the critic takes over
        {f"{ROLLOUT}.tensor_model_parallel_size": 4, f"{ROLLOUT}.gpu_memory_utilization": 0.4}
        | {f"{ROLLOUT}.name": "vllm"},
        {"algorithm.siop_turn_weight": 0.5, "algorithm.siop_baseline": "turn_group"},
        {"algorithm.siop_epsilon": 1e-4, "algorithm.siop_gain": "log"},
        {"algorithm.siop_boundary": "assistant"},
        {"algorithm.siop_boundary": "observation", "algorithm.siop_use_gold_ref": True},
        {"algorithm.gamma": 0.5},
        {"algorithm.gamma": 0.5, **GRPO},
        # texts around a reference belong to a model, and stand in an experiment's settings for all methods
        {"algorithm.siop_reference_prefix": "<answer> ", "algorithm.siop_reward_mode": "majority_binary"},
    ],
    ids=str,
)  # fmt: skip
def test_a_setting_with_effect_passes(default: DictConfig, changes: dict[str, Any]) -> None:
    _checked(default, changes)


@pytest.mark.parametrize("path", sorted((ROOT / "config" / "ablation").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_preset_passes(default: DictConfig, path: Path) -> None:
    def leaves(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in section.items():
            found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        return found

    _checked(default, leaves(yaml.safe_load(path.read_text())))
