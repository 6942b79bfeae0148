"""Tic-Tac-Toe: which actions are right, exactly with ties, and what a tree search of N simulations takes for it."""

from __future__ import annotations

import math
import random

from verl.utils.siop.envs.base import Action
from verl.utils.siop.envs.tictactoe import TicTacToe, after, best_cells, free, is_over, winner

EXPLORATION = 2.0


def best(game: TicTacToe) -> frozenset[Action]:
    """All cells that keep the value of the game tree."""
    return frozenset((cell + 1,) for cell in best_cells(game.board))


def searched(game: TicTacToe, simulations: int, rng: random.Random) -> frozenset[Action]:
    """The one cell with the largest mean in a tree search: argmax knows no ties, and with few simulations it errs."""
    return frozenset({(search(game.board, simulations, rng) + 1,)})


def search(board: str, simulations: int, rng: random.Random) -> int:
    """UCT with c = 2 and one random playout a simulation; the cell, counted from 0, with the largest mean value.

    Source: Kocsis and Szepesvári (2006).
    """
    # board -> visits, and the sum of the results for whoever has moved there
    visits: dict[str, int] = {board: 0}
    total: dict[str, float] = {board: 0.0}
    for _ in range(simulations):
        path, place = [board], board
        while not is_over(place):
            children = [after(place, cell) for cell in free(place)]
            new = [child for child in children if child not in visits]
            if new:
                place = rng.choice(new)
                visits[place], total[place] = 0, 0.0
                path.append(place)
                break
            log = math.log(max(visits[place], 1))
            place = max(
                children,
                key=lambda child: (
                    total[child] / visits[child] + EXPLORATION * math.sqrt(log / visits[child])
                    if visits[child]
                    else math.inf
                ),
            )
            path.append(place)
        end = _playout(place, rng)
        for node in path:
            visits[node] += 1
            has_moved = "OX"[node.count("X") > node.count("O")]
            total[node] += 0.0 if end is None else (1.0 if end == has_moved else -1.0)
    tried = [cell for cell in free(board) if visits.get(after(board, cell))]
    return max(tried, key=lambda cell: total[after(board, cell)] / visits[after(board, cell)])


def _playout(board: str, rng: random.Random) -> str | None:
    while not is_over(board):
        board = after(board, rng.choice(free(board)))
    return winner(board)
