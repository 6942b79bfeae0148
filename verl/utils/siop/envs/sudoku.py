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

from verl.utils.siop.envs.base import Action, InvalidAction, Rules, field, only, rows_of, whole
from verl.utils.siop.errors import GameError

# Height and width of a box.
BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}
# With fewer than 4, 8 and 17 digits no board has only one solution.
MAX_BLANKS = {4: 12, 6: 28, 9: 64}
BLANK = "."
# Digits tried until a solution is found; boards for people take some hundred.
MAX_STEPS = 20_000


class Sudoku(Rules):
    """Spec: ``size``, ``board`` (size² characters, a digit or ``.``). Action: ``ROW COLUMN DIGIT``, from 1."""

    name = "sudoku"

    def __init__(self, spec: Mapping[str, Any]) -> None:
        only(spec, ("size", "board"), self.name)
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
def units_of(size: int) -> tuple[tuple[int, int, int], ...]:
    """For each cell its row, column and box, as numbers below 3 · size."""
    height, width = BOXES[size]
    places = ((cell // size, cell % size) for cell in range(size * size))
    return tuple(
        (row, size + column, 2 * size + row // height * (size // width) + column // width) for row, column in places
    )


@lru_cache(maxsize=3)
def peers_of(size: int) -> tuple[tuple[int, ...], ...]:
    """For each cell the others of its row, column and box."""
    units = units_of(size)
    return tuple(
        tuple(
            other for other in range(size * size) if other != cell and any(map(int.__eq__, units[cell], units[other]))
        )
        for cell in range(size * size)
    )


class _Grid:
    """A board while it is solved: the digits that each row, column and box has, as bits."""

    def __init__(self, board: str, size: int) -> None:
        self.cells, self.size, self.every = list(board), size, (1 << size) - 1
        self.used = [0] * (3 * size)
        for cell, value in enumerate(board):
            if value != BLANK:
                self.turn(cell, 1 << int(value) - 1)

    def turn(self, cell: int, bit: int) -> None:
        """Put a digit where it is not, or take it away where it is."""
        for unit in units_of(self.size)[cell]:
            self.used[unit] ^= bit

    def fewest(self) -> list[tuple[int, int]]:
        """The (cell, bit) of which one must be right, as few as are easy to find: the digits of one cell, or the one
        place of a digit in its row, column or box."""
        allowed: dict[int, int] = {}
        for cell, value in enumerate(self.cells):
            if value == BLANK:
                row, column, box = units_of(self.size)[cell]
                allowed[cell] = self.every & ~(self.used[row] | self.used[column] | self.used[box])
        cell = min(allowed, key=lambda cell: allowed[cell].bit_count())
        if allowed[cell].bit_count() > 1:
            once, twice = [0] * len(self.used), [0] * len(self.used)
            for other, bits in allowed.items():
                for unit in units_of(self.size)[other]:
                    twice[unit] |= once[unit] & bits
                    once[unit] |= bits
            for other, bits in allowed.items():
                for unit in units_of(self.size)[other]:
                    if only := bits & ~twice[unit]:
                        return [(other, only & -only)]
            if any(used | seen != self.every for used, seen in zip(self.used, once, strict=True)):
                return []
        return [(cell, 1 << digit) for digit in range(self.size) if allowed[cell] >> digit & 1]


def solutions(board: str, size: int, rng: random.Random | None = None) -> Iterator[str]:
    """All solutions; the digits of a cell are tried in order, or in the order that ``rng`` draws.

    Raises:
        GameError: looking for the next one takes more than :data:`MAX_STEPS` steps.
    """
    grid, steps = _Grid(board, size), 0

    def search() -> Iterator[str]:
        nonlocal steps
        steps += 1
        if steps > MAX_STEPS:
            raise GameError(f"sudoku: board={board!r} takes more than {MAX_STEPS} steps to solve; take another one")
        if BLANK not in grid.cells:
            steps = 0
            yield "".join(grid.cells)
            return
        options = grid.fewest()
        if rng is not None:
            rng.shuffle(options)
        for cell, bit in options:
            grid.cells[cell] = str(bit.bit_length())
            grid.turn(cell, bit)
            yield from search()
            grid.turn(cell, bit)
            grid.cells[cell] = BLANK

    return search()


@lru_cache(maxsize=4096)
def only_solution(board: str, size: int) -> str:
    """The solution of a board.

    Raises:
        GameError: it is no board of this size, contradicts itself, has none or several solutions, or is too hard.
    """
    if size not in BOXES:
        raise GameError(f"sudoku: size={size} is not allowed; choose one of {', '.join(map(str, BOXES))}")
    allowed = BLANK + "".join(map(str, range(1, size + 1)))
    if len(board) != size * size or set(board) - set(allowed):
        raise GameError(f"sudoku: board={board!r:.100} is not allowed; needs {size * size} characters of {allowed}")
    for cell, value in enumerate(board):
        if value != BLANK and any(board[peer] == value for peer in peers_of(size)[cell]):
            raise GameError(
                f"sudoku: board={board!r} is impossible: row {cell // size + 1}, column {cell % size + 1} holds "
                f"{value}, which its row, column or box has twice"
            )
    if board.count(BLANK) > MAX_BLANKS[size]:
        raise GameError(
            f"sudoku: board={board!r} has {board.count(BLANK)} blank cells, and so several solutions; a turn can be "
            f"judged only where there is one; of size {size} there are at most {MAX_BLANKS[size]} blank cells"
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
    return sorted(solutions(BLANK * 16, 4))


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
            if _has_one_solution("".join(board), size):
                left -= 1
            else:
                board[cell] = grid[cell]
        if not left:
            return "".join(board)
    return None


def _has_one_solution(board: str, size: int) -> bool:
    """Of a board that has one at least; one that is too hard to tell is taken for one with several."""
    found = solutions(board, size)
    try:
        next(found)
        return next(found, None) is None
    except GameError:
        return False
