"""Boards of a game as data for training and evaluation, in verl's format.

    python -m verl.utils.siop.envs.build --game sudoku --size 9 --blanks 40 --out data/sudoku9
    python -m verl.utils.siop.envs.build --game minesweeper --size 5 --mines 5 --start centre --flags --out data/mines5
    python -m verl.utils.siop.envs.build --game tictactoe --out data/tictactoe
    MODEL_PATH=Qwen/Qwen3-4B DATA_DIR=data/sudoku9 bash train_siop.sh experiment=games_sudoku9 ablation=vpr_loo

Writes train.parquet, eval.parquet, overrides.yaml (the settings that every game needs, which DATA_DIR brings along) and
manifest.json (what was asked for). A row holds its whole board, so all rollouts of a question share it; no board is in
both parts. How well oracle play does on a board stands in its row too.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pandas as pd
from tqdm import tqdm
from verl.utils.siop.envs.boards import Spec, minesweeper_boards, sudoku_boards, tictactoe_boards
from verl.utils.siop.envs.games import GAMES, Env, find, oracle_play, prompt_of
from verl.utils.siop.errors import GameError

AGENT = "verified_game"
LOOP = "config/game_loop.yaml"
# What a game needs of a run, whatever else it is: its agent loop, no tools, and as many turns as it takes.
OVERRIDES = {
    "actor_rollout_ref.rollout.agent.agent_loop_config_path": LOOP,
    "actor_rollout_ref.rollout.agent.default_agent_loop": AGENT,
    "actor_rollout_ref.rollout.multi_turn.max_assistant_turns": None,
    "actor_rollout_ref.rollout.multi_turn.tool_config_path": None,
}
# Raise when the same arguments would build other boards than before.
VERSION = 2
_UNFINISHED = "unfinished"
_FILES = ("train.parquet", "eval.parquet", "overrides.yaml", "manifest.json")
# Games of oracle play for a board's ceiling; of a game of chance several.
_PLAYS = {"minesweeper": 8}


def row_of(name: str, source: str, spec: Spec, index: int, split: str, bare: bool = False) -> dict[str, Any]:
    """A board as a row in verl's format.

    Args:
        name: of the game.
        source: ``data_source``, under which results are reported.
        spec: the board.
        index, split: place of the row.
        bare: the prompt is the first observation alone, for a model that knows the game.

    Raises:
        GameError: there is no such game, or it cannot be played.
    """
    game = find(name)
    env = Env(game)
    env.reset(spec)
    rules = env.rules
    content = json.dumps(spec, sort_keys=True)
    rng = random.Random(content)
    played = [oracle_play(game, spec, rng) for _ in range(_PLAYS.get(name, 1))]
    return {
        "data_source": source,
        "agent_name": AGENT,
        "prompt": [{"role": "user", "content": rules.show() if bare else prompt_of(rules)}],
        "ability": "game",
        "reward_model": {"style": "rule", "ground_truth": None},
        "extra_info": {
            "index": index,
            "split": split,
            "id": hashlib.sha256(f"{name} {content}".encode()).hexdigest()[:16],
            "question": rules.show(),
            "game": name,
            "spec": content,
            "ceiling_success": fmean(float(success) for success, _ in played),
            "ceiling_completion": fmean(completion for _, completion in played),
        },
    }


def write(out: Path, rows: dict[str, list[dict[str, Any]]], settings: dict[str, Any]) -> None:
    """Write a data folder from rows by part (``train``, ``eval``).

    Args:
        out: the folder; what else lies there stays.
        rows: by part.
        settings: what was asked for, of JSON's types; a folder with other settings is not written over.

    Raises:
        GameError: there are other data.
        OSError: the folder cannot be written.
    """
    _check_folder(out, settings)
    out.mkdir(parents=True, exist_ok=True)
    # First, so that the same command goes on after an interruption.
    _write_manifest(out, {**settings, _UNFINISHED: True})
    for split, part in rows.items():
        pd.DataFrame(part).to_parquet(out / f"{split}.parquet", index=False)
    lines = (f"{key}: {'null' if value is None else value}\n" for key, value in OVERRIDES.items())
    (out / "overrides.yaml").write_text("".join(lines), encoding="utf-8")
    _write_manifest(out, settings)


def _write_manifest(out: Path, content: dict[str, Any]) -> None:
    (out / "manifest.json").write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _check_folder(out: Path, settings: dict[str, Any]) -> bool:
    """Refuse to write over other data; whether these are there already, whole.

    Raises:
        GameError: there is a file, or a folder with other data.
    """
    manifest = out / "manifest.json"
    names = {path.name for path in out.iterdir()} if out.is_dir() else {""} if out.exists() else set()
    if not names & {"", *_FILES}:
        return False
    with contextlib.suppress(OSError, ValueError):
        known = json.loads(manifest.read_text(encoding="utf-8"))
        if known == settings:
            return names >= set(_FILES)
        if known == {**settings, _UNFINISHED: True}:
            return False
    raise GameError(f"--out {out} exists and holds other data than these boards; choose another folder, or remove it")


def boards(args: argparse.Namespace) -> dict[str, tuple[list[Spec], list[Spec]]]:
    """Data source -> training and held-out boards.

    Raises:
        GameError: see :mod:`verl.utils.siop.envs.boards`.
    """
    if args.game == "tictactoe":
        return {"tictactoe": tictactoe_boards(args.seed, args.train, args.eval)}
    if args.game == "minesweeper":
        source = f"minesweeper_{args.size}x{args.size}_{args.mines}"
        centre = args.start == "centre"
        found = minesweeper_boards(args.size, args.mines, args.flags, centre, args.seed, args.train, args.eval)
        return {source: found}
    return {
        f"sudoku_{args.size}x{args.size}_{blanks}": sudoku_boards(args.size, blanks, args.seed, args.train, args.eval)
        for blanks in args.blanks
    }


def _numbers(text: str) -> list[int]:
    try:
        found = [int(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; needs numbers, as 8 or 2,4,6") from None
    if len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{text!r} names a number twice")
    return sorted(found)


# Option -> games that read it.
_OWN = {"blanks": ("sudoku",), "size": ("sudoku", "minesweeper"), "mines": ("minesweeper",)}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m verl.utils.siop.envs.build",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    built_in = ("sudoku", "tictactoe", "minesweeper")
    parser.add_argument("--game", required=True, help=f"one of {', '.join(built_in)}")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--train", type=int, default=1024, help="training boards, of each number of blanks (1024)")
    parser.add_argument("--eval", type=int, default=256, help="held-out boards, of each number of blanks (256)")
    parser.add_argument("--seed", type=int, default=0, help="of the boards (0)")
    parser.add_argument("--size", type=int, help="sudoku: 4, 6 or 9; minesweeper: 2 to 9")
    parser.add_argument("--blanks", type=_numbers, help="sudoku: blank cells, as 8 or 2,4,6; up to 12, 28, 64 by size")
    parser.add_argument("--mines", type=int, help="minesweeper: number of mines")
    parser.add_argument("--flags", action="store_true", help="minesweeper: cells can be flagged")
    parser.add_argument(
        "--start",
        choices=("any", "centre"),
        default="any",
        help="minesweeper: the free reveal: any cell without a mine, or the centre with no mine around it (any)",
    )
    parser.add_argument("--bare", action="store_true", help="prompts are boards alone, for a model that knows the game")
    args = parser.parse_args(argv)
    if args.game not in built_in:
        parser.error(f"--game {args.game} is not allowed; choose one of {', '.join(n for n in GAMES if n in built_in)}")
    for name, games in _OWN.items():
        given = getattr(args, name) is not None
        if given != (args.game in games):
            need = "needs" if not given else "does not read"
            parser.error(f"--game {args.game} {need} --{name}")
    if args.game != "minesweeper" and (args.flags or args.start != "any"):
        parser.error(f"--game {args.game} does not read --flags and --start")
    for name in ("train", "eval"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    given = {key: value for key, value in vars(args).items() if key != "out" and value is not None}
    settings = {"version": VERSION, **given}
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "eval": []}
    try:
        if _check_folder(args.out, settings):
            sys.stdout.write(f"{args.out} is up to date\n")
            return 0
        for source, parts in boards(args).items():
            for split, specs in zip(rows, parts, strict=True):
                for spec in tqdm(specs, desc=f"{source} {split}", unit=" boards", leave=False, disable=None, delay=1):
                    rows[split].append(row_of(args.game, source, spec, len(rows[split]), split, args.bare))
        write(args.out, rows, settings)
    except (GameError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    ceiling = fmean(row["extra_info"]["ceiling_success"] for row in rows["eval"])
    sys.stdout.write(
        f"wrote {len(rows['train'])} training and {len(rows['eval'])} held-out boards to {args.out}; "
        f"oracle play solves {ceiling:.3f} of the held-out ones\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
