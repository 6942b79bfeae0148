"""Sudoku: the rules. n×n with n of 4, 6, 9, exactly one solution, and as many turns as blank cells.

A wrong digit is refused and costs its turn, so success needs every turn right. To refuse it the rules know the
solution: the one place where they know more than a player could. All methods play by the same rule, and after the
first refusal the success is lost anyway.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from verl.utils.siop.envs.base import Action, InvalidAction, Rules, field, rows_of, whole
from verl.utils.siop.errors import GameError

# Height and width of a box.
BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}
BLANK = "."


class Sudoku(Rules):
    """Spec: ``size``, ``board`` (size² characters, a digit or ``.``). Action: ``ROW COLUMN DIGIT``, from 1."""

    name = "sudoku"

    def __init__(self, spec: Mapping[str, Any]) -> None:
        self.size = field(spec, "size", int, self.name)
        self.board = list(field(spec, "board", str, self.name))
        self.solution = only_solution("".join(self.board), self.size)
        self.blanks = self.turns = self.board.count(BLANK)
        if not self.blanks:
            raise GameError(f"sudoku: board={''.join(self.board)!r} has no blank cell, so there is nothing to play")
        self.form = "ROW COLUMN DIGIT"

    def instructions(self) -> str:
        height, width = BOXES[self.size]
        return (
            f"Solve this Sudoku: every row, every column and every box of {height} rows and {width} columns holds each "
            f"digit from 1 to {self.size} once. Fill one blank cell ({BLANK}) a turn. Rows and columns are counted "
            "from 1, from the top left. You have one turn for each blank cell; a wrong digit is refused and costs its "
            "turn."
        )

    def show(self) -> str:
        return rows_of(self.board, self.size)

    def parse(self, words: list[str]) -> Action:
        if len(words) != 3:
            raise InvalidAction("three numbers")
        row, column, digit = (whole(word, 1, self.size) for word in words)
        if self.board[(row - 1) * self.size + column - 1] != BLANK:
            raise InvalidAction("filled")
        return row, column, digit

    def play(self, action: Action) -> str:
        row, column, digit = action
        cell = (row - 1) * self.size + column - 1
        if self.solution[cell] != str(digit):
            return "wrong"
        self.board[cell] = str(digit)
        return "right"

    @property
    def finished(self) -> bool:
        return BLANK not in self.board

    @property
    def success(self) -> bool:
        return self.finished

    @property
    def completion(self) -> float:
        return 1 - self.board.count(BLANK) / self.blanks


@lru_cache(maxsize=3)
def peers_of(size: int) -> tuple[tuple[int, ...], ...]:
    """For each cell the others of its row, column and box."""
    height, width = BOXES[size]
    place = [
        (cell // size, cell % size, cell // size // height * size + cell % size // width) for cell in range(size * size)
    ]
    return tuple(
        tuple(
            other for other in range(size * size) if other != cell and any(map(int.__eq__, place[cell], place[other]))
        )
        for cell in range(size * size)
    )


def candidates(board: list[str] | str, cell: int, size: int) -> list[str]:
    """The digits that no peer of the cell has."""
    taken = {board[peer] for peer in peers_of(size)[cell]}
    return [str(digit) for digit in range(1, size + 1) if str(digit) not in taken]


def solutions(board: str, size: int, rng: random.Random | None = None) -> Iterator[str]:
    """All solutions; the digits of a cell are tried in order, or in the order that ``rng`` draws."""
    cells = list(board)
    blanks = [cell for cell, value in enumerate(cells) if value == BLANK]
    if not blanks:
        yield board
        return
    cell, allowed = min(((cell, candidates(cells, cell, size)) for cell in blanks), key=lambda pair: len(pair[1]))
    if rng is not None:
        rng.shuffle(allowed)
    for digit in allowed:
        cells[cell] = digit
        yield from solutions("".join(cells), size, rng)


@lru_cache(maxsize=4096)
def only_solution(board: str, size: int) -> str:
    """The solution of a board.

    Raises:
        GameError: it is no board of this size, contradicts itself, or has none or several solutions.
    """
    if size not in BOXES:
        raise GameError(f"sudoku: size={size} is not allowed; choose one of {', '.join(map(str, BOXES))}")
    allowed = BLANK + "".join(map(str, range(1, size + 1)))
    if len(board) != size * size or set(board) - set(allowed):
        raise GameError(f"sudoku: board={board!r} is not allowed; needs {size * size} characters of {allowed}")
    for cell, value in enumerate(board):
        if value != BLANK and any(board[peer] == value for peer in peers_of(size)[cell]):
            raise GameError(
                f"sudoku: board={board!r} is impossible: row {cell // size + 1}, column {cell % size + 1} holds "
                f"{value}, which its row, column or box has twice"
            )
    found = solutions(board, size)
    first = next(found, None)
    if first is None:
        raise GameError(f"sudoku: board={board!r} has no solution")
    if next(found, None) is not None:
        raise GameError(f"sudoku: board={board!r} has several solutions; a turn can be judged only where there is one")
    return first


def all_grids(size: int) -> list[str]:
    """Every full grid; of 4×4 there are 288.

    Raises:
        GameError: there are too many to list.
    """
    if size != 4:
        raise GameError(f"sudoku: size={size} is not allowed; only the grids of size 4 can be listed")
    return list(solutions(BLANK * 16, 4))


def random_grid(size: int, rng: random.Random) -> str:
    return next(solutions(BLANK * (size * size), size, rng))


def dig(grid: str, blanks: int, rng: random.Random, tries: int = 200) -> str | None:
    """The grid without ``blanks`` cells, its solution still the only one; None if no try found such a board."""
    size = int(len(grid) ** 0.5)
    for _ in range(tries):
        board, order, left = list(grid), rng.sample(range(len(grid)), len(grid)), blanks
        for cell in order:
            if not left:
                return "".join(board)
            board[cell] = BLANK
            found = solutions("".join(board), size)
            next(found)
            if next(found, None) is None:
                left -= 1
            else:
                board[cell] = grid[cell]
        if not left:
            return "".join(board)
    return None
