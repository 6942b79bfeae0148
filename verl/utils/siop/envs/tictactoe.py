"""Tic-Tac-Toe: the rules, and an opponent that never loses, so that a draw is the best there is.

The opponent draws among its best moves, by the seed of the game and the position alone: all rollouts of a question
meet the same opponent.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from functools import cache
from typing import Any

from verl.utils.siop.envs.base import Action, InvalidAction, Rules, field, only, rows_of, whole
from verl.utils.siop.errors import GameError

EMPTY = "."
LINES = ((0, 1, 2), (3, 4, 5), (6, 7, 8), (0, 3, 6), (1, 4, 7), (2, 5, 8), (0, 4, 8), (2, 4, 6))
START = EMPTY * 9


class TicTacToe(Rules):
    """Spec: ``board`` (9 characters of X, O and ``.``), ``seed`` of the opponent. The player has whose turn it is.

    Action: ``CELL`` from 1 to 9. Success: not lost, in a game that has ended.
    """

    name = "tictactoe"

    def __init__(self, spec: Mapping[str, Any]) -> None:
        only(spec, ("board", "seed"), self.name)
        self.board = field(spec, "board", str, self.name)
        self.seed = field(spec, "seed", int, self.name)
        self.mark = mover(self.board)
        if is_over(self.board):
            raise GameError(f"tictactoe: board={self.board!r} is impossible: the game has ended, so nobody moves")
        self.form = "CELL"
        self.turns = (self.board.count(EMPTY) + 1) // 2
        self._moves = 0

    def instructions(self) -> str:
        return (
            f"Play Tic-Tac-Toe as {self.mark}; three in a row, a column or a diagonal win. Cells are numbered from 1 "
            f"to 9, row by row from the top left; {EMPTY} is an empty cell. Take one empty cell a turn. An "
            "invalid action costs its turn, and a game that is not played to its end is lost."
        )

    def show(self) -> str:
        return rows_of(self.board, 3)

    def parse(self, words: list[str]) -> Action:
        if len(words) != 1:
            raise InvalidAction("one number")
        cell = whole(words[0], 1, 9)
        if self.board[cell - 1] != EMPTY:
            raise InvalidAction("taken")
        return (cell,)

    def play(self, action: Action) -> str:
        self.board = after(self.board, action[0] - 1)
        self._moves += 1
        if is_over(self.board):
            return "end"
        reply = random.Random(f"{self.seed} {self.board}").choice(sorted(best_cells(self.board)))
        self.board = after(self.board, reply)
        return f"reply {reply + 1}"

    @property
    def finished(self) -> bool:
        return is_over(self.board)

    @property
    def success(self) -> bool:
        return self.finished and winner(self.board) in (None, self.mark)

    @property
    def completion(self) -> float:
        """1 for a success, else the share of its turns that the player used well-formed before the end."""
        return 1.0 if self.success else min(self._moves, self.turns - 1) / self.turns


def mover(board: str) -> str:
    """Whose turn it is; X begins.

    Raises:
        GameError: no game leads to such a board.
    """
    if len(board) != 9 or set(board) - set("XO."):
        raise GameError(f"tictactoe: board={board!r:.100} is not allowed; needs 9 characters of X, O and {EMPTY}")
    ahead = board.count("X") - board.count("O")
    lines = {board[a] for a, b, c in LINES if board[a] == board[b] == board[c] != EMPTY}
    # Who has won has moved last.
    if ahead not in (0, 1) or len(lines) > 1 or lines == {"XO"[ahead == 1]}:
        raise GameError(f"tictactoe: board={board!r} is impossible: X and O move in turn until one has won")
    return "XO"[ahead]


def winner(board: str) -> str | None:
    return next((board[a] for a, b, c in LINES if board[a] == board[b] == board[c] != EMPTY), None)


def is_over(board: str) -> bool:
    return EMPTY not in board or winner(board) is not None


def after(board: str, cell: int) -> str:
    """The board when the mover has taken the cell, counted from 0."""
    return board[:cell] + "XO"[board.count("X") > board.count("O")] + board[cell + 1 :]


def free(board: str) -> list[int]:
    return [cell for cell, value in enumerate(board) if value == EMPTY]


@cache
def value(board: str) -> int:
    """What perfect play of both gives the mover: 1, 0 or −1."""
    if winner(board) is not None:
        return -1
    return max((-value(after(board, cell)) for cell in free(board)), default=0)


def best_cells(board: str) -> frozenset[int]:
    """All cells, counted from 0, with which the mover keeps the value of the board."""
    return frozenset(cell for cell in free(board) if -value(after(board, cell)) == value(board))


def states() -> list[str]:
    """The 4,520 boards of which a game can go on, in an order that does not change."""
    seen, new = {START}, [START]
    while new:
        following = {after(board, cell) for board in new for cell in free(board)}
        new = [board for board in following - seen if not is_over(board)]
        seen.update(new)
    return sorted(seen)
