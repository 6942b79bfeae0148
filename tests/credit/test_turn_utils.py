"""Turns, answers, observations and boundaries."""

from __future__ import annotations

import json
import re
from itertools import groupby

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from method_helpers import byte_tokenizer, rollout, tool_result
from verl.utils.siop.chat_markup import _any_of, special_tokens, without_special_tokens
from verl.utils.siop.errors import RolloutError, SiopConfigError
from verl.utils.siop.turn_utils import (
    BOUNDARY_MODES,
    boundaries,
    extract_answer,
    extract_observations,
    extract_queries,
    get_assistant_turn_ranges,
    parse_queries,
)


@given(st.lists(st.integers(0, 1), max_size=40))
def test_turns_are_the_maximal_runs_of_one(mask: list[int]) -> None:
    expected, position = [], 0
    for value, run in groupby(mask):
        length = len(list(run))
        if value:
            expected.append((position, position + length))
        position += length
    for form in (mask, np.array(mask, dtype=int), torch.tensor(mask, dtype=torch.int64), torch.tensor(mask).bool()):
        assert get_assistant_turn_ranges(form) == expected


@pytest.mark.parametrize("mask", [[0, 2, 1], [0.5], [[1, 0]], [[1], [1, 0]], [float("nan")]])
def test_a_malformed_mask_is_refused(mask: list[float]) -> None:
    with pytest.raises(RolloutError, match="response mask"):
        get_assistant_turn_ranges(mask)


TURNS = [(2, 5), (8, 12), (20, 30)]


@pytest.mark.parametrize(
    ("mode", "turns", "expected"),
    [
        ("before_answer", TURNS, [0, 5, 12, 20]),
        ("assistant", TURNS, [0, 5, 12, 30]),
        ("observation", TURNS, [0, 8, 20, 20]),
        ("before_answer", [(0, 4)], [0, 0]),
        ("assistant", [(0, 4)], [0, 4]),
        ("observation", [(3, 7)], [0, 0]),
        ("observation", [], [0]),
    ],
)
def test_boundaries(mode: str, turns: list[tuple[int, int]], expected: list[int]) -> None:
    assert boundaries(turns, mode) == expected


def test_an_unknown_boundary_is_refused() -> None:
    with pytest.raises(SiopConfigError, match=r"'end'.*before_answer, assistant, observation"):
        boundaries(TURNS, "end")


@given(st.lists(st.integers(0, 1), max_size=30), st.sampled_from(BOUNDARY_MODES))
def test_boundaries_are_nested_prefixes(mask: list[int], mode: str) -> None:
    turns = get_assistant_turn_ranges(mask)
    found = boundaries(turns, mode)
    assert len(found) == len(turns) + 1
    assert found[0] == 0
    assert found == sorted(found)
    assert found[-1] <= len(mask)


LONG = " ".join(f"word{n}" for n in range(500))


@pytest.mark.parametrize(
    ("last_turn", "answer"),
    [
        ("<think>so</think><answer> Paris </answer><|im_end|>", "Paris"),
        ("<answer>Lyon</answer> no, <answer>\nParis\n</answer>", "Paris"),
        ("<answer>Lyon</answer><answer></answer>", ""),
        ("<answer>  </answer>", ""),
        ("<answer>Par", ""),
        ("<think>done</think><|im_end|>", ""),
        ("<think><answer>Lyon</answer></think>", ""),
        ("<think><answer>Lyon</answer></think><answer>Paris</answer>", "Paris"),
        ("<answer>Paris</answer><think>or <answer>Lyon</answer></think>", "Paris"),
        ("<think>is it <answer>Lyon</answer>", ""),
        ("<answer>Paris</answer><think>is it <answer>Lyon</answer>", "Paris"),
        ("so <answer>Lyon</answer></think><answer>Paris</answer>", "Paris"),
        ("I write <answer> tags: <answer>Paris</answer>", "Paris"),
        ("<answer>Paris</answer> with </answer>", "Paris"),
        ('<answer>Paris</answer><tool_call>{"name": "search"}</tool_call>', "Paris"),
        ('<tool_call>{"name": "search"}</tool_call>', ""),
        ("<answer>Paris<|im_end|></answer>", "Paris"),
        ("<answer>東京都</answer>", "東京都"),
        ("<answer>القاهرة &amp; Жуков 🙂</answer>", "القاهرة &amp; Жуков 🙂"),
        ("<answer>two\nlines , and 's space</answer>", "two\nlines , and 's space"),
        (f"<answer>{LONG}</answer>", LONG),
    ],
)
def test_answer_of_the_last_turn(last_turn: str, answer: str) -> None:
    item = rollout("q", ["<answer>earlier turn</answer>", last_turn], [tool_result("<answer>tool</answer>")])
    assert extract_answer(item.response_ids, get_assistant_turn_ranges(item.response_mask), byte_tokenizer()) == answer


def test_an_answer_after_the_last_turn_is_tool_output() -> None:
    item = rollout("q", ["<tool_call>search</tool_call>"], [tool_result("<answer>tool</answer>")])
    assert extract_answer(item.response_ids, get_assistant_turn_ranges(item.response_mask), byte_tokenizer()) == ""


def test_a_row_without_turns_has_no_answer_and_no_observations() -> None:
    assert extract_answer([1, 2, 3], [], byte_tokenizer()) == ""
    assert extract_observations([1, 2, 3], [], byte_tokenizer()) == []


def test_tags_that_are_special_tokens_are_read() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(byte_tokenizer().name_or_path)
    tags = ["<think>", "</think>", "<answer>", "</answer>", "<tool_response>", "</tool_response>"]
    tokenizer.add_special_tokens({"additional_special_tokens": tags})
    item = rollout(
        "q",
        ["<tool_call>a</tool_call>", "<think><answer>Lyon</answer></think><answer> Paris </answer><|im_end|>"],
        [tool_result("Doc 1")],
        tokenizer=tokenizer,
    )
    assert tokenizer.convert_tokens_to_ids("<answer>") in item.response_ids
    turns = get_assistant_turn_ranges(item.response_mask)
    assert extract_answer(item.response_ids, turns, tokenizer) == "Paris"
    assert extract_observations(item.response_ids, turns, tokenizer) == ["Doc 1"]


@pytest.mark.parametrize(
    ("observation", "expected"),
    [
        (tool_result(" Doc 1: Paris "), ["Doc 1: Paris"]),
        ("<tool_response>\na\n</tool_response>\n<tool_response>\nb\n</tool_response>", ["a\nb"]),
        ("<|im_start|><information> c </information><|im_end|>", ["<information> c </information>"]),
        ("\n<tool_response>\ncut of", ["cut of"]),
        ("<tool_response>\n\n</tool_response>", []),
        ("<|im_end|>\n", []),
    ],
)
def test_observation_text(observation: str, expected: list[str]) -> None:
    item = rollout("q", ["search", "answer"], [observation, "after the last turn"])
    turns = get_assistant_turn_ranges(item.response_mask)
    assert extract_observations(item.response_ids, turns, byte_tokenizer()) == expected


# One line each, as Llama has them; the second refuses more than one call in a turn, as Llama does.
ROLE = "('ipython' if m.role == 'tool' else m.role)"
LLAMA = (
    "{{ '<|begin|>' }}{% for m in messages %}{{ '<|head|>' + ROLE + '<|/head|>\\n\\n' + m.content + '<|eot|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\\n\\nTHINK' }}{% endif %}"
).replace("ROLE", ROLE)
ONE_CALL = (
    "{% for m in messages %}{% if m.tool_calls and m.tool_calls|length > 1 %}{{ raise_exception('one') }}{% endif %}"
    "{% endfor %}"
)
NO_CALL = "{% for m in messages %}{% if m.tool_calls %}{{ raise_exception('none') }}{% endif %}{% endfor %}"
TAGS = ["<|begin|>", "<|head|>", "<|/head|>", "<|eot|>"]
HEAD, NEXT = "<|head|>ipython<|/head|>\n\n", "<|eot|><|head|>assistant<|/head|>\n\n"


def observed(template: str, observation: str, special: bool) -> list[str]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(byte_tokenizer().name_or_path)
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": TAGS})
    tokenizer.chat_template = template
    item = rollout("q", ["search<|eot|>", "answer"], [observation], tokenizer=tokenizer)
    return extract_observations(item.response_ids, get_assistant_turn_ranges(item.response_mask), tokenizer)


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("checks", ["", ONE_CALL, NO_CALL])
@pytest.mark.parametrize("think", ["", "<think>\\n"])
@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        ([""], []),
        (["Paris is."], ["Paris is."]),
        (["Paris is.", " Lyon is.\n"], ["Paris is.\nLyon is."]),
        (["ipython\n\nassistant"], ["ipython\n\nassistant"]),
    ],
)
def test_what_the_template_writes_around_a_result_is_no_evidence(
    texts: list[str], expected: list[str], think: str, checks: str, special: bool
) -> None:
    template = checks + LLAMA.replace("THINK", think)
    # The run may have rendered its prompts with other options than the template's own: thinking or none.
    for opened in ("", "<think>\n", "<think>\n\n</think>\n\n"):
        observation = f"{HEAD}{f'<|eot|>{HEAD}'.join(texts)}{NEXT}{opened}"
        assert observed(template, observation, special) == expected


def test_a_result_that_names_its_call_and_templates_that_tell_nothing() -> None:
    named = LLAMA.replace("m.role)", "m.name + ' ' + m.tool_call_id if m.role == 'tool' else m.role)").replace(
        "'ipython' if m.role == 'tool' else m.name", "m.name"
    )
    assert observed(named, f"<|head|>search call_17<|/head|>\n\nParis is.{NEXT}", True) == ["Paris is."]
    # As it is: the template refuses results, writes them elsewhere, or the rollout was rendered by another.
    whole = ["ipython\n\nParis is.assistant"]
    refuses = "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no') }}{% endif %}{% endfor %}"
    for template in (refuses + LLAMA, "{{ messages|length }}" + LLAMA):
        assert observed(template, f"{HEAD}Paris is.{NEXT}", True) == whole
    assert observed(LLAMA, f"user\n\nParis is.{NEXT}", True) == ["user\n\nParis is."]


def test_no_control_token_is_made_by_taking_one_out() -> None:
    inner = "<|im_<|endoftext|>end|>"
    for text, left in [
        (f"Paris{inner}", "Paris"),
        (f"a<|im_{inner}end|>b", "ab"),
        ("<|im_" * 9 + "x" + "end|>" * 9, "<|im_" * 9 + "x" + "end|>" * 9),
        ("<|im_<|im_<|im_end|><|endoftext|>start|>end|>Paris", "Paris"),
        ("no token", "no token"),
        ("<|im_" * 20_000 + "<|im_end|>" + "end|>" * 20_000, ""),
    ]:
        assert without_special_tokens(text, byte_tokenizer()) == left


@given(st.lists(st.sampled_from(["<", "|", "im_", "start", "end", "|>", "<|im_end|>", "oftext", "x"])).map("".join))
def test_no_control_token_is_left(text: str) -> None:
    found = without_special_tokens(text, byte_tokenizer())
    assert not any(token in found for token in special_tokens(byte_tokenizer()).values())
    pieces = iter(text)
    assert all(character in pieces for character in found)


@given(st.sets(st.text("ab<|", min_size=1, max_size=4), min_size=1), st.text("ab<|", max_size=12))
def test_any_of_many_tokens_is_the_longest_of_them(words: set[str], text: str) -> None:
    plain = "|".join(map(re.escape, sorted(words, key=len, reverse=True)))
    assert re.findall(_any_of(words), text) == re.findall(plain, text)


@pytest.mark.parametrize(
    ("turn", "queries"),
    [
        (
            '<think>x</think> <tool_call> {"name": "search", "arguments": {"query": " The  Tower! "}} </tool_call>',
            [("search", "query", "tower")],
        ),
        (
            '<tool_call>{"name": "f", "arguments": {"b": "X", "a": ["y", 1]}}</tool_call>'
            '<tool_call>{"name": "g", "arguments": {}}</tool_call>',
            [("f", "a", '["y", 1]', "b", "x"), ("g",)],
        ),
        ('<tool_call>{"name": "search", "arguments": "塔 の"}</tool_call>', [("search", "", "塔 の")]),
        ('<tool_call>{"name": "search", "arguments": {"query": "!"}}</tool_call>', [("search", "query", "!")]),
        # What computes something else is another query.
        *(
            (f'<tool_call>{{"name": "c", "arguments": {{"e": {json.dumps(value)}}}}}</tool_call>', [("c", "e", form)])
            for value, form in [("3+5", "3+5"), ("3*5", "3*5"), ("3.5", "3.5"), (-1, "-1"), (1, "1"), ("C++", "c++")]
        ),
        ('<tool_call>{"name": "search"}</tool_call><tool_call>[1]</tool_call><tool_call>{"na</tool_call>', []),
        ('<tool_call>{"name": "search", "arguments": {"query": "cut of', []),
        ('<tool_call>{"name": "search", "arguments": {"query": ' + "7" * 5000 + "}}</tool_call>", []),
        ("<tool_call>" + "[" * 20000 + "</tool_call>", []),
        ("<answer>Paris</answer>", []),
    ],
)
def test_queries_of_a_turn(turn: str, queries: list[tuple[str, ...]]) -> None:
    assert parse_queries(turn) == queries
    item = rollout("q", [turn, "<answer>x</answer>", turn], [tool_result(turn), tool_result("")])
    turns = get_assistant_turn_ranges(item.response_mask)
    assert extract_queries(item.response_ids, turns, byte_tokenizer()) == [queries, [], queries]


def test_queries_are_those_that_verls_parser_calls() -> None:
    import asyncio

    from verl.experimental.agent_loop.tool_parser import ToolParser

    text = (
        '<think><tool_call>{"name": "search", "arguments": {"query": "a b"}}</tool_call></think>'
        '<tool_call>\n{"name": "search", "arguments": {"query": "c"}}\n</tool_call><tool_call>{"x": 1}</tool_call>'
        '<tool_call>{"name": "search", "arguments": {"query": "d'
    )
    ids = byte_tokenizer()(text, add_special_tokens=False)["input_ids"]
    _, calls = asyncio.run(ToolParser.get_tool_parser("hermes", byte_tokenizer()).extract_tool_calls(ids))
    assert [(call.name, json.loads(call.arguments)["query"]) for call in calls] == [("search", "a b"), ("search", "c")]
    assert parse_queries(text) == [("search", "query", "a b"), ("search", "query", "c")]
