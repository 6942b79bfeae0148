"""The quickstart for real: services, verl, Ray, checkpoint, evaluation. Two steps; a third that resumes, with support
from the policy and a scorer without a language model; Ctrl-C."""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from dumps import rows_of
from find_browser import open_browser
from transformers import AutoTokenizer
from verl.trainer.siop.report import read_metrics
from verl.utils.siop.inspector.dump import Dump
from verl.utils.siop.inspector.recompute import recompute
from verl.utils.siop.scorer.engines.base import Probe, RolloutQuery
from verl.utils.siop.scorer.engines.transformers_engine import TransformersEngine
from verl.utils.siop.siop_process_reward import SiopConfig, build_reference
from verl.utils.siop.turn_utils import boundaries, get_assistant_turn_ranges

from benchmarks.marked import marked
from benchmarks.step import read_steps
from benchmarks.toy_services import toy_services
from examples.toy_world.tokenizer import ASSISTANT, END, REFERENCE_PREFIX, REFERENCE_SUFFIX

ROOT = Path(__file__).parents[2]


class Quickstart:
    """Runs ``quickstart.sh`` into a folder of its own; its processes carry a mark in their environment."""

    def __init__(self, folder: Path) -> None:
        self.out, self.records, self.mark = folder / "out", folder / "records", uuid.uuid4().hex
        self.records.mkdir()
        self.plugins = {
            "PYTHONPATH": str(ROOT / "tests" / "helpers" / "plugins"),
            "VERL_USE_EXTERNAL_MODULES": "record_rewards",
            "RECORD_DIR": str(self.records),
        }

    def start(self, steps: int, method: str = "siop") -> subprocess.Popen[str]:
        env = {
            **os.environ,
            "QUICKSTART_STEPS": str(steps),
            "OUTPUT_DIR": str(self.out),
            "SIOP_TEST_MARK": self.mark,
            **self.plugins,
        }
        return subprocess.Popen(
            ["bash", "quickstart.sh", "--method", method],
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # Ignored in the background of a shell, and bash cannot trap what was ignored when it started.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def run(self, steps: int, method: str = "siop") -> str:
        process = self.start(steps, method)
        output, _ = process.communicate(timeout=1200)
        assert process.returncode == 0, output
        return output

    def alive(self) -> list[str]:
        """Command lines of what is left of this quickstart."""
        found = []
        for process in marked("SIOP_TEST_MARK", self.mark):
            with contextlib.suppress(psutil.Error):
                found.append(" ".join(process.cmdline()))
        return found

    def wait_until_nothing_is_left(self) -> None:
        end = time.monotonic() + 30
        while self.alive() and time.monotonic() < end:
            time.sleep(0.5)
        assert self.alive() == []

    def dumps(self) -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in (self.out / "rollouts").glob("[0-9]*.jsonl")}

    def dumped(self, step: int) -> list[dict]:
        return rows_of(self.out / "rollouts" / f"{step}.jsonl")


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
    assert (run.out / "global_step_2" / "actor" / "huggingface" / "config.json").is_file()


def test_the_estimator_receives_the_turn_rewards_bit_for_bit(quickstart: tuple[Quickstart, str]) -> None:
    run, _ = quickstart
    # The third step belongs to another test.
    for step, call in enumerate(_received(run.records)[:2], start=1):
        _assert_received_is_dumped(call, run.dumped(step))
        assert any(len(set(turns)) > 1 for turns in _of_turns(call["rewards"], call["mask"]))
        assert call["advantages"].abs().sum() > 0


def _received(records: Path) -> list[dict]:
    """What the estimator got, step by step."""
    return [torch.load(file, weights_only=False) for file in sorted(records.glob("*.pt"))]


def _of_turns(values: torch.Tensor, masks: torch.Tensor) -> list[tuple[float, ...]]:
    """Of each rollout, what stands on the last tokens of its turns."""
    ends = [[end - 1 for _, end in get_assistant_turn_ranges(mask)] for mask in masks]
    return [tuple(row[at].tolist()) for row, at in zip(values, ends, strict=True)]


def _assert_received_is_dumped(call: dict, rows: list[dict]) -> None:
    received: dict[str, list[tuple[float, ...]]] = {}
    turns = _of_turns(call["rewards"], call["mask"])
    for rewards, on_turns, uid in zip(call["rewards"], turns, call["index"], strict=True):
        assert rewards.count_nonzero() == np.count_nonzero(on_turns)  # nothing anywhere else
        received.setdefault(uid, []).append(on_turns)
    computed: dict[str, list[tuple[float, ...]]] = {}
    for row in rows:
        computed.setdefault(row["uid"].split("_")[0], []).append(tuple(row["turn_rewards"]))
    assert sum(len(group) for group in received.values()) == 64
    assert received.keys() == computed.keys()
    for uid, group in received.items():
        # A rollout without an answer has no turn rewards, and zeros in the update.
        answered = sorted(row for row in computed[uid] if row)
        silent = len(computed[uid]) - len(answered)
        zeros = [row for row in group if row not in answered]
        assert sorted(row for row in group if row in answered) == answered
        assert len(zeros) == silent and not any(any(row) for row in zeros)


def test_the_dump_holds_the_estimators_own_tensors(quickstart: tuple[Quickstart, str]) -> None:
    run, _ = quickstart
    dump = Dump(run.out)
    for step, file in enumerate(sorted(run.records.glob("*.pt"))[:2], start=1):
        call = torch.load(file, weights_only=False)
        received: Counter[tuple[object, ...]] = Counter()
        for row, uid in enumerate(call["index"]):
            turns = get_assistant_turn_ranges(call["mask"][row])
            values = []
            for name in ("advantages", "returns"):
                of_turns = [call[name][row, start:end] for start, end in turns]
                assert all(torch.equal(tokens, tokens[:1].expand_as(tokens)) for tokens in of_turns)
                values.append(tuple(tokens[0].item() for tokens in of_turns))
            rewards = tuple(call["rewards"][row, end - 1].item() for _, end in turns)
            received[uid, tuple(turns), rewards, tuple(values)] += 1
        rollouts = [rollout for _, rollout in dump.read(step)]
        dumped: Counter[tuple[object, ...]] = Counter()
        for rollout in rollouts:
            assert rollout.turn_advantages is not None and rollout.turn_returns is not None
            ranges = tuple(span.tokens for span in rollout.turns)
            values = [tuple(rollout.turn_advantages), tuple(rollout.turn_returns)]
            rewards = tuple(rollout.turn_rewards or [0.0] * len(ranges))
            dumped[rollout.group, ranges, rewards, tuple(values)] += 1
        assert dumped == received
        # Under the keys of the training the page computes what the estimator did.
        settings = dump.settings(rollouts[0].settings)
        assert settings.method == "process" and settings.rollouts == 8
        credit = recompute(rollouts, settings)
        assert all(credit[rollout.uid]["advantages"] == rollout.turn_advantages for rollout in rollouts)


def test_the_exported_page_shows_the_training(quickstart: tuple[Quickstart, str]) -> None:
    run, output = quickstart
    page_file = run.out / "rollouts.html"
    assert f"turn credit:      {page_file}" in output
    errors: list[str] = []
    with open_browser() as browser:
        page = browser.new_page()
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.context.set_offline(True)
        page.goto(page_file.as_uri())
        page.wait_for_selector(".chart")
        assert "2 steps, 128 rollouts" in page.locator(".summary").inner_text()
        assert page.locator(".chart", has_text="Seconds by phase").count() == 1
        page.keyboard.press("q")
        page.wait_for_selector("tbody tr")
        assert page.locator("tbody tr").count() == 16
        page.locator("tbody tr a.open").first.click()
        page.wait_for_selector(".turn")
        assert page.locator(".rollout").count() == 8
        assert page.locator(".piece.call").count() and page.locator(".piece.passage").count()
    assert errors == []


def test_rollout_log_probs_are_the_actors_after_every_weight_sync(quickstart: tuple[Quickstart, str]) -> None:
    log = (quickstart[0].out / "logs" / "siop_train-siop.log").read_text()
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
        assert row["siop_tools"]["executed"] == row["output"].count("<tool_response>")
        by_question.setdefault(row["uid"].split("_")[0], []).append(row)
    for group in by_question.values():
        targets = {row["cluster"]: row["target"] for row in group}
        assert sum(targets.values()) == pytest.approx(1)
        for row in group:
            q, p = row["target"], row["support"]
            gains = [b - a for a, b in itertools.pairwise(itertools.accumulate(p, max))] or [0.0]
            expected = [q * gain for gain in gains]
            expected[-1] += 0.5 * q
            assert row["turn_rewards"] == pytest.approx(expected, abs=1e-6)


@pytest.fixture(scope="module")
def garbage(quickstart: tuple[Quickstart, str], tmp_path_factory: pytest.TempPathFactory) -> Quickstart:
    """The same two steps with another label for every question, all of them wrong."""
    toy, run = ROOT / "runs" / "toy", Quickstart(tmp_path_factory.mktemp("garbage"))
    table, data = pq.read_table(toy / "train.parquet"), run.records / "train.parquet"
    at = table.schema.get_field_index("reward_model")
    labels = [{"style": "rule", "ground_truth": {"target": [f"nobody {row}"]}} for row in range(len(table))]
    pq.write_table(table.set_column(at, "reward_model", pa.array(labels, table.schema.field(at).type)), data)
    command = ["bash", "train_siop.sh", "ablation=siop", "trainer.total_training_steps=2", f"data.train_files={data}"]
    with toy_services(toy, run.out / "logs", **run.plugins, OUTPUT_DIR=str(run.out), SEED="1") as env:
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return run


def test_labels_change_no_gradient(quickstart: tuple[Quickstart, str], garbage: Quickstart) -> None:
    right, _ = quickstart
    metrics = [
        read_steps((run.out / "logs" / log).read_text())
        for run, log in ((right, "siop_train-siop.log"), (garbage, "siop_train.log"))
    ]
    received = [_received(run.records)[:2] for run in (right, garbage)]
    for step, (ours, theirs, call, other) in enumerate(zip(*metrics, *received, strict=True), start=1):
        _assert_received_is_dumped(other, garbage.dumped(step))
        # The labels are others, and are read.
        assert ours["siop/outcome/em"] > 0 == theirs["siop/outcome/em"]
        assert ours["actor/grad_norm"] == pytest.approx(theirs["actor/grad_norm"], rel=1e-4)
        # Rollouts come in the order in which they end; the second step starts from updated weights.
        for name in ("rewards", "advantages"):
            one, two = (sorted(_of_turns(of[name], of["mask"])) for of in (call, other))
            assert list(map(len, one)) == list(map(len, two))
            assert np.concatenate(one) == pytest.approx(np.concatenate(two), abs=1e-4)


@pytest.fixture(scope="module")
def resumed(quickstart: tuple[Quickstart, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A third step, in which the policy is its own scorer: what it printed, and the weights that it started from."""
    run, _ = quickstart
    before = run.dumps()
    weights = tmp_path_factory.mktemp("weights") / "step_2"
    shutil.copytree(run.out / "global_step_2" / "actor" / "huggingface", weights)
    printed = run.run(steps=3, method="policy")
    # What is dumped goes on with the next number, and leaves the earlier ones alone.
    after = run.dumps()
    assert sorted(before) == ["1.jsonl", "2.jsonl"] and sorted(after) == [*sorted(before), "3.jsonl"]
    assert all(after[name] == content for name, content in before.items())
    return printed, weights


def test_a_second_call_reuses_and_resumes(quickstart: tuple[Quickstart, str], resumed: tuple[str, Path]) -> None:
    run, _ = quickstart
    assert f"reusing {run.out}/before" in resumed[0]
    assert [{row["step"] for row in run.dumped(step)} for step in (1, 2, 3)] == [{1}, {2}, {3}]
    _assert_received_is_dumped(_received(run.records)[2], run.dumped(3))
    log = (run.out / "logs" / "siop_train-policy.log").read_text()
    assert "Resuming from" in log and "global_step_2, setting global step to 2" in log
    assert [int(x) for x in re.findall(r"\bstep:(\d+) - ", log)] == [3]
    run.wait_until_nothing_is_left()


def test_support_from_the_policy_is_that_of_the_weights_before_the_update(
    quickstart: tuple[Quickstart, str], resumed: tuple[str, Path]
) -> None:
    run, _ = quickstart
    assert "language model: none" in resumed[0]
    rows = [row for row in run.dumped(3) if row["support"]]
    assert len(rows) > 32
    measured = np.concatenate([row["support"] for row in rows])
    np.testing.assert_allclose(measured, _support(resumed[1], rows), atol=1e-4)
    updated = run.out / "global_step_3" / "actor" / "huggingface"
    assert np.abs(measured - _support(updated, rows)).max() > 0.01


def _support(model: Path, rows: list[dict]) -> np.ndarray:
    """p at every boundary of dumped rollouts, by the scorer's engine."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    config = SiopConfig(siop_reference_prefix=REFERENCE_PREFIX, siop_reference_suffix=REFERENCE_SUFFIX)
    end, assistant = (tokenizer.convert_tokens_to_ids(token) for token in (END, ASSISTANT))
    (line,) = tokenizer.encode("\n", add_special_tokens=False)
    queries = []
    for row in rows:
        prompt, response = (list(tokenizer(row[name])["input_ids"]) for name in ("input", "output"))
        mask, sampled = [], True
        for token in response:
            mask.append(int(sampled))
            sampled = token != end if sampled else token == assistant
        probes = [build_reference(text, tokenizer, config) for text in row["references"]]
        turns = get_assistant_turn_ranges(mask)
        where = boundaries(turns, config.siop_boundary)
        ends = {turn_end for _, turn_end in turns}  # there the next turn is opened
        queries.append(
            RolloutQuery(
                np.array(prompt),
                np.array(response),
                where,
                [Probe(np.array(probe.token_ids), probe.start, probe.end) for probe in probes],
                [np.array([line, assistant] if boundary in ends else [], dtype=np.int64) for boundary in where],
            )
        )
    scores = TransformersEngine.from_pretrained(str(model)).support(queries).support
    return np.concatenate([np.exp(rollout).mean(axis=1) for rollout in scores])


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
    # The step in progress was saved.
    assert int((run.out / "latest_checkpointed_iteration.txt").read_text()) > 2, rest


@pytest.mark.parametrize("method", ["grp", "../trainer", ""])
def test_an_unknown_method_is_refused_with_those_there_are(method: str) -> None:
    done = subprocess.run(["bash", "quickstart.sh", "--method", method], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    named = done.stderr.split("--method", 1)[1].split()
    assert method == "" or {path.stem for path in (ROOT / "config" / "ablation").glob("*.yaml")} <= set(named)
