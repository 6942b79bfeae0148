"""Boards to train and to be judged on: the same for all rollouts of a question, and no board in both parts."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

from verl.utils.siop.envs import minesweeper, sudoku, tictactoe
from verl.utils.siop.errors import GameError

Spec = dict[str, Any]
# Held out: one in four of what boards are made from.
HELD_OUT = 4
# Draws without a new board after which there are no more.
_IN_VAIN = 400


def sudoku_boards(size: int, blanks: int, seed: int, train: int, held_out: int) -> tuple[list[Spec], list[Spec]]:
    """Distinct boards with exactly ``blanks`` blank cells; the held-out ones have other solutions.

    Of size 4 a quarter of all 288 full grids is held out, of the larger sizes every fourth grid that is drawn.

    Raises:
        GameError: an impossible size or number of blanks, or fewer such boards than asked for.
    """
    if size not in sudoku.BOXES:
        raise GameError(f"sudoku: size={size} is not allowed; choose one of {', '.join(map(str, sudoku.BOXES))}")
    if not 1 <= blanks < size * size:
        raise GameError(f"sudoku: blanks={blanks} is not allowed; choose from 1 to {size * size - 1}")
    rng = random.Random(f"sudoku {size} grids {seed}")
    grids: tuple[Callable[[], str], Callable[[], str]]
    if size == 4:
        every = sudoku.all_grids(4)
        rng.shuffle(every)
        cut = len(every) // HELD_OUT
        grids = (lambda: rng.choice(every[cut:]), lambda: rng.choice(every[:cut]))
    else:
        known: list[set[str]] = [set(), set()]

        def drawn(part: int) -> str:
            grid = sudoku.random_grid(size, rng)
            while grid in known[1 - part]:
                grid = sudoku.random_grid(size, rng)
            known[part].add(grid)
            return grid

        grids = (lambda: drawn(0), lambda: drawn(1))

    def board(part: int) -> Spec | None:
        found = sudoku.dig(grids[part](), blanks, rng, tries=1)
        return None if found is None else {"size": size, "board": found}

    return tuple(
        _distinct(lambda part=part: board(part), count, f"sudoku of size {size} with {blanks} blanks")  # type: ignore[misc]
        for part, count in enumerate((train, held_out))
    )  # type: ignore[return-value]


def tictactoe_boards(seed: int, train: int, held_out: int) -> tuple[list[Spec], list[Spec]]:
    """Openings of up to four stones that perfect play draws, each with a seed of the opponent.

    Held out is a quarter of the openings, with all that turning and mirroring makes of them.
    """
    rng = random.Random(f"tictactoe {seed}")
    openings = [board for board in tictactoe.states() if board.count(".") >= 5 and tictactoe.value(board) == 0]
    classes = sorted({canonical(board) for board in openings} - {tictactoe.START})
    rng.shuffle(classes)
    # The empty board is where every game begins: it is trained on.
    unseen = set(classes[: len(classes) // HELD_OUT])
    parts = [[b for b in openings if (canonical(b) in unseen) == wanted] for wanted in (False, True)]
    return tuple(
        _distinct(
            lambda part=part: {"board": rng.choice(part), "seed": rng.randrange(2**31)},  # type: ignore[misc]
            count,
            "openings of tictactoe",
        )
        for part, count in zip(parts, (train, held_out), strict=True)
    )  # type: ignore[return-value]


def canonical(board: str) -> str:
    """The first, in the order of texts, of the eight boards that turning and mirroring make of one."""
    found, rows = [], [board[:3], board[3:6], board[6:]]
    for _ in range(4):
        rows = ["".join(column) for column in zip(*rows[::-1], strict=True)]
        found += ["".join(rows), "".join(row[::-1] for row in rows)]
    return min(found)


def minesweeper_boards(
    size: int, mines: int, flags: bool, centre: bool, seed: int, train: int, held_out: int
) -> tuple[list[Spec], list[Spec]]:
    """Distinct layouts that the free reveal does not solve.

    Args:
        size, mines: of the board.
        flags: whether cells can be flagged.
        centre: the free reveal is the middle cell, around which there are no mines; else any cell without a mine.
        seed, train, held_out: of the draw.

    Raises:
        GameError: an impossible board, or fewer such layouts than asked for.
    """
    if not 2 <= size <= minesweeper.MAX_SIZE:
        raise GameError(f"minesweeper: size={size} is not allowed; choose from 2 to {minesweeper.MAX_SIZE}")
    if centre and size % 2 == 0:
        raise GameError(f"minesweeper: size={size} is not allowed with a start in the centre; choose an odd size")
    cells = size * size
    free = 9 if centre else 1
    if not 1 <= mines < cells - free:
        raise GameError(f"minesweeper: mines={mines} is not allowed; choose from 1 to {cells - free - 1}")
    rng = random.Random(f"minesweeper {size} {mines} {seed}")

    def board() -> Spec | None:
        start = cells // 2 if centre else rng.randrange(cells)
        kept = {start, *(minesweeper.around(size)[start] if centre else ())}
        layout = sorted(rng.sample([cell for cell in range(cells) if cell not in kept], mines))
        spec = {"size": size, "mines": layout, "start": start, "flags": flags}
        try:
            minesweeper.Minesweeper(spec)
        except GameError:  # solved by the free reveal
            return None
        return spec

    both = _distinct(board, train + held_out, f"minesweeper of size {size} with {mines} mines")
    return both[held_out:], both[:held_out]


def _distinct(draw: Callable[[], Spec | None], count: int, what: str) -> list[Spec]:
    found: dict[str, Spec] = {}
    for spec in _until_in_vain(draw, found):
        found.setdefault(repr(spec), spec)
        if len(found) >= count:
            break
    if len(found) < count:
        raise GameError(f"only {len(found)} different boards of {what} were found, {count} are asked for")
    return list(found.values())


def _until_in_vain(draw: Callable[[], Spec | None], found: dict[str, Spec]) -> Iterator[Spec]:
    vain = 0
    while vain < _IN_VAIN:
        before, spec = len(found), draw()
        if spec is not None:
            yield spec
        vain = 0 if len(found) > before else vain + 1
