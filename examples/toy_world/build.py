r"""Builds a toy world with one command: model, tokenizer, corpus, questions and tool config.

    python -m examples.toy_world.build --out runs/toy                    # about four minutes on one core
    python -m examples.toy_world.build --data-only --seed 8 --out DIR    # other facts for the same model, seconds
    # three and four hops; the same with a stale answer at once in 15 % of the questions
    python -m examples.toy_world.build --world chains --init runs/toy/model --out runs/toy-chains
    python -m examples.toy_world.build --world chains --stale 0.15 --imperfect-steps 400 --init runs/toy-chains/model \
        --out runs/toy-stale
    # the same with stops after a hop that is not the last; and half of the questions without need of a search
    python -m examples.toy_world.build --world chains --early 0.25 --imperfect-steps 400 --init runs/toy-chains/model \
        --out runs/toy-early
    python -m examples.toy_world.build --world mixed --init runs/toy/model --out runs/toy-mixed

Writes to the folder:

    model/            Qwen3 of 0.3M parameters after the warm start, with tokenizer and chat template
    corpus.jsonl      passages of the training and the held-out world
    train.parquet     questions of the training world, in verl's format
    eval.parquet      questions of the held-out world: entities with names that training never uses
    tool_config.yaml  the search tool for verl
    meta.json         what was built; a second call with the same arguments reuses it

A folder that holds another world is left alone: ``--keep`` uses what is there, ``--force`` replaces it.

The labels in the question files are for evaluation. SIOP does not read them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import transformers

from examples.toy_world.tokenizer import REFERENCE_PREFIX, REFERENCE_SUFFIX, build_tokenizer
from examples.toy_world.warm_start import SEARCH_MAX_CHARS, SEARCH_TOPK, Schedule, warm_start
from examples.toy_world.world import (
    CHAINS,
    HELD_OUT_SIZES,
    KINDS,
    TRAIN_SIZES,
    TWO_HOP,
    Kind,
    Question,
    corpus,
    held_out_world,
    sample_questions,
    train_world,
    vocabulary,
)

# Raise when the same arguments would build something else than before.
VERSION = 1
_WEIGHTS = "model.safetensors"
_META = "meta.json"
_DATA = ("corpus.jsonl", "train.parquet", "eval.parquet", "tool_config.yaml")
_TRAIN_QUESTIONS, _EVAL_QUESTIONS = 1400, 420

_TOOL_CONFIG = f"""\
# The search tool of the toy world. The address comes from RETRIEVER_URL where that is set.
tools:
  - class_name: verl.tools.local_search_tool.LocalSearchTool
    config:
      type: native
      retrieval_service_url: ${{oc.env:RETRIEVER_URL,http://127.0.0.1:8000/retrieve}}
      topk: {SEARCH_TOPK}
      timeout_s: 30
      max_retries: 3
      max_chars: {SEARCH_MAX_CHARS}
    tool_schema:
      type: function
      function:
        name: search
        description: Searches for passages about a query and returns the best ones.
        parameters:
          type: object
          properties:
            query:
              type: string
              description: What to look for, in a few words.
          required: [query]
"""


def question_row(question: Question, index: int, split: str, kind: Kind) -> dict[str, Any]:
    """A question as a row in verl's format."""
    return {
        "data_source": kind.data_source,
        "agent_name": "tool_agent",
        "prompt": [{"role": "user", "content": question.text}],
        "ability": "search",
        "reward_model": {"style": "rule", "ground_truth": {"target": [question.gold]}},
        "extra_info": {
            "index": index,
            "split": split,
            "question": question.text,
            "template": question.template,
            "bridge": question.bridge,
        },
    }


def write_data(out: Path, seed: int, kind: Kind, train_questions: int, eval_questions: int) -> None:
    """Writes corpus, questions and tool config.

    Raises:
        ValueError: more questions asked for than the worlds have.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / "corpus.jsonl").open("w", encoding="utf-8") as file:
        for document in corpus(seed, kind):
            file.write(json.dumps(document) + "\n")
    for split, world, count in (
        ("train", train_world(seed, kind), train_questions),
        ("eval", held_out_world(seed, kind), eval_questions),
    ):
        rows = [question_row(q, i, split, kind) for i, q in enumerate(sample_questions(world, count, seed))]
        pd.DataFrame(rows).to_parquet(out / f"{split}.parquet", index=False)
    (out / "tool_config.yaml").write_text(_TOOL_CONFIG, encoding="utf-8")


def write_model(
    out: Path, seed: int, schedule: Schedule, kind: Kind, stale: float, early: float, init: Path | None
) -> dict[str, float]:
    """Trains and writes the model with its tokenizer; returns seconds and parameters."""
    started = time.monotonic()
    tokenizer = build_tokenizer(vocabulary())
    start = None if init is None else transformers.Qwen3ForCausalLM.from_pretrained(init, dtype=torch.float32)
    model = warm_start(tokenizer, seed=seed, schedule=schedule, kind=kind, stale=stale, early=early, start=start)
    model.save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    return {"seconds": round(time.monotonic() - started, 1), "parameters": model.num_parameters()}


def description(args: argparse.Namespace, schedule: Schedule | None) -> dict[str, Any]:
    """What determines the result of a build; equal descriptions mean that nothing needs to be built."""
    # The default kind of world is not named: folders built without this choice stay valid.
    world = {} if args.world == TWO_HOP.name else {"world": args.world, "stale": args.stale}
    early = {"early": args.early} if args.early else {}
    weights = None if args.init is None else (args.init / _WEIGHTS).read_bytes()
    init = {} if weights is None else {"init": hashlib.sha256(weights).hexdigest()}
    return {
        **world,
        **early,
        **init,
        "version": VERSION,
        "seed": args.seed,
        "train_questions": args.train_questions,
        "eval_questions": args.eval_questions,
        "warm_start": None if schedule is None else asdict(schedule),
    }


def read_meta(out: Path) -> dict[str, Any]:
    """``meta.json``: "build" describes a finished world, "unfinished" an interrupted one; empty if it is unreadable."""
    try:
        meta = json.loads((out / _META).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return meta if isinstance(meta, dict) else {}


def write_meta(out: Path, meta: dict[str, Any]) -> None:
    """Writes ``meta.json`` in one step."""
    new = out / f"{_META}.new"
    new.write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    new.replace(out / _META)


def missing(out: Path, built: dict[str, Any]) -> list[str]:
    """Files of the world ``built`` that the folder lacks."""
    names = _DATA if built["warm_start"] is None else (*_DATA, "model/config.json")
    return [name for name in names if not (out / name).is_file()]


def is_built(out: Path, wanted: dict[str, Any]) -> bool:
    """Whether the folder holds what ``wanted`` describes."""
    return read_meta(out).get("build") == wanted and not missing(out, wanted)


def is_usable(out: Path) -> bool:
    """Whether the folder holds a finished world of any kind, with a model."""
    built = read_meta(out).get("build")
    return built is not None and built["warm_start"] is not None and not missing(out, built)


def summary(built: dict[str, Any]) -> str:
    """A description in words."""
    parts = [f"{built.get('world', TWO_HOP.name)}", f"seed {built['seed']}"]
    if built.get("stale"):
        parts.append(f"stale {built['stale']:g}")
    if built.get("early"):
        parts.append(f"early {built['early']:g}")
    parts.append(f"{built['train_questions']} + {built['eval_questions']} questions")
    if steps := built["warm_start"]:
        start = f" from model {built['init'][:8]}" if "init" in built else ""
        parts.append(f"warm start of {steps['copying_steps']} + {steps['imperfect_steps']} steps{start}")
    else:
        parts.append("no model")
    return ", ".join([*parts, f"version {built['version']}"])


def obstacle(out: Path, wanted: dict[str, Any]) -> str | None:
    """What a build of ``wanted`` would destroy in the folder; None if that is nothing, or an earlier part of itself."""
    meta = read_meta(out)
    built = meta.get("build") or meta.get("unfinished")
    if built == wanted:
        return None
    if built:
        lost = missing(out, built)
        state = "an unfinished toy world" if "unfinished" in meta else "a toy world"
        without = f", without {', '.join(lost)}" if lost and "build" in meta else ""
        return f"{state} ({summary(built)}{without}), not the one asked for ({summary(wanted)})"
    present = [name for name in (*_DATA, "model", _META) if (out / name).exists()]
    return f"{', '.join(present)}, which no {_META} describes" if present else None


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="seed of facts, names and warm start (default: 0)")
    parser.add_argument(
        "--world",
        choices=list(KINDS),
        default=TWO_HOP.name,
        help="two_hop (default); chains of three and four hops; mixed: two hops, and questions that need no search",
    )
    parser.add_argument(
        "--stale",
        type=float,
        default=0.0,
        metavar="P",
        help="chains: the warm-start agent answers at once with the same entity with probability P, and whenever it "
        "does not know (default: 0)",
    )
    parser.add_argument(
        "--early",
        type=float,
        default=0.0,
        metavar="P",
        help="chains: the warm-start agent stops with probability P after each hop but the last (default: 0)",
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of the warm start (default: 2)")
    parser.add_argument("--data-only", action="store_true", help="no model: corpus, questions and tool config")
    for name, most in (("train", _TRAIN_QUESTIONS), ("eval", _EVAL_QUESTIONS)):
        described = f"{'held-out ' * (name == 'eval')}questions (default: {most}, or all that the world has)"
        parser.add_argument(f"--{name}-questions", type=int, help=described)
    parser.add_argument("--init", type=Path, metavar="MODEL", help="toy model to go on from, without the first phase")
    parser.add_argument("--copying-steps", type=int, help="warm start, first phase (default: 800; 0 with --init)")
    parser.add_argument("--imperfect-steps", type=int, default=Schedule.imperfect_steps, help="second phase")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--keep", action="store_true", help="if the folder holds any world with a model, use it")
    existing.add_argument("--force", action="store_true", help="build, whatever the folder holds")
    args = parser.parse_args(argv)
    if args.copying_steps is None:
        args.copying_steps = 0 if args.init else Schedule.copying_steps
    templates = len(KINDS[args.world].templates)
    for key, default, companies in (
        ("train_questions", _TRAIN_QUESTIONS, TRAIN_SIZES["company"]),
        ("eval_questions", _EVAL_QUESTIONS, HELD_OUT_SIZES["company"]),
    ):
        most = templates * companies
        if getattr(args, key) is None:
            setattr(args, key, min(default, most))
        if not 0 < getattr(args, key) <= most:
            parser.error(f"--{key.replace('_', '-')} must be between 1 and {most}, got {getattr(args, key)}")
    for key, least in (("threads", 1), ("copying_steps", 0), ("imperfect_steps", 1)):
        if getattr(args, key) < least:
            parser.error(f"--{key.replace('_', '-')} must be at least {least}, got {getattr(args, key)}")
    for key in ("stale", "early"):
        if not 0.0 <= getattr(args, key) < 1.0:
            parser.error(f"--{key} must be from 0 to below 1, got {getattr(args, key)}")
    if args.init and not (args.init / _WEIGHTS).is_file():
        parser.error(f"--init {args.init}: no {_WEIGHTS} there")
    if args.early and args.world != CHAINS.name:
        parser.error(f"--early {args.early} needs --world chains: in {args.world} each question has its own share")
    if args.stale and args.world != CHAINS.name:
        parser.error(f"--stale {args.stale} needs --world chains: in {args.world} the stale answers can be right")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    out: Path = args.out
    kind = KINDS[args.world]
    schedule = None if args.data_only else Schedule(args.copying_steps, args.imperfect_steps)
    wanted = description(args, schedule)
    if out.exists() and not out.is_dir():
        print(f"error: {out} is not a folder", file=sys.stderr)
        return 2
    if not args.force:
        if is_built(out, wanted):
            print(f"{out} is up to date")
            return 0
        if args.keep and is_usable(out):
            print(f"using the toy world in {out}: {summary(read_meta(out)['build'])}")
            return 0
        if found := obstacle(out, wanted):
            advice = "choose another folder, or replace it with python -m examples.toy_world.build --force"
            print(f"error: {out} holds {found}; {advice}", file=sys.stderr)
            return 2
    out.mkdir(parents=True, exist_ok=True)
    # Until the parts are complete: an interrupted build is never taken for a whole one, and is known for what it was.
    write_meta(out, {"unfinished": wanted})
    try:
        write_data(out, args.seed, kind, args.train_questions, args.eval_questions)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {args.train_questions} training and {args.eval_questions} held-out questions to {out}")
    meta: dict[str, Any] = {
        "build": wanted,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "probe": {"prefix": REFERENCE_PREFIX, "suffix": REFERENCE_SUFFIX},
    }
    if schedule is not None:
        torch.set_num_threads(args.threads)
        shutil.rmtree(out / "model", ignore_errors=True)
        meta["model"] = write_model(out, args.seed, schedule, kind, args.stale, args.early, args.init)
        print(f"warm start: {meta['model']['parameters']} parameters in {meta['model']['seconds']:.0f} s")
    write_meta(out, meta)
    return 0


if __name__ == "__main__":
    sys.exit(main())
