"""The quickstart for real: services, verl, Ray, checkpoint, evaluation. Two steps, a third that resumes, Ctrl-C."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from verl.trainer.siop.report import read_metrics
from verl.utils.siop.turn_utils import get_assistant_turn_ranges

ROOT = Path(__file__).parent.parent


class Quickstart:
    """Runs ``quickstart.sh`` into a folder of its own; its processes carry a mark in their environment."""

    def __init__(self, folder: Path) -> None:
        self.out, self.records, self.mark = folder / "out", folder / "records", uuid.uuid4().hex
        self.records.mkdir()

    def start(self, steps: int) -> subprocess.Popen[str]:
        env = {
            **os.environ,
            "QUICKSTART_STEPS": str(steps),
            "OUT_DIR": str(self.out),
            "SIOP_TEST_MARK": self.mark,
            "PYTHONPATH": str(ROOT / "tests" / "plugins"),
            "VERL_USE_EXTERNAL_MODULES": "record_rewards",
            "RECORD_DIR": str(self.records),
        }
        return subprocess.Popen(
            ["bash", "quickstart.sh"],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # Ignored in the background of a shell, and bash cannot trap what was ignored when it started.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def run(self, steps: int) -> str:
        process = self.start(steps)
        output, _ = process.communicate(timeout=1200)
        assert process.returncode == 0, output
        return output

    def alive(self) -> list[str]:
        """Command lines of what is left of this quickstart."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("SIOP_TEST_MARK") == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(" ".join(process.cmdline()))
            except psutil.Error:
                continue
        return found

    def wait_until_nothing_is_left(self) -> None:
        end = time.monotonic() + 30
        while self.alive() and time.monotonic() < end:
            time.sleep(0.5)
        assert self.alive() == []

    def dumped(self, step: int) -> list[dict]:
        return [json.loads(line) for line in (self.out / "rollouts" / f"{step}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Quickstart, str]]:
    run = Quickstart(tmp_path_factory.mktemp("quickstart"))
    yield run, run.run(steps=2)


def test_prints_the_table_and_leaves_nothing_running(quickstart: tuple[Quickstart, str]) -> None:
    run, output = quickstart
    for line in ("held-out EM", "held-out F1", "mean turns", "mean response tokens", "EM founder_spouse"):
        assert re.search(rf"^{line} +[\d.]+ +[\d.]+$", output, re.MULTILINE), output
    assert len(re.findall(r"done in \d+ s", output)) == 6
    run.wait_until_nothing_is_left()
    before = read_metrics(run.out / "before" / "validation")
    assert 0.2 < before["val-aux/toy_two_hop/em/mean@1"] < 0.4
    assert 1 < before["val-aux/turns/mean"] < 5
    assert list((run.out / "tensorboard").glob("events.*"))
    assert (run.out / "checkpoints" / "global_step_2" / "actor" / "huggingface" / "config.json").is_file()


def test_the_estimator_receives_the_turn_rewards_bit_for_bit(quickstart: tuple[Quickstart, str]) -> None:
    run, _ = quickstart
    records = sorted(run.records.glob("*.pt"))
    # The third step belongs to another test.
    for step, file in enumerate(records[:2], start=1):
        call = torch.load(file, weights_only=False)
        received: dict[str, list[tuple[float, ...]]] = {}
        for rewards, mask, uid in zip(call["rewards"], call["mask"], call["index"], strict=True):
            ends = [end - 1 for _, end in get_assistant_turn_ranges(mask)]
            elsewhere = rewards.clone()
            elsewhere[ends] = 0
            assert not elsewhere.any()
            received.setdefault(uid, []).append(tuple(rewards[ends].tolist()))
        computed: dict[str, list[tuple[float, ...]]] = {}
        turns = {}
        for row in run.dumped(step):
            turns[row["uid"]] = row["turn_rewards"]
            computed.setdefault(row["uid"].split("_")[0], []).append(tuple(row["turn_rewards"]))
        assert sum(len(rows) for rows in received.values()) == 64
        assert received.keys() == computed.keys()
        for uid, rows in received.items():
            # A rollout without an answer has no turn rewards, and zeros in the update.
            answered = sorted(row for row in computed[uid] if row)
            silent = len(computed[uid]) - len(answered)
            zeros = [row for row in rows if row not in answered]
            assert sorted(row for row in rows if row in answered) == answered
            assert len(zeros) == silent and not any(any(row) for row in zeros)
        assert any(len(set(row)) > 1 for rows in received.values() for row in rows)
        assert call["advantages"].abs().sum() > 0


def test_rollout_log_probs_are_the_actors_after_every_weight_sync(quickstart: tuple[Quickstart, str]) -> None:
    log = (quickstart[0].out / "logs" / "train-siop.log").read_text()
    differences = [float(x) for x in re.findall(r"training/rollout_probs_diff_max:(\S+)", log)]
    assert len(differences) == 2 and max(differences) < 1e-4


def test_dumped_rollouts_show_every_stage(quickstart: tuple[Quickstart, str]) -> None:
    rows = [row for row in quickstart[0].dumped(2) if row["answer"]]
    assert rows
    by_question: dict[str, list[dict]] = {}
    for row in rows:
        assert row["answer"] in row["output"]
        assert len(row["support"]) in (0, len(row["turn_rewards"]) + 1)
        assert all(0 <= p <= 1 for p in row["support"])
        by_question.setdefault(row["uid"].split("_")[0], []).append(row)
    for group in by_question.values():
        targets = {row["cluster"]: row["target"] for row in group}
        assert sum(targets.values()) == pytest.approx(1)
        for row in group:
            q, p = row["target"], row["support"]
            gains = [b - a for a, b in itertools.pairwise(p)] or [0.0]
            expected = [q * gain for gain in gains]
            expected[-1] += 0.5 * q
            assert row["turn_rewards"] == pytest.approx(expected, abs=1e-6)


def test_a_second_call_reuses_and_resumes(quickstart: tuple[Quickstart, str]) -> None:
    run, _ = quickstart
    output = run.run(steps=3)
    assert f"reusing {run.out}/before" in output
    log = (run.out / "logs" / "train-siop.log").read_text()
    assert "Resuming from" in log and "global_step_2, setting global step to 2" in log
    assert [int(x) for x in re.findall(r"\bstep:(\d+) - ", log)] == [3]
    run.wait_until_nothing_is_left()


def test_ctrl_c_stops_everything(quickstart: tuple[Quickstart, str]) -> None:
    run, _ = quickstart
    process = run.start(40)
    assert process.stdout is not None
    seen = []
    for line in process.stdout:
        seen.append(line)
        if re.search(r"step \d+/40", line):
            break
    assert any("raylet" in command for command in run.alive()), seen
    process.send_signal(signal.SIGINT)
    rest = process.stdout.read()
    assert process.wait(timeout=60) == 130, rest
    run.wait_until_nothing_is_left()
