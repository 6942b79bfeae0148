"""Where credit methods and baselines are registered; ``siop_reward_mode`` and ``siop_baseline`` choose among them.

A credit method turns the rollouts of a batch into turn rewards, a baseline turns turn rewards into turn advantages.
``docs/credit_assignment.md`` shows how to add one from a module of your own.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

from verl.utils.siop.errors import SiopConfigError

F = TypeVar("F", bound=Callable[..., object])


class Registry(Generic[F]):
    """Functions by the name that a configuration key takes.

    Args:
        key: the configuration key.

    Attributes:
        without_scorer: names of the functions that were registered with ``needs_scorer=False``.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self.without_scorer: set[str] = set()
        self._functions: dict[str, F] = {}

    def names(self) -> tuple[str, ...]:
        """Registered names, in the order of their registration."""
        return tuple(self._functions)

    def __getitem__(self, name: str) -> F:
        if name not in self._functions:
            raise SiopConfigError(f"{self.key}={name!r} is not allowed; choose one of {', '.join(self._functions)}")
        return self._functions[name]

    def register(self, name: str, *, needs_scorer: bool = True) -> Callable[[F], F]:
        """Decorator that registers a function; the same function may come again (a module that is loaded twice).

        Args:
            name: value of the key.
            needs_scorer: False of a credit method that asks for no clusters, evidence or support, and reads no
                answers: then no scorer is looked for, and no metric speaks of answers.

        Raises:
            SiopConfigError: the name belongs to another function.
        """

        def add(function: F) -> F:
            known = self._functions.get(name)
            if known is not None and _where(known) != _where(function):
                raise SiopConfigError(
                    f"{self.key}: {_where(function)} wants the name {name!r}, which belongs to {_where(known)}"
                )
            self._functions[name] = function
            if not needs_scorer:
                self.without_scorer.add(name)
            return function

        return add


def _where(function: Callable[..., object]) -> str:
    return f"{function.__module__}.{function.__qualname__}"


# CreditBatch -> GroupRewards, and Turns -> [B, T] advantages. Not typed by these: this module imports neither.
CREDIT_METHODS: Registry[Callable[[Any], Awaitable[Any]]] = Registry("siop_reward_mode")
BASELINES: Registry[Callable[[Any], Any]] = Registry("siop_baseline")

register_credit = CREDIT_METHODS.register
register_baseline = BASELINES.register
