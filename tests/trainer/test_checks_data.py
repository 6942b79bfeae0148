"""Data files: whatever a row is used for is looked at in every row before the start."""

from __future__ import annotations

import inspect
import re
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from preflight_world import MULTI_TURN, ROW, SEARCH_TOOL, Parts, check, right_parts, write_rows, write_tools
from verl.trainer.siop.checks.data import RESERVED, DataError, check_schemas
from verl.utils.siop.errors import ScorerUnavailable

SCORER_IS_ASKED = pytest.raises(ScorerUnavailable)  # all checks of the data have passed


@pytest.fixture
def parts(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Parts:
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    tools = write_tools(tmp_path / "search.yaml", SEARCH_TOOL)
    return {**right_parts(tmp_path, tiny_model), f"{MULTI_TURN}.tool_config_path": tools}


def _said(*messages: tuple[str, Any]) -> dict[str, Any]:
    return {**ROW, "prompt": [{"role": role, "content": content} for role, content in messages]}


def _labelled(label: Any) -> dict[str, Any]:
    return {**ROW, "reward_model": label}


def _extra(**fields: Any) -> dict[str, Any]:
    return {**ROW, "extra_info": fields}


# The bad row, overrides beside it, and what the message says after "row 1: ".
BAD_ROWS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "no question": (_said(("system", "be brief")), {}, "no user message with text in the prompt"),
    "an empty question": (_said(("user", "  ")), {}, "the question is empty"),
    "an unknown role": (_said(("human", "who?")), {}, "'prompt' has the role 'human'; choose one of system,"),
    "no content": (_said(("user", None)), {}, "'prompt' must be a list of messages with role and content"),
    "no messages": ({**ROW, "prompt": []}, {}, "'prompt' must be a list of messages with role and content"),
    "no label struct": (_labelled(None), {}, "'reward_model' is null"),
    "no label for IGPO": (
        _labelled({"style": "rule", "ground_truth": None}),
        {"algorithm__siop_use_gold_ref": "true"},
        "algorithm.siop_use_gold_ref=true needs a label in every row",
    ),
    "too long": (_said(("user", "x" * 90)), {}, "the prompt has 1\\d\\d tokens, data.max_prompt_length is 64"),
    "an agent of another project": ({**ROW, "agent_name": "react"}, {}, "'agent_name' is 'react'; choose one of"),
    "an agent without tools": ({**ROW, "agent_name": "single_turn_agent"}, {}, "calls no tools, but multi_turn.tool_c"),
    "no agent": ({**ROW, "agent_name": None}, {}, "'agent_name' is None"),
    "an unknown tool": (_extra(tool_selection=["calculator"]), {}, "names 'calculator'; the tools are search"),
    "a tool as text": (_extra(tool_selection="search"), {}, "extra_info.tool_selection is the text 'search'"),
    "a number of tools": (_extra(tool_selection=1), {}, "extra_info.tool_selection is int 1, needs a list"),
    "options in a list": (_extra(tools_kwargs=["search"]), {}, "tools_kwargs is .'search'., at which every call"),
    "options as JSON": (_extra(tools_kwargs='{"search": {}}'), {}, "tools_kwargs is .* needs a struct of structs"),
    "options as text": (_extra(tools_kwargs={"search": "x"}), {}, "tools_kwargs is .* needs a struct of structs"),
    "an image": ({**ROW, "images": ["a.png"]}, {}, "'images' is not empty, and the model takes texts alone"),
    "a video": ({**ROW, "videos": [{"video": "a.mp4"}]}, {}, "'videos' is not empty"),
    "an image by another key": ({**ROW, "pictures": ["a"]}, {"data__image_key": "pictures"}, "'pictures' is not empty"),
    "a number as question": (_extra(question=5), {}, "extra_info.question is 5, needs a text"),
    "questions": (_extra(question=["who?", "why?"]), {}, "extra_info.question is ..who.*, needs a text"),
    "cut by the engine": (
        _said(("user", "x" * 20)),
        {"actor_rollout_ref__rollout__prompt_length": "30", "data__filter_overlong_prompts": "true"},
        "the prompt has 39 tokens, actor_rollout_ref.rollout.prompt_length is 30; raise it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ROWS)
@pytest.mark.parametrize("key", ["data.train_files", "data.val_files"])
def test_a_bad_row_is_named_with_its_file_and_number(parts: Parts, tmp_path: Path, name: str, key: str) -> None:
    row, overrides, message = BAD_ROWS[name]
    good = {**ROW, "agent_name": "tool_agent"} if "agent_name" in row else ROW
    path = write_rows(tmp_path / "bad.parquet", [good, row, good, good])
    only_in_training = ("no question", "an empty question", "no label for IGPO", "a number as question", "questions")
    if key == "data.val_files" and name in only_in_training:
        with SCORER_IS_ASKED:
            check({**parts, key: path, **{k.replace("__", "."): v for k, v in overrides.items()}})
        return
    with pytest.raises(DataError, match=rf"^{path}: row 1: .*{message}"):
        check({**parts, key: path}, **overrides)


def test_calls_that_would_all_fail_in_silence(parts: Parts, tmp_path: Path) -> None:
    """verl's agent loop looks the tool up in ``tools_kwargs``, and tells the model that the tool failed if that is
    null; parquet fills rows that lack a field with nulls."""
    fine = _extra(need_tools_kwargs=True, tools_kwargs={"search": {"create_kwargs": {"k": 1}}})
    with SCORER_IS_ASKED:
        check(parts, data__train_files=write_rows(tmp_path / "fine.parquet", [fine, fine]))
    for broken in (_extra(need_tools_kwargs=False), _extra(need_tools_kwargs=True, tools_kwargs={"search": None})):
        path = write_rows(tmp_path / "null.parquet", [fine, broken])
        with pytest.raises(DataError, match=r"row 1: extra_info.tools_kwargs is .*at which every call .* would fail"):
            check(parts, data__train_files=path)


@pytest.mark.parametrize(
    ("label", "allowed"),
    [
        ({"style": "rule", "ground_truth": "a<|answer_split|>b"}, True),
        ({"style": "rule", "ground_truth": ["a", "b"]}, True),
        ({"style": "rule", "ground_truth": {"ground_truth": {"target": ["a"]}}}, True),
        ({"style": "rule", "ground_truth": {"answers": ["a"]}}, False),
        ({"style": "rule", "ground_truth": True}, True),
        ({"style": "rule", "ground_truth": b"a"}, False),
    ],
    ids=str,
)
def test_labels_are_read_as_the_metrics_read_them(parts: Parts, tmp_path: Path, label: Any, allowed: bool) -> None:
    path = write_rows(tmp_path / "labels.parquet", [_labelled(label)] * 2)
    with SCORER_IS_ASKED if allowed else pytest.raises(DataError, match=r"row 0: the label .* cannot be read: a gro"):
        check(parts, data__train_files=path)
    # A reward function of the user's reads labels of its own form.
    with SCORER_IS_ASKED:
        (tmp_path / "mine.py").write_text("def compute_score(**kwargs): return 0.0")
        check(parts, data__train_files=path, reward__custom_reward_function__path=str(tmp_path / "mine.py"))


def test_rows_must_be_enough(parts: Parts, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.train_files: 3 rows, data.train_batch_size is 4"):
        check(parts, data__train_batch_size="4")
    with pytest.raises(DataError, match=r"data.train_files: 1 rows \(2 of 3 .*left out.*, data.train_batch_size is 2"):
        check(parts, data__train_max_samples="1")
    nothing = str(tmp_path / "nothing.parquet")
    pq.write_table(pa.Table.from_pylist([ROW]).slice(0, 0), nothing)
    for key in ("data.train_files", "data.val_files"):
        with pytest.raises(DataError, match=rf"{key}: the files have no rows"):
            check({**parts, key: nothing})
    long = _said(("user", "x" * 90))
    path = write_rows(tmp_path / "long.parquet", [ROW, long, long])
    with pytest.raises(DataError, match=r"data.train_files: 1 rows \(2 of 3 are left out .*train_batch_size is 2"):
        check(parts, data__train_files=path, data__filter_overlong_prompts="true")
    # An evaluation draws no training rows.
    with pytest.raises(DataError, match=r"data.val_files: 0 rows \(2 of 2 are left out"):
        check(
            parts,
            trainer__val_only="true",
            trainer__val_before_train="true",
            data__train_batch_size="100",
            data__filter_overlong_prompts="true",
            data__val_files=write_rows(tmp_path / "all_long.parquet", [long, long]),
        )


def test_rows_are_drawn_before_long_ones_are_left_out(parts: Parts, tmp_path: Path) -> None:
    """As verl's RLHFDataset does, with its random numbers."""
    from verl.utils.dataset.rl_dataset import RLHFDataset

    path = write_rows(tmp_path / "rows.parquet", [*[_said(("user", "x" * 90))] * 6, *[ROW] * 6])
    parts = {**parts, "data.filter_overlong_prompts": "true", "data.train_max_samples": "6", "data.train_files": path}
    with pytest.raises(DataError, match=r"data.train_files: 0 rows \(12 of 12 are left out .*train_batch_size is 2"):
        check(parts, data__shuffle="false")
    for seed in range(8):
        drawn: Any = object.__new__(RLHFDataset)
        drawn.__dict__ |= {"data_files": [path], "max_samples": 6, "shuffle": True, "seed": seed}
        drawn.maybe_filter_out_long_prompts = lambda rows: rows.filter(lambda row: row["prompt"] == ROW["prompt"])
        drawn._read_files_and_tokenize()
        left = len(drawn.dataframe)
        settings = {"data__seed": seed, "data__train_batch_size": left + 1}
        with pytest.raises(DataError, match=rf"data.train_files: {left} rows"):
            check(parts, **settings)
        if left:
            with SCORER_IS_ASKED:
                check(parts, **{**settings, "data__train_batch_size": left})


def test_an_evaluation_needs_a_question_that_it_can_write_down(parts: Parts, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "numbers.parquet", [_extra(question=5)] * 2)
    evaluation = {"trainer__val_only": "true", "trainer__val_before_train": "true"}
    with pytest.raises(DataError, match=r"row 0: extra_info\.question is 5, needs a text"):
        check(parts, data__val_files=path, **evaluation)


def test_media_in_messages_and_empty_ones(parts: Parts, tmp_path: Path) -> None:
    picture = _said(("user", [{"type": "image", "image": "a.png"}]))
    path = write_rows(tmp_path / "picture.parquet", [picture] * 2)
    with pytest.raises(DataError, match=r"row 0: 'prompt' holds a part of type 'image', and the model takes texts al"):
        check(parts, data__val_files=path)
    path = write_rows(tmp_path / "empty.parquet", [{**ROW, "images": [], "videos": None}] * 2)
    with SCORER_IS_ASKED:
        check(parts, data__train_files=path)


def test_grpo_needs_labels(parts: Parts, tmp_path: Path) -> None:
    none = {"style": "rule", "ground_truth": None}
    some = [_labelled({"style": "rule", "ground_truth": "a"}), _labelled(none)]
    check(parts, algorithm__adv_estimator="grpo", data__train_files=write_rows(tmp_path / "some.parquet", some))
    path = write_rows(tmp_path / "none.parquet", [_labelled(none)] * 2)
    with pytest.raises(DataError, match=r"data.train_files: no row has a label, from which .*adv_estimator=grpo"):
        check(parts, algorithm__adv_estimator="grpo", data__train_files=path)
    with SCORER_IS_ASKED:
        check(parts, data__train_files=path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra_info": "{}"}, "column 'extra_info' has type string, needs struct"),
        ({"agent_name": 1}, "column 'agent_name' has type int64, needs string"),
        ({"num_turns": 1}, "column 'num_turns' would take the place of verl's own"),
        ({"self": "a"}, "column 'self' would take the place of verl's own"),
        ({"priority": 1}, "column 'priority' would take the place of verl's own"),
        ({"__rollout_n__": 3}, "column '__rollout_n__' would take the place of verl's own"),
    ],
)
def test_columns(parts: Parts, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write_rows(tmp_path / "columns.parquet", [{**ROW, **change}] * 2)
    with pytest.raises(DataError, match=rf"data.train_files={path}: {message}"):
        check(parts, data__train_files=path)


def test_reserved_columns_are_those_that_verl_would_take_from_the_data() -> None:
    from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics, AgentLoopOutput
    from verl.experimental.agent_loop.tool_agent_loop import ToolAgentLoop
    from verl.trainer.ppo.v1 import agent_loop_tq

    output = AgentLoopOutput(
        prompt_ids=[1], response_ids=[1], response_mask=[1], response_logprobs=[0.0], reward_score=0.0, num_turns=2,
        metrics=AgentLoopMetrics(),
    ).as_dict()  # fmt: skip
    assert set(output) <= RESERVED
    # A row's columns are passed on as arguments, beside verl's own; agent_name is the one that a row may give.
    worker: Any = vars(agent_loop_tq.AgentLoopWorkerTQ)["__ray_metadata__"].modified_class
    for function in (worker._run_agent_loop, worker._agent_loop_postprocess, ToolAgentLoop.run.__wrapped__):
        parts = inspect.signature(function).parameters.values()
        named = {part.name for part in parts if part.kind is not part.VAR_KEYWORD and not part.name.startswith("_ray")}
        assert named - {"agent_name"} <= RESERVED
    popped = re.findall(r"prompt\.pop\(\"(\w+)\"", inspect.getsource(worker._run_prompt))
    assert popped and set(popped) <= RESERVED


def test_a_file_by_another_name_is_refused(parts: Parts, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "data.pq", [ROW] * 2)
    with pytest.raises(DataError, match=r"data.val_files=.*data.pq: .*must end in .parquet"):
        check(parts, data__val_files=path)


def test_several_files_with_unlike_columns_are_named(parts: Parts, tmp_path: Path) -> None:
    one = write_rows(tmp_path / "one.parquet", [_labelled({"ground_truth": "a"})] * 2)
    other = write_rows(tmp_path / "other.parquet", [_labelled({"ground_truth": ["a"]})] * 2)
    same = write_rows(tmp_path / "same.parquet", [{**_labelled({"ground_truth": "b"}), "split": None}] * 2)
    message = rf"data.train_files: column 'reward_model' has type .*string.* in {one} and .*list.* in {other}"
    with pytest.raises(DataError, match=message):
        check(parts, data__train_files=f"[{one},{other}]")
    with SCORER_IS_ASKED:
        check(parts, data__train_files=f"[{one},{same}]")
    named = write_rows(tmp_path / "named.parquet", [{**_labelled({"ground_truth": "a"}), "agent_name": "tool_agent"}])
    with pytest.raises(DataError, match=rf"column 'agent_name' is in {named} and not in {one}"):
        check(parts, data__train_files=f"[{one},{named}]")


def test_the_check_of_schemas_agrees_with_verls_reader(tmp_path: Path) -> None:
    import datasets

    rows = {
        "text": {"a": "x"},
        "number": {"a": 1},
        "null": {"a": None},
        "other": {"b": 1.5},
        "struct": {"a": {"x": 1}},
        "longer struct": {"a": {"x": 1, "y": None}},
    }
    paths = {name: write_rows(tmp_path / f"{name}.parquet", [row]) for name, row in rows.items()}
    for one, a in paths.items():
        for other, b in paths.items():
            read = [datasets.Dataset.from_parquet(path, cache_dir=str(tmp_path / "cache")) for path in (a, b)]
            try:
                datasets.concatenate_datasets(read)
                united = True
            except (ValueError, AttributeError):
                united = False
            try:
                check_schemas({a: pq.read_schema(a), b: pq.read_schema(b)}, "data.train_files")
                passed = True
            except DataError:
                passed = False
            assert passed == united, (one, other)


def test_another_column_of_prompts(parts: Parts, tmp_path: Path) -> None:
    row = {"messages" if key == "prompt" else key: value for key, value in ROW.items()}
    path = write_rows(tmp_path / "messages.parquet", [row] * 3)
    with SCORER_IS_ASKED:
        check(parts, data__train_files=path, data__val_files=path, data__prompt_key="messages")


def test_tens_of_thousands_of_rows_take_seconds(parts: Parts, tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    rows = [{**ROW, "extra_info": {"index": i, "question": "who?"}} for i in range(20_000)]
    path = write_rows(tmp_path / "many.parquet", rows)
    started = time.monotonic()
    check(parts, algorithm__adv_estimator="grpo", data__train_files=path)
    assert time.monotonic() - started < 60
    assert "check" in capfd.readouterr().err  # a progress bar
