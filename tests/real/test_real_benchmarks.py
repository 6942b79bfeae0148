"""benchmarks/real_lm.py and real_training.py with a small model: that they run, go on, and report."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import real_lm, real_training
from benchmarks.real_lm_report import failures, within_rollouts


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(real_lm, "RUNS", tmp_path / "runs")
    return tmp_path / "runs"


def call(model: Path, out: Path, questions: int, *more: str) -> str:
    arguments = ["--model", str(model), "--out", str(out), "--questions", str(questions), "--rollouts", "4"]
    assert real_lm.main([*arguments, "--threads", "1", *more]) == 0
    return (out / "real_lm.md").read_text()


def test_real_lm_goes_on_and_reports(small_llama: Path, tmp_path: Path, runs: Path) -> None:
    text = call(small_llama, tmp_path / "out", 2)
    files = {dtype: runs / f"{real_lm.name_of(small_llama)}-{dtype}.jsonl" for dtype in real_lm.DTYPES}
    lines = {dtype: file.read_text().splitlines() for dtype, file in files.items()}
    assert [len(part) for part in lines.values()] == [3, 3]
    assert text.split("\n")[2].startswith(
        "Written by `python -m benchmarks.real_lm --questions 2 --rollouts 4` from 2 two-hop questions"
    )
    assert "2 questions were asked for" in text and f"Scorer {real_lm.name_of(small_llama)}, float32" in text
    assert "It needs `pip install -e" in text and "`stale`: the same wrong answer whatever it finds." in text
    for heading in ("## Turn AUC", "## Where the signal fails", "probe: of the template", "probe: a sentence"):
        assert heading in text
    assert all(f"| {name} |" in text for name in (*real_lm.VARIANTS, real_lm.BFLOAT16))
    assert (tmp_path / "out" / "real_lm.svg").read_text().lstrip().startswith("<?xml")
    # The same again computes nothing.
    assert call(small_llama, tmp_path / "out", 2) == text
    # Without --out beside the numbers: docs/results is about another model.
    arguments = ["--model", str(small_llama), "--questions", "2", "--rollouts", "4", "--report-only"]
    assert real_lm.main(arguments) == 0
    assert (runs / real_lm.name_of(small_llama) / "real_lm.md").is_file()
    assert {dtype: file.read_text().splitlines() for dtype, file in files.items()} == lines
    # Killed while it wrote the last line: that question is measured again, and its numbers are the same.
    whole = files["float32"].read_text()
    files["float32"].write_text(whole[: whole.rfind("{") + 40])
    assert "from 1 two-hop questions" in call(small_llama, tmp_path / "out", 2, "--report-only")
    assert call(small_llama, tmp_path / "out", 2) == text
    assert files["float32"].read_text() == whole
    # Another scorer's numbers are not mixed with these.
    head, *rest = whole.splitlines(keepends=True)
    files["float32"].write_text(json.dumps({**json.loads(head), "model": "other"}) + "\n" + "".join(rest))
    with pytest.raises(SystemExit):
        call(small_llama, tmp_path / "out", 2)


def test_nothing_measured_is_no_report(small_llama: Path, tmp_path: Path, runs: Path) -> None:
    with pytest.raises(SystemExit, match="nothing is measured"):
        call(small_llama, tmp_path / "out", 2, "--report-only")


def test_the_page_of_the_default_model(
    small_llama: Path, tmp_path: Path, runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It stays where it is about more, and the model is known by any path."""
    prepared: list[Path] = []
    results, model = tmp_path / "results", tmp_path / "models" / "smollm2"
    monkeypatch.setattr(real_lm, "RESULTS", results)
    monkeypatch.setattr(real_lm, "MODEL", model)
    monkeypatch.setattr(real_lm, "prepare", prepared.append)
    shutil.copytree(small_llama, model)
    monkeypatch.chdir(model.parent)
    (model / real_lm.MADE_OF).write_text(json.dumps({"version": 1, "model": real_lm.PACKAGE}))
    results.mkdir()
    page = results / "real_lm.md"
    committed = "from 51 two-hop questions over countries and cities (`examples/real_world`) with 408 scripted rollouts"
    page.write_text(committed)
    arguments = ["--model", "smollm2", "--questions", "1", "--rollouts", "2"]
    assert real_lm.main([*arguments, "--threads", "1"]) == 0 and prepared == [model]
    assert page.read_text() == committed and f"wrote {runs / 'smollm2' / 'real_lm.md'}" in capsys.readouterr().out
    assert {file.name for file in runs.glob("*.jsonl")} == {"smollm2-float32.jsonl", "smollm2-bfloat16.jsonl"}
    page.write_text(committed.replace("51", "1").replace("408", "2"))
    assert real_lm.main([*arguments, "--report-only"]) == 0 and prepared == [model]
    text = page.read_text()
    assert "Scorer SmolLM2-135M-Instruct, float32" in text and "--rollouts 2 --report-only` from 1 two-hop" in text


def test_numbers_are_kept_by_what_a_model_is_made_of(tmp_path: Path) -> None:
    """Every toy world calls its model ``model``."""

    def model(world: str, **files: str) -> str:
        folder = tmp_path / world / "model"
        folder.mkdir(parents=True)
        for name, text in {"model_safetensors": "a", "tokenizer_json": "b", **files}.items():
            (folder / name.replace("_", ".")).write_text(text)
        return real_lm.name_of(folder)

    first = model("first")
    assert first.startswith("model-") and model("same") == first
    assert len({first, model("weights", model_safetensors="c"), model("tokenizer", tokenizer_json="c")}) == 3


def test_a_wrong_model_is_an_error(runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        real_lm.main(["--model", "/nope"])
    assert "error: --model /nope: " in capsys.readouterr().err
    monkeypatch.setattr(real_lm, "MODEL", runs / "smollm2")
    assert real_lm.main(["--model", str(runs / "smollm2"), "--report-only"]) == 2
    assert f"error: {runs / 'smollm2'} is missing" in capsys.readouterr().err and not (runs / "smollm2").exists()


def test_a_gain_at_any_boundary_of_the_default_is_one() -> None:
    """``peak``: what counts is the highest support, not the last."""

    def falls(opened: list[float], result: float) -> str:
        by_context = {"opened": opened, "result": [opened[0], opened[1], result], "bare": opened}
        support = {name: [[value, 0.01, 0.01, 0.01] for value in values] for name, values in by_context.items()}
        question = {"uid": "0", "support": {"of the template": support}, "greedy_right": {"after": True}}
        turns = [("0", 0, True, 1.0, True, "right", 0), ("0", 0, True, 0.0, False, "right", 0)]
        lines = failures({"questions": [{**question, "heaviest": True}], "turns": {"siop": turns}})
        (line,) = [line for line in lines if "earn nothing" in line]
        return line

    assert "in 0 of 1 questions" in falls([0.2, 0.4, 0.1], 0.1)
    assert "in 0 of 1 questions" in falls([0.2, 0.1, 0.4], 0.1)
    assert "in 0 of 1 questions" in falls([0.2, 0.1, 0.1], 0.4)
    assert "in 1 of 1 questions" in falls([0.2, 0.1, 0.2], 0.1)


def test_auc_within_rollouts() -> None:
    def row(uid: str, rollout: int, value: float, needed: bool, searches: bool = True) -> tuple:
        return (uid, 0, searches, value, needed, "right", rollout)

    rows = [row("a", 0, 2.0, True), row("a", 0, 1.0, False), row("a", 0, 9.0, True, searches=False)]
    assert within_rollouts(rows)[0] == 1.0
    # Between rollouts nothing is compared.
    assert within_rollouts([*rows, row("a", 1, 5.0, False), row("a", 2, 0.0, True)])[0] == 1.0
    assert within_rollouts([*rows, row("b", 3, 1.0, True), row("b", 3, 2.0, False)])[0] == 0.5


def test_warm_start_goes_on_and_learns(small_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(real_training, "_SAVE_EVERY", 2)
    monkeypatch.setattr(real_training, "_LR", 1e-2)
    out, again = tmp_path / "once" / "model", tmp_path / "twice" / "model"
    for folder in (out.parent, again.parent):
        folder.mkdir()
    real_training.warm_start(small_llama, out, 5, seed=0, threads=1)

    class Stopped(Exception):
        pass

    calls = []
    step_of = real_training.imitation_step

    def stops(model, batch):
        calls.append(step_of(model, batch))
        if len(calls) == 4:
            raise Stopped
        return calls[-1]

    monkeypatch.setattr(real_training, "imitation_step", stops)
    with pytest.raises(Stopped):
        real_training.warm_start(small_llama, again, 5, seed=0, threads=1)
    assert not again.exists()
    real_training.warm_start(small_llama, again, 5, seed=0, threads=1)
    assert len(calls) == 4 + 3  # from step 2 on
    weights = [AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (out, again)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert calls[-1] < calls[0]
    assert [path.name for path in again.parent.iterdir()] == ["model"]
    real_training.warm_start(small_llama, again, 5, seed=0, threads=1)
    assert len(calls) == 7


def test_the_report_of_a_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "siop-seed1"
    (run / "rollouts").mkdir(parents=True)
    for step, em in ((1, 0.0), (2, 1.0), (10, 1.0)):
        rows = [{"em": em, "output": "<answer>x</answer>", "answer": "x"}, {"em": 0.0, "output": "", "answer": ""}]
        (run / "rollouts" / f"{step}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert real_training.curve(run / "rollouts") == {
        "em": [0.0, 0.5, 0.5],
        "turns": [1.0, 1.0, 1.0],
        "no_answer": [0.5, 0.5, 0.5],
    }
    for folder, em in ((tmp_path / "before", 0.25), (run / "after", 0.5)):
        (folder / "validation").mkdir(parents=True)
        metrics = {
            "val-aux/real_world/em/mean@1": em, "val-core/average/em/mean@1": em, "val-aux/turns/mean": 2.5
        }  # fmt: skip
        (folder / "validation" / "metrics.json").write_text(json.dumps(metrics))
    assert [file.name for file in real_training.report(tmp_path)] == ["table.md", "curve.svg"]
    table = (tmp_path / "table.md").read_text()
    assert "| before | 0 | 0.250 ± 0.043 | 2.50 |" in table and "| siop-seed1 | 3 | 0.500 ± 0.050 | 2.50 |" in table
    # With the steps in their names evaluations are told apart, and one without them is not believed.
    for steps in (10, 2):
        shutil.copytree(tmp_path / "before", run / f"after-{steps}")
    (run / "after-30").mkdir()
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert real_training.main(["--report-only", "--out", str(tmp_path)]) == 0
    assert "matplotlib is missing" in capsys.readouterr().err
    lines = (tmp_path / "table.md").read_text().splitlines()[3:]
    assert lines == [f"| siop-seed1 | {steps} | 0.250 ± 0.043 | 2.50 |" for steps in (2, 10)]
