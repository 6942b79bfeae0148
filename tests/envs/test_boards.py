"""Data of games: disjoint by content, one board a row, what is impossible refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from omegaconf import OmegaConf
from verl.utils.siop.envs import build
from verl.utils.siop.envs.boards import canonical, minesweeper_boards, sudoku_boards, tictactoe_boards
from verl.utils.siop.envs.games import make
from verl.utils.siop.envs.sudoku import only_solution
from verl.utils.siop.errors import GameError


def test_held_out_sudokus_have_other_solutions() -> None:
    for size, blanks in ((4, 8), (6, 12)):
        train, held_out = sudoku_boards(size, blanks, 0, 40, 12)
        solved = [{only_solution(spec["board"], size) for spec in part} for part in (train, held_out)]
        assert not solved[0] & solved[1]
        assert all(spec["board"].count(".") == blanks for spec in train + held_out)
        assert sudoku_boards(size, blanks, 0, 40, 12) == (train, held_out)
        assert sudoku_boards(size, blanks, 1, 40, 12) != (train, held_out)


def test_held_out_openings_are_no_turned_or_mirrored_training_openings() -> None:
    train, held_out = tictactoe_boards(0, 500, 100)
    classes = [{canonical(spec["board"]) for spec in part} for part in (train, held_out)]
    assert not classes[0] & classes[1] and len(classes[1]) > 3
    assert len({json.dumps(spec) for spec in train}) == 500
    assert canonical("X........") == canonical("........X") != canonical(".X.......")


def test_held_out_layouts_are_no_turned_or_mirrored_training_layouts() -> None:
    train, held_out = minesweeper_boards(4, 3, False, False, 0, 1024, 256)
    kinds = [
        {canonical("".join(".*"[cell in spec["mines"]] for cell in range(16))) for spec in part}
        for part in (train, held_out)
    ]
    assert not kinds[0] & kinds[1] and len(kinds[1]) > 10
    games = {(tuple(spec["mines"]), make("minesweeper").reset(spec)) for spec in train + held_out}
    assert len(games) == 1280
    centre, _ = minesweeper_boards(5, 5, True, True, 0, 50, 10)
    for spec in centre:
        assert spec["start"] == 12
        assert make("minesweeper").reset(spec).split("\n")[2].split()[2] == "0"


def test_data_are_not_written_over_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--game", "tictactoe", "--train", "4", "--eval", "4", "--out"]
    (tmp_path / "notes.txt").touch()
    assert build.main([*words, str(tmp_path)]) == 0
    before = (tmp_path / "train.parquet").read_bytes()
    capsys.readouterr()
    assert build.main([*words, str(tmp_path)]) == 0 and "is up to date" in capsys.readouterr().out
    # Interrupted: the same command writes them again.
    manifest = tmp_path / "manifest.json"
    settings = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**settings, "unfinished": True}))
    (tmp_path / "train.parquet").unlink()
    assert build.main([*words, str(tmp_path)]) == 0 and json.loads(manifest.read_text()) == settings
    with pytest.raises(GameError, match="holds other data"):
        build.write(tmp_path, {"train": []}, {"game": "other"})
    assert build.main([*words, str(tmp_path), "--seed", "1"]) == 2
    assert "holds other data than these boards" in capsys.readouterr().err
    assert (tmp_path / "train.parquet").read_bytes() == before
    for out in (tmp_path / "notes.txt", tmp_path / "notes.txt" / "data"):
        assert build.main([*words, str(out)]) == 2
        assert f"{tmp_path / 'notes.txt'}" in capsys.readouterr().err


def test_rows_are_played_as_they_are_written(tmp_path: Path) -> None:
    words = ["--game", "sudoku", "--size", "4", "--blanks", "2,6", "--train", "6", "--eval", "3"]
    assert build.main([*words, "--out", str(tmp_path)]) == 0
    rows = pd.read_parquet(tmp_path / "train.parquet").to_dict("records")
    assert [row["data_source"] for row in rows] == ["sudoku_4x4_2"] * 6 + ["sudoku_4x4_6"] * 6
    for index, row in enumerate(rows):
        extra = row["extra_info"]
        env = make(extra["game"])
        assert row["prompt"][0]["content"].endswith(env.reset(json.loads(extra["spec"])))
        assert (extra["index"], extra["ceiling_success"], row["agent_name"]) == (index, 1.0, "verified_game")
    assert len({row["extra_info"]["id"] for row in rows}) == 12
    told: Any = OmegaConf.load(tmp_path / "overrides.yaml")
    assert told["actor_rollout_ref.rollout.agent.default_agent_loop"] == "verified_game"
    assert told["actor_rollout_ref.rollout.multi_turn.tool_config_path"] is None
    assert json.loads((tmp_path / "manifest.json").read_text())["blanks"] == [2, 6]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--game chess", "--game chess is not allowed; choose one of sudoku, tictactoe, minesweeper"),
        ("--game sudoku --size 4", "--game sudoku needs --blanks"),
        ("--game tictactoe --size 4", "--game tictactoe does not read --size"),
        ("--game tictactoe --flags", "does not read --flags and --start"),
        ("--game tictactoe --eval 0", "--eval must be at least 1"),
        ("--game sudoku --size 5 --blanks 3", "size=5 is not allowed"),
        ("--game sudoku --size 4 --blanks 13", "blanks=13 is not allowed with size=4; choose from 1 to 12"),
        ("--game sudoku --size 9 --blanks 65", "blanks=65 is not allowed with size=9; choose from 1 to 64"),
        ("--game sudoku --size 4 --blanks 8,8", "'8,8' names a number twice"),
        ("--game sudoku --size 4 --blanks many", "'many' is not allowed; needs numbers, as 8 or 2,4,6"),
        ("--game sudoku --size 4 --blanks 1 --eval 5000", "boards of sudoku of size 4 with 1 blanks to hold out"),
        ("--game minesweeper --size 4 --mines 15", "mines=15 is not allowed; choose from 1 to 14"),
        ("--game minesweeper --size 4 --mines 3 --start centre", "choose 5, 7 or 9"),
        ("--game minesweeper --size 3 --mines 1 --start centre", "size=3 is not allowed with a start in the centre"),
        ("--game minesweeper --size 2 --mines 1", "different boards of minesweeper"),
    ],
)
def test_what_is_impossible_is_refused(
    words: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        status: Any = build.main([*words.split(), "--out", str(tmp_path / "data")])
    except SystemExit as end:
        status = end.code
    assert status == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "data").exists()
