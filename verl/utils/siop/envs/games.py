"""All games by name, and a game being played: rules and oracle together, one score a turn.

env = make("sudoku")
observation = env.reset({"size": 4, "board": "1.3434122143432."})
step = env.step("<action> 1 2 2 </action>")     # step.observation, .score, .done, .success, .completion
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from verl.utils.siop.envs import minesweeper_oracle, sudoku_oracle, tictactoe_oracle
from verl.utils.siop.envs.base import Action, InvalidAction, Rules, read_action
from verl.utils.siop.envs.minesweeper import Minesweeper
from verl.utils.siop.envs.sudoku import Sudoku
from verl.utils.siop.envs.tictactoe import TicTacToe
from verl.utils.siop.errors import GameError

EXACT, SEARCH = "exact", "search"


@dataclass(frozen=True)
class Game:
    """A kind of game.

    Args:
        rules: its state.
        best: all right actions of a state; an action is right or not, there are no degrees.
        search: what a tree search of N simulations takes for the best, where the game has one.
    """

    rules: Callable[[Mapping[str, Any]], Rules]
    best: Callable[[Any], frozenset[Action]]
    search: Callable[[Any, int, random.Random], frozenset[Action]] | None = None


GAMES: dict[str, Game] = {
    "sudoku": Game(Sudoku, sudoku_oracle.best),
    "tictactoe": Game(TicTacToe, tictactoe_oracle.best, tictactoe_oracle.searched),
    "minesweeper": Game(Minesweeper, minesweeper_oracle.best),
}


def register_game(name: str, game: Game) -> None:
    """Add a game under a name of its own; the same class may come again (a module that is loaded twice).

    The class is known by its module and its name.

    Raises:
        GameError: the name belongs to another game, or is none; or this is no :class:`Game`.
    """
    if not isinstance(name, str) or not name or not isinstance(game, Game):
        raise GameError(f"register_game({name!r}, {game!r:.100}) is not allowed; needs a name and a Game")
    known = GAMES.get(name)
    if known is not None and _origin(known.rules) != _origin(game.rules):
        raise GameError(f"the name {name!r} belongs to another game, {'.'.join(_origin(known.rules))}")
    GAMES[name] = game


def _origin(rules: Callable[..., Rules]) -> tuple[str, str]:
    return rules.__module__, getattr(rules, "__qualname__", repr(rules))


@dataclass(frozen=True)
class Judge:
    """Who gives the turns their scores.

    Args:
        oracle: ``exact``: 1 for every right action, ties included; ``search``: 1 for the one that a tree search of
            ``simulations`` finds.
        simulations: of the search, for each turn.
        flip: share of the scores of valid actions that are turned round, at random: an oracle that errs.
        invalid_score: of a turn without a valid action, and of one that the length limit cut. The paper's score is
            binary (arXiv 2605.10325), so it is 0 unless told otherwise.

    Raises:
        GameError: a value that is not allowed, or one without effect.
    """

    oracle: str = EXACT
    simulations: int | None = None
    flip: float = 0.0
    invalid_score: float = 0.0

    def __post_init__(self) -> None:
        if self.oracle not in (EXACT, SEARCH):
            raise GameError(f"oracle={self.oracle!r} is not allowed; choose one of {EXACT}, {SEARCH}")
        if (self.oracle == SEARCH) != (self.simulations is not None):
            raise GameError(
                f"simulations={self.simulations} is not allowed with oracle={self.oracle}: a number for {SEARCH}, none "
                f"for {EXACT}"
            )
        if self.simulations is not None and not _within(self.simulations, 1, 100_000, int):
            raise GameError(f"simulations={self.simulations!r} is not allowed; choose a whole number from 1 to 100000")
        if not _within(self.flip, 0, 1, int | float):
            raise GameError(f"flip={self.flip!r} is not allowed; choose a share from 0 to 1")
        if not _within(self.invalid_score, -10, 0, int | float):
            raise GameError(f"invalid_score={self.invalid_score!r} is not allowed; choose a number from -10 to 0")

    def check(self, name: str, game: Game) -> None:
        """Refuse a tree search that the game does not have.

        Raises:
            GameError: it has none.
        """
        if self.oracle == SEARCH and game.search is None:
            raise GameError(
                f"oracle={SEARCH} is not allowed with the game {name!r}, which has no tree search; use {EXACT}"
            )


def _within(value: Any, low: float, high: float, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high


@dataclass(frozen=True)
class Step:
    """What a turn has come to.

    Args:
        observation: what the player sees next.
        score: of the judge.
        done: whether the game is over, or no turn is left.
        success, completion: of the game so far, see :class:`~verl.utils.siop.envs.base.Rules`.
        valid: whether the turn held an action that the rules allow.
        right: whether the exact oracle calls it right, whoever gives the score.
    """

    observation: str
    score: float
    done: bool
    success: bool
    completion: float
    valid: bool
    right: bool


class Env:
    """One game being played.

    Args:
        game: its kind.
        judge: who gives the scores.
        seed: of the judge's chances.
    """

    rules: Rules

    def __init__(self, game: Game, judge: Judge | None = None, seed: int | str = 0) -> None:
        self.game, self.judge = game, judge or Judge()
        self.name = getattr(game.rules, "name", str(game.rules))
        self.judge.check(self.name, game)
        self._rng = random.Random(str(seed))

    def reset(self, spec: Mapping[str, Any]) -> str:
        """Begin the game of a spec; returns the first observation.

        Raises:
            GameError: see :class:`~verl.utils.siop.envs.base.Rules`; or nothing is left to do.
        """
        if not isinstance(spec, Mapping):
            raise GameError(f"{self.name}: spec={spec!r:.100} is not allowed; needs a mapping")
        with self._named("constructor"):
            self.rules, self.turns = self.game.rules(spec), 0
        for field, kind in (("form", str), ("turns", int)):
            self._typed(field, getattr(self.rules, field, None), kind)
        if self.done:
            raise GameError(f"{self.name}: this game is over before the first turn (turns={self.rules.turns})")
        return self._shown()

    def branch(self) -> Env:
        """The same game as it is now, to try an action with; the chances of its judge are its own."""
        other = copy.copy(self)
        other.rules, other._rng = copy.deepcopy(self.rules), random.Random(self._rng.random())
        return other

    @property
    def done(self) -> bool:
        with self._named("finished"):
            return bool(self.rules.finished) or self.turns >= self.rules.turns

    def step(self, text: str) -> Step:
        """Play the action in the text of a turn, of which thinking is no part.

        Raises:
            GameError: the game is over, or its rules or its oracle break their word.
        """
        if self.done:
            raise GameError(f"{self.name}: the game is over; reset it")
        self.turns += 1
        score, right, valid = self.judge.invalid_score, False, True
        try:
            words = read_action(text)
            with self._named(f"parse, of {' '.join(words)!r:.80},"):
                action = self._typed("action", self.rules.parse(words), tuple)
        except InvalidAction as error:
            note, valid = f"invalid : {error} ; write <action> {self.rules.form} </action>", False
        else:
            exact = self.right_actions()
            right = action in exact
            score = float(action in self._paid(exact))
            if self.judge.flip and self._rng.random() < self.judge.flip:
                score = 1.0 - score
            with self._named(f"play, of {action!r:.80},"):
                note = self._typed("play", self.rules.play(action), str)
        with self._named("success or completion"):
            success = self._typed("success", self.rules.success, bool)
            completion = self._typed("completion", self.rules.completion, int | float)
        if not 0 <= completion <= 1:
            raise GameError(f"{self.name}: completion={completion!r} is not allowed; needs a number from 0 to 1")
        return Step(
            observation=f"{note}\n{self._shown()}",
            score=score,
            done=self.done,
            success=success,
            completion=completion,
            valid=valid,
            right=right,
        )

    def _shown(self) -> str:
        with self._named("show"):
            return self._typed("show", self.rules.show(), str)

    @contextmanager
    def _named(self, what: str) -> Iterator[None]:
        """A game of the user's may raise anything: the message names it."""
        try:
            yield
        except GameError:
            raise
        except Exception as error:
            raise GameError(f"{self.name}: its {what} raises {type(error).__name__}: {error!s:.200}") from error

    def _typed(self, what: str, value: Any, kind: Any) -> Any:
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise GameError(
                f"{self.name}: {what}={value!r:.100} is not allowed; needs {getattr(kind, '__name__', kind)}"
            )
        return value

    def right_actions(self) -> frozenset[Action]:
        """What the exact oracle calls right now.

        Raises:
            GameError: it names nothing, or not actions, which are tuples.
        """
        with self._named("oracle"):
            found = self.game.best(self.rules)
        if not isinstance(found, frozenset) or not found or not all(isinstance(action, tuple) for action in found):
            raise GameError(
                f"{self.name}: its oracle must give a frozenset of actions (tuples, as parse gives them), one at "
                f"least, got {found!r:.100}"
            )
        return found

    def _paid(self, exact: frozenset[Action]) -> frozenset[Action]:
        if self.judge.simulations is None:
            return exact
        assert self.game.search is not None
        return self.game.search(self.rules, self.judge.simulations, self._rng)


def find(name: str) -> Game:
    """The game of a name.

    Raises:
        GameError: there is none.
    """
    if name not in GAMES:
        raise GameError(f"game={name!r} is not allowed; choose one of {', '.join(GAMES)}")
    return GAMES[name]


def make(name: str, judge: Judge | None = None, seed: int | str = 0) -> Env:
    """A game by its name, to be reset.

    Raises:
        GameError: there is none of this name.
    """
    return Env(find(name), judge, seed)


def prompt_of(rules: Rules) -> str:
    """The message with which a game begins: what to do, how, and the first observation."""
    return (
        f"{rules.instructions()} Write each action as <action> {rules.form} </action> ; what stands before "
        f"it is free.\n{rules.show()}"
    )


def written(action: Action) -> str:
    """An action as a player writes it."""
    return f"<action> {' '.join(map(str, action))} </action>"


def oracle_play(game: Game, spec: Mapping[str, Any], rng: random.Random) -> tuple[bool, float]:
    """Success and completion of one game in which every action is right, by chance among those.

    Raises:
        GameError: the spec cannot be played, or what the oracle names is something else when it is written and read.
    """
    env = Env(game)
    env.reset(spec)
    while not env.done:
        right = env.right_actions()
        action = rng.choice(sorted(right, key=repr))
        step = env.step(written(action))
        if not step.right:
            raise GameError(
                f"{env.name}: its oracle names {action!r}, and {written(action)!r} is "
                + ("read as another action" if step.valid else f"refused: {step.observation.splitlines()[0]}")
            )
    return step.success, step.completion
