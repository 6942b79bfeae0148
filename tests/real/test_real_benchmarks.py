"""benchmarks/real_lm.py and real_training.py with a small model: that they run, go on, and report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import real_lm, real_training
from benchmarks.real_lm_report import within_rollouts


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
    files = {dtype: runs / f"llama-{dtype}.jsonl" for dtype in real_lm.DTYPES}
    lines = {dtype: file.read_text().splitlines() for dtype, file in files.items()}
    assert [len(part) for part in lines.values()] == [3, 3]
    for heading in ("## Turn AUC", "## Where the signal fails", "probe: of the template", "probe: a sentence"):
        assert heading in text
    assert all(f"| {name} |" in text for name in (*real_lm.VARIANTS, real_lm.BFLOAT16))
    assert (tmp_path / "out" / "real_lm.svg").read_text().lstrip().startswith("<?xml")
    # The same again computes nothing.
    assert call(small_llama, tmp_path / "out", 2) == text
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


def test_the_report_of_a_training(tmp_path: Path) -> None:
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
