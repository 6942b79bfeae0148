"""Methods against seeds and worlds, trained with the real trainer on toy worlds: tables and plots in docs/results.

    python benchmarks/toy_table.py                       # what is missing of the plan, then the report
    python benchmarks/toy_table.py --list                # the plan and what is there
    python benchmarks/toy_table.py --worlds stale --methods siop,empo --seeds 1,2
    python benchmarks/toy_table.py --only two_hop/siop-seed1
    python benchmarks/toy_table.py --report-only

A finished run is not run again, an interrupted one goes on from its last checkpoint. Ctrl-C stops everything that was
started. A run takes about five minutes on two cores; its folder is runs/toy_table/WORLD/METHOD-seedN.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm
from verl.trainer.siop.report import METRICS_FILE

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.toy_results import (  # noqa: E402
    config_of,
    evaluation,
    is_finished,
    plot,
    render,
    training,
)
from benchmarks.toy_services import toy_services  # noqa: E402
from benchmarks.training_table import chosen, split_name, start_run, stop, with_known  # noqa: E402

RUNS = ROOT / "runs" / "toy_table"
RESULTS = ROOT / "docs" / "results"


@dataclass(frozen=True)
class ToyWorld:
    """A world of the table.

    Args:
        toy: its folder.
        steps: of a training.
        options: it is built with.
        init: the world whose model it goes on from.
        methods: that the plan trains in it, three seeds each; None for all of them, as the plan has them.
        test_freq: steps between evaluations while it trains; -1 for none.
    """

    toy: Path
    steps: int
    options: tuple[str, ...] = ()
    init: str | None = None
    methods: tuple[str, ...] | None = None
    test_freq: int = -1

    @property
    def settings(self) -> str:
        """Its settings in config/experiment, as the launchers choose them."""
        return "toy_chains" if "chains" in self.options else "toy"


WORLDS: Mapping[str, ToyWorld] = {
    "two_hop": ToyWorld(ROOT / "runs" / "toy", 60),
    "chains": ToyWorld(ROOT / "runs" / "toy-chains", 40, ("--world", "chains"), "two_hop"),
    "stale": ToyWorld(
        ROOT / "runs" / "toy-stale",
        40,
        ("--world", "chains", "--stale", "0.15", "--imperfect-steps", "400"),
        "chains",
    ),
    "early": ToyWorld(
        ROOT / "runs" / "toy-early",
        40,
        ("--world", "chains", "--early", "0.25", "--imperfect-steps", "400"),
        "chains",
        methods=("siop", "informed", "empo", "grpo"),
    ),
    "mixed": ToyWorld(
        ROOT / "runs" / "toy-mixed", 60, ("--world", "mixed"), "two_hop", methods=("siop", "informed", "empo", "grpo")
    ),
    # Ten times as long: does it last?
    "long": ToyWorld(ROOT / "runs" / "toy", 600, methods=("siop", "siop-noise"), test_freq=60),
}
# Tried by training, see benchmarks/toy_variants.py; not in the plan of every world.
_VARIANTS = "algorithm.siop_import=benchmarks.toy_variants"
_VOTES = ("vote_path", "vote_path_mean", "vote_last_query", "vote_judge", "vote_pairwise")
_COMPLETE = ("complete",)
_ALIGNED = ("aligned", "aligned_end2", "aligned_end4")
_METHODS: Mapping[str, tuple[str, ...]] = {
    "siop": ("ablation=siop",),
    "siop-bare": ("ablation=siop",),
    "informed": ("ablation=informed",),
    "release": ("ablation=release",),
    "empo": ("ablation=empo",),
    "grpo": ("ablation=grpo",),
    "ttrl": ("ablation=ttrl",),
    "igpo": ("ablation=igpo",),
    "igpo-before-answer": ("ablation=igpo", "algorithm.siop_boundary=before_answer"),
    "siop-prob": ("ablation=siop", "algorithm.siop_gain=prob"),
    "siop-log": ("ablation=siop", "algorithm.siop_gain=log"),
    "siop-assistant": ("ablation=siop", "algorithm.siop_boundary=assistant"),
    "siop-observation": ("ablation=siop", "algorithm.siop_boundary=observation"),
    "siop-eta0": ("ablation=siop", "algorithm.siop_eta=0"),
    "siop-evidence-max": ("ablation=siop", "algorithm.siop_evidence=max"),
    "siop-lambda1": ("ablation=siop", "algorithm.siop_lambda=1"),
    "siop-prob-evidence-max": ("ablation=siop", "algorithm.siop_gain=prob", "algorithm.siop_evidence=max"),
    "siop-prob-lambda1": ("ablation=siop", "algorithm.siop_gain=prob", "algorithm.siop_lambda=1"),
    "siop-prob-lambda1-eta0": (
        "ablation=siop",
        "algorithm.siop_gain=prob",
        "algorithm.siop_lambda=1",
        "algorithm.siop_eta=0",
    ),
    "siop-prob-lambda1-broadcast": (
        "ablation=siop",
        "algorithm.siop_gain=prob",
        "algorithm.siop_lambda=1",
        "algorithm.siop_advantage_mode=broadcast",
    ),
    "siop-log-lambda1": ("ablation=siop", "algorithm.siop_gain=log", "algorithm.siop_lambda=1"),
    "siop-k4": ("ablation=siop", "actor_rollout_ref.rollout.n=4"),
    "siop-prob-k4": ("ablation=siop", "algorithm.siop_gain=prob", "actor_rollout_ref.rollout.n=4"),
    "siop-log-k4": ("ablation=siop", "algorithm.siop_gain=log", "actor_rollout_ref.rollout.n=4"),
    "release-k4": ("ablation=release", "actor_rollout_ref.rollout.n=4"),
    "query_consensus": ("ablation=query_consensus",),
    "query_frequency": ("ablation=query_frequency",),
    "matchtir": ("ablation=matchtir",),
    "pure": ("ablation=pure",),
    "a2tgpo": ("ablation=a2tgpo",),
    "trace": ("ablation=trace",),
    "siop-noise": (
        "ablation=siop",
        "algorithm.siop_import=benchmarks.noisy_support",
        "algorithm.siop_reward_mode=noisy",
    ),
    **{name: ("ablation=siop", _VARIANTS, f"algorithm.siop_reward_mode={name}") for name in (*_VOTES, *_COMPLETE)},
    **{
        name: ("ablation=siop", _VARIANTS, f"algorithm.siop_reward_mode={name}", "algorithm.siop_boundary=observation")
        for name in _ALIGNED
    },
}


def _bare(name: str) -> bool:
    """Whether it was measured before contexts were opened; these stay comparable with each other."""
    return (name.startswith("siop-") and name not in ("siop-observation", "siop-noise")) or name in (
        "igpo-before-answer",
        "matchtir",
        "pure",
        "a2tgpo",
    )


METHODS: Mapping[str, tuple[str, ...]] = {
    name: (*overrides, "algorithm.siop_probe_opening=false") if _bare(name) else overrides
    for name, overrides in _METHODS.items()
}
_EVERYWHERE = tuple(name for name in METHODS if name not in ("siop-noise", *_VOTES, *_COMPLETE, *_ALIGNED))
_THREE_SEEDS = ("siop", "informed", "siop-prob", "release", "empo", "grpo")


@dataclass
class Run:
    """One training with its evaluation."""

    world: str
    method: str
    seed: int
    started: float = 0.0
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        return f"{self.world}/{self.method}-seed{self.seed}"

    @property
    def folder(self) -> Path:
        return RUNS / self.name

    @property
    def log(self) -> Path:
        return self.folder / "logs" / f"siop_train-{self.method}.log"

    @property
    def state(self) -> str:
        if is_finished(self.folder):
            return "finished"
        return "interrupted" if (self.folder / "logs").is_dir() else "to do"

    def command(self) -> list[str]:
        """Trains and evaluates, each part only if it is missing."""
        steps = WORLDS[self.world].steps
        overrides = [
            *METHODS[self.method],
            f"trainer.total_training_steps={steps}",
            "trainer.save_freq=20",
            f"trainer.test_freq={WORLDS[self.world].test_freq}",
            "trainer.max_actor_ckpt_to_keep=1",
        ]
        script = (
            "set -e; checkpoint=$OUTPUT_DIR/global_step_$1; shift; "
            '[ -d "$checkpoint/actor/huggingface" ] || bash train_siop.sh -- "$@"; '
            'EXPERIMENT_NAME=after OUTPUT_DIR=$OUTPUT_DIR/after exec bash eval_siop.sh "$checkpoint"'
        )
        return ["bash", "-c", script, "toy_table", str(steps), *overrides]

    def steps_done(self) -> int:
        """Training steps in the log of this call."""
        if not self.log.is_file() or self.log.stat().st_mtime < self.started:
            return 0
        found = re.findall(r"step:(\d+) - ", self.log.read_text(errors="replace"))
        return int(found[-1]) if found else 0


def plan(worlds: Sequence[str], methods: Sequence[str] | None, seeds: Sequence[int] | None) -> list[Run]:
    """The runs asked for, or the plan: three seeds of the main methods where answers differ most, one of the others."""
    runs = []
    for method in methods or METHODS:
        for world in worlds:
            chosen_here = WORLDS[world].methods
            if methods is None and method not in (chosen_here or _EVERYWHERE):
                continue
            three = method in (chosen_here or _THREE_SEEDS) and world != "chains"
            runs += [Run(world, method, seed) for seed in seeds or ((1, 2, 3) if three else (1,))]
    # The same seed of every method first: a table that is cut short compares like with like.
    return sorted(runs, key=lambda run: (list(WORLDS).index(run.world), run.seed))


def named(text: str) -> Run:
    """The run with this name."""
    return Run(*split_name(text, WORLDS, METHODS, "WORLD/METHOD-seedN, for example two_hop/siop-seed1"))


def build_world(world: str) -> None:
    """Builds the world, after the one whose model it goes on from, where that has not been done."""
    entry = WORLDS[world]
    options = list(entry.options)
    if entry.init:
        build_world(entry.init)
        options += ["--init", str(WORLDS[entry.init].toy / "model")]
    command = [sys.executable, "-m", "examples.toy_world.build", "--out", str(entry.toy), *options]
    subprocess.run(command, cwd=ROOT, check=True)


def evaluate_start(world: str) -> None:
    """Evaluates the model that training starts from, where that has not been done."""
    entry, folder = WORLDS[world], RUNS / world / "start"
    if (folder / "validation" / METRICS_FILE).is_file():
        return
    with toy_services(entry.toy, RUNS / world / "logs") as env:
        run_env = {**env, "EXPERIMENT_NAME": "start", "OUTPUT_DIR": str(folder), "LOG_DIR": str(folder / "logs")}
        command = ["bash", "eval_siop.sh", str(entry.toy / "model")]
        subprocess.run(command, cwd=ROOT, env=run_env, check=True, stdout=subprocess.DEVNULL)


def run_world(world: str, runs: list[Run], jobs: int, bar: Any) -> list[str]:
    """Runs what is missing in one world, ``jobs`` at a time; returns the names of the runs that failed."""
    toy = WORLDS[world].toy
    failed: list[str] = []
    waiting, running = list(runs), list[Run]()
    done_before = bar.n
    with toy_services(toy, RUNS / world / "logs") as env:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    run = waiting.pop(0)
                    run.started = time.time()
                    run_env = {
                        **env,
                        "PYTHONPATH": str(ROOT),  # for what METHODS import
                        "SEED": str(run.seed),
                        "EXPERIMENT_NAME": run.method,
                        "OUTPUT_DIR": str(run.folder),
                        "LOG_DIR": str(run.folder / "logs"),
                        "TENSORBOARD_DIR": str(run.folder / "tensorboard"),
                    }
                    run.process = start_run(run.command(), run_env, run.folder / "logs", ROOT)
                    running.append(run)
                time.sleep(1)
                for run in list(running):
                    assert run.process is not None
                    if run.process.poll() is None:
                        continue
                    running.remove(run)
                    if not is_finished(run.folder):
                        failed.append(run.name)
                        bar.write(f"failed: {run.name}, see {run.folder / 'logs'}")
                finished = len(runs) - len(waiting) - len(running)
                steps = WORLDS[world].steps
                bar.n = done_before + finished * steps + sum(run.steps_done() for run in running)
                bar.set_postfix_str(", ".join(run.name for run in running) or world, refresh=False)
                bar.refresh()
        finally:
            for run in running:
                assert run.process is not None
                stop(run.process)
    return failed


def collect(worlds: Iterable[str]) -> dict[str, Any]:
    """World -> ``runs``, ``start`` and ``auc``: what is in :data:`RUNS`, whichever call made it."""
    results: dict[str, Any] = {}
    for world in worlds:
        folder, toy = RUNS / world, WORLDS[world].toy
        entry: dict[str, Any] = {"runs": []}
        start = folder / "start" / "validation"
        if start.is_dir():
            entry["start"] = evaluation(start, toy)
        for method, overrides in METHODS.items():
            runs = [
                Run(world, method, int(path.name.rsplit("seed", 1)[1])) for path in folder.glob(f"{method}-seed[0-9]*")
            ]
            for run in sorted((run for run in runs if is_finished(run.folder)), key=lambda run: run.seed):
                algorithm = config_of(overrides).algorithm
                entry["runs"].append(
                    {
                        "method": method,
                        "seed": run.seed,
                        **evaluation(run.folder / "after" / "validation", toy),
                        **training(run.folder / "rollouts", algorithm),
                    }
                )
        auc_file = folder / "turn_auc.json"
        if auc_file.is_file():
            entry["auc"] = json.loads(auc_file.read_text())
        if entry["runs"] or "auc" in entry:
            results[world] = entry
    return results


def report() -> None:
    """Writes docs/results from the finished runs, and from what it holds of others."""
    file = RESULTS / "results.json"
    known = json.loads(file.read_text())["worlds"] if file.is_file() else {}
    results = {"worlds": with_known(collect(WORLDS), known, list(METHODS))}
    if not results["worlds"]:
        sys.exit(f"error: no finished run in {RUNS}")
    RESULTS.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(results, indent=1) + "\n")
    (RESULTS / "table.md").write_text(render(results))
    written = [RESULTS / "table.md", file]
    try:
        written += plot(results, RESULTS)
    except ImportError:
        print("no plots: matplotlib is missing; pip install '.[plots]'", file=sys.stderr)
    print("wrote", *(path.relative_to(ROOT) for path in written))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", default=",".join(WORLDS), help=f"default: {','.join(WORLDS)}")
    parser.add_argument("--methods", help=f"of {', '.join(METHODS)} (default: all)")
    parser.add_argument("--seeds", help=f"e.g. 1,2 (default: 1, and 1,2,3 of {', '.join(_THREE_SEEDS)} but in chains)")
    parser.add_argument("--only", action="append", metavar="WORLD/METHOD-seedN", help="this run; may be repeated")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="runs at a time")
    parser.add_argument("--list", action="store_true", help="show the runs and their state, and do nothing")
    parser.add_argument("--report-only", action="store_true", help="no runs, only the report from what is there")
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error(f"--jobs must be at least 1, got {args.jobs}")
    worlds = chosen(args.worlds, WORLDS, "--worlds")
    methods = chosen(args.methods, METHODS, "--methods") if args.methods else None
    if args.seeds and not re.fullmatch(r"\d+(,\d+)*", args.seeds):
        parser.error(f"--seeds {args.seeds}: whole numbers from 0, with commas")
    seeds = [int(seed) for seed in args.seeds.split(",")] if args.seeds else None
    runs = [named(name) for name in args.only] if args.only else plan(worlds, methods, seeds)
    if args.list:
        print("\n".join(f"{run.state:12} {run.name}" for run in runs))
        return
    if not args.report_only:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        missing = [run for run in runs if run.state != "finished"]
        failed: list[str] = []
        total = sum(WORLDS[run.world].steps for run in missing)
        try:
            with tqdm(
                total=total, unit=" steps", desc=f"{len(missing)} of {len(runs)} runs", dynamic_ncols=True
            ) as bar:
                for world in WORLDS:
                    of_world = [run for run in missing if run.world == world]
                    if of_world:
                        build_world(world)
                        evaluate_start(world)
                        failed += run_world(world, of_world, args.jobs, bar)
        except KeyboardInterrupt:
            sys.exit("stopped; the same command goes on where this one ended")
        except subprocess.CalledProcessError as error:
            sys.exit(f"error: {' '.join(map(str, error.cmd))} failed")
        if failed:
            sys.exit(f"error: {len(failed)} runs failed: {', '.join(failed)}")
    report()


if __name__ == "__main__":
    main()
