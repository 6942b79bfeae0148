r"""Builds a small game with one command: boards, tokenizer, and a model that is warm-started on a faulty agent.

    python -m examples.games.build --game sudoku --blanks 8 --out runs/games/sudoku        # a few minutes on two cores
    python -m examples.games.build --game sudoku --blanks 4 --init runs/games/sudoku/model --out runs/games/sudoku-4
    python -m examples.games.build --game tictactoe --out runs/games/tictactoe
    python -m examples.games.build --game minesweeper --out runs/games/minesweeper

Writes train.parquet, eval.parquet, overrides.yaml and manifest.json (``python -m verl.utils.siop.envs.build``) and
model/. Sudoku is 4x4, Minesweeper 4x4 with 3 mines and reveals alone. A folder that holds the same build is left as it
is, an interrupted one is made again; --init copies a model instead of training one.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM
from verl.utils.siop.envs import build as boards
from verl.utils.siop.envs.boards import Spec

from examples.games.agent import AGENTS, played
from examples.games.tokenizer import game_tokenizer
from examples.toy_world.warm_start import Example, batches, new_model, train

# Raise when the same arguments would build something else than before.
VERSIONS = {"sudoku": 3, "tictactoe": 3, "minesweeper": 4}
GAMES = ("sudoku", "tictactoe", "minesweeper")
OPTIONS = {"sudoku": ["--size", "4"], "tictactoe": [], "minesweeper": ["--size", "4", "--mines", "3"]}
# The warm start of Sudoku sees boards of all these, whatever the data's number of blanks is.
BLANKS = (2, 4, 6, 8, 10)
BATCH = 16
# Optimiser steps on an agent that plays right, where what there is to see of a board is learnt, and on the faulty one.
STEPS = {"sudoku": (700, 200), "tictactoe": (300, 150), "minesweeper": (500, 200)}
# To write down the next board is to look up every cell of the last one: without it the small model is slow to learn
# which cells a move concerns (right first moves after 1,000 steps on 4x4 Sudoku with 8 blanks: .80, without .43).
_OBSERVATION_WEIGHT = 0.3
_META, _UNFINISHED = "build.json", "unfinished"


def data_arguments(game: str, blanks: str, seed: int, train_boards: int, eval_boards: int, out: Path) -> list[str]:
    """Arguments of ``verl.utils.siop.envs.build``."""
    words = ["--game", game, *OPTIONS[game], "--seed", str(seed), "--out", str(out), "--bare"]
    words += ["--train", str(train_boards), "--eval", str(eval_boards)]
    return [*words, "--blanks", blanks] if game == "sudoku" else words


def specs_for_warm_start(game: str, seed: int, eval_boards: int, out: Path) -> list[Spec]:
    """Boards that the agent plays: of the same training part as the data, so that held-out ones stay unseen."""
    blanks = ",".join(map(str, BLANKS))
    held_out = 1 if game == "sudoku" else eval_boards
    words = data_arguments(game, blanks, seed, 400 if game == "sudoku" else 1000, held_out, out)
    return [spec for train_part, _ in boards.boards(boards.parse_args(words)).values() for spec in train_part]


def examples(
    game: str, specs: Sequence[Spec], tokenizer: PreTrainedTokenizerFast, count: int, faults: float, rng: random.Random
) -> list[Example]:
    """Games as token ids, the agent's own tokens weighed fully."""
    known: dict[str, list[int]] = {}
    found = []
    for _ in range(count):
        pieces, _ = played(game, rng.choice(specs), rng, faults)
        ids: list[int] = []
        weights: list[float] = []
        for text, own in pieces:
            if text not in known:
                known[text] = tokenizer.encode(text, add_special_tokens=False)
            ids += known[text]
            weights += [1.0 if own else _OBSERVATION_WEIGHT] * len(known[text])
        found.append(Example(ids, weights))
    return found


def write_model(game: str, seed: int, steps: tuple[int, int], eval_boards: int, out: Path) -> dict[str, float]:
    """Trains and writes the model with its tokenizer; returns seconds and parameters."""
    started = time.monotonic()
    tokenizer = game_tokenizer()
    model: Qwen3ForCausalLM = new_model(tokenizer, seed)
    rng = random.Random(f"{game} {seed}: warm start")
    specs = specs_for_warm_start(game, seed, eval_boards, out)
    plan: list[list[Example]] = []
    for count, faults in zip(steps, (0.0, AGENTS[game][1]), strict=True):
        plan += batches(examples(game, specs, tokenizer, count * BATCH, faults, rng), rng, BATCH)
    train(model, plan, int(tokenizer.pad_token_id), None, show_progress=True)
    model.eval().save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    return {"seconds": round(time.monotonic() - started, 1), "parameters": model.num_parameters()}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.games.build", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--game", choices=GAMES, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--blanks", help="sudoku: blank cells, as 8 or 2,4,6 (8)")
    parser.add_argument("--seed", type=int, default=0, help="of boards and warm start (0)")
    parser.add_argument("--train-boards", type=int, default=1024, help="(1024)")
    parser.add_argument("--eval-boards", type=int, default=256, help="held-out boards (256)")
    parser.add_argument("--right-steps", type=int, help="warm start on an agent that plays right")
    parser.add_argument("--faulty-steps", type=int, help="warm start on the faulty agent")
    parser.add_argument("--init", type=Path, metavar="MODEL", help="take this model of the same game as it is")
    parser.add_argument("--keep", action="store_true", help="if the folder holds any build of this game, use it")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the warm start (1)")
    args = parser.parse_args(argv)
    if args.blanks and args.game != "sudoku":
        parser.error(f"--game {args.game} does not read --blanks")
    if args.game == "sudoku":
        args.blanks = args.blanks or "8"
    steps = (args.right_steps, args.faulty_steps)
    if args.init and any(step is not None for step in steps):
        parser.error("--init takes a model as it is: it has no --right-steps and --faulty-steps")
    if args.init and not (args.init / "config.json").is_file():
        parser.error(f"--init {args.init}: no model there")
    numbers = {"--right-steps": steps[0], "--faulty-steps": steps[1], "--threads": args.threads}
    for name, value in {**numbers, "--train-boards": args.train_boards, "--eval-boards": args.eval_boards}.items():
        if value is not None and value < 1:
            parser.error(f"{name} must be at least 1, got {value}")
    args.steps = tuple(given or default for given, default in zip(steps, STEPS[args.game], strict=True))
    return args


def _known(meta: Path) -> dict[str, Any]:
    """What a folder says that it holds; nothing if it says nothing that can be read."""
    try:
        known = json.loads(meta.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    out: Path = args.out
    wanted: dict[str, Any] = {
        "version": VERSIONS[args.game],
        **{name: getattr(args, name) for name in ("game", "blanks", "seed", "train_boards", "eval_boards")},
        "init": str(args.init) if args.init else None,
        "steps": None if args.init else list(args.steps),
    }
    known = _known(out / _META)
    unfinished = bool(known.pop(_UNFINISHED, False))
    if known == wanted and not unfinished:
        print(f"{out} is up to date")
        return 0
    kept = (args.game, VERSIONS[args.game])
    if args.keep and (known.get("game"), known.get("version")) == kept and not unfinished:
        print(f"using {out}: {', '.join(f'{key} {value}' for key, value in known.items() if value is not None)}")
        return 0
    if known != wanted and out.exists() and any(out.iterdir()):
        begun = "an unfinished build" if unfinished else "another build"
        what = f"{begun} ({known})" if known else f"files that no {_META} describes"
        print(
            f"error: {out} holds {what}, not the one asked for ({wanted}); remove it, or choose another --out",
            file=sys.stderr,
        )
        return 2
    words = data_arguments(args.game, args.blanks, args.seed, args.train_boards, args.eval_boards, out)
    boards.parse_args(words)  # before anything is written
    out.mkdir(parents=True, exist_ok=True)
    (out / _META).write_text(json.dumps({**wanted, _UNFINISHED: True}, indent=1) + "\n")
    status = boards.main(words)
    if status:
        return status
    if args.init:
        shutil.copytree(args.init, out / "model", dirs_exist_ok=True)
    else:
        torch.set_num_threads(args.threads)
        told = write_model(args.game, args.seed, args.steps, args.eval_boards, out)
        print(f"warm start: {told['parameters']} parameters in {told['seconds']:.0f} s")
    (out / _META).write_text(json.dumps(wanted, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted: the same command begins this build again", file=sys.stderr)
        sys.exit(130)
