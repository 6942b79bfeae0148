"""Prompts that fit a model: the preset by rendering, the proof on an example rollout, what a run accepts and sees."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from data_trees import flashrag_tree, write_jsonl
from preflight_world import CODER, HERMES, SEARCH_TOOL, TOOL_TEMPLATE, changed, model_with_template, write_tools
from transformers import AutoTokenizer
from verl.trainer.siop.preflight import SEARCH, check_before_start
from verl.utils.siop.data.build import build
from verl.utils.siop.data.cli import main
from verl.utils.siop.data.fit import fit, load_chat, preset_for
from verl.utils.siop.data.manifest import read_manifest, rows_of
from verl.utils.siop.data.prompts import PROMPTS, QUESTION, SYSTEM, overrides, prompt_of
from verl.utils.siop.data.select import Options
from verl.utils.siop.errors import ScorerUnavailable, SiopConfigError
from verl.utils.siop.turn_utils import THINKING

INSTRUCT = TOOL_TEMPLATE.replace("CALL", HERMES)
OPEN = "<|im_start|>assistant\n{% endif %}"
HYBRID = INSTRUCT.replace(
    OPEN, OPEN.replace("{% endif %}", "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}")
).replace("enable_thinking is false", "enable_thinking is defined and enable_thinking is false")
PREFILLED = INSTRUCT.replace(OPEN, OPEN.replace("{% endif %}", "<think>\n{% endif %}"))
CLOSED = INSTRUCT.replace(OPEN, OPEN.replace("{% endif %}", "<think>\n\n</think>\n\n{% endif %}"))
SILENT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}" + (
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
Model = Callable[[str], str]


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Model:
    """Makes a model with a chat template."""
    return lambda template: model_with_template(tiny_model, tmp_path, template)


@pytest.fixture
def tools(tmp_path: Path) -> str:
    return write_tools(tmp_path / "tools.yaml", SEARCH_TOOL)


@pytest.fixture
def options(tmp_path: Path, tools: str) -> Options:
    tree = flashrag_tree(tmp_path / "tree")
    # A prompt longer than a run takes that is told nothing.
    for path, start in (("bamboogle/test.jsonl", "who"), ("hotpotqa/train.jsonl", "where")):
        long = {"id": "long", "question": f"{start} is {'very ' * 200}late?", "golden_answers": ["me"]}
        write_jsonl(tree / path, [long])
    return Options(out=tmp_path / "out", preset="searchr1", source=(str(tree),), tool_config=tools)


# --- the preset ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "preset"),
    [
        (HYBRID, "hermes-thinking"),
        (PREFILLED, "hermes-prefilled"),
        (CLOSED, "hermes-direct"),
        (INSTRUCT, "hermes-instruct"),
    ],
)
def test_the_template_says_which_preset_fits(model: Model, tools: str, template: str, preset: str) -> None:
    chat = load_chat(model(template), tools)
    assert preset_for(chat).name == preset
    fitted = fit(chat, None)
    assert (fitted.prompt.name, fitted.chat.format) == (preset, "hermes")
    assert fitted.chat.builder.chat_template_kwargs == PROMPTS[preset].template_kwargs


@pytest.mark.parametrize("tags", THINKING)
@pytest.mark.parametrize(
    ("template", "preset"), [(HYBRID, "hermes-thinking"), (PREFILLED, "hermes-prefilled"), (CLOSED, "hermes-direct")]
)
def test_templates_with_other_tags_around_thinking(
    model: Model, tools: str, template: str, preset: str, tags: tuple[str, str]
) -> None:
    def own(text: str) -> str:
        return text.replace("<think>", tags[0]).replace("</think>", tags[1])

    chat = load_chat(model(own(template)), tools)
    fitted, named = fit(chat, None), fit(chat, PROMPTS[preset])
    assert fitted.prompt == named.prompt and fitted.prompt.name == preset
    assert fitted.prompt.reference_prefix == own(str(PROMPTS[preset].reference_prefix))
    # The other presets leave a thought open, or close one that is not open.
    if template == PREFILLED:
        with pytest.raises(SiopConfigError, match=re.escape(f"with 1 {tags[0]} and 0 {tags[1]}")):
            fit(chat, PROMPTS["hermes-instruct"])


@pytest.mark.parametrize(
    ("template", "fits"),
    [
        (HYBRID, {"hermes-thinking", "hermes-direct", "hermes-instruct"}),
        (PREFILLED, {"hermes-prefilled"}),
        (INSTRUCT, {"hermes-thinking", "hermes-direct", "hermes-instruct"}),
    ],
)
def test_a_preset_that_leaves_a_thinking_open_is_refused(
    model: Model, tools: str, template: str, fits: set[str]
) -> None:
    chat = load_chat(model(template), tools)
    for name in PROMPTS.keys() - {"bare"}:
        if name in fits:
            fit(chat, PROMPTS[name])
            continue
        with pytest.raises(SiopConfigError, match=rf"prompt {name} does not fit --model .*<think>.*asks for hermes-"):
            fit(chat, PROMPTS[name])


def test_the_format_is_what_the_template_writes(model: Model, tools: str, tmp_path: Path) -> None:
    chat = load_chat(model(TOOL_TEMPLATE.replace("CALL", CODER)), tools)
    fitted = fit(chat, None)
    assert fitted.chat.format == "qwen3_coder"
    assert overrides(fitted.prompt)["actor_rollout_ref.rollout.multi_turn.format"] == "qwen3_coder"
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump({"format": "hermes", "reference_prefix": "<answer>\n"}))
    with pytest.raises(
        SiopConfigError, match=r"writes the call '<tool_call>.*which hermes of verl's parsers do not read"
    ):
        fit(chat, prompt_of(str(own)))
    own.write_text(yaml.safe_dump({"format": "hermess"}))
    with pytest.raises(SiopConfigError, match=r"format=hermess is not allowed; choose one of .*hermes"):
        fit(chat, prompt_of(str(own)))


def test_a_template_without_tools_needs_a_prompt_that_shows_the_call(model: Model, tools: str, tmp_path: Path) -> None:
    chat = load_chat(model(SILENT), tools)
    with pytest.raises(
        SiopConfigError, match=r"renders no tools, and the prompt hermes-instruct does not name 'search'"
    ):
        fit(chat, None)
    shown = tmp_path / "shown.yaml"
    shown.write_text(yaml.safe_dump({"system": "Use the tool search.", "reference_prefix": "<answer>\n"}))
    fitted = fit(chat, prompt_of(str(shown)))
    assert fitted.chat.format == "hermes"


def test_a_template_that_loses_a_tools_result_is_refused(model: Model, tools: str) -> None:
    lost = INSTRUCT.replace("{{ m.content }}\n</tool_response>", "</tool_response>")
    with pytest.raises(SiopConfigError, match=r"the result would be read as .*not 'Emma is a novel by Jane Austen'"):
        fit(load_chat(model(lost), tools), None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reference_prefix": "", "reference_suffix": "<|im_end|>"}, "the answer would be read as ''"),
        ({"reference_suffix": "<|im_end|>"}, "the answer would be read as ''"),
        ({"reference_prefix": "<think>\n<answer>\n"}, "1 <think> and 0 </think>"),
        (
            {"reference_prefix": "<think><answer>\n", "reference_suffix": "</answer></think>"},
            "the answer would be read as ''",
        ),
    ],
)
def test_a_probe_that_gives_no_answer_is_refused(
    model: Model, tools: str, change: dict[str, str], message: str
) -> None:
    prompt = PROMPTS["hermes-instruct"].model_copy(update=change)
    with pytest.raises(SiopConfigError, match=message):
        fit(load_chat(model(INSTRUCT), tools), prompt)


def test_a_model_without_template_or_tokenizer_is_refused(model: Model, tools: str, tmp_path: Path) -> None:
    with pytest.raises(SiopConfigError, match=r"--model .*nowhere: no tokenizer can be loaded"):
        load_chat(str(tmp_path / "nowhere"), tools)
    path = model(INSTRUCT)
    config = Path(path) / "config.json"
    config.write_text(config.read_text().replace('"qwen3"', '"glm4_moe"'))
    with pytest.raises(
        SiopConfigError, match=r"--model .*: Tokenizer does not define required token '<.observation.>'"
    ):
        load_chat(path, tools)
    bare = model("x")
    (Path(bare) / "chat_template.jinja").unlink()
    with pytest.raises(SiopConfigError, match=r"--model .*: the tokenizer has no chat template"):
        load_chat(bare, tools)


# --- prompts of one's own --------------------------------------------------------------------------------------------


def test_an_own_prompt(tmp_path: Path, options: Options) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(
        yaml.safe_dump({
            "user": f"Short, please. {QUESTION} {{x}}",
            "template_kwargs": {"enable_thinking": False},
            "max_response_length": 4096,
        })
    )  # fmt: skip
    build(replace(options, prompt=str(path), tool_config=None))
    (row, *_) = rows_of(options.out / "train.parquet")
    assert row["prompt"] == [{"role": "user", "content": "Short, please. who is number 0 in the train part of nq? {x}"}]
    assert yaml.safe_load((options.out / "overrides.yaml").read_text()) == {
        "data.apply_chat_template_kwargs": {"enable_thinking": False},
        "data.max_response_length": 4096,
    }
    # Another text under the same name is another build.
    path.write_text(path.read_text().replace("Short", "Brief"))
    with pytest.raises(Exception, match="holds other data: prompt_sha256"):
        build(replace(options, prompt=str(path), tool_config=None))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("user: no place", "user: Value error, needs {question} once"),
        ("sytem: x", "sytem: Extra inputs are not permitted; allowed are name, system, user"),
        ("max_prompt_length: much", "max_prompt_length: Input should be a valid integer"),
        ("- x", "needs keys \\(name, system"),
        ("a: [", "while parsing"),
    ],
)
def test_a_wrong_prompt_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(SiopConfigError, match=rf"--prompt {path}: {message}"):
        prompt_of(str(path))
    with pytest.raises(SiopConfigError, match=r"--prompt hermes is not allowed; choose one of hermes-thinking, .*YAML"):
        prompt_of("hermes")


def test_the_system_text_names_no_tool_and_is_short() -> None:
    assert "search" not in SYSTEM.lower() and "tool_call" not in SYSTEM and "<answer>" in SYSTEM
    assert len(SYSTEM.split()) < 100


# --- the folder ------------------------------------------------------------------------------------------------------


def test_lengths_are_raised_to_what_the_longest_prompt_needs(model: Model, options: Options) -> None:
    path = model(HYBRID)
    manifest = build(replace(options, model=path))
    assert manifest is not None and manifest.prompt.name == "hermes-thinking"
    tokenizer, lengths = AutoTokenizer.from_pretrained(path), []
    schemas: Any = [tool.tool_schema.model_dump(exclude_unset=True, exclude_none=True)
                    for tool in load_chat(path, options.tool_config).tools.values()]  # fmt: skip
    for part in ("train", "eval"):
        for row in rows_of(options.out / f"{part}.parquet"):
            text = tokenizer.apply_chat_template(
                row["prompt"], tools=schemas, add_generation_prompt=True, tokenize=False
            )
            lengths.append(len(tokenizer(text, add_special_tokens=False)["input_ids"]))
    assert manifest.prompt.longest == max(lengths) > 1024
    told = yaml.safe_load((options.out / "overrides.yaml").read_text())
    assert max(lengths) <= told["data.max_prompt_length"] < max(lengths) + 256
    assert told["actor_rollout_ref.rollout.multi_turn.tool_config_path"] == options.tool_config
    # Another template is another build.
    with pytest.raises(Exception, match=r"holds other data: .*model.chat_template_sha256"):
        build(replace(options, model=model(INSTRUCT)))


def test_a_model_needs_its_tools(
    options: Options, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SiopConfigError, match=r"--model .*: name its tools with --tool-config FILE"):
        build(replace(options, model=model(INSTRUCT), tool_config=None))
    with pytest.raises(SiopConfigError, match="tool_config_path=/no/such: no such file"):
        build(replace(options, prompt="bare", tool_config="/no/such"))


@pytest.mark.parametrize("template", [HYBRID, PREFILLED, CLOSED, INSTRUCT])
def test_what_is_built_passes_the_checks_of_a_run(
    model: Model, options: Options, template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    path = model(template)
    build(replace(options, model=path))
    told = yaml.safe_load((options.out / "overrides.yaml").read_text())
    parts = {
        "actor_rollout_ref.model.path": path,
        "data.train_files": str(options.out / "train.parquet"),
        "data.val_files": str(options.out / "eval.parquet"),
        "data.train_batch_size": "4",
        "algorithm.siop_scorer_url": "http://127.0.0.1:1",
        "algorithm.siop_scorer_timeout_s": "0.5",
        "trainer.default_local_dir": str(tmp_path / "run"),
    }
    words = [f"{key}={json.dumps(value)}" for key, value in told.items()]
    with pytest.raises(ScorerUnavailable):  # all but the retriever and the scorer, which comes last
        check_before_start(changed(parts, *words), without=[SEARCH])
    # Without what the folder says about lengths, the checks refuse it.
    with pytest.raises(SiopConfigError, match=r"row 20: the prompt has \d+ tokens, data.max_prompt_length is 1024"):
        check_before_start(changed(parts, *[word for word in words if "max_prompt_length" not in word]))


def test_show_prints_a_row_as_the_model_sees_it(
    model: Model, options: Options, capsys: pytest.CaptureFixture[str]
) -> None:
    path = model(CLOSED.replace("<think>\n\n</think>", "{% if not enable_thinking %}<think>\n\n</think>{% endif %}"))
    build(replace(options, model=path, prompt="hermes-direct"))
    capsys.readouterr()
    assert main(["show", str(options.out), "--row", "21", "--part", "eval", "--model", path]) == 0
    shown = capsys.readouterr().out
    assert "<|im_start|>user\nwho is number 1 in the test part of triviaqa?<|im_end|>" in shown
    assert shown.index('"name": "search"') < shown.index(SYSTEM) < shown.index("<think>\n\n</think>\n\n")
    prompt = shown.partition("\n--- row ")[0]
    tokens = len(AutoTokenizer.from_pretrained(path)(prompt, add_special_tokens=False)["input_ids"])
    assert f"--- {tokens} tokens: " in shown and "of the tools search, " in shown and "format hermes" in shown
    assert main(["show", str(options.out), "--row", "21", "--model", path]) == 2
    assert "--row 21: " in (error := capsys.readouterr().err) and "has rows 0 to 20" in error


def test_show_of_a_part_that_is_not_there(
    model: Model, options: Options, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_jsonl(tmp_path / "nq" / "test.jsonl", [{"question": "who?", "answer": "me"}])
    build(Options(out=options.out, source=(str(source),), prompt="bare"))
    assert main(["show", str(options.out), "--part", "train", "--model", model(INSTRUCT)]) == 2
    assert "--part train: " in (error := capsys.readouterr().err) and "has eval.parquet" in error
    assert read_manifest(options.out).prompt.longest == 0
