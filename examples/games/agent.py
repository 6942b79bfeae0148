"""Scripted agents that play the small games with faults, and the games that they play as text.

Each knows some of what a good player knows, and has a probability of a fault: a digit that the row alone allows, any
free cell, any closed cell.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from typing import Any

from verl.utils.siop.envs.base import Action, Rules
from verl.utils.siop.envs.games import Env, find, written
from verl.utils.siop.envs.minesweeper import HIDDEN, Minesweeper
from verl.utils.siop.envs.sudoku import BLANK, Sudoku
from verl.utils.siop.envs.tictactoe import TicTacToe, free

from examples.games.tokenizer import observation_text, opening_text, turn_text


def sudoku_fault(game: Sudoku, rng: random.Random, q: float = 0.2) -> Action:
    """Any blank cell; a digit that its row allows, with probability q any: columns and boxes are not looked at."""
    cell = rng.choice([cell for cell, value in enumerate(game.board) if value == BLANK])
    row = game.board[cell // game.size * game.size :][: game.size]
    allowed = [digit for digit in range(1, game.size + 1) if str(digit) not in row]
    digit = rng.randint(1, game.size) if rng.random() < q else rng.choice(allowed)
    return cell // game.size + 1, cell % game.size + 1, digit


def tictactoe_fault(game: TicTacToe, rng: random.Random) -> Action:
    """Any empty cell."""
    return (rng.choice(free(game.board)) + 1,)


def minesweeper_fault(game: Minesweeper, rng: random.Random) -> Action:
    """Any closed cell."""
    cells = [cell for cell in range(game.size**2) if game._shown(cell) == HIDDEN]
    cell = rng.choice(cells)
    return "reveal", cell // game.size + 1, cell % game.size + 1


# Game -> the faulty agent, and how often it plays instead of one whose every action is right.
AGENTS: Mapping[str, tuple[Callable[[Any, random.Random], Action], float]] = {
    "sudoku": (sudoku_fault, 0.9),
    "tictactoe": (tictactoe_fault, 0.7),
    "minesweeper": (minesweeper_fault, 0.4),
}


def action_of(name: str, rules: Rules, rng: random.Random, faults: float) -> Action:
    """The next action; with probability ``faults`` the faulty agent's."""
    fault, _ = AGENTS[name]
    return fault(rules, rng) if rng.random() < faults else rng.choice(sorted(find(name).best(rules)))


def played(name: str, spec: Mapping[str, Any], rng: random.Random, faults: float) -> tuple[list[tuple[str, bool]], Env]:
    """A whole game as pieces of text, each with whether the agent wrote it; and the game at its end."""
    env = Env(find(name))
    pieces = [(opening_text(env.reset(spec)), False)]
    while True:
        action = written(action_of(name, env.rules, rng, faults))
        step = env.step(action)
        pieces.append((turn_text(action), True))
        if step.done:
            return pieces, env
        pieces.append((observation_text(step.observation), False))
