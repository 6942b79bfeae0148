"""Kills one process after the other in the middle of a step, and shows how the run ends and what a resume is worth.

    python benchmarks/drill.py [--toy runs/toy] [--only VICTIM ...] [--list]

For each victim: a training by SIOP on the toy world that saves every step; SIGKILL to the victim while step 3 of 4 is
made; how long until the run has ended, the line that says why, what is left running; the same command again; and the
largest difference between the metrics of its steps and those of a run that nobody disturbed: relative, and absolute
below .01, where a metric may be no more than rounding.

Tokens are drawn from (seed, step, context), and weights and optimizer are restored bit for bit, so a resumed run
samples what an undisturbed one samples. What is not equal: sums of float32 in micro-batches, whose order follows the
order in which rollouts ended, and all times.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.marked import marked  # noqa: E402
from benchmarks.step import read_steps  # noqa: E402
from benchmarks.toy_services import toy_services  # noqa: E402

STEPS = 4
LIMIT_S = 600
FLOOR = 0.01

# Victim -> what its command line holds. The services are started once for each drill.
VICTIMS = {
    "agent loops": "ray::AgentLoopWorkerTQ",
    "rollout server": "ray::HfServer",
    "training worker": "ray::WorkerDict",
    "trainer": "ray::TaskRunnerV1",
    "reward function": "ray::RewardLoopWorker",
    "load balancer": "ray::GlobalRequestLoadBalancer",
    "queue, storage": "ray::SimpleStorageUnit",
    "queue, controller": "ray::TransferQueueController",
    "Ray's scheduler": "raylet/raylet",
    "Ray's control service": "gcs_server",
    "driver": "verl.trainer.siop.main",
    "scorer, front": "verl.utils.siop.scoring_server",
    "scorer, worker": "ray::ScoringWorker",
    "retriever": "verl.utils.siop.retriever.server",
}
# Killed in any process of the drill; all others only in the training's own.
SERVICES = ("scorer, front", "scorer, worker", "retriever")
# What a step's seconds and sizes of memory are called; they differ between any two runs.
NO_NUMBERS = re.compile(r"timing|seconds|perf/|siop/scorer|_tokens/s|mfu")


@dataclass
class End:
    """How a disturbed run ended.

    Args:
        seconds: from the kill to the end of the process that the user started.
        status: its exit status.
        said: its line that says why.
        left: command lines of what was still running 5 s later.
    """

    seconds: float
    status: int
    said: str
    left: list[str]


def command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@contextmanager
def training(env: dict[str, str], folder: Path, mark: str) -> Iterator[subprocess.Popen[str]]:
    """``train_siop.sh`` in ``folder``; nothing of it is left after the block."""
    run_env = {**env, "OUTPUT_DIR": str(folder), "LOG_DIR": str(folder / "logs"), "SIOP_DRILL": mark}
    steps = [f"trainer.total_training_steps={STEPS}", "trainer.save_freq=1", "trainer.val_before_train=false"]
    run = subprocess.Popen(
        ["bash", "train_siop.sh", *steps], cwd=ROOT, env=run_env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    try:
        yield run
    finally:
        for process in marked("SIOP_DRILL", mark):
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        run.wait(10)


def disturbed(env: dict[str, str], folder: Path, victim: str) -> End:
    """A training whose victim is killed in step 3."""
    mark, word = uuid.uuid4().hex, VICTIMS[victim]
    with training(env, folder, mark) as run:
        assert run.stdout is not None
        printed = []
        for line in run.stdout:
            printed.append(line.rstrip())
            if re.search(rf"step 2/{STEPS}", line):
                break
        else:
            sys.exit("the training ended before step 2:\n" + "\n".join(printed))
        time.sleep(0.3)  # the rollouts of step 3 are on their way
        candidates = marked("SIOP_DRILL", env["SIOP_DRILL"] if victim in SERVICES else mark)
        chosen = [process for process in candidates if word in command_line(process)]
        if not chosen:
            sys.exit(f"{victim}: no process {word!r} found")
        for process in chosen:
            process.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        try:
            rest, _ = run.communicate(timeout=LIMIT_S)
        except subprocess.TimeoutExpired:
            return End(LIMIT_S, -1, "it waited until the drill ended it", [])
        seconds = time.monotonic() - killed
        printed += rest.splitlines()
        time.sleep(5)
        said = [line for line in printed if line.startswith(("error:", "stopped", "done"))]
        return End(
            seconds, run.returncode, said[-1] if said else "", [command_line(p) for p in marked("SIOP_DRILL", mark)]
        )


def finished(env: dict[str, str], folder: Path) -> dict[int, dict[str, float]]:
    """Trains to the end; step -> metrics, of all steps that the log has."""
    with training(env, folder, uuid.uuid4().hex) as run:
        printed, _ = run.communicate(timeout=LIMIT_S)
        if run.returncode:
            sys.exit(f"the training failed:\n{printed[-3000:]}")
    log = "".join(file.read_text(errors="replace") for file in sorted((folder / "logs").glob("siop_train*.log")))
    return {int(step["training/global_step"]): step for step in read_steps(log) if "training/global_step" in step}


def largest_difference(one: dict[str, float], other: dict[str, float]) -> tuple[float, str]:
    """The largest difference of a metric that is no time, relative above :data:`FLOOR`, and its name."""
    found = [(0.0, "")]
    for name in sorted(one.keys() & other.keys()):
        if not NO_NUMBERS.search(name):
            scale = max(abs(one[name]), abs(other[name]), FLOOR)
            found.append((abs(one[name] - other[name]) / scale, name))
    return max(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", type=Path, default=ROOT / "runs" / "toy", help="toy world (built if it is missing)")
    parser.add_argument("--only", nargs="+", choices=list(VICTIMS), default=list(VICTIMS), metavar="VICTIM")
    parser.add_argument("--list", action="store_true", help="print the victims")
    args = parser.parse_args()
    if args.list:
        print("\n".join(VICTIMS))
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # and nothing is left running
    toy = args.toy.resolve()
    build = [sys.executable, "-m", "examples.toy_world.build", "--keep", "--out", str(toy)]
    subprocess.run(build, cwd=ROOT, check=True)
    wrong = []
    with tempfile.TemporaryDirectory(prefix="siop-drill-") as name:
        folder = Path(name)
        os.environ["SIOP_DRILL"] = name
        with toy_services(toy, folder / "logs") as env:
            undisturbed = finished(env, folder / "undisturbed")
            again = finished(env, folder / "again")
        noise = max(largest_difference(undisturbed[step], again[step]) for step in undisturbed)
        print(f"two undisturbed runs differ by {noise[0]:.1e} at most ({noise[1]})", flush=True)
        for victim in args.only:
            out = folder / re.sub(r"\W+", "_", victim)
            with toy_services(toy, folder / "logs") as env:
                end = disturbed(env, out, victim)
            with toy_services(toy, folder / "logs") as env:
                resumed = finished(env, out)
            most = max(largest_difference(undisturbed[step], resumed[step]) for step in resumed)
            print(f"{victim:22}{end.seconds:5.0f} s, exit {end.status}; resumed: {most[0]:.1e} ({most[1]})  {end.said}")
            if end.left or end.seconds >= LIMIT_S or sorted(resumed)[-1] != STEPS:
                wrong.append(f"{victim}: left running: {end.left}, steps {sorted(resumed)}")
            sys.stdout.flush()
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
