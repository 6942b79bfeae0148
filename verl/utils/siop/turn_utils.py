"""What a rollout's tokens say: its turns, its final answer, its tool observations and the support boundaries."""

from __future__ import annotations

import itertools
import json
import re
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from verl.utils.siop.chat_markup import result_texts, special_token, without_special_tokens
from verl.utils.siop.chat_markup import special_tokens as special_tokens  # others import it from here
from verl.utils.siop.errors import RolloutError, SiopConfigError
from verl.utils.siop.nli_clustering import plain_form

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BOUNDARY_MODES = ("before_answer", "assistant", "observation")

# What stands around thinking in the formats that verl's tool parsers read, and in others.
THINKING = (
    ("<think>", "</think>"),
    ("<seed:think>", "</seed:think>"),
    ("<|channel>thought", "<channel|>"),  # gemma4
    ("<|channel|>analysis<|message|>", "<|end|>"),  # gpt-oss
    ("[THINK]", "[/THINK]"),  # mistral
    ("◁think▷", "◁/think▷"),  # kimi
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # cohere
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
)
# Whether a turn begins inside thinking; the tags (:data:`THINKING`), where they are known.
Thinking = bool | tuple[str, str]
# What stands around tool calls in the formats of verl's tool parsers.
_CALLS = (
    ("<tool_call>", "</tool_call>"),  # hermes, qwen3_coder, glm
    ("<seed:tool_call>", "</seed:tool_call>"),
    ("<minimax:tool_call>", "</minimax:tool_call>"),
    ("<|tool_call_begin|>", "<|tool_call_end|>"),  # kimi
    ("<|tool_call>", "<tool_call|>"),  # gemma4
    ("<｜DSML｜tool_calls>", "</｜DSML｜tool_calls>"),  # deepseek_v4
    ("<|channel|>commentary to=functions.", "<|call|>"),  # gpt-oss
    ("[TOOL_CALLS]", "</s>"),  # mistral
    ("<function_call>", "</function_call>"),
)
# The same in a turn's header, whose beginning may be the prompt's, in other places; in prose it is prose.
_CALL_HEADER = r"(?:\A\s*|<\|(?:start|channel)\|>[^<]*) to=functions\..*?(?:<\|call\|>|\Z)"
# Closing tags that close thinking which somebody else opened; <|end|> may also end a turn.
_STRAY = [closing for _, closing in THINKING if closing != "<|end|>"]
# A piece that opens first owns the text to its closing tag, or to the end. An answer is the innermost pair: a stray
# opening tag before it does not swallow it.
_PIECES = re.compile(
    "|".join(
        [
            *(f"{re.escape(opening)}.*?(?:{re.escape(closing)}|\\Z)" for opening, closing in (*THINKING, *_CALLS)),
            _CALL_HEADER,
            r"<answer>(?P<answer>[^<]*(?:<(?!/?answer>)[^<]*)*)</answer>",
            f"(?P<stray>{'|'.join(map(re.escape, _STRAY))})",
        ]
    ),
    re.DOTALL,
)
_THINKING_END = re.compile("|".join(re.escape(closing) for _, closing in THINKING))
# Thinking alone: what no tag closes matches to the end and has no group.
_THOUGHT = re.compile(
    "|".join(
        [
            *(
                f"{re.escape(opening)}.*?(?:(?P<closed{n}>{re.escape(closing)})|\\Z)"
                for n, (opening, closing) in enumerate(THINKING)
            ),
            f"(?P<stray>{'|'.join(map(re.escape, _STRAY))})",
        ]
    ),
    re.DOTALL,
)
# Tokens before a turn in which its opening is looked for: its header, thinking, and words that a template puts into it.
OPENING_TOKENS = 512
_UNSEEN = frozenset({"Cc", "Cf", "Zl", "Zp", "Zs"})
# Of other categories, and nothing to see either: fillers, the empty braille cell, variation selectors.
_BLANK = re.compile("[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]")
# A truncated observation has no closing tag.
_TOOL_RESPONSE = re.compile(r"<tool_response>(.*?)(?:</tool_response>|\Z)", re.DOTALL)

# A normalised tool call.
Query = tuple[str, ...]


def get_assistant_turn_ranges(response_mask: Any) -> list[tuple[int, int]]:
    """Assistant turns of one rollout: the maximal runs of 1 in its response mask.

    Args:
        response_mask: L values 0 or 1, as a list, a numpy array or a torch tensor (any device, any type).

    Returns:
        T half-open ranges ``(start, end)`` into the response tokens, in order.

    Raises:
        RolloutError: the mask is not one-dimensional or holds other values than 0 and 1.

    >>> get_assistant_turn_ranges([1, 1, 0, 0, 1])
    [(0, 2), (4, 5)]
    """
    if hasattr(response_mask, "detach"):
        response_mask = response_mask.detach().cpu().tolist()
    try:
        mask_L = np.asarray(response_mask)
    except ValueError as error:  # rows of different lengths
        raise RolloutError(f"a response mask has one dimension, got {response_mask!r:.80}") from error
    if mask_L.ndim != 1:
        raise RolloutError(f"a response mask has one dimension, got an array of shape {mask_L.shape}")
    assistant_L = mask_L == 1
    if not np.all(assistant_L | (mask_L == 0)):
        bad = mask_L[~(assistant_L | (mask_L == 0))][0]
        raise RolloutError(f"a response mask holds only 0 and 1, got {bad!r}")
    edges = np.flatnonzero(np.diff(assistant_L.astype(np.int8), prepend=0, append=0))
    return list(zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True))


def boundaries(turn_ranges: Sequence[tuple[int, int]], mode: str) -> list[int]:
    """Where the support is measured: T + 1 exclusive ends into the response tokens, boundary 0 being the prompt alone.

    - ``before_answer``: the end of each assistant turn, but for the last turn its start (all observations are in, the
      answer is not).
    - ``assistant``: the end of each assistant turn; the last prefix contains the answer itself.
    - ``observation``: the start of the next assistant turn, that is after the tool result and the generation prompt;
      the last boundary equals the one before, so that the last turn has no gain.

    Args:
        turn_ranges: T half-open ranges, see :func:`get_assistant_turn_ranges`.
        mode: one of :data:`BOUNDARY_MODES`.

    Raises:
        SiopConfigError: unknown mode.

    >>> boundaries([(0, 5), (8, 12), (20, 30)], "before_answer")
    [0, 5, 12, 20]
    """
    starts, ends = [start for start, _ in turn_ranges], [end for _, end in turn_ranges]
    if mode not in BOUNDARY_MODES:
        raise SiopConfigError(f"siop_boundary={mode!r} is not allowed; choose one of {', '.join(BOUNDARY_MODES)}")
    if not turn_ranges:
        return [0]
    if mode == "assistant":
        return [0, *ends]
    if mode == "before_answer":
        return [0, *ends[:-1], starts[-1]]
    return [0, *starts[1:], starts[-1] if len(starts) > 1 else 0]


def _visible(text: str) -> str:
    """The text without surrounding white space; empty if nothing of it can be seen (a zero-width space)."""
    seen = any(unicodedata.category(character) not in _UNSEEN for character in _BLANK.sub("", text))
    return text.strip() if seen else ""


def parse_answer(turn_text: str, thinking: Thinking = False) -> str:
    """The last ``<answer>…</answer>`` in the text of one assistant turn, without surrounding white space.

    What stands inside thinking (:data:`THINKING`) or inside a tool call does not count, closed or not; neither does
    text before the closing tag of thinking that nothing opened, and an answer in which thinking only opens or ends.
    Empty if there is no complete answer, or nothing visible in it. Takes time linear in the length of the text.

    Args:
        turn_text: what the policy wrote.
        thinking: whether the turn's generation prompt left thinking open, so that the turn begins inside it: the tags
            that :func:`open_thinking` found, of which only the closing one ends it; or True, and any one does.

    >>> parse_answer("Is it <answer>Lyon</answer>?</think><answer> Paris </answer>")
    'Paris'
    >>> parse_answer("Is it <answer>Lyon</answer>? I am", thinking=True)
    ''
    """
    if thinking:
        _, turn_text = leave_thinking(turn_text, thinking)
    answer = ""
    for piece in _PIECES.finditer(turn_text):
        if piece["stray"]:
            answer = ""
        elif piece["answer"] is not None:
            words = _without_thoughts(piece["answer"])
            if any(closing in words for closing in _STRAY):
                answer = ""
            elif not any(opening in words for opening, _ in THINKING):
                answer = words
    return _visible(answer)


def _without_thoughts(text: str) -> str:
    """The text without the thinking in it that is closed. Linear time."""
    for opening, closing in THINKING:
        kept, start = [], 0
        while (begin := text.find(opening, start)) >= 0 and (end := text.find(closing, begin)) >= 0:
            kept.append(text[start:begin])
            start = end + len(closing)
        text = "".join([*kept, text[start:]])
    return text


def leave_thinking(turn_text: str, thinking: Thinking = True) -> tuple[str, str]:
    """The two parts of a turn that begins inside thinking: the thought, and what follows its closing tag.

    Args:
        turn_text: what the policy wrote.
        thinking: the tags of the thinking; True for any.

    >>> leave_thinking("so it is[/THINK]It is.")
    ('so it is', 'It is.')
    >>> leave_thinking("so[/THINK] it", ("<think>", "</think>"))
    ('so[/THINK] it', '')
    """
    if not isinstance(thinking, bool):
        thought, _, rest = turn_text.partition(thinking[1])
        return thought, rest
    ends = _THINKING_END.search(turn_text)
    return (turn_text[: ends.start()], turn_text[ends.end() :]) if ends else (turn_text, "")


def without_thinking(turn_text: str, thinking: Thinking = False, keep_open: bool = True) -> str:
    """What stands outside of the closed thinking (:data:`THINKING`) of a turn. Linear time.

    A closing tag that nothing opened closes what stands before it: a template may put the opening tag into the prompt.

    Args:
        turn_text: what the policy wrote.
        thinking: as in :func:`parse_answer`.
        keep_open: whether thinking that no tag closes stays.

    >>> without_thinking("so</think>a[THINK]b[/THINK]c<think>d")
    'ac<think>d'
    """
    if thinking:
        begun, rest = leave_thinking(turn_text, thinking)
        if begun != turn_text:
            turn_text = rest
        elif not keep_open:
            return ""
    kept: list[str] = []
    at = 0
    for thought in _THOUGHT.finditer(turn_text):
        if thought.lastgroup is None:
            if not keep_open:
                return "".join([*kept, turn_text[at : thought.start()]])
            break
        if not thought["stray"]:
            kept.append(turn_text[at : thought.start()])
        at = thought.end()
    return "".join([*kept, turn_text[at:]])


def unpaired_thinking(text: str) -> tuple[str, str] | None:
    """The first pair of :data:`THINKING` of which a text does not open as many as it closes; None if there is none.

    >>> unpaired_thinking("<think>a</think>[THINK]b")
    ('[THINK]', '[/THINK]')
    """
    for opening, closing in THINKING:
        opened, closed = text.count(opening), text.count(closing)
        if opened > closed or (opened < closed and closing in _STRAY):
            return opening, closing
    return None


def _decode(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    # Special tokens stay: a tokenizer may have the tags themselves among them.
    return str(tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def open_thinking(context_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> tuple[str, str] | None:
    """The tags (:data:`THINKING`) of the thinking in which a turn after these tokens begins; None if outside.

    Chat templates of thinking models write the opening tag, some with words after it. A control token, as a turn's
    header has, ends what stands before it: a tag in a user's message opens nothing.

    Args:
        context_ids: what the policy saw before the turn; its last 512 tokens are looked at.
        tokenizer: the policy's tokenizer.
    """
    text = _decode(tokenizer, context_ids[-OPENING_TOKENS:])
    at, tags = max((text.rfind(tags[0]), tags) for tags in THINKING)
    rest = text[at + len(tags[0]) :]
    ended = at < 0 or _THINKING_END.search(rest) or special_token(tokenizer).search(rest)
    return None if ended else tags


def opens_thinking(context_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a turn after these tokens begins inside thinking, see :func:`open_thinking`."""
    return open_thinking(context_ids, tokenizer) is not None


def extract_answer(
    response_ids: Sequence[int],
    turn_ranges: Sequence[tuple[int, int]],
    tokenizer: PreTrainedTokenizerBase,
    prompt_ids: Sequence[int] = (),
) -> str:
    """Final answer of a rollout: :func:`parse_answer` of the last assistant turn's own tokens, never of tool output.

    Args:
        response_ids: L response tokens.
        turn_ranges: T half-open ranges of the assistant turns.
        tokenizer: the policy's tokenizer.
        prompt_ids: the rendered prompt, which may open the thinking of a rollout of one turn; that of later turns is
            opened by response tokens.

    Returns:
        The answer without special tokens and surrounding white space; empty if there is none.
    """
    if not turn_ranges:
        return ""
    start, end = turn_ranges[-1]
    before = [*prompt_ids[-OPENING_TOKENS:], *response_ids[max(0, start - OPENING_TOKENS) : start]]
    answer = parse_answer(_decode(tokenizer, response_ids[start:end]), open_thinking(before, tokenizer) or False)
    return _visible(without_special_tokens(answer, tokenizer))


def extract_observations(
    response_ids: Sequence[int], turn_ranges: Sequence[tuple[int, int]], tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """Tool observations of a rollout: the texts between consecutive assistant turns, in order.

    The text inside ``<tool_response>…</tool_response>`` where the template has these tags, else what the chat template
    writes around a tool's text is cut off (:func:`~verl.utils.siop.chat_markup.result_texts`), else the whole text
    between the turns; without special tokens and surrounding white space, several in one observation joined by a
    newline. An observation without any text is left out: there is nothing in it that could support an answer.

    Args:
        response_ids: L response tokens.
        turn_ranges: T half-open ranges of the assistant turns.
        tokenizer: the policy's tokenizer.

    Returns:
        At most T - 1 texts.
    """
    between = [_decode(tokenizer, response_ids[end:start]) for (_, end), (start, _) in itertools.pairwise(turn_ranges)]
    return [text for text in (observation_text(text, tokenizer) for text in between) if text]


def observation_text(text: str, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
    """An observation of what stands between two turns, see :func:`extract_observations`; empty without any text.

    Args:
        text: decoded with special tokens.
        tokenizer: the policy's; without it control tokens stay, and what a template writes where it has no tags.
    """
    responses = _TOOL_RESPONSE.findall(text) or (result_texts(text, tokenizer) if tokenizer else [text])
    text = "\n".join(response.strip() for response in responses)
    return _visible(without_special_tokens(text, tokenizer) if tokenizer else text)


def parse_queries(turn_text: str) -> list[Query]:
    """The queries of one assistant turn: its tool calls, normalised so that equal ones can be counted.

    Reads hermes calls, ``<tool_call>{"name": …, "arguments": {…}}</tool_call>``, wherever verl's hermes parser finds
    them. A query is the tool's name and, sorted by name, each argument with the plain form of its text
    (:func:`~verl.utils.siop.nli_clustering.plain_form`), or with its JSON, if it is no text. A call that is not valid
    JSON, or has no name or no arguments, is none: the tool is not called either.

    >>> parse_queries('<tool_call>{"name": "search", "arguments": {"query": "The  Tower!"}}</tool_call>')
    [('search', 'query', 'tower')]
    """
    queries = []
    for piece in turn_text.split("</tool_call>")[:-1]:
        _, opened, text = piece.partition("<tool_call>")
        if not opened:
            continue
        try:
            call = json.loads(text)
            name, arguments = call["name"], call["arguments"]
        except (ValueError, KeyError, TypeError, RecursionError):  # a number of 5,000 digits is a ValueError
            continue
        queries.append(query_of(str(name), arguments))
    return queries


def query_of(name: str, arguments: Any) -> Query:
    """The normal form of one tool call, see :func:`parse_queries`; ``arguments`` are what its JSON holds."""
    named = arguments if isinstance(arguments, dict) else {"": arguments}
    parts = [
        (key, plain_form(value) or value.strip() if isinstance(value, str) else json.dumps(value, sort_keys=True))
        for key, value in named.items()
    ]
    return (name, *itertools.chain.from_iterable(sorted(parts)))


def extract_queries(
    response_ids: Sequence[int], turn_ranges: Sequence[tuple[int, int]], tokenizer: PreTrainedTokenizerBase
) -> list[list[Query]]:
    """The queries of each assistant turn of a rollout, see :func:`parse_queries`.

    Args:
        response_ids: L response tokens.
        turn_ranges: T half-open ranges of the assistant turns.
        tokenizer: the policy's tokenizer.
    """
    return [parse_queries(_decode(tokenizer, response_ids[start:end])) for start, end in turn_ranges]
