"""What is read out of text that a model wrote or a passage holds: the right thing, and in linear time.

Time is not measured here (``benchmarks/scanners.py`` does). The scanners equal plain definitions that take quadratic
time, what they look at is counted, and no regular expression of theirs can look at a text again from every start.
"""

from __future__ import annotations

import re
from types import ModuleType

import pytest
from hypothesis import given
from hypothesis import strategies as st
from method_helpers import Scorer, byte_tokenizer, rollout, run, search_rollout, tool_result
from verl.tools import control_tokens
from verl.trainer.siop.rollouts import tool_calls
from verl.utils.reward_score import siop_reward
from verl.utils.siop import chat_markup, nli_clustering, turn_utils
from verl.utils.siop.credit import answers
from verl.utils.siop.turn_utils import (
    _CALLS,
    THINKING,
    extract_answer,
    get_assistant_turn_ranges,
    leave_thinking,
    opens_thinking,
    parse_answer,
    parse_queries,
    without_thinking,
)

CALL = '<tool_call>{"name": "search", "arguments": {"query": "<answer>Lyon</answer>"}}'
MAYBE = "Maybe it is <answer>Lyon</answer> but let me check"


@pytest.mark.parametrize(
    ("text", "thinking", "answer"),
    [
        # The prompt opened the thinking.
        (MAYBE, True, ""),
        (MAYBE, False, "Lyon"),
        (f"{MAYBE}</think><answer>Paris</answer>", True, "Paris"),
        (f"{MAYBE}</think>", True, ""),
        (f"{MAYBE}</think><answer>Paris</answer><think>or {MAYBE}", True, "Paris"),
        (f"<think>again</think><answer>Paris</answer>{MAYBE}", True, "Lyon"),
        (f"I could write <tool_call> now. {MAYBE}</think><answer>Paris</answer>", True, "Paris"),
        # Tool calls, closed, cut off, of other formats, beside an answer.
        (f"{CALL}</tool_call>", False, ""),
        (CALL, False, ""),
        (f"<answer>Paris</answer>{CALL}</tool_call>", False, "Paris"),
        (f"{CALL}</tool_call><answer>Paris</answer>", False, "Paris"),
        (f"I will write <answer> later. {CALL}</tool_call>", False, ""),
        (f"{CALL}</tool_call> done </tool_call><answer>Paris</answer>", False, "Paris"),
        *((f"{opening}x{MAYBE}{closing}", False, "") for opening, closing in _CALLS),
        *((f"<answer>Paris</answer>{opening}x{MAYBE}", False, "Paris") for opening, _ in _CALLS),
        # Thinking of all families.
        *((f"{opening}x{MAYBE}", False, "") for opening, _ in THINKING),
        *((f"{opening}x{MAYBE}{closing}no answer", False, "") for opening, closing in THINKING),
        *((f"{opening}x{MAYBE}{closing}<answer>Paris</answer>", False, "Paris") for opening, closing in THINKING),
        *((f"{MAYBE}{closing}no answer", True, "") for _, closing in THINKING),
        *((f"{MAYBE}{closing}no answer", False, "") for _, closing in THINKING if closing != "<|end|>"),
        ("<answer>Paris</answer><|end|>", False, "Paris"),
        ("<|START_THINKING|><answer>Lyon</answer> hm", False, ""),
        ("<|begin_of_thought|><answer>Lyon</answer>", False, ""),
        ('[TOOL_CALLS]x{"q": "<answer>Lyon</answer>"}', False, ""),
        ('<function_call>{"q":"<answer>Lyon</answer>"}</function_call>', False, ""),
        # A call of gpt-oss stands in a header; what looks like one in prose is prose.
        (f" to=functions.x<|channel|>commentary json<|message|>{MAYBE}<|call|>", False, ""),
        (f"<|start|>assistant to=functions.x<|channel|>commentary<|message|>{MAYBE}", False, ""),
        (f"<|channel|>analysis to=functions.x code<|message|>{MAYBE}", False, ""),
        ("I map x to=functions.x. <answer>Paris</answer>", False, "Paris"),
        ("<|channel|>final<|message|>I map x to=functions.x. <answer>Paris</answer>", False, "Paris"),
        # What opens first owns what is in it.
        ('<tool_call>{"query": "what is <think>"}</tool_call><answer>Paris</answer>', False, "Paris"),
        ('<answer>Paris</answer><tool_call>{"query": "</think>"}</tool_call>', False, "Paris"),
        ("The tag is <answer><think></answer>", False, ""),
        ("<answer>Lyon? No.</think> Paris</answer>", False, ""),
        ("<answer><tool_call></answer>", False, "<tool_call>"),
        ("<answer><think>Lyon? No.</think> Paris</answer>", False, "Paris"),
        # Cut off while correcting, nothing visible, other spellings of the tag.
        ("<answer>Lyon</answer> No: <answer>Paris", False, "Lyon"),
        ("<answer>\u200b</answer>", False, ""),
        ("<answer>\u3164 \u2800\ufe0f\u034f\u180b</answer>", False, ""),
        ("<answer>❤\ufe0f</answer>", False, "❤\ufe0f"),
        ("<answer>Lyon</answer><answer>\u00a0\ufeff\n</answer>", False, ""),
        ("<answer>\u200b5 </answer>", False, "\u200b5"),
        ("<answer><answer>Paris</answer></answer>", False, "Paris"),
        ("<Answer>Paris</Answer>", False, ""),
        (r"\boxed{Paris}", False, ""),
    ],
)
def test_answers(text: str, thinking: bool, answer: str) -> None:
    assert parse_answer(text, thinking) == answer
    prompt = byte_tokenizer()("<think>\n" if thinking else "assistant\n", add_special_tokens=False)["input_ids"]
    item = rollout("q", [text])
    turns = get_assistant_turn_ranges(item.response_mask)
    assert extract_answer(item.response_ids, turns, byte_tokenizer(), prompt) == answer
    record = {"siop_tools": {"thinking": thinking}}
    assert siop_reward.final_answer(text, record) == answer
    assert siop_reward.compute_score("d", text, "Lyon", record)["em"] == float(answer == "Lyon")
    # The generation prompt of a later turn stands in the response.
    opened = tool_result("found") + ("<think>\n" if thinking else "")
    item = rollout("q", ["search", text], [opened])
    turns = get_assistant_turn_ranges(item.response_mask)
    assert extract_answer(item.response_ids, turns, byte_tokenizer()) == answer
    assert siop_reward.final_answer(f"search{opened}{text}") == answer
    assert siop_reward.final_answer(f"search{opened}{text}", record) == answer


THINK = ("<think>", "</think>")


@pytest.mark.parametrize("closing", [closing for _, closing in THINKING[1:]])
def test_only_its_own_tag_closes_thinking_that_the_prompt_opened(closing: str) -> None:
    thought = f"thought {closing}<answer>Lyon</answer> still"
    prompt = byte_tokenizer()("<think>\n", add_special_tokens=False)["input_ids"]
    for text, answer in ((thought, ""), (f"{thought}</think><answer>Paris</answer>", "Paris")):
        assert parse_answer(text, THINK) == answer
        ids = byte_tokenizer()(text, add_special_tokens=False)["input_ids"]
        assert extract_answer(ids, [(0, len(ids))], byte_tokenizer(), prompt) == answer
    assert without_thinking(thought, THINK, keep_open=False) == ""
    assert without_thinking(f"{thought}</think>so", THINK) == "so"
    assert leave_thinking(f"{thought}</think>so", THINK) == (thought, "so")


REASON = "<think>\nOkay, the user asks a question and I need to reason about it carefully.\n"


@pytest.mark.parametrize(
    ("prompt", "opened"),
    [
        ("x" * 100 + "<|im_start|>assistant\n<think>\n", True),
        ("<think>", True),
        ("<think>\n\n</think>\n\n", False),
        ("<|im_start|>assistant\n<think>\nOkay,", True),
        ("<|im_start|>assistant\n<think>\nOkay.</think>\nSo", False),
        ("<|im_start|>assistant\n<seed:think>", True),
        ("<|im_start|>assistant\n<seed:think></seed:think>", False),
        (f"<|im_start|>assistant\n{REASON}", True),
        (f"<|im_start|>assistant\n{REASON}</think>", False),
        (f"{REASON}<|im_start|>assistant\n", False),
        ("Write <think> first.<|im_end|>\n<|im_start|>assistant\n", False),
        ("", False),
    ],
)
def test_whether_the_prompt_opens_the_thinking(prompt: str, opened: bool) -> None:
    assert opens_thinking(byte_tokenizer()(prompt, add_special_tokens=False)["input_ids"], byte_tokenizer()) == opened


def test_an_answer_in_thinking_that_the_prompt_opened_gets_no_reward() -> None:
    items = [rollout("a", [MAYBE]), rollout("a", [f"{MAYBE}</think><answer>Paris</answer>"]), search_rollout("a", "x")]
    for item in items:
        item.prompt_ids += byte_tokenizer()("<think>\n", add_special_tokens=False)["input_ids"]
    scorer = Scorer()
    found = run(items, scorer=scorer)
    assert found.answers == ["", "Paris", "x"] and found.turn_rewards[0] == []
    assert scorer.cluster_calls == [("Q a", ["Paris", "x"])]


# --- the same as plain definitions ------------------------------------------------------------------------------------

TAGS = ["<think>", "</think>", "<answer>", "</answer>", "<tool_call>", "</tool_call>", "<seed:tool_call>"]
CALLED = '{"name": "f", "arguments": {"q": "x"}}'
texts = st.lists(st.sampled_from([*TAGS, "</seed:tool_call>", "a", "b ", "\n", "<", CALLED]), max_size=16).map("".join)


def answer_by_definition(text: str, thinking: bool) -> str:
    if thinking:
        text = text.partition("</think>")[2]
    answer, start = "", 0
    while rest := text[start:]:
        tag = next((tag for tag in TAGS if rest.startswith(tag)), "")
        if not tag:
            start += 1
            continue
        start += len(tag)
        inner, closed, _ = rest[len(tag) :].partition(tag.replace("<", "</", 1))
        if tag == "</think>":
            answer = ""
        elif tag == "<answer>" and closed and tag not in inner:
            start += len(inner) + len("</answer>")
            words = re.sub("<think>.*?</think>", "", inner, flags=re.DOTALL)
            if "</think>" in words:
                answer = ""
            elif "<think>" not in words:
                answer = words.strip()
        elif tag in ("<think>", "<tool_call>", "<seed:tool_call>"):
            start += len(inner) + len(tag) + 1
    return answer


@given(texts, st.booleans())
def test_the_answer_equals_its_definition(text: str, thinking: bool) -> None:
    assert parse_answer(text, thinking) == answer_by_definition(text, thinking)


@given(texts)
def test_queries_equal_their_definition(text: str) -> None:
    called = re.findall(r"<tool_call>(.*?)</tool_call>", text, re.DOTALL)
    expected = [("f", "q", "x") for body in called if body.strip() == CALLED]
    assert parse_queries(text) == expected


@given(texts)
def test_f1_of_the_first_release_reads_the_first_answer(text: str) -> None:
    found = re.search(r"<answer>(.*?)</answer>", text, re.DOTALL)
    has_a = found is not None and "a" in re.findall(r"\w+", found[1])
    assert (answers.f1_release(text, ["a"]) > 0) == has_a


SHAPES = ["<", ">", "[", "]", "|", "/", " ", "\t", "tool", "INST", "s", "im_end", "answer", "｜", "x"]


@given(st.lists(st.sampled_from(SHAPES), max_size=14).map("".join))
def test_control_tokens_are_those_of_the_plain_expression(text: str) -> None:
    plain = re.compile(
        control_tokens._CONTROL.pattern.replace(r"\s*(?:/\s*)?", r"\s*/?\s*"), control_tokens._CONTROL.flags
    )
    assert r"\s*/?\s*" in plain.pattern
    assert bool(control_tokens._CONTROL.fullmatch(text)) == bool(plain.fullmatch(text))


# --- linear -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module", [turn_utils, chat_markup, siop_reward, answers, nli_clustering, tool_calls, control_tokens]
)
def test_no_expression_looks_at_a_text_again_from_every_start(module: ModuleType) -> None:
    for name, expression in vars(module).items():
        if isinstance(expression, re.Pattern):
            text = expression.pattern
            # What is not found may end with the text, or every later start looks for it again.
            assert not re.search(r"[.][*+][?]", text) or r"|\Z)" in text, name
            # Two neighbours that can divide the same characters between them in every way.
            assert not re.search(r"(\\[sw])[*+](?:.[?])?\1[*+]", text), name
