"""Text from outside is data: takes the shape of a control token from what a search found.

A chat's tokenizer reads its control tokens wherever they stand, in a retrieved passage too: one ``<|im_end|>`` there
ends the turn, one ``</tool_response>`` hides all that follows from the evidence, one ``<answer>`` speaks for the agent.
"""

from __future__ import annotations

import re
import unicodedata

OPEN, CLOSE = "‹", "›"

# Brackets, with the characters that a tokenizer's normaliser (NFKC, or stripped accents) would make into them, and
# Kimi-VL's own.
_LT, _GT, _LB, _RB = "<＜﹤≮◁", ">＞﹥≯▷", r"\[［﹇", r"\]］﹈"
_INSIDE = f"[^{_LT}{_GT}{_LB}{_RB}{OPEN}{CLOSE}]{{1,256}}"  # bounded, so that the search takes linear time
_CANDIDATE = re.compile(
    rf"[{_LT}][/／]?[|｜][^|｜{_LT}{_GT}{OPEN}{CLOSE}]{{1,256}}[|｜][{_GT}]"
    rf"|[{_LT}][{_LB}]{_INSIDE}[{_RB}][{_GT}]|[{_LT}]{_INSIDE}[{_GT}]|[{_LB}]{_INSIDE}[{_RB}]"
)
# MiniMax's: a bracket of theirs may be that of another pair.
_ODD = re.compile(r"\]~!?b[\[\]]|\[e~\[")
# Two runs of \s never meet, or a run of spaces would take the square of its length.
_CONTROL = re.compile(
    r"""
      <\s*(?:/\s*)?\|[^|]+\|\s*>                # <|im_end|>, <｜User｜>
    | </?\|\S+>                                 # <|turn>
    | </?\|\w+\|\w.*>                           # <|DSML|invoke name="x">
    | </?[^\W\d][\w.:=▁-]+\|?\s*/?>             # <tool_call>, <start_of_turn>, <function=search>, <turn|>
    | </?s\s*>
    | <\[.+\]>                                  # <[begin▁of▁sentence]>
    | <\s*(?:/\s*)?(?:tool\w*|function\w*|answer|think(?:ing)?|thought|information|search|observation|documents?
        |im_start|im_end|start_of_turn|end_of_turn)\s*(?:/\s*)?>
    | \[\|.+\|\]                                # [|endofturn|]
    | \[\s*(?:/\s*)?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|TOOL_CONTENT|CALL_ID|MODEL_SETTINGS
        |BEGIN_AUDIO|IMG_BREAK|IMG_END|[gs]MASK|unused_?\d+|multimodal|toxicity=\d|@BOS@)\s*\]
    | \[/?(?-i:[A-Z]+(?:_[A-Z\d]+)+)\]         # [UNUSED_TOKEN_145], [CONTROL_8]
    | \[/?(?-i:THINK|ARGS|IMG|AUDIO|PREFIX|MIDDLE|SUFFIX|CLS|SEP|PAD|UNK|MASK|BOS|EOS|EOT)\]
    """,
    re.VERBOSE | re.IGNORECASE | re.DOTALL,
)
_REPLACED = str.maketrans(
    dict.fromkeys((_LT + _LB).replace("\\", ""), OPEN) | dict.fromkeys((_GT + _RB).replace("\\", ""), CLOSE)
)
_DROPPED = frozenset({"Mn", "Cf", "Cc", "Cn", "Co"})


# More than the longest candidate: a token that begins before a cut ends within so many characters after it.
LOOKAHEAD = 300


def well_formed(text: str) -> str:
    """The text without half surrogate pairs; ``?`` takes the place of each."""
    # JSON may hold surrogates without their partner, which neither HTTP bodies nor tokenizers take.
    return text.encode("utf-8", "replace").decode("utf-8")


def neutralise(text: str, max_chars: int | None = None) -> tuple[str, int]:
    """Text in which nothing has the shape of a control token, and how many of them there were.

    Of the result no more than ``max_chars`` characters if that is given, and no more work than they need: time is
    linear in what is shown, however long the text.

    The brackets of a token become ``‹`` and ``›``: ``</tool_response>`` reads ``‹/tool_response›``. Which tokens the
    policy's tokenizer has is not known to a tool, so the shapes of all go: ``<|…|>`` and its relatives, every
    ``<name>`` or ``</name>`` of two letters and more (so HTML's tags as well) and ``<s>``, and the names in brackets
    that models use, such as ``[INST]``; upper and lower case, with white space around the tags that a reader may take
    for one (``< answer >``), full-width look-alikes, invisible characters or accents inside. All else stays as it is:
    ``a < b``, ``x<y>z``, ``[1]``, ``->``, but for half surrogate pairs (:func:`well_formed`).

    One character takes the place of one, so nothing joins that stood apart, and a text may be cut anywhere before or
    after. No normal form of Unicode leads from ``‹`` back to ``<``, and no tokenizer in use has a control token with
    it; a zero-width space could be dropped by a normaliser, a plain one overlooked by a reader. Applied twice, it does
    nothing more.

    >>> neutralise("The tower.<|im_end|> 1 < 2")
    ('The tower.‹|im_end|› 1 < 2', 1)
    """
    count, end = 0, len(text) if max_chars is None else max_chars

    def replace(match: re.Match[str]) -> str:
        nonlocal count
        if match.re is _CANDIDATE and not _CONTROL.fullmatch(_folded(match.group())):
            return match.group()
        count += match.start() < end
        return match.group().translate(_REPLACED)

    return _CANDIDATE.sub(replace, _ODD.sub(replace, well_formed(text[: end + LOOKAHEAD])))[:end], count


def _folded(text: str) -> str:
    """What the most eager normaliser makes of it: compatible forms, no accents, nothing invisible."""
    if text.isascii() and text.isprintable():
        return text
    characters = unicodedata.normalize("NFKD", text).replace("◁", "<").replace("▷", ">")
    kept = (c for c in characters if c in "\t\n\r" or unicodedata.category(c) not in _DROPPED)
    return "".join(kept).replace("\ufffd", "")
