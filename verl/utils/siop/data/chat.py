"""What a model's chat template makes of messages and tools, and whether verl reads back what it writes.

Everything is rendered and parsed by the functions of verl that a run uses.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from verl.utils.siop.errors import SiopConfigError, SiopError

MULTI_TURN = "actor_rollout_ref.rollout.multi_turn"
Messages = Sequence[Mapping[str, Any]]


class PromptError(SiopError, ValueError):
    """The model's chat template, or a tool's result in it, cannot be rendered."""


def first_cause(error: BaseException) -> str:
    """One line about what went wrong first: verl tries some things a second time, in another way."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@dataclass(frozen=True)
class Chat:
    """The parts of the agent loop that turn messages into tokens and tokens into calls.

    Args:
        path: where the model comes from, for messages.
        tokenizer: the model's.
        builder: verl's builder of prompts, which renders the chat template.
        tools: the tools by name.
        format: ``multi_turn.format``, how a call is written.
    """

    path: str
    tokenizer: Any
    builder: Any
    tools: dict[str, Any]
    format: str

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


# ---------------------------------------------------------------------- the tools
def build_tools(multi_turn: DictConfig) -> dict[str, Any]:
    """The tools of ``multi_turn.tool_config_path`` and ``function_tool_path``, instantiated; no network is used.

    Raises:
        SiopConfigError: a file is missing or malformed, a class cannot be imported or refuses its configuration, two
            tools have one name, or one has none.
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
    if not all(tool.name.strip() for tool in tools):
        raise SiopConfigError(f"{named}: a tool has an empty name; models call it by its name")
    twice = [name for name, count in Counter(tool.name for tool in tools).items() if count > 1]
    if twice:
        raise SiopConfigError(f"{named}: two tools are called {twice[0]!r}; the name of a tool must be its own")
    return {tool.name: tool for tool in tools}


def _check_tool_file(path: str, named: str) -> None:
    from verl.tools.base_tool import BaseTool
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
        unknown = sorted(set(map(str, entry)) - {"class_name", "config", "tool_schema"})
        if unknown:
            raise SiopConfigError(
                f"{where}: unknown key(s) {', '.join(unknown)}; allowed: class_name, config, tool_schema"
            )
        name = str(entry["class_name"])
        try:
            found = get_tool_class(name)
        except Exception as error:  # importing a module runs it
            raise SiopConfigError(f"{where}.class_name={name} cannot be imported: {first_cause(error)}") from error
        if not isinstance(found, type) or not issubclass(found, BaseTool):
            raise SiopConfigError(f"{where}.class_name={name} is not a tool: it must be a subclass of verl's BaseTool")


# ---------------------------------------------------------------------- calls
def tool_parsers() -> dict[str, Any]:
    """verl's tool parsers by the name of their format."""
    from verl.experimental.agent_loop.tool_parser import ToolParser

    return dict(ToolParser._registry)  # there is no public list of the names


def sample_arguments(tool: Any, text: str) -> dict[str, Any]:
    """Arguments for the required parameters of a tool, or for all if none is required, with ``text`` where it fits."""
    parameters = tool.tool_schema.function.parameters
    values = {"array": [text], "integer": 1, "number": 1, "boolean": True, "object": {}}
    properties = parameters.properties
    wanted = [name for name in properties if name in (parameters.required or properties)]
    return {name: values.get(str(properties[name].type), text) for name in wanted}


def call_message(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The assistant's message as verl's tool agent writes it into the history."""
    function = {"name": name, "arguments": arguments}
    # The id is for templates that write it in place of the name.
    return {"role": "assistant", "content": "", "tool_calls": [
        {"id": f"functions.{name}:0", "type": "function", "function": function}
    ]}  # fmt: skip


def rendered_call(chat: Chat, name: str, arguments: dict[str, Any], messages: Messages) -> str | None:
    """What the template makes of an assistant turn with a call after ``messages``; None if the call is not in it.

    Raises:
        SiopConfigError: the template cannot render such a turn.
    """
    schemas = chat.schemas()
    try:
        before = chat.render(messages, True, schemas)
        text = chat.render([*messages, call_message(name, arguments)], False, schemas)
    except PromptError as error:
        raise SiopConfigError(
            f"actor_rollout_ref.model.path={chat.path}: its chat template cannot render an assistant turn with a "
            f"call of {name!r}: {error}"
        ) from error
    # A template may open the assistant's turn otherwise than it writes one that is past.
    same = next((i for i, (a, b) in enumerate(zip(before, text, strict=False)) if a != b), min(len(before), len(text)))
    # Not inside of a tag: <think> and <tool_call> begin alike.
    if text.rfind("<", 0, same) > text.rfind(">", 0, same):
        same = text.rfind("<", 0, same)
    call = text[same:]
    return call if name in call else None


def reads_call(chat: Chat, form: str, call: str, name: str, arguments: dict[str, Any]) -> bool:
    """Whether verl's parser of this format reads back just this call."""
    import verl.experimental.agent_loop.tool_parser as tool_parser

    noise = logging.getLogger(tool_parser.__file__)
    ids = chat.tokenizer(call, add_special_tokens=False)["input_ids"]
    noise.disabled, before = True, noise.disabled
    try:
        parser = tool_parsers()[form](chat.tokenizer)
        _, calls = asyncio.run(parser.extract_tool_calls(ids, [tool.tool_schema for tool in chat.tools.values()]))
        return [(found.name, _stripped(json.loads(found.arguments))) for found in calls] == [(name, arguments)]
    except Exception:  # noqa: BLE001  (parsers of other models may want tokens that this one has not)
        return False
    finally:
        noise.disabled = before


def _stripped(value: Any) -> Any:
    """A value without white space around its texts: tokenizers by words put some there, and tools take it off."""
    if isinstance(value, dict):
        return {key: _stripped(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_stripped(item) for item in value]
    return value.strip() if isinstance(value, str) else value
