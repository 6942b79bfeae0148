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
    """Number of mines -> layouts of a component, and the same for the layouts with a mine under each cell.

    Cell by cell, from the first and from the last: layouts after which every constraint misses as many mines as after
    others go on alike, so they are counted together (the forward-backward algorithm). The counts by number of mines are
    the digits of one whole number in base 2^shift; one mine more is a shift to the left.
    """
    shift = len(cells) + 1  # 2^cells layouts at most
    touching = {cell: [i for i, (members, _) in enumerate(constraints) if cell in members] for cell in cells}
    room = [len(members) for members, _ in constraints]
    # One entry for each number of cells placed: missing mines by constraint -> layouts.
    before: list[dict[tuple[int, ...], int]] = [{tuple(number for _, number in constraints): 1}]
    moves: list[dict[tuple[int, ...], list[tuple[int, ...] | None]]] = []
    for cell in cells:
        for i in touching[cell]:
            room[i] -= 1
        following: defaultdict[tuple[int, ...], int] = defaultdict(int)
        moves.append({})
        for missing, ways in before[-1].items():
            budget.spend()
            pair = [_placed(missing, mine, touching[cell], room) for mine in (0, 1)]
            moves[-1][missing] = pair
            for mine, state in enumerate(pair):
                if state is not None:
                    following[state] += ways << shift * mine
        before.append(dict(following))
    after = {state: 1 for state in before[-1]}
    of_cell: dict[int, dict[int, int]] = {}
    for position in reversed(range(len(cells))):
        ways_to_end: dict[tuple[int, ...], int] = {}
        with_mine = 0
        for missing, ways in before[position].items():
            without, mine = (0 if state is None else after[state] for state in moves[position][missing])
            ways_to_end[missing] = without + (mine << shift)
            with_mine += ways * (mine << shift)
        of_cell[cells[position]] = _digits(with_mine, shift)
        after = ways_to_end
    return _digits(sum(before[-1].values()), shift), of_cell


def _placed(missing: tuple[int, ...], mine: int, touched: Sequence[int], room: Sequence[int]) -> tuple[int, ...] | None:
    """What the constraints miss after one more cell; None if one of them cannot come out any more."""
    left = list(missing)
    for i in touched:
        left[i] -= mine
        if not 0 <= left[i] <= room[i]:
            return None
    return tuple(left)


def _digits(number: int, shift: int) -> dict[int, int]:
    """Digits that are not 0, by their place."""
    found, place = {}, 0
    while number:
        if digit := number & ((1 << shift) - 1):
            found[place] = digit
        number, place = number >> shift, place + 1
    return found
