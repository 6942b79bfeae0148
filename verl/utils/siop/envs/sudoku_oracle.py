"""Sudoku: which actions are right. With one solution: the digit of the solution in any blank cell."""

from __future__ import annotations

from verl.utils.siop.envs.base import Action
from verl.utils.siop.envs.sudoku import BLANK, Sudoku


def best(game: Sudoku) -> frozenset[Action]:
    """(row, column, digit) for every blank cell."""
    size, solution = game.size, game.solution
    return frozenset(
        (cell // size + 1, cell % size + 1, int(solution[cell]))
        for cell, value in enumerate(game.board)
        if value == BLANK
    )
