"""What the rules of a game are, and how an action is read from a text."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

from verl.utils.siop.errors import GameError

# An action is parsed to values before anything is done with it: ("reveal", 2, 3), never the text "reveal 2 03".
Action = tuple[Any, ...]

_ACTION = re.compile(r"<action>((?:(?!<action>).)*?)</action>", re.IGNORECASE | re.DOTALL)
_WHOLE = re.compile(r"[0-9]{1,6}", re.ASCII)


class InvalidAction(GameError):
    """A turn holds no action that the rules allow; the text is what the player is told."""


class Rules(ABC):
    """The state of one game and what may be done in it. Knows nothing of good and bad actions.

    Args:
        spec: the whole game as plain values, as a data row holds it; equal specs give equal games.

    Raises:
        GameError: the spec is none, or no such game can be played.

    Attributes:
        name: of the game.
        form: how an action is written, for the prompt and for whoever wrote another one.
        turns: how many turns the player has; every turn costs one, an invalid one too.
    """

    name: ClassVar[str]
    form: str
    turns: int

    @abstractmethod
    def __init__(self, spec: Mapping[str, Any]) -> None: ...

    @abstractmethod
    def instructions(self) -> str:
        """What a player has to know, without the form of an action."""

    @abstractmethod
    def show(self) -> str:
        """What the player sees."""

    @abstractmethod
    def parse(self, words: list[str]) -> Action:
        """The action that these words are.

        Raises:
            InvalidAction: they are none, or one that the state does not allow.
        """

    @abstractmethod
    def play(self, action: Action) -> str:
        """Do what :meth:`parse` gave; returns what the player is told, in few words."""

    @property
    @abstractmethod
    def finished(self) -> bool:
        """Whether nothing is left to do, whatever number of turns is left."""

    @property
    @abstractmethod
    def success(self) -> bool:
        """Whether the game has been won, in the sense that the game gives to it."""

    @property
    @abstractmethod
    def completion(self) -> float:
        """How much of the game is done, in [0, 1]; 1 with a success."""


def read_action(text: str) -> list[str]:
    """The words of the last complete ``<action>…</action>`` of a text; case does not count.

    Raises:
        InvalidAction: there is none.

    >>> read_action("<action> reveal 1 1 </action>, no: <Action> Reveal 2 03 </action>")
    ['reveal', '2', '03']
    """
    found = _ACTION.findall(text)
    words = found[-1].replace(",", " ").lower().split() if found else []
    if not words:
        raise InvalidAction("no action")
    return words


def whole(word: str, low: int, high: int) -> int:
    """A whole number of a word: ``05`` is 5.

    Raises:
        InvalidAction: it is none, or not within these limits.
    """
    if not _WHOLE.fullmatch(word) or not low <= int(word) <= high:
        raise InvalidAction(f"numbers from {low} to {high}")
    return int(word)


def rows_of(cells: str | list[str], width: int) -> str:
    """Cells as lines, with spaces between them."""
    return "\n".join(" ".join(cells[start : start + width]) for start in range(0, len(cells), width))


def field(spec: Mapping[str, Any], name: str, kind: type, game: str) -> Any:
    """A value of a spec.

    Raises:
        GameError: it is missing or of another type.
    """
    value = spec.get(name)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise GameError(f"{game}: {name}={value!r:.100} is not allowed; the spec needs a value of type {kind.__name__}")
    return value


def only(spec: Mapping[str, Any], names: Collection[str], game: str) -> None:
    """Refuse what a spec holds beside these names.

    Raises:
        GameError: another name, which would have no effect.
    """
    for name, value in spec.items():
        if name not in names:
            raise GameError(f"{game}: {name}={value!r:.100} is not allowed; the spec has {', '.join(names)}")
