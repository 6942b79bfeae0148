"""Minesweeper: the rules. One cell is opened for free; a cell without mines around it opens its neighbours."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from verl.utils.siop.envs.base import Action, InvalidAction, Rules, field, only, rows_of, whole
from verl.utils.siop.errors import GameError

HIDDEN, FLAG = ".", "F"
MAX_SIZE = 9


class Minesweeper(Rules):
    """Spec: ``size``, ``mines`` and ``start`` (cells counted from 0), ``flags`` (whether cells can be flagged).

    Action: ``reveal ROW COLUMN`` or ``flag ROW COLUMN``, from 1. Success: all safe cells are open. Completion: the
    share of the safe cells that the free reveal left closed and that are open.
    """

    name = "minesweeper"

    def __init__(self, spec: Mapping[str, Any]) -> None:
        only(spec, ("size", "mines", "start", "flags"), self.name)
        self.size = field(spec, "size", int, self.name)
        mines = field(spec, "mines", list, self.name)
        start = field(spec, "start", int, self.name)
        self.flags_allowed = field(spec, "flags", bool, self.name)
        if not 2 <= self.size <= MAX_SIZE:
            raise GameError(f"minesweeper: size={self.size} is not allowed; choose from 2 to {MAX_SIZE}")
        cells = range(self.size * self.size)
        if (
            not mines
            or any(type(mine) is not int or mine not in cells for mine in mines)
            or len(set(mines)) < len(mines)
        ):
            raise GameError(
                f"minesweeper: mines={mines!r:.100} is not allowed; needs distinct whole numbers of 0 to {cells[-1]}"
            )
        if start not in cells or start in mines:
            raise GameError(
                f"minesweeper: start={start} is not allowed; needs a cell of 0 to {cells[-1]} without a mine"
            )
        self.mines, self.opened, self.flags, self.exploded = frozenset(mines), set[int](), set[int](), False
        self._open(start)
        self.left = len(cells) - len(mines) - len(self.opened)
        if not self.left:
            raise GameError(f"minesweeper: mines={mines} start={start} is solved by the free reveal: nothing to play")
        self.form = "reveal ROW COLUMN" + (" or flag ROW COLUMN" if self.flags_allowed else "")
        self.turns = self.left + (len(mines) if self.flags_allowed else 0)

    def instructions(self) -> str:
        flag = f" A flag ({FLAG}) marks a cell that holds a mine for certain." if self.flags_allowed else ""
        return (
            f"Play Minesweeper with {len(self.mines)} mines on {self.size} rows and columns, counted from 1, from the "
            f"top left. A number says how many of the up to eight cells around hold a mine; {HIDDEN} is a closed cell. "
            f"Open all cells without a mine, one a turn; a mine ends the game.{flag} An invalid action costs its turn."
        )

    def show(self) -> str:
        return rows_of([self._shown(cell) for cell in range(self.size * self.size)], self.size)

    def _shown(self, cell: int) -> str:
        if cell in self.opened:
            return str(self.number(cell))
        return FLAG if cell in self.flags else HIDDEN

    def number(self, cell: int) -> int:
        """Mines around a cell."""
        return sum(other in self.mines for other in around(self.size)[cell])

    def parse(self, words: list[str]) -> Action:
        verbs = ("reveal", "flag") if self.flags_allowed else ("reveal",)
        if len(words) != 3 or words[0] not in verbs:
            raise InvalidAction(f"{' or '.join(verbs)} and two numbers")
        row, column = (whole(word, 1, self.size) for word in words[1:])
        cell = (row - 1) * self.size + column - 1
        if cell in self.opened:
            raise InvalidAction("open")
        if words[0] == "flag" and cell in self.flags:
            raise InvalidAction("flagged")
        return words[0], row, column

    def play(self, action: Action) -> str:
        verb, row, column = action
        cell = (row - 1) * self.size + column - 1
        if verb == "flag":
            self.flags.add(cell)
            return "flagged"
        if cell in self.mines:
            self.exploded = True
            return "mine"
        self._open(cell)
        return "safe"

    def _open(self, cell: int) -> None:
        waiting = [cell]
        while waiting:
            cell = waiting.pop()
            if cell not in self.opened:
                self.opened.add(cell)
                self.flags.discard(cell)
                if self.number(cell) == 0:
                    waiting += around(self.size)[cell]

    @property
    def closed_safe(self) -> int:
        return self.size * self.size - len(self.mines) - len(self.opened)

    @property
    def finished(self) -> bool:
        return self.exploded or not self.closed_safe

    @property
    def success(self) -> bool:
        return not self.exploded and not self.closed_safe

    @property
    def completion(self) -> float:
        return 1 - self.closed_safe / self.left


@lru_cache(maxsize=16)
def around(size: int) -> tuple[tuple[int, ...], ...]:
    """The up to eight neighbours of each cell."""
    return tuple(
        tuple(
            (row + i) * size + column + j
            for i in (-1, 0, 1)
            for j in (-1, 0, 1)
            if (i or j) and 0 <= row + i < size and 0 <= column + j < size
        )
        for row in range(size)
        for column in range(size)
    )
