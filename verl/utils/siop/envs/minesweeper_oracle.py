"""Minesweeper: which actions are right, by the exact probability of a mine under every closed cell.

All layouts of the mines that agree with what is seen are equally likely. Closed cells beside an open number fall into
connected components; each is counted by itself and the counts are multiplied, in exact whole numbers.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from fractions import Fraction

from verl.utils.siop.envs.base import Action
from verl.utils.siop.envs.minesweeper import Minesweeper, around
from verl.utils.siop.errors import GameError

MAX_STEPS = 200_000

# (cells, mines among them)
Constraint = tuple[tuple[int, ...], int]


class _Budget:
    def __init__(self, steps: int) -> None:
        self.left = steps

    def spend(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise GameError(
                f"minesweeper: the mine probabilities of this board take more than {MAX_STEPS} steps; use a smaller "
                "board. They are never approximated"
            )


def best(game: Minesweeper) -> frozenset[Action]:
    """Reveals of least mine probability, ties included, and with flags those of certain mines not yet flagged."""
    chances = posterior(game)
    least = min(chances.values())
    found = {("reveal", *_place(cell, game.size)) for cell, chance in chances.items() if chance == least}
    if game.flags_allowed:
        certain = (cell for cell, chance in chances.items() if chance == 1 and cell not in game.flags)
        found |= {("flag", *_place(cell, game.size)) for cell in certain}
    return frozenset(found)


def _place(cell: int, size: int) -> tuple[int, int]:
    return cell // size + 1, cell % size + 1


def posterior(game: Minesweeper) -> dict[int, Fraction]:
    """P(mine) of every closed cell, given the open numbers and the number of mines; flags are no evidence.

    Raises:
        GameError: the count takes more than :data:`MAX_STEPS` steps.
    """
    closed = [cell for cell in range(game.size * game.size) if cell not in game.opened]
    constraints: list[Constraint] = [
        (tuple(other for other in around(game.size)[cell] if other not in game.opened), game.number(cell))
        for cell in sorted(game.opened)
    ]
    constraints = [constraint for constraint in constraints if constraint[0]]
    budget = _Budget(MAX_STEPS)
    counts = [_count(cells, own, budget) for cells, own in _components(constraints)]
    border = {cell for cells, _ in constraints for cell in cells}
    off = len(closed) - len(border)
    everything = _product((total for total, _ in counts), budget)
    mines = len(game.mines)
    layouts = sum(ways * _choose(off, mines - k) for k, ways in everything.items())
    found: dict[int, Fraction] = {}
    for number, (_, of_cell) in enumerate(counts):
        others = _product((total for i, (total, _) in enumerate(counts) if i != number), budget)
        for cell, by_mines in of_cell.items():
            with_mine = sum(
                ways * other * _choose(off, mines - k - j)
                for k, ways in by_mines.items()
                for j, other in others.items()
            )
            found[cell] = Fraction(with_mine, layouts)
    if off:
        inside = sum(ways * _choose(off - 1, mines - k - 1) for k, ways in everything.items())
        found.update({cell: Fraction(inside, layouts) for cell in closed if cell not in border})
    return found


def _choose(cells: int, mines: int) -> int:
    return math.comb(cells, mines) if 0 <= mines <= cells else 0


def _product(parts: Iterable[dict[int, int]], budget: _Budget) -> dict[int, int]:
    """Number of mines -> layouts of independent components together."""
    product = {0: 1}
    for part in parts:
        new: defaultdict[int, int] = defaultdict(int)
        for k, ways in product.items():
            for j, other in part.items():
                budget.spend()
                new[k + j] += ways * other
        product = dict(new)
    return product


def _components(constraints: Sequence[Constraint]) -> list[tuple[list[int], list[Constraint]]]:
    """Cells that constraints connect, each with its constraints."""
    found: list[tuple[set[int], list[Constraint]]] = []
    for constraint in constraints:
        cells, own = set(constraint[0]), [constraint]
        apart = []
        for other_cells, other in found:
            if cells & other_cells:
                cells |= other_cells
                own = other + own
            else:
                apart.append((other_cells, other))
        found = [*apart, (cells, own)]
    return [(sorted(cells), own) for cells, own in found]


def _count(
    cells: Sequence[int], constraints: Sequence[Constraint], budget: _Budget
) -> tuple[dict[int, int], dict[int, dict[int, int]]]:
    """Number of mines -> layouts of a component, and the same for the layouts with a mine under each cell."""
    total: defaultdict[int, int] = defaultdict(int)
    of_cell: dict[int, defaultdict[int, int]] = {cell: defaultdict(int) for cell in cells}
    touching = {cell: [i for i, (members, _) in enumerate(constraints) if cell in members] for cell in cells}
    missing = [number for _, number in constraints]
    room = [len(members) for members, _ in constraints]
    chosen: list[int] = []

    def place(position: int) -> None:
        budget.spend()
        if position == len(cells):
            total[len(chosen)] += 1
            for cell in chosen:
                of_cell[cell][len(chosen)] += 1
            return
        cell = cells[position]
        for mine in (0, 1):
            for i in touching[cell]:
                room[i] -= 1
                missing[i] -= mine
            if all(0 <= missing[i] <= room[i] for i in touching[cell]):
                if mine:
                    chosen.append(cell)
                place(position + 1)
                if mine:
                    chosen.pop()
            for i in touching[cell]:
                room[i] += 1
                missing[i] += mine

    place(0)
    return dict(total), {cell: dict(counts) for cell, counts in of_cell.items()}
