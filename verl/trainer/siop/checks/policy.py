"""What the rollouts of a run are made with: the model's tokenizer, its chat template, the tools.

Everything is built by the functions of verl that the run uses, from the same keys: what is checked is what runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from verl.trainer.siop.rollouts.agent_loop import AGENT_LOOP, UPSTREAM  # (registers it)
from verl.utils.siop.errors import SiopConfigError, SiopError

MULTI_TURN = "actor_rollout_ref.rollout.multi_turn"
# Agent loops that call tools: verl's, and ours on it.
TOOL_AGENTS = (UPSTREAM, AGENT_LOOP)
Messages = Sequence[Mapping[str, Any]]


class PromptError(SiopError, ValueError):
    """The model's chat template, or a tool's result in it, cannot be rendered."""


@dataclass(frozen=True)
class Policy:
    """The parts of the agent loop that turn messages into tokens and tokens into calls.

    Args:
        path: where the model comes from, for messages.
        tokenizer: the model's.
        builder: verl's builder of prompts, which renders the chat template.
        tools: the tools by name.
        agent: verl's agent loop for rows that name none (``rollout.agent.default_agent_loop``).
        agents: all that are registered.
        format: ``multi_turn.format``, how a call is written.
        limit: tokens at which the run cuts a prompt, on the left (``rollout.prompt_length``).
    """

    path: str
    tokenizer: Any
    builder: Any
    tools: dict[str, Any]
    agent: str
    agents: frozenset[str]
    format: str
    limit: int

    @property
    def calls_tools(self) -> bool:
        """Whether the default agent loop calls tools; of a loop of the user's own nothing is known."""
        return self.agent in TOOL_AGENTS

    def schemas(self, names: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """The tools that a prompt describes: all, or those that a row selects (``extra_info.tool_selection``)."""
        # As verl's tool agent: an empty selection is none.
        chosen = [self.tools[name] for name in names if name in self.tools] if names else self.tools.values()
        return [tool.tool_schema.model_dump(exclude_unset=True, exclude_none=True) for tool in chosen]

    def prompt_ids(self, messages: Messages, tools: list[dict[str, Any]]) -> list[int]:
        """The tokens of a prompt as the run makes them, before it cuts them.

        Raises:
            PromptError: the template raises; the text is its first reason.
        """
        # A template is a program that came with the model, and may raise anything.
        try:
            ids: list[int] = self.builder.build_initial_tokens(list(messages), tools=tools)
        except Exception as error:
            raise PromptError(first_cause(error)) from error
        return ids

    def render(self, messages: Messages, generation: bool, tools: list[dict[str, Any]]) -> str:
        """The text of a conversation by the same template; ``generation`` opens the assistant's turn after it.

        Raises:
            PromptError: the template raises.
        """
        from verl.utils.tokenizer.chat_template import apply_chat_template

        options = self.builder.chat_template_kwargs
        try:
            text = apply_chat_template(
                self.tokenizer,
                [dict(message) for message in messages],
                tokenize=False,
                add_generation_prompt=generation,
                tools=tools,
                **options,
            )
        except Exception as error:
            raise PromptError(first_cause(error)) from error
        return str(text)


def first_cause(error: BaseException) -> str:
    """One line about what went wrong first: verl tries some things a second time, in another way."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


# ---------------------------------------------------------------------- the model
def load_policy(config: DictConfig) -> Policy:
    """The policy's tokenizer, template and tools, and its agent loops.

    Raises:
        SiopConfigError: one of them cannot be had; the message names the key, the value and the reason.
    """
    from verl.utils.tokenizer.continuous_token_wiring import create_continuous_token_builder

    model, rollout = config.actor_rollout_ref.model, config.actor_rollout_ref.rollout
    loaded = _load_model(model)
    agents = _agents(rollout)
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
        format=rollout.multi_turn.format,
        limit=rollout.prompt_length,
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
    if loaded.custom_chat_template is not None:
        loaded.tokenizer.chat_template = loaded.custom_chat_template  # as the agent loop's worker does
    if not loaded.tokenizer.chat_template:
        raise SiopConfigError(
            f"{key}: the tokenizer has no chat template; use an instruction-tuned model or set "
            "actor_rollout_ref.model.custom_chat_template"
        )
    return loaded


def _agents(rollout: DictConfig) -> frozenset[str]:
    """Names of the agent loops, which must include the default one."""
    from verl.experimental.agent_loop.agent_loop import _agent_loop_registry
    from verl.utils.import_utils import resolve_config_path

    names = set(_agent_loop_registry)
    if path := rollout.agent.get("agent_loop_config_path"):
        try:
            loops = OmegaConf.to_container(OmegaConf.load(resolve_config_path(path)))
            names |= {str(loop["name"]) for loop in loops}  # type: ignore[union-attr,call-overload,index]
        except (OSError, ValueError, TypeError, KeyError, OmegaConfBaseException) as error:
            raise SiopConfigError(
                f"actor_rollout_ref.rollout.agent.agent_loop_config_path={path}: not a list of agent loops: {error}"
            ) from error
    if rollout.agent.default_agent_loop not in names:
        raise SiopConfigError(
            f"actor_rollout_ref.rollout.agent.default_agent_loop={rollout.agent.default_agent_loop} is not allowed; "
            f"choose one of {', '.join(sorted(names))}"
        )
    return frozenset(names)


# ---------------------------------------------------------------------- the tools
def build_tools(multi_turn: DictConfig) -> dict[str, Any]:
    """The tools of ``multi_turn.tool_config_path`` and ``function_tool_path``, instantiated; no network is used.

    Raises:
        SiopConfigError: a file is missing or malformed, a class cannot be imported or refuses its configuration, or two
            tools have one name.
    """
    from verl.tools.tool_registry import load_all_tools
    from verl.utils.import_utils import resolve_config_path

    paths: dict[str, str | None] = {}
    for key in ("tool_config_path", "function_tool_path"):
        path = multi_turn.get(key)
        try:
            paths[key] = resolve_config_path(path) if path else None
        except FileNotFoundError:
            raise SiopConfigError(f"{MULTI_TURN}.{key}={path}: no such file") from None
        if path and not Path(str(paths[key])).is_file():
            raise SiopConfigError(f"{MULTI_TURN}.{key}={path}: no such file")
    if paths["tool_config_path"]:
        _check_tool_file(paths["tool_config_path"], f"{MULTI_TURN}.tool_config_path={multi_turn.tool_config_path}")
    named = ", ".join(f"{MULTI_TURN}.{key}={path}" for key, path in paths.items() if path)
    # A tool's constructor is the user's code.
    try:
        tools = load_all_tools(**paths)
    except SiopConfigError as error:
        raise SiopConfigError(f"{named}: {error}") from error
    except Exception as error:
        raise SiopConfigError(f"{named}: the tools cannot be built: {first_cause(error)}") from error
    twice = [name for name, count in Counter(tool.name for tool in tools).items() if count > 1]
    if twice:
        raise SiopConfigError(f"{named}: two tools are called {twice[0]!r}; the name of a tool must be its own")
    return {tool.name: tool for tool in tools}


def _check_tool_file(path: str, named: str) -> None:
    from verl.tools.tool_registry import get_tool_class

    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except Exception as error:  # YAML, OmegaConf and its resolvers have no common root
        raise SiopConfigError(f"{named}: {first_cause(error)}") from error
    entries = content.get("tools") if isinstance(content, dict) else None
    if not isinstance(entries, list):
        raise SiopConfigError(f"{named}: needs a list under the key 'tools'")
    for index, entry in enumerate(entries):
        where = f"{named}: tools[{index}]"
        if not isinstance(entry, dict) or not {"class_name", "config"} <= set(entry):
            # Not the entry itself: it may hold a secret.
            found = sorted(map(str, entry)) if isinstance(entry, dict) else type(entry).__name__
            raise SiopConfigError(f"{where} needs the keys class_name and config, got {found}")
        if not isinstance(entry["config"], dict) or entry["config"].get("type") != "native":
            raise SiopConfigError(f"{where}.config needs type: native")
        name = str(entry["class_name"])
        try:
            get_tool_class(name)
        except Exception as error:  # importing a module runs it
            raise SiopConfigError(f"{where}.class_name={name} cannot be imported: {first_cause(error)}") from error


def check_tool_length(config: DictConfig, tools: Mapping[str, Any]) -> None:
    """Refuse a second cut of tool results that would take out their middle or their beginning.

    Raises:
        SiopConfigError: naming both limits.
    """
    multi_turn = config.actor_rollout_ref.rollout.multi_turn
    limit, side = multi_turn.max_tool_response_length, multi_turn.tool_response_truncate_side
    for name, tool in tools.items():
        longest = getattr(getattr(tool, "settings", None), "max_chars", None)
        if longest is not None and limit < longest and side != "right":
            raise SiopConfigError(
                f"{MULTI_TURN}.max_tool_response_length={limit} is below max_chars={longest} of the tool {name!r}, and "
                f"with tool_response_truncate_side={side} verl would cut its results once more, through passages; "
                "raise it, lower max_chars, or set tool_response_truncate_side=right"
            )
