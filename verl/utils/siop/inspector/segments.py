"""A turn's text in the pieces that a reader looks for: thinking, calls, results, the answer, and the rest."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from verl.utils.siop.nli_clustering import normalize_answer
from verl.utils.siop.turn_utils import THINKING, leave_thinking, parse_queries

_TAGS = (
    *((f"think{place}", *tags) for place, tags in enumerate(THINKING)),
    ("call", "<tool_call>", "</tool_call>"),
    ("answer", "<answer>", "</answer>"),
    ("action", "<action>", "</action>"),
)
_RESULT = ("result", "<tool_response>", "</tool_response>")


def _pieces(tags: Iterable[tuple[str, str, str]]) -> re.Pattern[str]:
    """An expression that finds each piece, in the group of its kind; one that is not closed goes to the end."""
    each = (f"{re.escape(opening)}(?P<{kind}>.*?)(?:{re.escape(closing)}|\\Z)" for kind, opening, closing in tags)
    return re.compile("|".join(each), re.DOTALL)


_PIECE, _OWN_PIECE = _pieces([*_TAGS, _RESULT]), _pieces(_TAGS)
_THINKS = re.compile("|".join(re.escape(opening) for opening, _ in THINKING))
# A number or a title before a passage: "[2] …", "Doc 2 (Title: …) …".
_NUMBER = re.compile(r"^\s*(?:\[\d+\]|doc(?:ument)?\s*\d+\s*:?)\s*", re.IGNORECASE)
_NUMBERED = re.compile(r"(?=\[\d+\] )|\n")
# The markup of a chat, of which a reader learns nothing.
_CHAT = re.compile(r"<\|im_end\|>|<\|im_start\|>(?:user|assistant|tool)?[ \t]*")
MIN_KEY = 3


@dataclass(frozen=True)
class Segment:
    """A piece of a turn.

    Args:
        kind: ``think``, ``call``, ``passage``, ``answer``, ``action`` (a move in a game) or ``text``.
        text: as it was written, without the tags and the markup of the chat.
        keys: what equal queries and passages of other rollouts share; empty where there is nothing to compare.
    """

    kind: str
    text: str
    keys: list[str] = field(default_factory=list)


def segments(text: str, thinking: bool = False, own: bool = False) -> list[Segment]:
    """The pieces of one span, in order; white space around each is left out.

    Args:
        text: of an assistant turn, or of what is between two.
        thinking: whether the turn begins inside thinking.
        own: whether the policy wrote it, so that a ``<tool_response>`` in it is text like any other.

    >>> [(s.kind, s.text) for s in segments("<think> so </think><answer> Paris </answer>")]
    [('think', 'so'), ('answer', 'Paris')]
    """
    found: list[Segment] = []
    if thinking:
        thought, text = leave_thinking(text)
        if shown := _THINKS.sub("", thought).strip():
            found.append(Segment("think", shown))
    at = 0
    for match in (_OWN_PIECE if own else _PIECE).finditer(text):
        _add_text(found, text[at : match.start()])
        at = match.end()
        inner = (match[match.lastgroup or 0] or "").strip()
        kind = (match.lastgroup or "text").rstrip("0123456789")
        if kind == "result":
            found += _passages(inner)
        elif kind == "call":
            found.append(_call(inner))
        elif inner:
            found.append(Segment(kind, inner))
    _add_text(found, text[at:])
    return found


def _add_text(found: list[Segment], text: str) -> None:
    shown = _CHAT.sub("", text).strip()
    if shown:
        found.append(Segment("text", shown))


def _call(text: str) -> Segment:
    keys = [json.dumps(query) for query in parse_queries(f"<tool_call>{text}</tool_call>")]
    try:
        call = json.loads(text)
        arguments = call["arguments"]
        shown = ", ".join(
            value.strip() if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for value in arguments.values()
        )
        return Segment("call", f"{call['name']}: {shown}", keys)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # not a call that was read
        return Segment("call", text, keys)


def _passages(text: str) -> list[Segment]:
    found = []
    for passage in _NUMBERED.split(text):
        if not passage.strip():
            continue
        key = normalize_answer(_NUMBER.sub("", passage))
        found.append(Segment("passage", passage.strip(), [key] if len(key) >= MIN_KEY else []))
    return found
