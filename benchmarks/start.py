"""From the launchers to the end of the first step on the toy world: seconds by phase, processor time by process.

    python benchmarks/start.py [--rounds 3] [--toy runs/toy] [--against SETTING ...]

Starts a retriever and a scorer, then trains one step as the quickstart does, again and again: as it is, and ``against``
the defaults of verl and Ray, with which services load verl's plugins and workers wait for tasks that never come
(SETTING: other Hydra overrides, or environment variables in capitals). The two sides take turns, and the medians are
printed, because a machine's load changes from minute to minute; processor time depends on it the least.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.marked import marked  # noqa: E402
from benchmarks.toy_services import toy_services  # noqa: E402

# What a phase ends with: a pattern in what is printed or logged.
SERVICES = "services"
PHASES = {
    "launcher, imports": r"^model  ",
    "checks": r"the checks have passed",
    "Ray": r"Started a local Ray instance",
    "trainer, models, data": r"Training Progress",
    "first step": r"step:1 - ",
}
BASELINE = ("VERL_USE_EXTERNAL_PLUGINS=auto", "RAY_prestart_worker_first_driver=1")
_PERIOD_S = 0.2


@dataclass
class Start:
    """What one start showed.

    Args:
        phases: seconds of each phase.
        cpu: processor seconds by what the processes are.
        count: how many processes of each kind there were.
    """

    phases: dict[str, float]
    cpu: Counter[str]
    count: Counter[str]


def kind_of(command: Sequence[str]) -> str:
    """What a process is, from its command line: an actor's name, or the program."""
    text = " ".join(command)
    if found := re.match(r"ray::(\w+)", text):
        return f"ray {found[1]}"
    for word, kind in {
        "scoring_server": "scorer",
        "retriever.server": "retriever",
        "default_worker.py": "ray IDLE",
        "verl.trainer.siop.main": "driver",
        "raylet": "Ray's daemons",
        "gcs_server": "Ray's daemons",
        "/ray/": "Ray's daemons",
    }.items():
        if word in text:
            return kind
    return "launcher"


class Processes:
    """Processor time of all processes with ``SIOP_BENCHMARK=mark`` in their environment, also when they have ended."""

    def __init__(self, mark: str) -> None:
        self._mark, self._seconds, self._kinds = mark, dict[int, float](), dict[int, str]()

    def look(self) -> None:
        for process in marked("SIOP_BENCHMARK", self._mark):
            with contextlib.suppress(psutil.Error):  # it has ended by now
                # An actor has its name, which is the last one seen, only once it is there.
                self._kinds[process.pid] = kind_of(process.cmdline())
                self._seconds[process.pid] = sum(process.cpu_times()[:2])

    def found(self) -> tuple[Counter[str], Counter[str]]:
        """Processor seconds and the number of processes, by kind."""
        cpu: Counter[str] = Counter()
        for pid, kind in self._kinds.items():
            cpu[kind] += self._seconds[pid]  # type: ignore[assignment]
        return cpu, Counter(self._kinds.values())


def first_step(env: dict[str, str], folder: Path, processes: Processes, overrides: Sequence[str]) -> dict[str, float]:
    """Train one step; the seconds of each phase."""
    printed, log = folder / "printed", folder / "logs" / "siop_train.log"
    command = ["bash", "train_siop.sh", "--", "trainer.total_training_steps=1", "trainer.save_freq=-1", *overrides]
    run_env = {**env, "OUTPUT_DIR": str(folder), "LOG_DIR": str(folder / "logs")}
    ends: dict[str, float] = {}
    start = time.monotonic()
    with printed.open("w") as out:
        run = subprocess.Popen(command, cwd=ROOT, env=run_env, stdout=out, stderr=subprocess.STDOUT)
    try:
        while len(ends) < len(PHASES) and run.poll() is None:
            processes.look()
            text = printed.read_text(errors="replace") + (log.read_text(errors="replace") if log.exists() else "")
            for name, pattern in PHASES.items():
                if name not in ends and re.search(pattern, text, re.MULTILINE):
                    ends[name] = time.monotonic() - start
            time.sleep(_PERIOD_S)
        status = run.wait()
    finally:
        run.terminate()
    if status:
        sys.exit(f"training failed:\n{printed.read_text()[-2000:]}")
    if missing := PHASES.keys() - ends.keys():
        sys.exit(f"the training ended without {', '.join(missing)} in what it printed or in {log}")
    phases, before = {}, 0.0
    for name, end in ends.items():
        phases[name], before = end - before, end
    return phases


def measure(toy: Path, folder: Path, settings: Sequence[str]) -> Start:
    """Services and one step, with some settings."""
    folder.mkdir()
    variables = dict(word.split("=", 1) for word in settings if re.match(r"[A-Z]\w*=", word))
    overrides = [word for word in settings if not re.match(r"[A-Z]\w*=", word)]
    processes, start = Processes(str(folder)), time.monotonic()
    with toy_services(toy, folder / "logs", SIOP_BENCHMARK=str(folder), **variables) as env:
        services = time.monotonic() - start
        phases = first_step(env, folder, processes, overrides)
    return Start({SERVICES: services, **phases}, *processes.found())


def show(found: dict[str, list[Start]]) -> None:
    """Medians of both sides."""

    def line(label: str, values: list[list[float]], form: str = "12.1f") -> None:
        print(f"{label:26}" + "".join(format(statistics.median(side), form) for side in values))

    sides = list(found.values())
    print(f"\n{'seconds':26}" + "".join(f"{name:>12}" for name in found))
    for name in (SERVICES, *PHASES):
        line(name, [[start.phases[name] for start in side] for side in sides])
    line("train_siop.sh to step 1", [[sum(start.phases[name] for name in PHASES) for start in side] for side in sides])
    print(f"\n{'processor seconds':26}" + "".join(f"{name:>12}" for name in found))
    kinds = sorted({kind for side in sides for start in side for kind in start.cpu})
    for kind in kinds:
        most = max(start.count[kind] for side in sides for start in side)
        label = f"{kind} x {most}" if most > 1 else kind
        line(label, [[float(start.cpu[kind]) for start in side] for side in sides])
    line("all", [[float(sum(start.cpu.values())) for start in side] for side in sides])
    line("processes", [[float(sum(start.count.values())) for start in side] for side in sides], "12.0f")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--toy", type=Path, default=ROOT / "runs" / "toy", help="toy world (built if it is missing)")
    parser.add_argument("--against", nargs="+", default=BASELINE, metavar="SETTING", help=f"({' '.join(BASELINE)})")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    toy = args.toy.resolve()
    build = [sys.executable, "-m", "examples.toy_world.build", "--keep", "--out", str(toy)]
    subprocess.run(build, cwd=ROOT, check=True)
    found: dict[str, list[Start]] = {"as it is": [], "against": []}
    with tempfile.TemporaryDirectory(prefix="siop-start-") as name:
        for number in range(args.rounds):
            for side, settings in (("as it is", ()), ("against", args.against)):
                found[side].append(measure(toy, Path(name) / f"{number}-{side}".replace(" ", "-"), settings))
                print(f"round {number + 1}, {side}: {sum(found[side][-1].phases.values()):.1f} s", flush=True)
    show(found)


if __name__ == "__main__":
    main()
