"""Damaged data: what is refused, with a message that names it; and what a person may edit."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data_trees import write_jsonl
from verl.utils.siop.data.build import build
from verl.utils.siop.data.cli import main
from verl.utils.siop.data.select import Options

ROW = {"id": "1", "question": "who?", "answer": "me"}
VERL = {"data_source": "nq", "prompt": [{"role": "user", "content": "Who?"}], "reward_model": {"ground_truth": "me"}}


def refused(capsys: pytest.CaptureFixture[str], *arguments: Path | str) -> str:
    capsys.readouterr()
    assert main(list(map(str, arguments))) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (json.dumps({**ROW, "id": "\ud800"}), "line 1: 'id' has half a surrogate pair"),
        (json.dumps({**ROW, "split": "\ud800"}), "line 1: 'split' has half a surrogate pair"),
        (json.dumps({**ROW, "id": ["\ud800"]}), "\\ud800"),  # written as Python shows a list: no surrogate
        (json.dumps({**VERL, "prompt": 5}), "line 1: no user message with text in 'prompt'"),
        (json.dumps({**VERL, "prompt": {"role": "user"}}), "line 1: no user message with text in 'prompt'"),
        (f'{{"question": "who?", "golden_answers": {"[" * 900}"x"{"]" * 900}}}', "line 1: nested too deeply"),
        (f'{{"question": "who?", "answer": "x", "id": {"[" * 900}{"]" * 900}}}', ""),
    ],
)
def test_a_bad_row_is_refused_by_its_line(
    tmp_path: Path, row: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(row + "\n")
    command = ["build", "--source", f"eval={path}", "--prompt", "bare", "--out", str(tmp_path / "out")]
    if message.startswith("line"):
        assert f"{path}: {message}" in refused(capsys, *command)
    else:
        assert main(command) in (0, 2)  # but no traceback


def test_a_damaged_parquet_file_or_prompt_is_named_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"question": ["a", "b"], "golden_answers": [["x"], ["y"]]}), path)
    content = bytearray(path.read_bytes())
    content[20:60] = bytes(40)
    path.write_bytes(content)
    command = ["build", "--source", f"eval={path}", "--out", str(tmp_path / "out"), "--prompt"]
    assert f"{path}: not a whole parquet file" in refused(capsys, *command, "bare")
    (tmp_path / "p.yaml").write_text("a: [\n")
    assert "p.yaml: while parsing" in refused(capsys, *command, tmp_path / "p.yaml")


def bad_utf8() -> pa.Table:
    buffers = [None, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe")]
    return pa.table({"question": pa.Array.from_buffers(pa.string(), 1, buffers), "golden_answers": [["x"]]})


def test_a_parquet_text_that_is_no_utf8_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(bad_utf8(), path)
    found = refused(capsys, "build", "--source", f"eval={path}", "--prompt", "bare", "--out", tmp_path / "out")
    assert f"{path}: a value after row 0 cannot be read: 'utf-8' codec" in found


def test_a_source_that_cannot_be_read_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [ROW])
    true = Path.open

    def denied(self: Path, *arguments: Any, **options: Any) -> Any:
        if self == path:
            raise PermissionError(13, "Permission denied", str(self))
        return true(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", denied)  # a test may run as root
    found = refused(capsys, "build", "--source", f"eval={path}", "--prompt", "bare", "--out", tmp_path / "out")
    assert f"{path}: cannot be read: Permission denied" in found


# --- a folder --------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [{"id": i, "question": f"who is {i}?", "answer": "me"} for i in range(4)]
    out = tmp_path / "out"
    build(Options(out=out, source=(f"eval={write_jsonl(tmp_path / 'x.jsonl', rows)}",), prompt="hermes-direct"))
    return out


def cut(folder: Path) -> None:
    path = folder / "eval.parquet"
    path.write_bytes(path.read_bytes()[:-50])


def without_outputs(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "outputs": {}}))


def without_prompt(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "prompt": {}}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "eval.parquet: not a whole parquet file"),
        (lambda folder: (folder / "eval.parquet").unlink(), "eval.parquet: not a whole parquet file"),
        (lambda folder: (folder / "overrides.yaml").write_text("a: ["), "overrides.yaml cannot be read: while parsing"),
        (lambda folder: (folder / "overrides.yaml").write_text("- x"), "overrides.yaml needs lines of the form key:"),
        (lambda folder: (folder / "overrides.yaml").unlink(), "overrides.yaml cannot be read: [Errno 2]"),
        (
            lambda folder: (folder / "overrides.yaml").write_text("data.apply_chat_template_kwargs: x"),
            "overrides.yaml: data.apply_chat_template_kwargs: Input should be a valid dict",
        ),
        (without_outputs, "its manifest names no parquet file"),
        (without_prompt, "manifest.json: prompt.name: Field required"),
    ],
)
def test_show_names_what_is_damaged(
    folder: Path, damage: Callable[[Path], Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(folder)
    assert message in refused(capsys, "show", folder, "--model", "no model is needed to find this")


def test_an_edit_of_the_overrides_is_noted_and_not_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    build(Options(out=other, source=(f"eval={tmp_path / 'x.jsonl'}",), prompt="hermes-direct"))
    assert main(["check", str(folder)]) == 0
    assert f"{folder} is as it was built\n" in capsys.readouterr().out
    path = folder / "overrides.yaml"
    path.write_text(path.read_text().replace("6144", "8192") + "actor_rollout_ref.actor.optim.lr: 1e-6\n")
    assert main(["check", str(folder)]) == 0
    said = capsys.readouterr().out
    assert f"note: {path} was edited after it was built" in said and "as it was built, but for overrides.yaml" in said
    assert main(["diff", str(other), str(folder)]) == 1
    assert capsys.readouterr().out.splitlines()[:2] == [
        "overrides.data.max_response_length: 6144 | 8192",
        "overrides.actor_rollout_ref.actor.optim.lr: (none) | 1e-06",
    ]
    path.write_text("a: [")
    assert "overrides.yaml cannot be read" in refused(capsys, "check", folder)
    path.unlink()
    assert "overrides.yaml is missing" in refused(capsys, "check", folder)
