"""quickstart.sh --game: what it refuses before it does anything."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--game chess", "--game chess: choose one of sudoku, tictactoe, minesweeper"),
        (
            "--game sudoku --method siop",
            "--method siop with --game sudoku: choose one of vpr, vpr_loo, vpr_return, grpo",
        ),
        ("--method vpr", "--method vpr needs turns that are verified: name a game"),
        ("--game", "--game needs a name"),
    ],
)
def test_a_game_and_its_methods_are_named(words: str, message: str) -> None:
    done = subprocess.run(
        ["bash", "quickstart.sh", *words.split()], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0
    assert message in done.stderr


def test_the_help_names_the_games() -> None:
    done = subprocess.run(["bash", "quickstart.sh", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "--game sudoku|tictactoe|minesweeper" in done.stdout and "GAME_DIR" in done.stdout
