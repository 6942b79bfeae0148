"""Where a training step's time and memory go, on the toy world with the quickstart's settings.

    python benchmarks/step.py [--steps 10] [--toy runs/toy] [-- HYDRA_OVERRIDE ...]

Starts a retriever and a scorer, trains, and prints the mean seconds per part (the first step, which warms up, is shown
apart), the time from the start to the first step, and the peak memory of all processes together (proportional set
size, so that shared pages count once).
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

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
    for process in psutil.process_iter():
        try:
            if process.environ().get("SIOP_BENCHMARK") == mark:
                total += process.memory_full_info().pss
        except psutil.Error:
            continue
    return total / 1e9


def read_steps(log: str) -> list[dict[str, float]]:
    """The metrics of every step line in a training log."""
    steps = []
    for line in log.splitlines():
        if re.search(r"step:\d+ - ", line):
            steps.append({k: float(v) for k, v in re.findall(r"([\w/@-]+):(-?[\d.]+(?:e-?\d+)?)", line)})
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--toy", type=Path, default=ROOT / "runs" / "toy", help="toy world (built if it is missing)")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, after --")
    args = parser.parse_args()
    if args.steps < 2:
        parser.error("--steps must be at least 2")
    toy = args.toy.resolve()
    subprocess.run([sys.executable, "-m", "examples.toy_world.build", "--out", str(toy)], cwd=ROOT, check=True)

    with tempfile.TemporaryDirectory(prefix="siop-step-") as folder:
        logs = Path(folder) / "logs"
        with toy_services(toy, logs, SIOP_BENCHMARK=folder, OUTPUT_DIR=folder) as env:
            overrides = [f"trainer.total_training_steps={args.steps}", "trainer.save_freq=-1", *args.overrides]
            log_file = logs / "siop_train.log"
            start, first, peak = time.monotonic(), 0.0, 0.0
            run = subprocess.Popen(
                ["bash", "train_siop.sh", "--", *overrides], cwd=ROOT, env=env, stdout=subprocess.DEVNULL
            )
            while run.poll() is None:
                peak = max(peak, memory_gb(folder))
                if not first and log_file.exists() and "Training Progress" in log_file.read_text(errors="replace"):
                    first = time.monotonic() - start
                time.sleep(1)
            log = log_file.read_text(errors="replace")
            if run.returncode:
                sys.exit(f"training failed:\n{log[-3000:]}")

    steps = read_steps(log)
    rest = steps[1:]

    def mean(key: str) -> float:
        return sum(step.get(key, 0.0) for step in rest) / len(rest)

    whole = mean("timing_s/step")
    print(f"\n{'part of a step':26}{'seconds':>9}{'share':>8}")
    for label, key in PARTS.items():
        print(f"{label:26}{mean(key):9.3f}{mean(key) / whole:8.1%}")
    other = whole - sum(mean(key) for key in PARTS.values())
    print(f"{'everything else':26}{other:9.3f}{other / whole:8.1%}")
    print(f"{'step':26}{whole:9.3f}   (mean of steps 2 to {len(steps)}; step 1: {steps[0]['timing_s/step']:.1f} s)")
    print(f"start to first step: {first:.0f} s; peak memory of all processes: {peak:.1f} GB")


if __name__ == "__main__":
    main()
