"""eval_siop.sh: what a stop or a failure leaves, with a trainer that only pretends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from launching import OWN, ROOT, Environment, bash, write_script
from scorer_process import eventually

# Writes results into the folder it is given, and ends as the mode says.
TRAINER = """\
#!/usr/bin/env bash
case "$*" in
    *verl.trainer.siop.main*)
        for word; do [[ $word != trainer.validation_data_dir=* ]] || out=${{word#*=}}; done
        mkdir -p "$out"
        echo "$MODE" >"$out/manifest.json"
        case $MODE in
            fails) exit 1 ;;
            dies) exit 137 ;;
            waits) exec {python} {waiting} {folder} ;;
        esac
        ;;
    *verl.trainer.siop.report*) echo "the table of $(<"${{@: -1}}/manifest.json")" ;;
    *) exec {python} "$@" ;;
esac
"""
# As the real one: a signal ends it in order, unless it was ignored when it started.
WAITING = """\
import os, pathlib, signal, sys, time
def stop(signum, frame):
    os.write(1, b"in order\\n")  # (print is not reentrant, and a second signal may come)
    sys.exit(128 + signum)
for signum in (signal.SIGINT, signal.SIGTERM):
    if signal.getsignal(signum) is not signal.SIG_IGN:
        signal.signal(signum, stop)
pathlib.Path(sys.argv[1], "started").touch()
time.sleep(60)
"""


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str | Path]:
    waiting = tmp_path / "waiting.py"
    waiting.write_text(WAITING)
    text = TRAINER.format(python=sys.executable, waiting=waiting, folder=tmp_path)
    write_script(tmp_path / "venv" / "bin" / "python", text)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    folders = {"OUTPUT_DIR": tmp_path / "out", "LOG_DIR": tmp_path / "logs"}
    return {"VIRTUAL_ENV": tmp_path / "venv", "N_GPUS_PER_NODE": "0", "VAL_FILE": "v.parquet", **folders}


def evaluate(env: Environment, mode: str) -> subprocess.CompletedProcess[str]:
    return bash("eval_siop.sh", str(Path(env["OUTPUT_DIR"]).parent / "model"), env={**env, "MODE": mode})


def results(env: Environment) -> dict[str, str]:
    """What the folders in OUTPUT_DIR hold."""
    return {path.parent.name: path.read_text().strip() for path in Path(env["OUTPUT_DIR"]).glob("*/manifest.json")}


def test_the_old_evaluation_stays_until_the_new_one_is_complete(env: dict[str, str | Path]) -> None:
    assert "the table of one" in evaluate(env, "one").stdout
    assert results(env) == {"validation": "one"}
    failed = evaluate(env, "fails")
    assert failed.returncode == 1 and "the table" not in failed.stdout
    assert f"the earlier evaluation in {env['OUTPUT_DIR']}/validation is as it was" in failed.stdout
    assert results(env)["validation"] == "one"
    killed = evaluate(env, "dies")
    assert killed.returncode == 1 and "the evaluation ended with exit status 137; the whole log is" in killed.stderr
    assert results(env)["validation"] == "one"
    # Killed between two names.
    (Path(env["OUTPUT_DIR"]) / "validation").rename(Path(env["OUTPUT_DIR"]) / "validation.old")
    assert evaluate(env, "fails").returncode == 1
    assert results(env)["validation"] == "one"
    assert "the table of two" in evaluate(env, "two").stdout
    assert results(env) == {"validation": "two"}


@pytest.mark.parametrize("everybody", [True, False])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_it_in_order(signum: signal.Signals, everybody: bool, env: dict[str, str | Path]) -> None:
    """To the whole group, as a terminal sends it, or to the script alone."""
    evaluate(env, "one")
    folder = Path(env["OUTPUT_DIR"]).parent
    full = {key: value for key, value in os.environ.items() if key not in OWN} | {k: str(v) for k, v in env.items()}
    run = subprocess.Popen(
        ["bash", "eval_siop.sh", str(folder / "model")],
        cwd=ROOT,
        env={**full, "MODE": "waits"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    eventually((folder / "started").exists)
    (os.killpg if everybody else os.kill)(run.pid, signum)
    printed, errors = run.communicate(timeout=30)
    assert run.returncode == 128 + signum, printed + errors
    assert "in order" in printed and "error" not in errors and "failed" not in printed + errors
    assert results(env)["validation"] == "one"
