r"""A training of SmolLM2-135M on two-hop questions in plain English, on a CPU: a night on two cores.

    python -m benchmarks.real_training [--method siop] [--warm-steps 150] [--steps 30] [--seed 1]
    python -m benchmarks.real_training --report-only

Warm start on the scripted agent of examples/real_world, whose answers are wrong more often than right; evaluation on
held-out questions; SIOP steps of 4 questions x 4 rollouts through the launchers, with the BM25 retriever and the warm
start as the scorer, without labels; evaluation again. The same command goes on where it was stopped. Leaves everything
in runs/real_training, and there table.md and curve.svg.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm
from verl.trainer.siop.report import METRICS_FILE, read_metrics
from verl.utils.siop.siop_process_reward import Rollout

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from real_model import prepare  # noqa: E402

from benchmarks.toy_results import read_rows, standard_error, turns_of  # noqa: E402
from benchmarks.toy_services import toy_services  # noqa: E402
from examples.real_world.agent import mixture  # noqa: E402
from examples.real_world.build import (  # noqa: E402
    DATA_SOURCE,
    EVAL_QUESTIONS,
    TRAIN_QUESTIONS,
    split_questions,
    write_world,
)
from examples.real_world.rollouts import chat_of, rollout_of, search_tool  # noqa: E402

OUT, MODEL = ROOT / "runs" / "real_training", ROOT / "runs" / "smollm2"
# Episodes of a step, and of one pass through the model: eight at once would take 6 GB.
_BATCH, _MICRO_BATCH = 8, 2
_LR, _SAVE_EVERY = 1e-4, 25
_WARM_QUESTIONS = 1000


def episodes(model: Path, count: int, seed: int) -> list[Rollout]:
    """Rollouts of the scripted agent, none of a question that is trained on or held out, sorted into random order."""
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
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if out.is_dir():
        return
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


def launch(script: str, env: Mapping[str, str], *arguments: str) -> float:
    """Runs a launcher in the foreground; returns its seconds.

    Raises:
        subprocess.CalledProcessError: it failed, and has said why.
    """
    started = time.monotonic()
    subprocess.run(["bash", script, *arguments], cwd=ROOT, env={**os.environ, **env}, check=True)
    return time.monotonic() - started


def is_evaluated(folder: Path) -> bool:
    return (folder / "validation" / METRICS_FILE).is_file()


def run(out: Path, method: str, steps: int, seed: int) -> None:
    """Evaluation, training, evaluation; what is there is not done again."""
    world, trained = out / "world", out / f"{method}-seed{seed}"
    checkpoint = trained / f"global_step_{steps}"
    common = ["experiment=real_world", f"trainer.total_training_steps={steps}"]
    with toy_services(world, out / "logs") as env:
        run_env = {
            **env,
            "MODEL_PATH": str(world / "model"),
            "TRAIN_FILE": str(world / "train.parquet"),
            "VAL_FILE": str(world / "eval.parquet"),
            "SEED": str(seed),
        }
        for name, weights in (("before", world / "model"), ("after", checkpoint)):
            if name == "after" and not checkpoint.is_dir():
                launch(
                    "train_siop.sh",
                    {**run_env, "OUTPUT_DIR": str(trained), "EXPERIMENT_NAME": f"real-{method}"},
                    f"ablation={method}",
                    "trainer.max_actor_ckpt_to_keep=1",
                    *common,
                )
            folder = out / "before" if name == "before" else trained / "after"
            if not is_evaluated(folder):
                launch(
                    "eval_siop.sh",
                    {**run_env, "OUTPUT_DIR": str(folder), "EXPERIMENT_NAME": f"real-{name}"},
                    str(weights),
                    "experiment=real_world",
                )


def curve(folder: Path) -> dict[str, list[float]]:
    """By step: EM of the training rollouts, their turns, and the share without an answer."""
    files = sorted(folder.glob("[0-9]*.jsonl"), key=lambda file: int(file.stem))
    steps = [read_rows(file) for file in files]
    return {
        "em": [float(np.mean([row["em"] for row in rows])) for rows in steps],
        "turns": [float(np.mean([len(turns_of(row["output"])) for row in rows])) for rows in steps],
        "no_answer": [float(np.mean([not row["answer"] for row in rows])) for rows in steps],
    }


def report(out: Path) -> list[Path]:
    """Writes ``table.md`` and ``curve.svg`` from what is there; returns their paths."""
    rows = []
    curves = {}
    for folder in [out / "before", *sorted(out.glob("*-seed[0-9]*"))]:
        evaluated = folder if folder.name == "before" else folder / "after"
        by_step = curve(folder / "rollouts") if folder.name != "before" else {}
        if by_step.get("em"):
            curves[folder.name] = by_step
        if is_evaluated(evaluated):
            metrics = read_metrics(evaluated / "validation")
            em = metrics[f"val-aux/{DATA_SOURCE}/em/mean@1"]
            error = standard_error([em], EVAL_QUESTIONS)
            turns = metrics["val-aux/turns/mean"]
            rows.append(f"| {folder.name} | {len(by_step.get('em', []))} | {em:.3f} ± {error:.3f} | {turns:.2f} |")
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
    if not (ROOT / "config" / "ablation" / f"{args.method}.yaml").is_file():
        parser.error(f"--method {args.method}: there is no config/ablation/{args.method}.yaml")
    if min(args.warm_steps, args.steps, args.threads) < 1:
        parser.error("--warm-steps, --steps and --threads are at least 1")
    out = args.out.resolve()
    if not args.report_only:
        try:
            prepare(MODEL)
            if not (out / "world" / "eval.parquet").is_file():
                write_world(out / "world", TRAIN_QUESTIONS, EVAL_QUESTIONS)
            warm_start(MODEL, out / "world" / "model", args.warm_steps, args.seed, args.threads)
            run(out, args.method, args.steps, args.seed)
        except KeyboardInterrupt:
            sys.exit("stopped; the same command goes on where this one ended")
        except subprocess.CalledProcessError as error:
            sys.exit(f"error: {' '.join(map(str, error.cmd))} failed")
    for file in report(out):
        print(f"wrote {file}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
