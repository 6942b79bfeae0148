"""Word-level tokenizer of the toy world, with a Qwen-style chat template.

One token per word, one per marker, two for the JSON around a search query, so that a whole rollout is about a hundred
tokens. Text is split at white space; markers split it even when nothing separates them (``</think>\\n<answer>``).
``decode`` joins tokens with one space, and ``encode(decode(ids)) == ids``.

The chat template renders no tool schema (the vocabulary has no words for one) and no default system prompt. A newline
is a token because verl's Qwen continuous-token builder puts one between ``<|im_end|>`` and the next turn.
"""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

PAD, UNK, END = "<pad>", "<unk>", "<|im_end|>"
USER, ASSISTANT, SYSTEM = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_start|>system\n"
NEWLINE = "\n"
QUERY_OPEN, QUERY_CLOSE = '{"name": "search", "arguments": {"query": "', '"}}'

SPECIAL_TOKENS = (PAD, UNK, END, USER, ASSISTANT, SYSTEM)
# Not special: `decode(..., skip_special_tokens=True)` must keep what parsers and answer extraction look for.
MARKERS = (
    NEWLINE,
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<answer>",
    "</answer>",
    QUERY_OPEN,
    QUERY_CLOSE,
)

# The probe that asks the model for its answer now; each part tokenises alone to the tokens the agent itself writes.
REFERENCE_PREFIX = "<think> done </think> <answer> "
REFERENCE_SUFFIX = " </answer> <|im_end|>"

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.content is not none and message.content is not string -%}
{{- raise_exception('message content must be text') -}}
{%- endif -%}
{%- set content = message.content or '' -%}
{%- if message.role in ('user', 'system') -%}
{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' -}}
{%- elif message.role == 'assistant' -%}
{{- '<|im_start|>assistant\\n' + content -}}
{%- for call in message.tool_calls or [] -%}
{%- set function = call.function or call -%}
{{- ' <tool_call> {"name": "' + function.name + '", "arguments": ' -}}
{{- (function.arguments if function.arguments is string else function.arguments | tojson) + '} </tool_call> ' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- elif message.role == 'tool' -%}
{%- if loop.first or messages[loop.index0 - 1].role != 'tool' -%}{{- '<|im_start|>user\\n' -}}{%- endif -%}
{{- '<tool_response> ' + content + ' </tool_response>' -}}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{- '<|im_end|>\\n' -}}{%- endif -%}
{%- else -%}
{{- raise_exception('unknown role ' + message.role) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""


def build_tokenizer(words: Iterable[str], markers: Iterable[str] = MARKERS) -> PreTrainedTokenizerFast:
    """Tokenizer over the special tokens, ``markers`` and ``words`` (order kept; ids follow it).

    Raises:
        ValueError: a word is listed twice, is a marker, or contains white space.
    """
    words, markers = list(words), list(markers)
    bad = [w for w in words if len(w.split()) != 1]
    if bad:
        raise ValueError(f"a word of the vocabulary must be one token without white space, got {bad[:3]}")
    entries = [*SPECIAL_TOKENS, *markers, *words]
    if len(set(entries)) != len(entries):
        raise ValueError("the vocabulary lists a word twice")
    core = Tokenizer(WordLevel({entry: i for i, entry in enumerate(entries)}, unk_token=UNK))
    core.pre_tokenizer = WhitespaceSplit()
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    core.add_tokens([AddedToken(t, special=False, normalized=False) for t in markers])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        unk_token=UNK,
        eos_token=END,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def prompt_text(question: str) -> str:
    """What the chat template renders for one user message and the generation prompt."""
    return f"{USER}{question}{END}\n{ASSISTANT}"


def search_turn_text(relation: str, query: str) -> str:
    """Assistant turn that looks for ``relation`` with ``query``, up to and with the end token."""
    return f"<think> find {relation} </think> <tool_call> {QUERY_OPEN} {query} {QUERY_CLOSE} </tool_call> {END}"


def answer_turn_text(answer: str) -> str:
    """Assistant turn that answers."""
    return f"{REFERENCE_PREFIX}{answer}{REFERENCE_SUFFIX}"


def observation_text(content: str) -> str:
    """What stands between an assistant turn and the next one: the newline after its end token, the tool's result and
    the generation prompt, as verl's agent loop inserts them."""
    return f"\n{USER}<tool_response> {content} </tool_response>{END}\n{ASSISTANT}"
