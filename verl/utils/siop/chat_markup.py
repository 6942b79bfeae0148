"""What a tokenizer puts around text: its control tokens, and what its chat template writes around a tool's result."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Nine letters and digits: templates check the length of a call's id.
_NAME = "siopcall0"
_RESULTS = ("SIOPRESULTA", "SIOPRESULTB")


@lru_cache(maxsize=4)
def special_tokens(tokenizer: PreTrainedTokenizerBase) -> Mapping[int, str]:
    """All control tokens of a tokenizer by id, also those that have no role: ``all_special_tokens`` lacks these.

    Read once for each tokenizer: a control token that is added later is none.
    """
    named = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    return named | {index: token.content for index, token in tokenizer.added_tokens_decoder.items() if token.special}


@lru_cache(maxsize=4)
def special_token(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches any control token of a tokenizer, the longest of several; nothing if there is none."""
    words = set(special_tokens(tokenizer).values()) - {""}
    return re.compile(_any_of(words) if words else "(?!)")


def _any_of(words: Iterable[str]) -> str:
    """An expression for any of these words that shares their beginnings: it tries few of thousands at a place."""
    branches, ends = [], False
    for first, group in itertools.groupby(sorted(words), key=lambda word: word[:1]):
        if first:
            branches.append(re.escape(first) + _any_of([word[1:] for word in group]))
        else:
            ends = True
    one = "|".join(branches)
    return f"(?:{one}){'?' if ends else ''}" if len(branches) > 1 or (ends and one) else one


def without_special_tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text without control tokens, and without those that its pieces then make. Linear time.

    ``Paris<|im_<|endoftext|>end|>`` becomes ``Paris``.
    """
    token = special_token(tokenizer)
    first, *rest = token.split(text)
    if not rest:
        return text
    longest = max(map(len, special_tokens(tokenizer).values()))
    kept = list(first)
    for piece in rest:
        start = 0
        while seam := token.search("".join(tail := kept[-longest:]) + piece[start : start + longest]):
            before = len(tail) - seam.start()
            del kept[len(kept) - before :]
            start += len(seam[0]) - before
        kept += piece[start:]
    return "".join(kept)


def result_texts(text: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The tools' texts in what stands between two assistant turns, by the tokenizer's chat template.

    The template is rendered once with two results, to see what it writes before a result, between two, and after the
    last one. What cannot be found, or told because the template refuses tool results, stays.

    Args:
        text: decoded with control tokens.
        tokenizer: the policy's tokenizer.
    """
    template = getattr(tokenizer, "chat_template", None)
    form = _result_form(tokenizer, str(template)) if template else None
    if form is None:
        return [text]
    before, between, after = form
    if after and after in text:
        text = text.rpartition(after)[0]
    header = before.search(text)
    # At most the end of the turn before stands before the header.
    if header is None or without_special_tokens(text[: header.start()], tokenizer).strip():
        return [text]
    text = text[header.end() :]
    return between.split(text) if between.pattern else [text]


@lru_cache(maxsize=4)
def _result_form(
    tokenizer: PreTrainedTokenizerBase, template: str
) -> tuple[re.Pattern[str], re.Pattern[str], str] | None:
    """``template`` tells one that has been changed since."""
    call = {"id": _NAME, "type": "function", "function": {"name": _NAME, "arguments": {}}}
    results = [{"role": "tool", "name": _NAME, "tool_call_id": _NAME, "content": text} for text in _RESULTS]

    def render(messages: list[dict[str, Any]], opened: bool = False) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened))

    # Some templates take one call in a turn, some as many as results, some none.
    for calls in ([call], [call, call], []):
        turn: dict[str, Any] = {"role": "assistant", "content": "", **({"tool_calls": calls} if calls else {})}
        asked = [{"role": "user", "content": "?"}, turn]
        try:
            start, closed, opened = render(asked), render([*asked, *results]), render([*asked, *results], True)
        except Exception:  # noqa: BLE001  (a template is a program, and may raise anything)
            continue
        pieces = re.split("|".join(_RESULTS), closed.removeprefix(start))
        if closed.startswith(start) and opened.startswith(closed) and len(pieces) == 3:
            before, between, after = (piece.strip() for piece in pieces)
            # A result may name its call.
            named = [re.compile(re.escape(p).replace(_NAME, "[^<>\\n]{0,99}")) for p in (before, between)]
            return named[0], named[1], after or opened.removeprefix(closed).strip()
    return None
