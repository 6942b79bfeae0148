"""Where a training step's time and memory go, on the toy world with the quickstart's settings.

    python benchmarks/step.py [--steps 10] [--toy runs/toy] [--slow-scorer 0.5] [-- HYDRA_OVERRIDE ...]

Starts a retriever and a scorer, trains, and prints the mean seconds per part (the first step, which warms up, is shown
apart), the time from the start to the first step, and the peak memory of all processes together (proportional set
size, so that shared pages count once). ``--slow-scorer``: how much of a slow scorer's time a step waits for.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.marked import marked  # noqa: E402
from benchmarks.slow_scorer import slow_scorer  # noqa: E402
from benchmarks.toy_results import read_rows  # noqa: E402
from benchmarks.toy_services import toy_services  # noqa: E402

PARTS = {
    "generation (with search)": "timing_s/gen",
    "log-probs": "timing_s/old_log_prob",
    "clusters": "siop/seconds/cluster",
    "evidence": "siop/seconds/entailment",
    "support": "siop/seconds/support",
    "update": "timing_s/update_actor",
    "weight sync": "timing_s/update_weights",
}


def memory_gb(mark: str) -> float:
    """Memory of every process that carries ``mark`` in its environment, in GB."""
    total = 0
    for process in marked("SIOP_BENCHMARK", mark):
        with contextlib.suppress(psutil.Error):
            total += process.memory_full_info().pss
    return total / 1e9


def read_steps(log: str) -> list[dict[str, float]]:
    """The metrics of every step line in a training log."""
    steps = []
    for line in log.splitlines():
        if re.search(r"step:\d+ - ", line):
            steps.append({k: float(v) for k, v in re.findall(r"([\w/@-]+):(-?[\d.]+(?:e-?\d+)?)", line)})
    return steps


@dataclass
class Training:
    """What a training of some steps showed.

    Args:
        steps: metrics of each.
        first: seconds from the start to the first step.
        peak: memory of all processes, GB.
        rewards: (prompt, response) -> turn rewards, of the first step, which all trainings begin with alike.
    """

    steps: list[dict[str, float]]
    first: float
    peak: float
    rewards: dict[tuple[str, str], list[float]]

    def mean(self, key: str) -> float:
        """Over all steps but the first, which warms up."""
        rest = self.steps[1:]
        return sum(step.get(key, 0.0) for step in rest) / len(rest)


def train(env: dict[str, str], folder: Path, mark: str, steps: int, overrides: Sequence[str]) -> Training:
    """Trains in ``folder``; every process has ``SIOP_BENCHMARK=mark``."""
    run_env = {**env, "OUTPUT_DIR": str(folder), "LOG_DIR": str(folder / "logs")}
    log_file, start, first, peak = folder / "logs" / "siop_train.log", time.monotonic(), 0.0, 0.0
    command = [
        "bash",
        "train_siop.sh",
        "--",
        f"trainer.total_training_steps={steps}",
        "trainer.save_freq=-1",
        *overrides,
    ]
    run = subprocess.Popen(command, cwd=ROOT, env=run_env, stdout=subprocess.DEVNULL)
    while run.poll() is None:
        peak = max(peak, memory_gb(mark))
        if not first and log_file.exists() and "Training Progress" in log_file.read_text(errors="replace"):
            first = time.monotonic() - start
        time.sleep(1)
    log = log_file.read_text(errors="replace")
    if run.returncode:
        sys.exit(f"training failed:\n{log[-3000:]}")
    rows = read_rows(folder / "rollouts" / "1.jsonl")
    rewards = {(row["input"], row["output"]): row["turn_rewards"] for row in rows}
    return Training(read_steps(log), first, peak, rewards)


def show_parts(training: Training) -> None:
    """Where a step's time goes."""
    whole = training.mean("timing_s/step")
    print(f"\n{'part of a step':26}{'seconds':>9}{'share':>8}")
    for label, key in PARTS.items():
        print(f"{label:26}{training.mean(key):9.3f}{training.mean(key) / whole:8.1%}")
    other = whole - sum(training.mean(key) for key in PARTS.values())
    steps = training.steps
    print(f"{'everything else':26}{other:9.3f}{other / whole:8.1%}")
    print(f"{'step':26}{whole:9.3f}   (mean of steps 2 to {len(steps)}; step 1: {steps[0]['timing_s/step']:.1f} s)")
    print(f"waited for rewards: {training.mean('siop/seconds/exposed'):.3f} s a step")
    print(f"start to first step: {training.first:.0f} s; peak memory of all processes: {training.peak:.1f} GB")


def show_streaming(ratio: float, generation: float, found: dict[str, Training]) -> None:
    """What a step waits for the scorer, in one pass at its end and question by question."""
    print(f"\nscorer slowed by {ratio:g} of the generation's {generation:.2f} s")
    print(f"{'':26}{'step s':>9}{'scorer busy s':>15}{'waited for s':>14}{'share of the step':>19}")
    for name, training in found.items():
        step, busy, exposed = (
            training.mean(key) for key in ("timing_s/step", "siop/seconds/busy", "siop/seconds/exposed")
        )
        print(f"{name:26}{step:9.2f}{busy:15.2f}{exposed:14.2f}{exposed / step:19.1%}")
    one, other = (training.rewards for training in found.values())
    both = [(one[key], other[key]) for key in one if key in other]
    most = max((abs(a - b) for values in both for a, b in zip(*values, strict=True)), default=0.0)
    print(f"turn rewards of the {len(both)} rollouts that both have in step 1 differ by {most:.1e} at most")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--toy", type=Path, default=ROOT / "runs" / "toy", help="toy world (built if it is missing)")
    parser.add_argument(
        "--slow-scorer",
        type=float,
        metavar="SHARE",
        help="also train with a scorer that needs this share of the generation time (0.5; above 1: slower than it), "
        "with rewards in one pass at the end of the step and question by question",
    )
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, after --")
    args = parser.parse_args()
    if args.steps < 2:
        parser.error("--steps must be at least 2")
    if args.slow_scorer is not None and not 0 < args.slow_scorer < 100:
        parser.error(f"--slow-scorer must be above 0 and below 100, got {args.slow_scorer}")
    toy = args.toy.resolve()
    build = [sys.executable, "-m", "examples.toy_world.build", "--keep", "--out", str(toy)]
    subprocess.run(build, cwd=ROOT, check=True)

    with tempfile.TemporaryDirectory(prefix="siop-step-") as name:
        folder = Path(name)
        with toy_services(toy, folder / "logs", SIOP_BENCHMARK=name) as env:
            plain = train(env, folder / "plain", name, args.steps, args.overrides)
            show_parts(plain)
            if args.slow_scorer is None:
                return
            generation, rollouts = plain.mean("timing_s/gen"), len(plain.rewards)
            with slow_scorer(env["SIOP_SCORER_URL"], args.slow_scorer * generation / rollouts) as url:
                found = {
                    label: train(
                        {**env, "SIOP_SCORER_URL": url},
                        folder / key,
                        name,
                        args.steps,
                        [*args.overrides, f"algorithm.siop_streaming={key}"],
                    )
                    for label, key in (("one pass at the end", "false"), ("question by question", "true"))
                }
            show_streaming(args.slow_scorer, generation, found)


if __name__ == "__main__":
    main()
