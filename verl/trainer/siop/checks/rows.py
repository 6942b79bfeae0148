"""What may be wrong with one row of the data: its messages, its media, its tools."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")
MEDIA = ("image", "video", "audio")


def wrong_messages(messages: Any) -> str:
    """What is wrong with the prompt of a row, or nothing."""
    if not isinstance(messages, list) or not messages:
        return "'prompt' must be a list of messages with role and content"
    for message in messages:
        if not isinstance(message, dict) or not message.get("role") or message.get("content") is None:
            return "'prompt' must be a list of messages with role and content"
        if message["role"] not in ROLES:
            return f"'prompt' has the role {message['role']!r}; choose one of {', '.join(ROLES)}"
        if not isinstance(message["content"], str | list):
            return f"'prompt' has a content of type {type(message['content']).__name__}, needs text"
    return ""


def wrong_media(messages: Iterable[Mapping[str, Any]], row: Mapping[str, Any], columns: Iterable[str]) -> str:
    """What a row holds that a model of texts cannot take: in its own columns, or in its messages."""
    for column in columns:
        if row.get(column):
            return f"'{column}' is not empty, and the model takes texts alone; drop the column, or use another model"
    for message in messages:
        parts = message["content"] if isinstance(message["content"], list) else []
        for part in parts:
            if isinstance(part, dict) and part.get("type") in MEDIA:
                return f"'prompt' holds a part of type {part['type']!r}, and the model takes texts alone"
    return ""


def wrong_tools(extra: Any, tools: Mapping[str, Any]) -> str:
    """What would make verl's agent loop leave out tools, or fail at each call, without a word."""
    if not extra or not tools:
        return ""
    selection = extra.get("tool_selection")
    if selection is not None and not isinstance(selection, list):
        kind = "the text" if isinstance(selection, str) else type(selection).__name__
        return f"extra_info.tool_selection is {kind} {selection!r}, needs a list of names"
    if unknown := [name for name in selection or [] if name not in tools]:
        return f"extra_info.tool_selection names {unknown[0]!r}; the tools are {', '.join(sorted(tools))}"
    if "tools_kwargs" not in extra:
        return ""
    options = extra["tools_kwargs"]
    told = options if isinstance(options, dict) else {}
    if not isinstance(options, dict) or any(name in told and not isinstance(told[name], dict) for name in tools):
        return (
            f"extra_info.tools_kwargs is {options!r}, at which every call of the tool would fail: it needs a struct of "
            "structs, as {'search': {'create_kwargs': {…}}}; fill it, or drop the field from all rows"
        )
    return ""
