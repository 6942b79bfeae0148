"""Boards to train and to be judged on: the same for all rollouts of a question, and no board in both parts."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from typing import Any

from tqdm import tqdm
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
    most = sudoku.MAX_BLANKS[size]
    if not 1 <= blanks <= most:
        raise GameError(f"sudoku: blanks={blanks} is not allowed with size={size}; choose from 1 to {most}")
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

    return _parts(board, train, held_out, f"sudoku of size {size} with {blanks} blanks")


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

    def board(part: int) -> Spec:
        return {"board": rng.choice(parts[part]), "seed": rng.randrange(2**31)}

    return _parts(board, train, held_out, "openings of tictactoe")


def canonical(board: str) -> str:
    """The first, in the order of texts, of the eight boards that turning and mirroring make of a square one."""
    size = math.isqrt(len(board))
    found, rows = [], [board[start : start + size] for start in range(0, len(board), size)]
    for _ in range(4):
        rows = ["".join(column) for column in zip(*rows[::-1], strict=True)]
        found += ["".join(rows), "".join(row[::-1] for row in rows)]
    return min(found)


def minesweeper_boards(
    size: int, mines: int, flags: bool, centre: bool, seed: int, train: int, held_out: int
) -> tuple[list[Spec], list[Spec]]:
    """Distinct games that the free reveal does not solve: other mines, or the same and another first view.

    Held out is about a quarter of the layouts of mines, each with all that turning and mirroring makes of it.

    Args:
        size, mines: of the board.
        flags: whether cells can be flagged.
        centre: the free reveal is the middle cell, around which there are no mines; else any cell without a mine.
        seed, train, held_out: of the draw.

    Raises:
        GameError: an impossible board, or fewer such games than asked for.
    """
    if not 2 <= size <= minesweeper.MAX_SIZE:
        raise GameError(f"minesweeper: size={size} is not allowed; choose from 2 to {minesweeper.MAX_SIZE}")
    if centre and (size % 2 == 0 or size < 5):
        raise GameError(f"minesweeper: size={size} is not allowed with a start in the centre; choose 5, 7 or 9")
    cells = size * size
    free = 9 if centre else 1
    if not 1 <= mines < cells - free:
        raise GameError(f"minesweeper: mines={mines} is not allowed; choose from 1 to {cells - free - 1}")
    rng = random.Random(f"minesweeper {size} {mines} {seed}")

    def is_held_out(layout: Sequence[int]) -> bool:
        kind = canonical("".join(".*"[cell in layout] for cell in range(cells)))
        return random.Random(f"minesweeper {seed} {kind}").randrange(HELD_OUT) == 0

    def board(part: int) -> Spec | None:
        start = cells // 2 if centre else rng.randrange(cells)
        kept = {start, *(minesweeper.around(size)[start] if centre else ())}
        layout = sorted(rng.sample([cell for cell in range(cells) if cell not in kept], mines))
        spec = {"size": size, "mines": layout, "start": start, "flags": flags}
        if is_held_out(layout) != bool(part):
            return None
        try:
            minesweeper.Minesweeper(spec)
        except GameError:  # solved by the free reveal
            return None
        return spec

    def game(spec: Spec) -> str:
        return f"{spec['mines']} {minesweeper.Minesweeper(spec).show()}"

    return _parts(board, train, held_out, f"minesweeper of size {size} with {mines} mines", game)


def _parts(
    draw: Callable[[int], Spec | None], train: int, held_out: int, what: str, name: Callable[[Spec], str] = repr
) -> tuple[list[Spec], list[Spec]]:
    """Training and held-out boards; ``draw`` is told which part it is for, 0 or 1, and gives None in vain."""
    first = _distinct(lambda: draw(0), train, f"{what} to train on", name)
    return first, _distinct(lambda: draw(1), held_out, f"{what} to hold out", name)


def _distinct(draw: Callable[[], Spec | None], count: int, what: str, name: Callable[[Spec], str]) -> list[Spec]:
    """So many boards of different names.

    Raises:
        GameError: there are not so many.
    """
    found: dict[str, Spec] = {}
    vain = 0
    with tqdm(total=count, desc=what, unit=" boards", leave=False, disable=None, delay=1) as progress:
        while len(found) < count:
            spec = draw()
            if spec is None or name(spec) in found:
                vain += 1
            else:
                found[name(spec)] = spec
                vain = 0
                progress.update()
            if vain >= _IN_VAIN:
                raise GameError(
                    f"only {len(found)} different boards of {what} were found, {count} are asked for; ask for fewer"
                )
    return list(found.values())
