"""What the rollouts of a run are made with: the model's tokenizer, its chat template, the tools.

Everything is built by the functions of verl that the run uses, from the same keys: what is checked is what runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from verl.tools.local_read_tool import LocalReadTool
from verl.trainer.siop.rollouts.agent_loop import AGENT_LOOP, UPSTREAM  # (registers it)
from verl.trainer.siop.rollouts.game_loop import VerifiedGameLoop
from verl.trainer.siop.rollouts.state_loop import VerifiedStateLoop
from verl.utils.siop.data.chat import MULTI_TURN, Chat, build_tools, first_cause
from verl.utils.siop.errors import SiopConfigError

# What is wrong with the ``extra_info`` of a row, or nothing.
RowCheck = Callable[[Any], str]

# Agent loops that call tools: verl's, and ours on it.
TOOL_AGENTS = (UPSTREAM, AGENT_LOOP)

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5")
NO_WEIGHTS = ("training_args", "optimizer", "scheduler")  # which trainers leave beside them


@dataclass(frozen=True)
class Policy(Chat):
    """The chat of a run, and its agent loops.

    Args:
        agent: verl's agent loop for rows that name none (``rollout.agent.default_agent_loop``).
        agents: all that are registered.
        scoring_agents: the classes of those that give each rollout its outcome themselves (``SCORES_ITSELF``), as games
            do: they need neither labels nor answers. Each with what is wrong with a row's ``extra_info``, or nothing.
        limit: tokens at which the run cuts a prompt, on the left (``rollout.prompt_length``).
        takes_media: whether the model takes images, videos or sounds beside texts.
    """

    agent: str
    agents: frozenset[str]
    scoring_agents: Mapping[str, RowCheck]
    limit: int
    takes_media: bool

    @property
    def scores_itself(self) -> bool:
        """Whether the default agent loop does, so that no answer is looked for."""
        return self.agent in self.scoring_agents

    @property
    def calls_tools(self) -> bool:
        """Whether the default agent loop calls tools; of a loop of the user's own nothing is known."""
        return self.agent in TOOL_AGENTS


# ---------------------------------------------------------------------- the model
def load_policy(config: DictConfig) -> Policy:
    """The policy's tokenizer, template and tools, and its agent loops.

    Raises:
        SiopConfigError: one of them cannot be had; the message names the key, the value and the reason.
    """
    from verl.utils.tokenizer.continuous_token_wiring import create_continuous_token_builder

    model, rollout = config.actor_rollout_ref.model, config.actor_rollout_ref.rollout
    loaded = _load_model(model)
    agents, scoring = _agents(config)
    if rollout.name == "vllm" and config.trainer.device == "cpu":
        _check_heads(loaded.hf_config, f"actor_rollout_ref.model.path={model.path}")
    try:
        builder = create_continuous_token_builder(
            loaded.tokenizer,
            hf_model_type=getattr(loaded.hf_config, "model_type", None),
            chat_template_kwargs=dict(config.data.get("apply_chat_template_kwargs") or {}),
            mm_processor_kwargs=dict(config.data.get("mm_processor_kwargs") or {}),
            processor=loaded.processor,
        )
    except ValueError as error:
        raise SiopConfigError(f"actor_rollout_ref.model.path={model.path}: {error}") from error
    return Policy(
        path=str(model.path),
        tokenizer=loaded.tokenizer,
        builder=builder,
        tools=build_tools(rollout.multi_turn),
        agent=rollout.agent.default_agent_loop,
        agents=agents,
        scoring_agents=scoring,
        format=rollout.multi_turn.format,
        limit=rollout.prompt_length,
        takes_media=loaded.processor is not None and builder.supports_multimodal(),
    )


def _load_model(model: DictConfig) -> Any:
    from verl.utils.config import omega_conf_to_dataclass

    key = f"actor_rollout_ref.model.path={model.path}"
    # This runs the user's external_lib and, with trust_remote_code, the model's own code.
    try:
        loaded = omega_conf_to_dataclass(model)
    except Exception as error:
        cause = (error.__cause__ if isinstance(error, InstantiationException) else None) or error
        if isinstance(cause, OSError | ValueError):
            raise SiopConfigError(f"{key}: no tokenizer can be loaded with its configuration: {cause}") from error
        raise SiopConfigError(f"{key}: the model cannot be used: {first_cause(error)}") from error
    folder = Path(str(model.path)).expanduser()
    if folder.is_dir() and not any(file.suffix in WEIGHTS and file.stem not in NO_WEIGHTS for file in folder.iterdir()):
        raise SiopConfigError(f"{key}: the folder holds no weights (*.safetensors or *.bin)")
    if loaded.custom_chat_template is not None:
        loaded.tokenizer.chat_template = loaded.custom_chat_template  # as the agent loop's worker does
    if not loaded.tokenizer.chat_template:
        raise SiopConfigError(
            f"{key}: the tokenizer has no chat template; use an instruction-tuned model or set "
            "actor_rollout_ref.model.custom_chat_template"
        )
    return loaded


def _check_heads(hf_config: Any, key: str) -> None:
    """Refuse what vLLM for CPUs would stop at in the first rollout."""
    try:
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
    except ImportError as error:
        raise SiopConfigError(
            f"actor_rollout_ref.rollout.name=vllm cannot be used here: {error}; take hf_cpu, or install vLLM for CPUs "
            "(bash scripts/setup_env.sh --vllm) and start with VIRTUAL_ENV=$PWD/.venv/vllm"
        ) from error
    size = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads
    allowed = CPUAttentionBackend.get_supported_head_sizes()
    if size not in allowed:
        raise SiopConfigError(
            f"{key} has attention heads of {size} numbers, and actor_rollout_ref.rollout.name=vllm on a CPU computes "
            f"{', '.join(map(str, allowed))} only; take hf_cpu or another model"
        )


def _agents(config: DictConfig) -> tuple[frozenset[str], dict[str, RowCheck]]:
    """Names of the agent loops, which must include the default one; and those that score rollouts themselves."""
    from verl.experimental.agent_loop.agent_loop import _agent_loop_registry
    from verl.utils.import_utils import resolve_config_path

    rollout = config.actor_rollout_ref.rollout
    checks = {name: _row_check(loop, f"agent loop {name}") for name, loop in _agent_loop_registry.items()}
    if path := rollout.agent.get("agent_loop_config_path"):
        key = f"actor_rollout_ref.rollout.agent.agent_loop_config_path={path}"
        try:
            loops: Any = OmegaConf.to_container(OmegaConf.load(resolve_config_path(path)), resolve=True)
            own = {str(loop["name"]): loop for loop in loops if loop["_target_"]}
        except (OSError, ValueError, TypeError, KeyError, OmegaConfBaseException) as error:
            raise SiopConfigError(f"{key}: not a list of agent loops: {error}") from error
        if len(own) < len(loops):
            raise SiopConfigError(f"{key}: two agent loops have the same name, of which verl would take one")
        for name, loop in own.items():
            checks[name] = _row_check(loop, key)
            if not config.trainer.get("val_only"):
                _check_comparison(loop, key, config.algorithm)
    if rollout.agent.default_agent_loop not in checks:
        raise SiopConfigError(
            f"actor_rollout_ref.rollout.agent.default_agent_loop={rollout.agent.default_agent_loop} is not allowed; "
            f"choose one of {', '.join(sorted(checks))}"
        )
    return frozenset(checks), {name: check for name, check in checks.items() if check is not None}


def _check_comparison(loop: Mapping[str, Any], key: str, algorithm: DictConfig) -> None:
    """Refuse to learn whole games from an agent loop that compares the actions of a state."""
    from verl.utils.import_utils import load_class_from_fqn

    if not issubclass(load_class_from_fqn(str(loop["_target_"])), VerifiedStateLoop):
        return
    for name, allowed in (("adv_estimator", "siop"), ("siop_reward_mode", "verifiable"), ("siop_outcome_weight", 0)):
        if algorithm.get(name) != allowed:
            raise SiopConfigError(
                f"{key}: the agent loop {loop['name']} compares the actions of one state, of which the outcome of the "
                f"game says nothing: algorithm.{name}={algorithm.get(name)} is not allowed with it; take {allowed} "
                "(ablation=vpr_loo), or config/game_loop.yaml"
            )


def _row_check(loop: Mapping[str, Any], key: str) -> RowCheck | None:
    """What an agent loop that scores rollouts itself has against a row; None for one that does not.

    Raises:
        SiopConfigError: it cannot be loaded, or its options are not allowed; the message begins with ``key``.
    """
    from verl.utils.import_utils import load_class_from_fqn

    try:
        found: Any = load_class_from_fqn(str(loop["_target_"]))
        judge = found.judge_of(loop) if issubclass(found, VerifiedGameLoop) else None
    except Exception as error:  # the user's code may raise anything
        raise SiopConfigError(
            f"{key}: the agent loop {loop.get('name', loop['_target_'])} cannot be used: {first_cause(error)}"
        ) from error
    if not getattr(found, "SCORES_ITSELF", False):
        return None
    wrong_row: RowCheck = getattr(found, "wrong_row", lambda _extra: "")
    if judge is None:
        return wrong_row
    asked: dict[Any, str] = {}  # by game

    def check(extra: Any) -> str:
        if told := str(wrong_row(extra)):
            return told
        game = extra["game"]
        if game not in asked:
            asked[game] = str(found.wrong_judge(extra, judge))
        return asked[game]

    return check


def check_tool_length(config: DictConfig, tools: Mapping[str, Any]) -> None:
    """Refuse a second cut of tool results that would take out their middle or their beginning, or any of a page.

    Raises:
        SiopConfigError: naming both limits.
    """
    multi_turn = config.actor_rollout_ref.rollout.multi_turn
    limit, side = multi_turn.max_tool_response_length, multi_turn.tool_response_truncate_side
    for name, tool in tools.items():
        longest = getattr(getattr(tool, "settings", None), "max_chars", None)
        if isinstance(tool, LocalReadTool) and limit < longest:
            raise SiopConfigError(
                f"{MULTI_TURN}.max_tool_response_length={limit} is below max_chars={longest} of the tool {name!r}: of "
                f"every page verl would cut off what no other has; raise it, or set max_chars to {limit} at most"
            )
        if longest is not None and limit < longest and side != "right":
            raise SiopConfigError(
                f"{MULTI_TURN}.max_tool_response_length={limit} is below max_chars={longest} of the tool {name!r}, and "
                f"with tool_response_truncate_side={side} verl would cut its results once more, through passages; "
                "raise it, lower max_chars, or set tool_response_truncate_side=right"
            )
