"""Tool calls of a rollout: which of them were executed, which the model tried in vain, and what to tell it then."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import Any

from verl.utils.siop.turn_utils import parse_answer, without_thinking

# Key of a rollout's record in verl's extra_fields; the reward function knows it too.
FIELD = "siop_tools"


@dataclass
class ToolRecord:
    """What became of one rollout's tool calls. Every attempted call is counted in one of the first six.

    Args:
        executed: the tool ran and answered.
        unparsed: verl's parser did not read what the turn wrote as a call.
        unknown_tool: the name is none of the rollout's tools.
        invalid_arguments: the arguments are no JSON object, or not what the tool takes.
        failed: the tool raised an exception, which the model got as text.
        dropped: read but not executed: over ``max_parallel_calls``, in the last turn that is allowed, or no room for an
            observation.
        truncated: 1 if the budget cut a turn, or left no room for an observation; else 0.
        neutralised: control tokens that tools took out of what they found (their metrics ``…/neutralised``).
        thinking: the prompt ends in open thinking, so that each turn begins inside it.
        offered: names of the tools that the rollout had.
        executed_calls: for each assistant turn the executed calls as (name, arguments in JSON), in their order.
    """

    executed: int = 0
    unparsed: int = 0
    unknown_tool: int = 0
    invalid_arguments: int = 0
    failed: int = 0
    dropped: int = 0
    truncated: int = 0
    neutralised: int = 0
    thinking: bool = False
    offered: list[str] = field(default_factory=list)
    executed_calls: list[list[tuple[str, str]]] = field(default_factory=list)

    @property
    def calls(self) -> int:
        """Attempted calls."""
        return self.executed + self.unparsed + self.unknown_tool + self.invalid_arguments + self.failed + self.dropped

    def count(self, outcome: str) -> None:
        """One more call whose fate is the field ``outcome``."""
        setattr(self, outcome, getattr(self, outcome) + 1)

    def as_dict(self) -> dict[str, Any]:
        """The fields and ``calls``, for ``extra_fields``."""
        return {"calls": self.calls, **asdict(self)}


@dataclass(frozen=True)
class Form:
    """How a format writes a call: the text that opens one, and an example (None where it is made of control tokens)."""

    opening: str
    example: Callable[[str, Mapping[str, str]], str] | None = None


def _tags(arguments: Mapping[str, str], pattern: str) -> str:
    return "\n".join(pattern.format(key=key, value=value) for key, value in arguments.items())


# verl's tool parsers (rollout.multi_turn.format).
FORMS: dict[str, Form] = {
    "hermes": Form(
        "<tool_call>",
        lambda name, arguments: (
            f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments}, ensure_ascii=False)}\n</tool_call>"
        ),
    ),
    "qwen3_coder": Form(
        "<tool_call>",
        lambda name, arguments: (
            f"<tool_call>\n<function={name}>\n"
            + _tags(arguments, "<parameter={key}>\n{value}\n</parameter>")
            + "\n</function>\n</tool_call>"
        ),
    ),
    "glm": Form(
        "<tool_call>",
        lambda name, arguments: (
            f"<tool_call>{name}\n"
            + _tags(arguments, "<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>")
            + "\n</tool_call>"
        ),
    ),
    "seed": Form(
        "<seed:tool_call>",
        lambda name, arguments: (
            f"<seed:tool_call>\n<function={name}>\n"
            + _tags(arguments, "<parameter={key}>{value}</parameter>")
            + "\n</function>\n</seed:tool_call>"
        ),
    ),
    "minimax": Form(
        "<minimax:tool_call>",
        lambda name, arguments: (
            f'<minimax:tool_call>\n<invoke name="{name}">\n'
            + _tags(arguments, '<parameter name="{key}">{value}</parameter>')
            + "\n</invoke>\n</minimax:tool_call>"
        ),
    ),
    "gpt-oss": Form(" to=functions."),
    "kimi": Form("<|tool_call_begin|>"),
    "deepseek_v4": Form("<｜DSML｜invoke "),
    "gemma4": Form("<|tool_call>"),
}

# How calls open in one format or another; a start of the tag is enough, so that attributes do not matter.
_OPENINGS = (
    *(form.opening.strip(">") for form in FORMS.values()),
    "</tool_call",
    "<function_call",
    "<function=",
    "<invoke ",
    "<tool_code",
    "<|python_tag|>",
    "[TOOL_CALLS]",
)
_NOT_CLOSED = "a tag <tool_call> before it is not closed"
_NAME_KEY = re.compile(r'"(?:name|tool|function|action)"\s*:')
_ARGUMENTS_KEY = re.compile(r'"(?:arguments|parameters|args|input|action_input)"\s*:')


def faults(
    text: str, read: int, tool_format: str, tools: Mapping[str, Iterable[str]], thinking: bool = False
) -> list[str]:
    """What is wrong with the tool calls of one assistant turn that verl's parser did not read.

    A turn that gives an answer (:func:`~verl.utils.siop.turn_utils.parse_answer`) tries none: what looks like one may
    be part of the explanation. Else the format's own opening outside of thinking and of ``<answer>`` is an attempt; and
    where nothing was read, so are another format's markup, a tag with a tool's name, a JSON call without tags or in a
    code block, ``{"query": "x"}`` in the beginning of a line, ``search("x")`` and ``Action: search``.

    Args:
        text: the decoded turn.
        read: number of calls that the parser found in it.
        tool_format: name of the parser.
        tools: the rollout's tools, name -> names of its arguments.
        thinking: whether the turn begins inside thinking.

    Returns:
        One reason for each such call; empty if there is none, or if the rollout has no tools.
    """
    if not tools or parse_answer(text, thinking):
        return []
    outside = _without_answers(without_thinking(text, thinking))
    form = FORMS.get(tool_format)
    pieces = outside.split(form.opening)[1:] if form is not None else []
    if pieces:
        if tool_format != "hermes":
            # Several openings with nothing between them are one.
            tried = sum(not piece.isspace() for piece in pieces if piece) or 1
            return ["it does not have the form of a tool call"] * max(0, tried - read)
        found = _faults_of_hermes(outside)
        wrong = [fault for fault in found if fault is not None]
        unread = len(found) - len(wrong) - read
        return wrong + [_NOT_CLOSED] * max(0, unread)
    if not read and _foreign(outside, tools):
        return ["it is not written in the form of a tool call"]
    return []


def message(fault: str, tool_format: str, tool: str, arguments: Iterable[str], special_tokens: Sequence[str]) -> str:
    """What the model is told about a call that could not be read: what is wrong, and the form.

    Args:
        fault: one of :func:`faults`.
        tool_format: name of the parser.
        tool, arguments: the tool of the example.
        special_tokens: the tokenizer's; an example that holds one is left out, since it would speak as the chat itself.
    """
    text = f"Error: the tool call could not be read: {fault}."
    form = FORMS.get(tool_format)
    if form is None or form.example is None:
        return text + " Nothing was called."
    example = form.example(tool, {name: "..." for name in arguments})
    if any(token in example for token in special_tokens):
        return text + " Nothing was called."
    return f"{text} Nothing was called. Write a call as\n{example}"


def _without_answers(text: str) -> str:
    *closed, rest = text.split("</answer>")
    return "".join([*(piece.rpartition("<answer>")[0] if "<answer>" in piece else piece for piece in closed), rest])


def json_fault(text: str) -> str | None:
    """Why a text cannot be read as JSON, in words none of which are its own; None if it can."""
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return f"no valid JSON ({error.msg} at character {error.pos})"
    except (ValueError, RecursionError):  # a number of 5,000 digits, a thousand brackets
        return "JSON that is too large"
    return None


def _faults_of_hermes(text: str) -> list[str | None]:
    """Of each call in the text, that is of each closing tag after an opening one, what is wrong with it."""
    *closed, rest = text.split("</tool_call>")
    bodies = [piece.split("<tool_call>")[1:] for piece in closed]
    found = [_fault_of_hermes(body[-1]) or (_NOT_CLOSED if len(body) > 1 else None) for body in bodies if body]
    return [*found, *["the closing tag </tool_call> is missing"] * ("<tool_call>" in rest)]


def _fault_of_hermes(body: str) -> str | None:
    """What is wrong with one call, given the text between its tags."""
    fault = json_fault(body)
    if fault is not None:
        return f"between the tags is {fault}"
    call = json.loads(body)
    if not isinstance(call, dict):
        return "between the tags is no JSON object"
    missing = [key for key in ("name", "arguments") if key not in call]
    if missing:
        return f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing"
    return None if isinstance(call["name"], str) else "name is no text"


@cache
def _written(names: tuple[str, ...], arguments: tuple[str, ...]) -> re.Pattern[str]:
    """A call of one of these tools as models write it that were taught another way. Linear time."""
    name, argument = ("|".join(map(re.escape, words)) or "(?!)" for words in (names, arguments))
    return re.compile(
        rf"""<(?:{name})[\s>] | \b(?:{name})\(\s*(?:["'{{]|(?:{argument})\s*=)
            | ^[ \t]*Action[ \t]*:[ \t]*["'`]?(?:{name})\b | ^[ \t]*\{{\s*"(?:{argument})"\s*:""",
        re.IGNORECASE | re.MULTILINE | re.VERBOSE,
    )


def _foreign(text: str, tools: Mapping[str, Iterable[str]]) -> bool:
    if any(opening in text for opening in _OPENINGS):
        return True
    if _written(tuple(tools), tuple(name for names in tools.values() for name in names)).search(text):
        return True
    if _NAME_KEY.search(text) and _ARGUMENTS_KEY.search(text):
        return True
    blocks = [block for block in text.split("```")[1::2] if block.lstrip().startswith(("json", "tool", "{"))]
    return any(f'"{argument}"' in block for block in blocks for names in tools.values() for argument in names)
