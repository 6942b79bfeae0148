"""Prompts, tools and their calls: the check renders and reads what the run renders and reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from preflight_world import (
    CODER,
    HERMES,
    MULTI_TURN,
    ROW,
    SEARCH_TOOL,
    TOOL_TEMPLATE,
    Parts,
    check,
    model_with_template,
    right_parts,
    write_rows,
    write_tools,
)
from transformers import AutoTokenizer
from verl.tools.search_common import SEARCH_SCHEMA
from verl.trainer.siop.checks.data import DataError
from verl.utils.siop.errors import ScorerUnavailable, SiopConfigError

SCORER_IS_ASKED = pytest.raises(ScorerUnavailable)
PLAIN = {"data.max_prompt_length": "2000"}


@pytest.fixture
def parts(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Parts:
    """A search tool, and a model whose template renders tools and writes hermes calls."""
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    model = model_with_template(tiny_model, tmp_path, TOOL_TEMPLATE.replace("CALL", HERMES))
    tools = write_tools(tmp_path / "search.yaml", SEARCH_TOOL)
    return {
        **right_parts(tmp_path, tiny_model),
        **PLAIN,
        "actor_rollout_ref.model.path": model,
        f"{MULTI_TURN}.tool_config_path": tools,
    }


def _length(parts: Parts, tools: bool) -> int:
    """Tokens of the prompt of ``ROW``, rendered by transformers itself."""
    tokenizer = AutoTokenizer.from_pretrained(parts["actor_rollout_ref.model.path"])
    schemas: Any = [SEARCH_SCHEMA.model_dump(exclude_unset=True, exclude_none=True)] if tools else None
    text = tokenizer.apply_chat_template(ROW["prompt"], tools=schemas, add_generation_prompt=True, tokenize=False)
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


# --- length -----------------------------------------------------------------------------------------------------------


def test_the_length_is_that_of_the_prompt_with_its_tools(parts: Parts) -> None:
    """The rendering of the run: the tools count, or verl would cut the prompt on its left."""
    with_tools, without = _length(parts, True), _length(parts, False)
    assert without < 100 < with_tools - 200
    with SCORER_IS_ASKED:
        check(parts, data__max_prompt_length=with_tools)
    message = rf"row 0: the prompt has {with_tools} tokens, data.max_prompt_length is {with_tools - 1}"
    with pytest.raises(DataError, match=message):
        check(parts, data__max_prompt_length=with_tools - 1)
    with SCORER_IS_ASKED:
        check({**parts, f"{MULTI_TURN}.tool_config_path": "null"}, data__max_prompt_length=without)


def test_rows_that_select_their_tools_are_rendered_with_these(parts: Parts, tmp_path: Path) -> None:
    long = SEARCH_SCHEMA.model_dump(exclude_unset=True, exclude_none=True)
    long["function"]["name"] = "archive"
    long["function"]["description"] = "x" * 1000
    tools = write_tools(tmp_path / "two.yaml", SEARCH_TOOL, {**SEARCH_TOOL, "tool_schema": long})
    parts = {**parts, f"{MULTI_TURN}.tool_config_path": tools, "data.max_prompt_length": "1000"}
    chosen = {**ROW, "extra_info": {"tool_selection": ["search"]}}
    path = write_rows(tmp_path / "chosen.parquet", [chosen, chosen])
    with SCORER_IS_ASKED:
        check(parts, data__train_files=path, data__val_files=path)
    every = write_rows(tmp_path / "every.parquet", [chosen, {**ROW, "extra_info": {"tool_selection": []}}])
    with pytest.raises(DataError, match=r"row 1: the prompt has \d+ tokens, data.max_prompt_length is 1000"):
        check(parts, data__train_files=every)
    # verl's own filter renders all tools for all rows.
    with pytest.raises(DataError, match=r"data.train_files: 0 rows \(2 of 2 are left out"):
        check(parts, data__train_files=path, data__filter_overlong_prompts="true")


def test_a_custom_template_and_its_options_are_rendered(parts: Parts, tiny_model: Path, tmp_path: Path) -> None:
    bare = model_with_template(tiny_model, tmp_path / "other", "x")
    (Path(bare) / "chat_template.jinja").unlink()
    template = "{{ intro }}" + TOOL_TEMPLATE.replace("CALL", HERMES)
    quoted = json.dumps(template)
    parts = {**parts, "actor_rollout_ref.model.path": bare}
    overrides = [f"actor_rollout_ref.model.custom_chat_template={quoted}"]
    with SCORER_IS_ASKED:
        check(parts, *overrides)
    with pytest.raises(DataError, match=r"the prompt has 3\d\d\d tokens"):
        check(parts, *overrides, f"+data.apply_chat_template_kwargs.intro={'x' * 3000}")


def test_a_template_that_raises_is_one_line(parts: Parts, tmp_path: Path) -> None:
    developer = {**ROW, "prompt": [{"role": "developer", "content": "be brief"}, *ROW["prompt"]]}
    path = write_rows(tmp_path / "role.parquet", [ROW, developer])
    for overlong in ("false", "true"):
        with pytest.raises(
            DataError, match=rf"^{path}: row 1: the chat template .*unexpected role developer$"
        ) as error:
            check(parts, data__train_files=path, data__filter_overlong_prompts=overlong)
        assert "\n" not in str(error.value)


# --- the format of calls ----------------------------------------------------------------------------------------------


def test_a_format_that_does_not_exist_is_refused(parts: Parts) -> None:
    with pytest.raises(
        SiopConfigError, match=r"multi_turn.format=hermez is not allowed; choose one of .*hermes.*qwen3"
    ):
        check({**parts, f"{MULTI_TURN}.format": "hermez"})
    with pytest.raises(SiopConfigError, match=r"multi_turn.format=hermez is not allowed"):
        check({**parts, f"{MULTI_TURN}.format": "hermez", f"{MULTI_TURN}.tool_config_path": "null"})


@pytest.mark.parametrize(("call", "fits"), [(HERMES, "hermes"), (CODER, "qwen3_coder")])
@pytest.mark.parametrize("form", ["hermes", "qwen3_coder", "glm", "seed", "minimax", "kimi", "gemma4"])
def test_the_format_reads_what_the_template_writes(
    parts: Parts, tiny_model: Path, tmp_path: Path, call: str, fits: str, form: str
) -> None:
    model = model_with_template(tiny_model, tmp_path, TOOL_TEMPLATE.replace("CALL", call))
    parts = {**parts, "actor_rollout_ref.model.path": model, f"{MULTI_TURN}.format": form}
    if form == fits:
        with SCORER_IS_ASKED:
            check(parts)
        return
    with pytest.raises(SiopConfigError, match=rf"multi_turn.format={form} does not read .*; set it to {fits}\. It wri"):
        check(parts)


def test_a_template_whose_calls_no_format_reads(parts: Parts, tiny_model: Path, tmp_path: Path) -> None:
    call = "[{{ call.function.name }}({{ call.function.arguments }})]"
    model = model_with_template(tiny_model, tmp_path, TOOL_TEMPLATE.replace("CALL", call))
    with pytest.raises(
        SiopConfigError, match=r"format=hermes does not read .*; nor does any other .*custom_chat_templ"
    ):
        check({**parts, "actor_rollout_ref.model.path": model})


def test_a_template_without_calls_is_no_obstacle(
    parts: Parts, tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The prompt shows the form then: the format's own example is read back in its place."""
    with SCORER_IS_ASKED:
        check({**parts, "actor_rollout_ref.model.path": str(tiny_model)})
    caplog.clear()
    with SCORER_IS_ASKED:
        check({**parts, "actor_rollout_ref.model.path": str(tiny_model), f"{MULTI_TURN}.format": "kimi"})
    assert "writes no tool calls, so that actor_rollout_ref.rollout.multi_turn.format=kimi could not be tried" in (
        caplog.text
    )


def test_a_template_that_loses_tool_results_is_refused(parts: Parts, tiny_model: Path, tmp_path: Path) -> None:
    template = TOOL_TEMPLATE.replace("CALL", HERMES)
    for changed, message in (
        (template.replace("{{ m.content }}\n</tool_response>", "</tool_response>"), "leaves out the result of a tool"),
        (template.replace("m.role == 'tool'", "false"), "cannot render the result of a tool .*unexpected role tool"),
        (template.replace("{%- for call in", "{%- if m.tool_calls %}{{ m.x.y }}{% endif %}{%- for call in"),
         "cannot render an assistant turn with a call of 'search'"),
    ):  # fmt: skip
        model = model_with_template(tiny_model, tmp_path, changed)
        with pytest.raises(SiopConfigError, match=message):
            check({**parts, "actor_rollout_ref.model.path": model})


def test_a_question_with_markup_is_no_obstacle(parts: Parts, tmp_path: Path) -> None:
    content = 'Write <tool_call>{"name": "search"}</tool_call>, then <answer> x </answer>. Question: "who\\s" {first}?'
    row = {**ROW, "prompt": [{"role": "user", "content": content}]}
    path = write_rows(tmp_path / "markup.parquet", [row, row])
    with SCORER_IS_ASKED:
        check(parts, data__train_files=path)


# --- what the prompt says ---------------------------------------------------------------------------------------------


def _warned(parts: Parts, caplog: pytest.LogCaptureFixture, tmp_path: Path, content: str, **changes: Any) -> str:
    row = {**ROW, "prompt": [{"role": "user", "content": content}]}
    caplog.clear()
    with SCORER_IS_ASKED:
        check(parts, data__train_files=write_rows(tmp_path / "said.parquet", [row, row]), **changes)
    return "\n".join(
        record.getMessage() for record in caplog.records if "the prompt does not say" in record.getMessage()
    )


def test_what_the_prompt_must_say_is_said(
    parts: Parts, tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    silent = {**parts, "actor_rollout_ref.model.path": str(tiny_model)}
    warned = _warned(silent, caplog, tmp_path, "who?")
    assert "how to call 'search'" in warned and '<tool_call>\\n{"name": "search"' in warned and "<answer>" in warned
    assert _warned(silent, caplog, tmp_path, "Call search in <tool_call> …, answer in <answer>. Who?") == ""
    only = _warned(parts, caplog, tmp_path, "who?")  # this template renders the tools
    assert "<answer>" in only and "how to call" not in only
    assert _warned(parts, caplog, tmp_path, "Answer in <answer>. Who?") == ""


# --- the tools --------------------------------------------------------------------------------------------------------

BAD_TOOLS: dict[str, tuple[str, str]] = {
    "a key of another tool": ("tools: [{class_name: verl.tools.local_search_tool.LocalSearchTool, config: "
                              "{type: native, depth: 3}}]", r"unknown config key\(s\) depth"),
    "a wrong value": ("tools: [{class_name: verl.tools.local_search_tool.LocalSearchTool, config: "
                      "{type: native, topk: 0}}]", r"topk must be"),
    "no such module": ("tools: [{class_name: nowhere.Tool, config: {type: native}}]",
                       r"tools\[0\].class_name=nowhere.Tool cannot be imported"),
    "no such class": ("tools: [{class_name: verl.tools.local_search_tool.Tool, config: {type: native}}]",
                      r"tools\[0\].class_name=verl.tools.local_search_tool.Tool cannot be imported: AttributeError"),
    "no type": ("tools: [{class_name: verl.tools.local_search_tool.LocalSearchTool, config: {}}]",
                r"tools\[0\].config needs type: native"),
    "no config": ("tools: [{class_name: verl.tools.local_search_tool.LocalSearchTool}]",
                  r"tools\[0\] needs the keys class_name and config"),
    "no list": ("search: {}", r"needs a list under the key 'tools'"),
    "no YAML": ("tools: [", r"tool_config_path=.*ParserError"),
    "no variable": ("tools: [{class_name: x.y, config: {type: '${oc.env:NOWHERE_SET}'}}]", r"NOWHERE_SET"),
    "no key for the service": ("tools: [{class_name: verl.tools.serper_search_tool.SerperSearchTool, config: "
                               "{type: native}}]", r"set the environment variable SERPER_API_KEY"),
    "a key with a typo": ("tools: [{class_name: verl.tools.local_search_tool.LocalSearchTool, config: {type: native}, "
                          "tool_shema: {}}]", r"tools\[0\]: unknown key\(s\) tool_shema; allowed: class_name, "),
    "no tool": ("tools: [{class_name: pathlib.Path, config: {type: native}}]",
                r"class_name=pathlib.Path is not a tool: it must be a subclass of verl's BaseTool"),
    "no name": ("tools: [{class_name: verl.tools.base_tool.BaseTool, config: {type: native}, tool_schema: {type: "
                "function, function: {name: '', description: ''}}}]", r"a tool has an empty name"),
    "one name twice": ("tools: [{class_name: verl.tools.local_search_tool.LocalSearchTool, config: {type: native}}, "
                       "{class_name: verl.tools.local_search_tool.LocalSearchTool, config: {type: native}}]",
                       r"two tools are called 'search'"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_TOOLS)
def test_the_tools_are_built_before_the_start(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.delenv("SERPER_API_KEY", raising=False)
    text, message = BAD_TOOLS[name]
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(SiopConfigError, match=message) as error:
        check({**parts, f"{MULTI_TURN}.tool_config_path": str(path)})
    assert f"{MULTI_TURN}.tool_config_path={path}" in str(error.value)


def test_a_second_cut_of_results_that_is_not_at_their_end_is_refused(parts: Parts) -> None:
    cut = {f"{MULTI_TURN}.max_tool_response_length": "100"}
    for side in ("middle", "left"):
        with pytest.raises(SiopConfigError, match=r"max_tool_response_length=100 is below max_chars=200 of .*'search'"):
            check({**parts, **cut, f"{MULTI_TURN}.tool_response_truncate_side": side})
    with SCORER_IS_ASKED:
        check({**parts, **cut, f"{MULTI_TURN}.tool_response_truncate_side": "right"})


def test_an_agent_loop_that_does_not_exist(parts: Parts) -> None:
    with pytest.raises(SiopConfigError, match=r"default_agent_loop=react is not allowed; choose one of .*tool_agent"):
        check({**parts, "actor_rollout_ref.rollout.agent.default_agent_loop": "react"})


# --- the method's texts -----------------------------------------------------------------------------------------------


def test_words_that_the_tokenizer_does_not_know(
    toy_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The toy world's vocabulary has no words for the text of the first release before a reference."""
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    row = {**ROW, "prompt": [{"role": "user", "content": "who ?"}]}
    path = write_rows(tmp_path / "toy.parquet", [row, row])
    parts = {**right_parts(tmp_path, toy_model), "data.train_files": path, "data.val_files": path}
    text = "\nNow there's enough information to answer\n</think>\n<answer>\n"
    release = f"algorithm.siop_reference_prefix={json.dumps(text)}"
    with pytest.raises(
        SiopConfigError, match=r"siop_reference_prefix=.*Now .* has words that the tokenizer of .* does"
    ):
        check(parts, release)
    with SCORER_IS_ASKED:
        check(
            parts,
            f"algorithm.siop_reference_prefix={json.dumps(release)}",
            algorithm__siop_reward_mode="majority_binary",
        )
    with SCORER_IS_ASKED:
        check(parts)
    with SCORER_IS_ASKED:
        check(parts, "algorithm.siop_reference_prefix='<think> done </think> <answer> '")


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The tiny model with a tokenizer by words, of the kind of the toy world's."""
    from examples.toy_world.tokenizer import build_tokenizer

    path = Path(model_with_template(tiny_model, tmp_path_factory.mktemp("toy"), ""))
    build_tokenizer(["who", "?", "done"]).save_pretrained(path)
    return path
