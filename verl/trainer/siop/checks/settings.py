"""Settings that would have no effect, or none that their name promises: refused by name, in one table."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf
from verl.trainer.ppo.utils import need_critic
from verl.trainer.siop.checks.values import critic_defaults, flat, shown
from verl.utils.siop.errors import SiopConfigError
from verl.utils.siop.siop_process_reward import SiopConfig


@dataclass(frozen=True)
class Refusal:
    """A setting that is refused.

    Args:
        key: as it is written on the command line.
        wrong: whether the value of the key is to be refused, given the whole configuration.
        why: what follows ``key=value`` in the message: the reason, and what to do instead.
    """

    key: str
    wrong: Callable[[Any, DictConfig], bool]
    why: str


def _on(value: Any, config: DictConfig) -> bool:
    return bool(value)


def _off(value: Any, config: DictConfig) -> bool:
    return value is False


def _not(default: Any) -> Callable[[Any, DictConfig], bool]:
    return lambda value, config: value is not None and value != default


def _siop(config: DictConfig) -> bool:
    return config.algorithm.adv_estimator == "siop"


def _has_tools(config: DictConfig) -> bool:
    multi_turn = config.actor_rollout_ref.rollout.multi_turn
    return bool(multi_turn.get("tool_config_path") or multi_turn.get("function_tool_path"))


def _own_sampler(config: DictConfig) -> bool:
    return bool((config.trainer.v1.sampler.get("custom_sampler") or {}).get("path"))


def _waits_for_each_step(config: DictConfig) -> bool:
    return config.trainer.v1.trainer_mode in ("siop", "sync")


def _other_than(*values: Any) -> Callable[[Any, DictConfig], bool]:
    return lambda value, config: value not in values


def _has_reference(config: DictConfig) -> bool:
    return bool(config.algorithm.use_kl_in_reward or config.actor_rollout_ref.actor.use_kl_loss)


def _by_tokens(key: str) -> Callable[[Any, DictConfig], bool]:
    return lambda value, config: bool(OmegaConf.select(config, key))


def _adapts(config: DictConfig) -> bool:
    return bool(config.algorithm.use_kl_in_reward and config.algorithm.kl_ctrl.type == "adaptive")


def _by_outcome(config: DictConfig) -> bool:
    return _siop(config) and SiopConfig.from_algorithm(config.algorithm).outcome_advantage


def _on_cpu(config: DictConfig) -> bool:
    return config.actor_rollout_ref.rollout.name == "hf_cpu"


def _trains(config: DictConfig) -> bool:
    return not config.trainer.get("val_only", False)


ROLLOUT = "actor_rollout_ref.rollout"
ACTOR, REF = "actor_rollout_ref.actor", "actor_rollout_ref.ref"
MULTI_TURN = f"{ROLLOUT}.multi_turn"
MODEL = "actor_rollout_ref.model"
_NOT_READ = "is read nowhere in verl 0.9.1's trainer"
_LORA = "is not implemented in actor_rollout_ref.rollout.name=hf_cpu, which samples from the base weights; set it to "
_KL_LOSS = "has no effect with actor_rollout_ref.actor.use_kl_loss=false; set that to true, or leave it at "
_KL_REWARD = "has no effect with algorithm.use_kl_in_reward=false; leave it at "
_ADAPTIVE = "has no effect without algorithm.use_kl_in_reward=true algorithm.kl_ctrl.type=adaptive; leave it at "
_NO_GPU = "has no effect on a CPU, where actor_rollout_ref.rollout.name=hf_cpu samples; leave it at "
_BY_TOKENS = "has no effect with batches by tokens; set {}=false too, or leave it at null"
_OVERWRITTEN = "has no effect with algorithm.adv_estimator=siop, whose turn rewards replace every other reward"
_SAMPLER = (
    "has no effect: the sampler of the siop trainer drops whole questions of which a rollout failed, and no others; "
    "set it to false, or, without SIOP, take verl's own trainer and sampler (trainer.v1.trainer_mode=sync "
    "trainer.v1.sampler.custom_sampler.path=null trainer.v1.sampler.custom_sampler.name=null)"
)

# fmt: off
REFUSALS: tuple[Refusal, ...] = (
    # --- the step: which rollouts come in, which reward they have
    Refusal("algorithm.filter_groups.enable", lambda on, c: on and _own_sampler(c), _SAMPLER),
    Refusal("trainer.v1.sampler.sync_refill_failed_groups", lambda on, c: on and _own_sampler(c), _SAMPLER),
    Refusal("trainer.v1.sampler.max_off_policy_threshold", lambda value, c: value != 8 and _waits_for_each_step(c),
            "has no effect: the trainer waits for the rollouts of every step; leave it at 8"),
    Refusal("trainer.v1.sampler.max_off_policy_strategy", lambda value, c: value != "drop" and _waits_for_each_step(c),
            "has no effect: the trainer waits for the rollouts of every step; leave it at drop"),
    Refusal("trainer.use_v1", _off, "is not honoured here: SIOP runs in verl's V1 trainer; set it to true"),
    Refusal("trainer.val_only", lambda on, c: on and not c.trainer.val_before_train,
            "would train all the same in verl 0.9.1 unless trainer.val_before_train=true; set that too"),
    Refusal("data.gen_batch_size", lambda size, c: size is not None and c.data.train_batch_size % size != 0,
            "does not divide data.train_batch_size; leave it at null"),
    Refusal("reward.reward_model.enable", lambda on, c: on and _siop(c), f"{_OVERWRITTEN}; set it to false"),
    Refusal("reward.reward_manager.name", lambda name, c: name != "naive" and _siop(c),
            f"{_OVERWRITTEN}; set it to naive, which gives EM and F1 for the metrics"),
    Refusal("reward.sandbox_fusion.url", lambda url, c: bool(url) and _siop(c), f"{_OVERWRITTEN}; set it to null"),
    Refusal("critic.enable", lambda on, c: on is True and _siop(c),
            "would train a critic that algorithm.adv_estimator=siop does not ask; set it to null"),
    Refusal("algorithm.lam", lambda lam, c: lam != 1 and _siop(c),
            "has no effect with algorithm.adv_estimator=siop, which has no such parameter; set it to 1.0"),
    Refusal("algorithm.gamma", lambda gamma, c: gamma != 1 and _by_outcome(c),
            "has no effect with siop_advantage_mode=broadcast (or siop_enable_two_pass=false), which compares the sums "
            "of the turn rewards; set it to 1.0"),
    Refusal("algorithm.siop_boundary", lambda x, c: x == "assistant" and _siop(c) and c.algorithm.siop_use_gold_ref,
            "has no effect with siop_use_gold_ref=true, which leaves out the answering turn's gain, in which alone "
            "it differs from before_answer; set it to observation, as IGPO and TRACE have it, or to before_answer"),
    Refusal("algorithm.use_pf_ppo", lambda on, c: on and c.algorithm.adv_estimator != "gae",
            "has an effect with algorithm.adv_estimator=gae only; set it to false"),
    Refusal("algorithm.pf_ppo.reweight_method", lambda x, c: x != "pow" and not c.algorithm.use_pf_ppo,
            "has no effect with algorithm.use_pf_ppo=false; leave it at pow"),
    Refusal("algorithm.pf_ppo.weight_pow", lambda x, c: x != 2 and not c.algorithm.use_pf_ppo,
            "has no effect with algorithm.use_pf_ppo=false; leave it at 2.0"),
    Refusal("algorithm.filter_groups.metric", lambda x, c: x != "reward" and not c.algorithm.filter_groups.enable,
            "has no effect with algorithm.filter_groups.enable=false; leave it at reward"),
    Refusal("algorithm.filter_groups.max_inflight_gen_batches",
            lambda x, c: x != 1 and not c.algorithm.filter_groups.enable,
            "has no effect with algorithm.filter_groups.enable=false; leave it at 1"),
    Refusal("algorithm.filter_groups.max_num_gen_batches", _other_than(0),
            f"has no effect: it {_NOT_READ}; set max_inflight_gen_batches, and leave it at 0"),
    Refusal("algorithm.kl_penalty", lambda x, c: x != "kl" and not c.algorithm.use_kl_in_reward, f"{_KL_REWARD}kl"),
    Refusal("algorithm.kl_ctrl.type", lambda x, c: x != "fixed" and not c.algorithm.use_kl_in_reward,
            f"{_KL_REWARD}fixed"),
    Refusal("algorithm.kl_ctrl.target_kl", lambda x, c: x != 0.1 and not _adapts(c),
            f"{_ADAPTIVE}0.1"),
    Refusal("algorithm.kl_ctrl.horizon", lambda x, c: x != 10000 and not _adapts(c),
            f"{_ADAPTIVE}10000"),
    Refusal("algorithm.kl_ctrl.kl_coef", lambda x, c: x != 0.001 and not c.algorithm.use_kl_in_reward,
            "has no effect with algorithm.use_kl_in_reward=false; the coefficient of the loss is "
            "actor_rollout_ref.actor.kl_loss_coef"),
    # --- the update
    Refusal(f"{ACTOR}.kl_loss_coef", lambda x, c: x not in (0.005, 0) and not c.actor_rollout_ref.actor.use_kl_loss,
            f"{_KL_LOSS}0.005"),
    Refusal(f"{ACTOR}.kl_loss_type", lambda x, c: x != "low_var_kl" and not c.actor_rollout_ref.actor.use_kl_loss,
            f"{_KL_LOSS}low_var_kl"),
    Refusal(f"{ACTOR}.grad_clip", _other_than(1), f"has no effect: it {_NOT_READ}; set {ACTOR}.optim.clip_grad"),
    Refusal(f"{ACTOR}.freeze_vision_tower", _on, f"has no effect: it {_NOT_READ}; set it to false"),
    Refusal(f"{ACTOR}.use_prefix_grouper", _on, f"has no effect: it {_NOT_READ}; set it to false"),
    Refusal(f"{ACTOR}.ppo_micro_batch_size", _not(None),
            f"has no effect: it {_NOT_READ}; set ppo_micro_batch_size_per_gpu"),
    Refusal(f"{ACTOR}.ppo_micro_batch_size_per_gpu", _by_tokens(f"{ACTOR}.use_dynamic_bsz"),
            _BY_TOKENS.format(f"{ACTOR}.use_dynamic_bsz")),
    Refusal(f"{ROLLOUT}.log_prob_micro_batch_size_per_gpu", _by_tokens(f"{ROLLOUT}.log_prob_use_dynamic_bsz"),
            _BY_TOKENS.format(f"{ACTOR}.use_dynamic_bsz")),
    Refusal(f"{ROLLOUT}.log_prob_use_dynamic_bsz", lambda on, c: on != c.actor_rollout_ref.actor.use_dynamic_bsz,
            f"is not allowed: verl wants the same as {ACTOR}.use_dynamic_bsz; set "
            "both PPO_MICRO_BATCH_SIZE_PER_GPU and LOGPROB_MICRO_BATCH_SIZE_PER_GPU, or neither"),
    Refusal(f"{REF}.log_prob_micro_batch_size_per_gpu", lambda x, c: x is not None and not _has_reference(c),
            f"(REF_LOGPROB_MICRO_BATCH_SIZE_PER_GPU) has no effect without a reference policy; set {ACTOR}.use_kl_loss="
            "true (KL_LOSS_COEF), or leave it unset"),
    Refusal(f"{REF}.log_prob_micro_batch_size_per_gpu", _by_tokens(f"{REF}.log_prob_use_dynamic_bsz"),
            _BY_TOKENS.format(f"{REF}.log_prob_use_dynamic_bsz")),
    Refusal("trainer.balance_batch", _off, "has no effect: verl 0.9.1's V1 trainer always balances; set it to true"),
    # --- the rollouts
    Refusal(f"{ROLLOUT}.multi_stage_wake_up", _on, f"has no effect: it {_NOT_READ}; set it to false"),
    Refusal(f"{ROLLOUT}.tensor_model_parallel_size", lambda n, c: n != 1 and _on_cpu(c),
            f"(ROLLOUT_TP_SIZE) {_NO_GPU}1"),
    Refusal(f"{ROLLOUT}.gpu_memory_utilization", lambda x, c: x != 0.5 and _on_cpu(c),
            f"(ROLLOUT_GPU_MEM) {_NO_GPU}0.5"),
    Refusal(f"{MULTI_TURN}.enable", lambda on, c: not on and _has_tools(c),
            "has no effect: verl 0.9.1 calls the tools of multi_turn.tool_config_path whatever it says; set it to "
            "true, or tool_config_path=null for rollouts without tools"),
    Refusal(f"{ROLLOUT}.agent.default_agent_loop", lambda name, c: name == "single_turn_agent" and _has_tools(c),
            "calls no tools, but multi_turn.tool_config_path (or function_tool_path) names some; set it to tool_agent, "
            "or the path to null"),
    Refusal(f"{ROLLOUT}.temperature", lambda x, c: x <= 0 and _trains(c),
            "would make all rollouts of a question the same; set it above 0"),
    Refusal(f"{ROLLOUT}.do_sample", lambda on, c: on is False and _trains(c),
            f"has no effect: it {_NOT_READ}; leave it at true"),
    Refusal(f"{ROLLOUT}.over_sample_rate", _not(0), f"has no effect: it {_NOT_READ}; set it to 0"),
    Refusal(f"{MULTI_TURN}.use_inference_chat_template", _on, f"has no effect: it {_NOT_READ}; set it to false"),
    Refusal(f"{MULTI_TURN}.tokenization_sanity_check_mode", _not("strict"),
            f"has no effect: it {_NOT_READ}; leave it at strict"),
    Refusal(f"{MULTI_TURN}.num_repeat_rollouts", _not(None),
            f"has no effect: it {_NOT_READ}; set actor_rollout_ref.rollout.n"),
    Refusal(f"{ROLLOUT}.val_kwargs.n", lambda n, c: n > 1 and c.actor_rollout_ref.rollout.val_kwargs.temperature == 0,
            "would make equal rollouts, for val_kwargs.temperature is 0; set n=1, or a temperature above 0"),
    Refusal(f"{ROLLOUT}.val_kwargs.do_sample",
            lambda on, c: on is False and c.actor_rollout_ref.rollout.val_kwargs.temperature != 0,
            f"has no effect: it {_NOT_READ}, and val_kwargs.temperature is not 0; to sample set it to true, for greedy "
            "validation val_kwargs.temperature=0"),
    Refusal(f"{MODEL}.lora_rank", lambda rank, c: rank > 0 and _on_cpu(c), f"{_LORA}0"),
    Refusal(f"{MODEL}.lora.rank", lambda rank, c: rank > 0 and _on_cpu(c), f"{_LORA}0"),
    Refusal(f"{MODEL}.lora_adapter_path", lambda path, c: bool(path) and _on_cpu(c), f"{_LORA}null"),
    # --- the data
    Refusal("data.return_raw_chat", _off, f"has no effect: it {_NOT_READ}; set it to true"),
    Refusal("data.return_raw_input_ids", _on, f"has no effect: it {_NOT_READ}; set it to false"),
    Refusal("data.return_full_prompt", _on, f"has no effect: it {_NOT_READ}; set it to false"),
    Refusal("data.truncation", _not("error"),
            f"has no effect: it {_NOT_READ}; too long a prompt is refused here, or left out with "
            "data.filter_overlong_prompts=true"),
    Refusal("data.tokenizer", _not(None), f"has no effect: it {_NOT_READ}; set {MODEL}.tokenizer_path"),
    Refusal("data.trust_remote_code", lambda on, c: on and not c.actor_rollout_ref.model.get("trust_remote_code"),
            f"has no effect: it {_NOT_READ}; set {MODEL}.trust_remote_code"),
    Refusal("data.reward_fn_key", _not("data_source"), f"has no effect: it {_NOT_READ}; leave it at data_source"),
    # --- old places
    Refusal("trainer.esi_redundant_time", _not(0), f"has no effect: it {_NOT_READ}; set it to 0"),
)
# fmt: on

# Sections of verl's older trainers, which its V1 trainer does not read.
OLD_SECTIONS = ("custom_reward_function", "reward_model", "sandbox_fusion")

# Keys that only some methods read. The texts around a reference are not among them: they belong to a model, and stand
# in the settings of an experiment whatever its method is.
SUPPORT_KEYS = (
    "siop_num_refs",
    "siop_gain",
    "siop_epsilon",
    "siop_boundary",
    "siop_probe_opening",
    "siop_scorer",
    "siop_scorer_noise",
)
TARGET_KEYS = ("siop_vote", "siop_eta", "siop_evidence")
TURN_KEYS = ("siop_baseline", "siop_return", "siop_turn_weight")
METHOD_KEYS = (
    "siop_reward_mode",
    "siop_use_gold_ref",
    "siop_advantage_mode",
    "siop_enable_two_pass",
    "siop_lambda",
    "siop_strict_entailment",
    "siop_consensus_terminal",
    "siop_outcome_weight",
    "siop_streaming",
    *TURN_KEYS,
    *SUPPORT_KEYS,
    *TARGET_KEYS,
)
BUILT_IN = ("process", "majority_binary", "cluster_frequency", "query_consensus", "verifiable")
# What only a method with a scorer reads.
SCORER_KEYS = ("siop_streaming", "siop_strict_entailment", "siop_on_scorer_error")


def _ignored(siop: SiopConfig) -> Iterator[tuple[str, str]]:
    """Keys that the method does not read, each with the setting because of which it does not."""
    mode = siop.siop_reward_mode
    if mode in BUILT_IN:
        yield from _ignored_by_method(siop, mode)
    if siop.outcome_advantage:
        outcome = "siop_advantage_mode=broadcast" if siop.siop_enable_two_pass else "siop_enable_two_pass=false"
        yield from ((key, f"{outcome}, GRPO's advantage of the sum of the rewards") for key in TURN_KEYS)
    elif siop.siop_baseline in ("leave_one_out", "pooled", "turn_index"):
        baseline = f"siop_baseline={siop.siop_baseline}"
        unread = ("siop_turn_weight", "siop_scorer_noise") if siop.siop_baseline == "pooled" else ("siop_turn_weight",)
        yield from ((key, baseline) for key in unread)


def _ignored_by_method(siop: SiopConfig, mode: str) -> Iterator[tuple[str, str]]:
    if siop.siop_use_gold_ref:
        gold = "siop_use_gold_ref=true, which asks for no clusters"
        yield from ((key, gold) for key in ("siop_lambda", *TARGET_KEYS, "siop_num_refs", "siop_strict_entailment"))
    elif mode != "process":
        method = f"siop_reward_mode={mode}"
        yield "siop_lambda", method
        if mode == "query_consensus":
            method += f" siop_consensus_terminal={siop.siop_consensus_terminal}"
        if not siop.measures_support:
            yield from ((key, f"{method}, which measures no support") for key in (*SUPPORT_KEYS, *TARGET_KEYS))
    if mode != "query_consensus":
        yield "siop_consensus_terminal", f"siop_reward_mode={mode}"
    if mode != "verifiable":
        yield "siop_outcome_weight", f"siop_reward_mode={mode}"
    if not siop.needs_scorer:
        yield from ((key, f"siop_reward_mode={mode}, which asks no scorer") for key in SCORER_KEYS)
    if siop.siop_eta == 0:
        yield "siop_evidence", "siop_eta=0, which leaves evidence out"
    if siop.siop_scorer == "policy":
        yield "siop_streaming", "siop_scorer=policy, which cannot generate and score at once"
    if siop.siop_gain != "log":
        yield "siop_epsilon", f"siop_gain={siop.siop_gain}, which takes no logarithm"


def check_settings(config: DictConfig, siop: SiopConfig) -> str:
    """Refuse every setting that would have no effect.

    Raises:
        SiopConfigError: naming the key, its value, the reason and what to set instead.
    """
    for refusal in REFUSALS:
        value = OmegaConf.select(config, refusal.key)
        if value is not None and refusal.wrong(value, config):
            raise SiopConfigError(f"{refusal.key}={shown(value)} {refusal.why}")
    for section in OLD_SECTIONS:
        for key, value in _leaves(OmegaConf.select(config, section), section):
            if value is not None:
                raise SiopConfigError(f"{key}={shown(value)} has no effect in verl 0.9.1's trainer; set reward.{key}")
    _check_critic(config)
    if _siop(config):
        unread = list(_ignored(siop))
    else:
        other = f"algorithm.adv_estimator={config.algorithm.adv_estimator}"
        unread = [(key, other) for key in METHOD_KEYS]
    default = SiopConfig()
    for key, because in unread:
        if getattr(siop, key) != getattr(default, key):
            raise SiopConfigError(
                f"algorithm.{key}={shown(getattr(siop, key))} has no effect with {because}; leave it at "
                f"{shown(getattr(default, key))}"
            )
    return "no setting without effect"


def _check_critic(config: DictConfig) -> None:
    """Refuse settings of a critic that is not there. What it takes over from the actor may be anything."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that there is none
        if need_critic(config):
            return
    default = critic_defaults(str(config.critic.get("_target_")))
    for key, value in flat(OmegaConf.to_container(config.critic), "critic"):
        if key in default and key != "critic.enable" and value != default[key] and "${" not in str(default[key]):
            raise SiopConfigError(
                f"{key}={shown(value)} has no effect: there is no critic with algorithm.adv_estimator="
                f"{config.algorithm.adv_estimator}; leave it at {shown(default[key])}"
            )


def _leaves(section: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(section, DictConfig):
        for key in section:
            yield from _leaves(section[key], f"{path}.{key!s}")
    else:
        yield path, section
