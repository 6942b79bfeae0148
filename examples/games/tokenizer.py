"""Word-level tokenizer of the small games, with a Qwen-style chat template: one token a cell, a number or a word.

The same machinery as the toy world's (``examples/toy_world/tokenizer.py``), with other words and markers.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast

from examples.toy_world.tokenizer import ASSISTANT, END, USER, build_tokenizer

# What the games say and are told; `<action>` is a marker, so that nothing need stand around it.
MARKERS = ("\n", "<action>", "</action>")
WORDS = (
    ".", "F", "X", "O", *map(str, range(10)),
    "right", "wrong", "filled", "taken", "open", "flagged", "safe", "mine", "end", "reply",
    "invalid", ":", ";", "write", "no", "action", "one", "three", "two", "number", "numbers", "from", "to", "and", "or",
    "ROW", "COLUMN", "DIGIT", "CELL", "reveal", "flag",
)  # fmt: skip


def game_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of all small games."""
    return build_tokenizer(WORDS, MARKERS)


def opening_text(observation: str) -> str:
    """What the chat template renders for the first observation and the generation prompt."""
    return f"{USER}{observation}{END}\n{ASSISTANT}"


def turn_text(action: str) -> str:
    """An assistant turn, up to and with the end token."""
    return f"{action} {END}"


def observation_text(observation: str) -> str:
    """What stands between an assistant turn and the next one, as verl's agent loop inserts it."""
    return f"\n{USER}{observation}{END}\n{ASSISTANT}"
