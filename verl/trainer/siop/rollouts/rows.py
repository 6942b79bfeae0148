"""What the trainer reads from a data row, for the run and for the checks before it alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from verl.utils.siop.errors import SiopError


def question_of(messages: Sequence[Mapping[str, Any]], extra_info: Mapping[str, Any] | None) -> str:
    """The bare question: ``extra_info.question`` where the data has it, else the text of the last user message.

    Raises:
        SiopError: there is neither, or the first is no text.
    """
    named = (extra_info or {}).get("question")
    if named is not None and not isinstance(named, str):
        raise SiopError(f"extra_info.question is {named!r:.100}, needs a text")
    if named:
        return named
    users = [message["content"] for message in messages if message["role"] == "user"]
    if not users or not isinstance(users[-1], str):
        raise SiopError(f"no user message with text in the prompt, and no extra_info.question: {messages!r}")
    return users[-1]
