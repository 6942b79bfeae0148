"""Verified turns against outcomes, trained with the real trainer on small games: docs/results/vpr.md.

    python benchmarks/vpr_table.py --list                  # the plan and what is there
    python benchmarks/vpr_table.py                         # what is missing of it, then the report
    python benchmarks/vpr_table.py --settings sudoku-8 --methods grpo,vpr_loo --seeds 1
    python benchmarks/vpr_table.py --only sudoku-8/vpr_loo-seed1
    python benchmarks/vpr_table.py --report-only

Sudoku 4x4 with B blanks (the success needs all B turns right), Minesweeper 4x4 with 3 mines (perfect play loses some
boards, so outcomes err), Tic-Tac-Toe with oracles that err. A finished run is not run again, an interrupted one goes on
from its last checkpoint; Ctrl-C stops everything. Folders: runs/vpr_table/SETTING/METHOD-seedN.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from tqdm import tqdm
from verl.trainer.siop.evaluation.manifest import read_evaluation
from verl.trainer.siop.evaluation.questions import EvaluationError

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "scripts"))

from launch_variables import TABLE  # noqa: E402

from benchmarks.toy_results import read_rows, standard_error  # noqa: E402
from benchmarks.training_table import chosen, split_name, start_run, stop, with_known  # noqa: E402

RUNS, GAMES = ROOT / "runs" / "vpr_table", ROOT / "runs" / "games"
RESULTS = ROOT / "docs" / "results"
STEPS = 60
_CONTROLS = "algorithm.siop_import=benchmarks.game_controls"


@dataclass(frozen=True)
class Setting:
    """A game of the table: its boards, and the methods that the plan trains on them."""

    game: str
    blanks: int | None
    methods: tuple[str, ...]


@dataclass(frozen=True)
class Method:
    """Overrides of a training, options of its agent loop (who gives the scores) where they are not the default, and
    overrides of the evaluation."""

    overrides: tuple[str, ...]
    loop: Mapping[str, Any] | None = None
    evaluation: tuple[str, ...] = ()


_ERRING: Mapping[str, Mapping[str, Any]] = {
    "search30": {"oracle": "search", "simulations": 30},
    "search100": {"oracle": "search", "simulations": 100},
    "search1000": {"oracle": "search", "simulations": 1000},
    "flip20": {"flip": 0.2},
    "flip40": {"flip": 0.4},
}
METHODS: Mapping[str, Method] = {
    "grpo": Method(("ablation=grpo",)),
    "outcome_loo": Method(("ablation=vpr_return", _CONTROLS, "algorithm.siop_reward_mode=outcome")),
    "vpr": Method(("ablation=vpr",)),
    "vpr_loo": Method(("ablation=vpr_loo",)),
    "vpr_outcome": Method(("ablation=vpr_return", "algorithm.siop_outcome_weight=1")),
    "vpr_unscaled": Method(("ablation=vpr", "algorithm.norm_adv_by_std_in_grpo=false")),
    # A rollout for every turn, as many actions a board and as many updates a step.
    "states": Method(
        ("ablation=vpr_loo", "actor_rollout_ref.rollout.n=1", "actor_rollout_ref.actor.ppo_mini_batch_size=512"),
        {"_target_": "verl.trainer.siop.rollouts.state_loop.VerifiedStateLoop", "candidates": 8},
        ("actor_rollout_ref.rollout.agent.agent_loop_config_path=config/game_states.yaml",),
    ),
    "shuffled": Method(("ablation=vpr_loo", _CONTROLS, "algorithm.siop_reward_mode=shuffled")),
    **{f"vpr_loo-{name}": Method(("ablation=vpr_loo",), loop) for name, loop in _ERRING.items()},
}
_ARMS = ("grpo", "outcome_loo", "vpr", "vpr_loo", "vpr_outcome")
SETTINGS: Mapping[str, Setting] = {
    "sudoku-8": Setting("sudoku", 8, (*_ARMS, "vpr_unscaled", "states", "shuffled")),
    **{f"sudoku-{blanks}": Setting("sudoku", blanks, _ARMS) for blanks in (2, 4, 6, 10)},
    "minesweeper": Setting("minesweeper", None, _ARMS),
    "tictactoe": Setting("tictactoe", None, ("grpo", "vpr_loo", *(f"vpr_loo-{name}" for name in _ERRING), "shuffled")),
}


@dataclass
class Run:
    """One training with its evaluation."""

    setting: str
    method: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.setting}/{self.method}-seed{self.seed}"

    @property
    def folder(self) -> Path:
        return RUNS / self.name

    @property
    def data(self) -> Path:
        """The folder of its boards and of the model that it starts from."""
        return GAMES / self.setting

    @property
    def state(self) -> str:
        if evaluated(self.folder / "after") is not None:
            return "finished"
        return "interrupted" if (self.folder / "logs").is_dir() else "to do"

    def overrides(self) -> list[str]:
        """Of the training."""
        method = METHODS[self.method]
        found = [
            # An outcome that nobody reaches teaches nothing: that is a result here.
            *("experiment=games", *method.overrides, "algorithm.siop_on_nothing_learnt=warn"),
            *(f"trainer.total_training_steps={STEPS}", "trainer.save_freq=20", "trainer.max_actor_ckpt_to_keep=1"),
        ]
        if method.loop is not None:
            (loop,) = yaml.safe_load((ROOT / "config" / "game_loop.yaml").read_text())
            file = self.folder / "game_loop.yaml"
            file.write_text(yaml.safe_dump([{**loop, **method.loop}]))
            found.append(f"actor_rollout_ref.rollout.agent.agent_loop_config_path={file}")
        return found

    def command(self) -> list[str]:
        """Trains and evaluates, each part only if it is missing."""
        evaluation = " ".join(("experiment=games", *METHODS[self.method].evaluation))
        script = (
            "set -e; checkpoint=$OUTPUT_DIR/global_step_$1; shift; "
            '[ -d "$checkpoint/actor/huggingface" ] || MODEL_PATH=$DATA_DIR/model bash train_siop.sh -- "$@"; '
            "EXPERIMENT_NAME=after OUTPUT_DIR=$OUTPUT_DIR/after exec bash eval_siop.sh $checkpoint " + evaluation
        )
        return ["bash", "-c", script, "vpr_table", str(STEPS), *self.overrides()]


def evaluated(folder: Path) -> Any:
    """The manifest of a finished evaluation, else None."""
    try:
        return read_evaluation(folder)[0]
    except EvaluationError:
        return None


def plan(settings: Sequence[str], methods: Sequence[str] | None, seeds: Sequence[int]) -> list[Run]:
    """The runs asked for, or the plan; the same seed of every method first, so that a part of it compares like with
    like."""
    return [
        Run(setting, method, seed)
        for setting in settings
        for seed in seeds
        for method in methods or SETTINGS[setting].methods
    ]


def named(text: str) -> Run:
    """The run with this name."""
    return Run(*split_name(text, SETTINGS, METHODS, "SETTING/METHOD-seedN, for example sudoku-8/vpr_loo-seed1"))


def environment(run_folder: Path, data: Path, name: str, seed: int) -> dict[str, str]:
    """In which the launchers use these boards, on a CPU, whatever is set for other runs."""
    known = {row.name for row in TABLE} - {"OMP_NUM_THREADS"}
    return {
        **{name: value for name, value in os.environ.items() if name not in known},
        "VIRTUAL_ENV": sys.prefix,
        "PYTHONPATH": str(ROOT),  # for what METHODS import
        "N_GPUS_PER_NODE": "0",
        "DATA_DIR": str(data),
        "EVAL_TEMPERATURE": "1",
        "SEED": str(seed),
        "EXPERIMENT_NAME": name,
        "OUTPUT_DIR": str(run_folder),
        "LOG_DIR": str(run_folder / "logs"),
    }


def prepare(setting: str) -> None:
    """Boards and start model, and the evaluation of that model, where they are missing. All numbers of blanks start
    from one model."""
    entry = SETTINGS[setting]
    build = [sys.executable, "-m", "examples.games.build", "--game", entry.game]
    base = GAMES / entry.game
    subprocess.run([*build, "--keep", "--out", str(base)], cwd=ROOT, check=True)
    if entry.blanks is not None:
        options = ["--blanks", str(entry.blanks), "--init", str(base / "model")]
        subprocess.run([*build, *options, "--out", str(GAMES / setting)], cwd=ROOT, check=True)
    folder = RUNS / setting / "start"
    if evaluated(folder) is None:
        command = ["bash", "eval_siop.sh", str(GAMES / setting / "model"), "experiment=games"]
        env = environment(folder, GAMES / setting, "start", 1)
        subprocess.run(command, cwd=ROOT, env=env, check=True, stdout=subprocess.DEVNULL)


def train(run: Run) -> bool:
    """Trains and evaluates; whether it has come to its end."""
    logs = run.folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    process = start_run(run.command(), environment(run.folder, run.data, run.method, run.seed), logs, ROOT)
    try:
        process.wait()
    finally:
        stop(process)
    return run.state == "finished"


# ---------------------------------------------------------------------- results
def training(folder: Path) -> dict[str, float]:
    """Of the rollouts that a training sampled: ``tokens`` that the policy wrote, ``turns``, and the measured
    ``oracle_error`` of the scores that it learnt from."""
    tokens, turns, errors = 0, 0, list[float]()
    for file in folder.glob("[0-9]*.jsonl"):
        for row in read_rows(file):
            turns += len(row["actions"])
            # One token a word, and the end of each turn.
            tokens += sum(len(text.split()) + 1 for text in row["actions"])
            errors.append(row["oracle_error"])
    return {"tokens": tokens, "turns": turns, "oracle_error": fmean(errors) if errors else math.nan}


def outcomes(manifest: Any) -> dict[str, float]:
    return {name: estimate.value for name, estimate in manifest.average.outcomes.items()}


def collect() -> dict[str, Any]:
    """Setting -> ``start`` and ``runs``, of what is in :data:`RUNS`."""
    results: dict[str, Any] = {}
    for setting in SETTINGS:
        start = evaluated(RUNS / setting / "start")
        runs = []
        for method in METHODS:
            for path in sorted((RUNS / setting).glob(f"{method}-seed[0-9]*")):
                run = Run(setting, method, int(path.name.rsplit("seed", 1)[1]))
                manifest = evaluated(run.folder / "after")
                if manifest is not None:
                    found = {**outcomes(manifest), **training(run.folder / "rollouts")}
                    runs.append({"method": method, "seed": run.seed, "boards": manifest.average.questions, **found})
        if start is not None:
            results[setting] = {"start": outcomes(start), "runs": runs}
    return results


def estimate(runs: Sequence[Mapping[str, Any]], name: str) -> tuple[float, float]:
    """Mean over seeds and its standard error, the larger of that over the boards and that over the seeds."""
    values = [run[name] for run in runs]
    return fmean(values), standard_error(values, runs[0]["boards"])


def against(runs: Sequence[Mapping[str, Any]], others: Sequence[Mapping[str, Any]]) -> str:
    """Difference of the successes with its standard error, in bold beyond two of them."""
    (mean, error), (other, other_error) = estimate(runs, "success"), estimate(others, "success")
    difference, error = mean - other, math.hypot(error, other_error)
    text = f"{difference:+.3f} ± {error:.3f}"
    return f"**{text}**" if abs(difference) > 2 * error else text


def render(results: Mapping[str, Any]) -> str:
    """``vpr.md``: for each setting a row a method."""
    lines = [
        "# Verified turns against outcomes",
        "",
        "Written by `python benchmarks/vpr_table.py` from finished runs: 60 steps of 8 boards x 8 rollouts from one",
        "warm start, sampled once on 256 held-out boards. Success is what no method is paid for but `grpo` and",
        "`outcome_loo`; right turns is what VPR is paid for. ± is the standard error, the larger of that over the",
        "seeds and that over the boards. `error` is the measured mean error of the scores that were learnt from,",
        "`tokens` what the policy wrote in training. The last column is the difference of success to `grpo`, bold",
        "beyond two standard errors.",
    ]
    for setting, entry in results.items():
        start = entry["start"]
        lines += [
            "",
            f"## {setting}",
            "",
            f"Oracle play: success {start['ceiling_success']:.3f}, completion {start['ceiling_completion']:.3f}.",
            "",
            "| method | seeds | success | completion | right turns | invalid | error | tokens | success − grpo |",
            "|---|---|---|---|---|---|---|---|---|",
            f"| start | | {start['success']:.3f} | {start['completion']:.3f} | {start['oracle_rate']:.3f} | "
            f"{start['invalid']:.3f} | | | |",
        ]
        by_method = {method: [run for run in entry["runs"] if run["method"] == method] for method in METHODS}
        for method, runs in by_method.items():
            if runs:
                names = ("success", "completion", "oracle_rate", "invalid")
                cells = [f"{mean:.3f} ± {error:.3f}" for mean, error in (estimate(runs, name) for name in names)]
                error, tokens = (fmean(run[name] for run in runs) for name in ("oracle_error", "tokens"))
                seeds = ", ".join(str(run["seed"]) for run in runs)
                compared = against(runs, by_method["grpo"]) if method != "grpo" and by_method["grpo"] else ""
                lines.append(f"| {method} | {seeds} | {' | '.join(cells)} | {error:.3f} | {tokens:,.0f} | {compared} |")
    return "\n".join(lines) + "\n"


def plot(results: Mapping[str, Any], file: Path) -> None:
    """Success against the number of blanks, a line a method with its standard errors, a dot a seed, as SVG.

    Raises:
        ImportError: without matplotlib (the extra ``plots``).
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sudoku: dict[int, Any] = {}
    for name, entry in results.items():
        if (number_of_blanks := SETTINGS[name].blanks) is not None:
            sudoku[number_of_blanks] = entry
    sudoku = dict(sorted(sudoku.items()))
    figure, axis = pyplot.subplots(figsize=(6.4, 4.2))
    for number, method in enumerate(_ARMS):
        runs_of = {
            blanks: [run for run in entry["runs"] if run["method"] == method] for blanks, entry in sudoku.items()
        }
        points = {blanks: estimate(runs, "success") for blanks, runs in runs_of.items() if runs}
        if points:
            aside = [blanks + 0.12 * (number - len(_ARMS) // 2) for blanks in points]  # so that all can be seen
            means, errors = zip(*points.values(), strict=True)
            line = axis.errorbar(aside, means, errors, label=method, capsize=3)
            for place, blanks in zip(aside, points, strict=True):
                found = [run["success"] for run in runs_of[blanks]]
                axis.plot([place] * len(found), found, ".", color=line[0].get_color(), markersize=4)
    start = {blanks: entry["start"]["success"] for blanks, entry in sudoku.items()}
    axis.plot(list(start), list(start.values()), ":", color="grey", label="start")
    axis.set_xticks(list(start))
    axis.set_xlabel("blanks of a 4x4 Sudoku, which is the number of turns")
    axis.set_ylabel("success, held-out boards")
    axis.legend()
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def report() -> None:
    """Writes docs/results/vpr.json, vpr.md and vpr.svg from the finished runs, and from what is known of others."""
    file = RESULTS / "vpr.json"
    results = with_known(collect(), json.loads(file.read_text()) if file.is_file() else {}, list(METHODS))
    if not any(entry["runs"] for entry in results.values()):
        sys.exit(f"error: no finished run in {RUNS}")
    results = {setting: results[setting] for setting in SETTINGS if setting in results}
    file.write_text(json.dumps(results, indent=1) + "\n")
    (RESULTS / "vpr.md").write_text(render(results))
    written = ["vpr.md"]
    if any(SETTINGS[setting].blanks is not None for setting in results):
        try:
            plot(results, RESULTS / "vpr.svg")
        except ImportError:
            print("no plot: matplotlib is missing; pip install '.[plots]'", file=sys.stderr)
        else:
            written.append("vpr.svg")
    print("wrote", file.relative_to(ROOT), *written)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", default=",".join(SETTINGS), help=f"default: {','.join(SETTINGS)}")
    parser.add_argument("--methods", help=f"of {', '.join(METHODS)} (default: those of the setting)")
    parser.add_argument("--seeds", default="1,2,3", help="default: 1,2,3")
    parser.add_argument("--only", action="append", metavar="SETTING/METHOD-seedN", help="this run; may be repeated")
    parser.add_argument("--list", action="store_true", help="show the runs and their state, and do nothing")
    parser.add_argument("--report-only", action="store_true", help="no runs, only the report from what is there")
    args = parser.parse_args()
    if not re.fullmatch(r"\d+(,\d+)*", args.seeds):
        parser.error(f"--seeds {args.seeds}: whole numbers from 0, with commas")
    settings = chosen(args.settings, SETTINGS, "--settings")
    methods = chosen(args.methods, METHODS, "--methods") if args.methods else None
    runs = plan(settings, methods, [int(seed) for seed in args.seeds.split(",")])
    runs = [named(name) for name in args.only] if args.only else runs
    for run in runs:
        game = SETTINGS[run.setting].game
        if "search" in run.method and game != "tictactoe":
            sys.exit(f"error: {run.name}: {game} has no tree search; choose a setting of tictactoe")
    if args.list:
        print("\n".join(f"{run.state:12} {run.name}" for run in runs))
        return
    if not args.report_only:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        failed, missing = list[str](), [run for run in runs if run.state != "finished"]
        try:
            for setting in dict.fromkeys(run.setting for run in missing):
                prepare(setting)
            for run in (bar := tqdm(missing, unit=" runs", dynamic_ncols=True)):
                bar.set_postfix_str(run.name)
                if not train(run):
                    failed.append(run.name)
                    bar.write(f"failed: {run.name}, see {run.folder / 'logs'}")
        except KeyboardInterrupt:
            sys.exit("stopped; the same command goes on where this one ended")
        except subprocess.CalledProcessError as error:
            sys.exit(f"error: {' '.join(map(str, error.cmd))} failed")
        if failed:
            sys.exit(f"error: {len(failed)} runs failed: {', '.join(failed)}")
    report()


if __name__ == "__main__":
    main()
