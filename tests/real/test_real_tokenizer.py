"""References between a probe's texts: which tokens are theirs when merges of a real BPE cross the borders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode
from verl.utils.siop.siop_process_reward import Reference, SiopConfig, build_reference

BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}
# What stands before and after a reference: merges with it in every way.
PREFIXES = ("", "\n", " ", "Answer: ", "<answer>\n", "<answer>", "(", "4", "New")
SUFFIXES = ("", "\n</answer><|im_end|>", "</answer>", ")", ".", "s", "0", " ", "\n\n")
TEXTS = (
    "Paris",
    "U.S.",
    "1984",
    "3.5",
    "東京",
    "café",
    "👩‍🚀",
    "ork",
    "</b>",
    "-",
    "New York",
    "x\ny",
    "Ġ",
    "é",
    "🇫🇷!",
)


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2)


def overlapping(reference: Reference, before: str, text: str, tokenizer: Any) -> list[int]:
    """Positions of the tokens that hold a byte of the text; the bytes are read off the vocabulary, not the offsets."""
    first = len(before.encode())
    last, at, found = first + len(text.encode()), 0, []
    for position, token in enumerate(tokenizer.convert_ids_to_tokens(reference.token_ids)):
        special = token in tokenizer.all_special_tokens
        size = len(token.encode()) if special else len(bytes(BYTE_OF[character] for character in token))
        if at < last and at + size > first:
            found.append(position)
        at += size
    return found


@given(prefix=st.sampled_from(PREFIXES), text=st.sampled_from(TEXTS), suffix=st.sampled_from(SUFFIXES))
def test_the_tokens_of_a_reference_are_those_with_its_bytes(
    tokenizer: Any, prefix: str, text: str, suffix: str
) -> None:
    config = SiopConfig(siop_reference_prefix=prefix, siop_reference_suffix=suffix)
    reference = build_reference(text, tokenizer, config)
    assert tokenizer.decode(reference.token_ids) == prefix + text + suffix
    assert list(range(reference.start, reference.end)) == overlapping(reference, prefix, text, tokenizer)


@given(text=st.text(min_size=1, max_size=12).map(str.strip).filter(bool))
def test_any_text(tokenizer: Any, text: str) -> None:
    reference = build_reference(text, tokenizer, SiopConfig())
    # The vocabulary lacks a few bytes (of code points from U+40000 on, and control characters).
    if tokenizer.unk_token_id not in reference.token_ids:
        own = list(range(reference.start, reference.end))
        assert own == overlapping(reference, "<answer>\n", text, tokenizer)


def test_where_a_merge_crosses_a_border(tokenizer: Any) -> None:
    def tokens(prefix: str, text: str, suffix: str) -> tuple[list[str], list[str]]:
        reference = build_reference(
            text, tokenizer, SiopConfig(siop_reference_prefix=prefix, siop_reference_suffix=suffix)
        )
        every = tokenizer.convert_ids_to_tokens(reference.token_ids)
        return every, every[reference.start : reference.end]

    assert tokens("Answer: ", "Paris", "") == (["Answer", ":", "ĠParis"], ["ĠParis"])
    assert tokens("<answer>\n", "Paris", "\n</answer>")[1] == ["Paris"]
    assert tokens("<answer>", "</b>", "</answer>")[1] == ["></", "b", "></"]  # tokens of both sides
    assert tokens("She said ", '"Paris"', ".")[1] == ['Ġ"', "Paris", '".']
    assert tokens("New", "ork", "")[1] == ["ork"]


def test_the_probe_of_the_template(tokenizer: Any) -> None:
    """SmolLM2 does not think: the answer's tag at once, and the end of a turn as the template writes it."""
    reference = build_reference("Paris", tokenizer, SiopConfig())
    assert tokenizer.decode(reference.token_ids) == "<answer>\nParis\n</answer><|im_end|>"
    assert tokenizer.decode(reference.token_ids[reference.start : reference.end]) == "Paris"
