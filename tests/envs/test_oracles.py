"""Each oracle equals brute force."""

from __future__ import annotations

import itertools
import random
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from verl.utils.siop.envs import minesweeper_oracle, sudoku, sudoku_oracle, tictactoe_oracle
from verl.utils.siop.envs.boards import minesweeper_boards
from verl.utils.siop.envs.games import find, oracle_play
from verl.utils.siop.envs.minesweeper import Minesweeper, around
from verl.utils.siop.envs.sudoku import BLANK, Sudoku, all_grids, dig, only_solution, random_grid, solutions
from verl.utils.siop.envs.tictactoe import TicTacToe, states
from verl.utils.siop.errors import GameError


def _minimax(board: str, mover: str, player: str, known: dict[str, int]) -> int:
    """The result for ``player``, without a line of the code under test."""
    if board not in known:
        lines = ["012", "345", "678", "036", "147", "258", "048", "246"]
        won = {board[int(line[0])] for line in lines if len({board[int(c)] for c in line}) == 1} - {"."}
        if won:
            known[board] = 1 if won == {player} else -1
        elif "." not in board:
            known[board] = 0
        else:
            other = "O" if mover == "X" else "X"
            results = [
                _minimax(board[:i] + mover + board[i + 1 :], other, player, known) for i in range(9) if board[i] == "."
            ]
            known[board] = max(results) if mover == player else min(results)
    return known[board]


def test_tictactoe_is_minimax_with_ties_in_all_states() -> None:
    found = states()
    assert len(found) == 4520
    known: dict[str, dict[str, int]] = {"X": {}, "O": {}}
    for board in found:
        mover = "XO"[board.count("X") > board.count("O")]
        other = "O" if mover == "X" else "X"
        value = _minimax(board, mover, mover, known[mover])
        keeping = {
            (i + 1,)
            for i in range(9)
            if board[i] == "." and _minimax(board[:i] + mover + board[i + 1 :], other, mover, known[mover]) == value
        }
        assert tictactoe_oracle.best(TicTacToe({"board": board, "seed": 0})) == keeping
    assert len(tictactoe_oracle.best(TicTacToe({"board": "." * 9, "seed": 0}))) == 9


def test_a_tree_search_errs_with_few_simulations_and_knows_no_ties() -> None:
    rng = random.Random(0)
    boards = [board for board in states() if 4 <= board.count(".") <= 7]
    sample = random.Random(1).sample(boards, 60)

    def wrong(simulations: int) -> int:
        count = 0
        for board in sample:
            game = TicTacToe({"board": board, "seed": 0})
            found = tictactoe_oracle.searched(game, simulations, rng)
            assert len(found) == 1
            count += not found <= tictactoe_oracle.best(game)
        return count

    assert wrong(5) > wrong(400)
    assert wrong(400) <= 3


def test_there_are_288_grids_of_size_4() -> None:
    grids = all_grids(4)
    assert len(set(grids)) == len(grids) == 288
    with pytest.raises(GameError, match="size=6"):
        all_grids(6)


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 9))
def test_sudoku_is_the_only_solution_among_all_grids(seed: int, blanks: int) -> None:
    rng = random.Random(seed)
    board = dig(rng.choice(all_grids(4)), blanks, rng)
    assert board is not None and board.count(BLANK) == blanks
    fitting = [g for g in all_grids(4) if all(a in (BLANK, b) for a, b in zip(board, g, strict=True))]
    (grid,) = fitting
    right = {(i // 4 + 1, i % 4 + 1, int(grid[i])) for i in range(16) if board[i] == BLANK}
    assert sudoku_oracle.best(Sudoku({"size": 4, "board": board})) == right


@pytest.mark.parametrize(("size", "blanks"), [(6, 18), (9, 40)])
def test_larger_sudokus_have_one_solution_too(size: int, blanks: int) -> None:
    rng = random.Random(size)
    grid = random_grid(size, rng)
    board = dig(grid, blanks, rng)
    assert board is not None
    assert list(itertools.islice(solutions(board, size), 2)) == [grid]


def test_a_board_that_is_hard_to_solve_is_solved_or_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # Made to take the longest when cells are tried one after another.
    hard = "..............3.85..1.2.......5.7.....4...1...9.......5......73..2.1........4...9"
    game = Sudoku({"size": 9, "board": hard})
    assert all(a in (BLANK, b) for a, b in zip(hard, game.solution, strict=True))
    only_solution.cache_clear()
    monkeypatch.setattr(sudoku, "MAX_STEPS", 10)
    with pytest.raises(GameError, match="more than 10 steps"):
        Sudoku({"size": 9, "board": hard})


def test_large_minefields_stay_within_the_budget() -> None:
    rng = random.Random(0)
    for mines in (10, 20, 30):
        (spec,), _ = minesweeper_boards(9, mines, False, False, mines, 1, 1)
        game = Minesweeper(spec)
        while not game.finished:
            chances = minesweeper_oracle.posterior(game)
            # The mines that are there are as many as are expected.
            assert sum(chances.values()) == mines
            cell = rng.choice([cell for cell in chances if cell not in game.mines])
            game.play(("reveal", cell // 9 + 1, cell % 9 + 1))


def _by_all_layouts(game: Minesweeper) -> dict[int, Fraction]:
    cells = range(game.size**2)
    closed = [cell for cell in cells if cell not in game.opened]
    shown = {cell: game.number(cell) for cell in game.opened}
    layouts = [
        set(mines)
        for mines in itertools.combinations(closed, len(game.mines))
        if all(sum(o in mines for o in around(game.size)[cell]) == number for cell, number in shown.items())
    ]
    return {cell: Fraction(sum(cell in layout for layout in layouts), len(layouts)) for cell in closed}


@settings(max_examples=60)
@given(st.integers(0, 10**6), st.integers(3, 4), st.integers(1, 4))
def test_minesweeper_is_the_share_of_all_layouts(seed: int, size: int, mines: int) -> None:
    rng = random.Random(seed)
    cells = list(range(size * size))
    rng.shuffle(cells)
    try:
        game = Minesweeper({"size": size, "mines": cells[:mines], "start": cells[mines], "flags": True})
    except GameError:
        return  # solved by the free reveal
    while not game.finished:
        expected = _by_all_layouts(game)
        assert minesweeper_oracle.posterior(game) == expected
        least = min(expected.values())
        right = {("reveal", c // size + 1, c % size + 1) for c, p in expected.items() if p == least}
        right |= {("flag", c // size + 1, c % size + 1) for c, p in expected.items() if p == 1 and c not in game.flags}
        assert minesweeper_oracle.best(game) == right
        game.play(rng.choice(sorted(right)))


def test_the_posterior_raises_rather_than_degrades(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minesweeper_oracle, "MAX_STEPS", 5)
    game = Minesweeper({"size": 5, "mines": [0, 7, 21], "start": 12, "flags": False})
    with pytest.raises(GameError, match="more than 5 steps"):
        minesweeper_oracle.posterior(game)


def test_oracle_play_is_the_ceiling() -> None:
    rng = random.Random(0)
    board = dig(random_grid(4, rng), 8, rng)
    assert oracle_play(find("sudoku"), {"size": 4, "board": board}, rng) == (True, 1.0)
    for board in random.Random(2).sample([b for b in states() if b.count(".") > 5], 30):
        success, completion = oracle_play(find("tictactoe"), {"board": board, "seed": 1}, rng)
        # Lost openings stay lost: the opponent plays as well.
        assert success == completion == 1 or not success
