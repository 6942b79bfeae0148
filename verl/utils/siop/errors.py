"""Errors of the project: one root, children that also are the standard library's type, all picklable for Ray."""

from __future__ import annotations

from typing import ClassVar


class SiopError(Exception):
    """Root of every error that this project raises on purpose."""


class SiopConfigError(SiopError, ValueError):
    """A configuration key or value is wrong; the message names the key, the value and what is allowed."""


class ScorerError(SiopError, RuntimeError):
    """The scorer answered, but refused the request or sent a response that is not valid."""


class EngineFailed(ScorerError):
    """The scoring engine is broken and has to be built anew; nothing that it would still give can be trusted."""


class ServiceUnavailable(SiopError, ConnectionError):
    """A service could not be reached, or did not answer, within the allowed attempts.

    Args:
        url: the address that was called.
        attempts: how often it was tried.
        last_error: the last failure, as text.
    """

    service: ClassVar[str] = "service"
    advice: ClassVar[str] = ""

    def __init__(self, url: str, attempts: int, last_error: str) -> None:
        super().__init__(url, attempts, last_error)
        self.url, self.attempts, self.last_error = url, attempts, last_error

    def __str__(self) -> str:
        return (
            f"no answer from the {self.service} at {self.url} after {self.attempts} attempt(s); "
            f"last error: {self.last_error}{self.advice}"
        )


class ScorerUnavailable(ServiceUnavailable):
    """The scorer did not answer."""

    service = "scorer"
    advice = "; start it with bash launch_siop_scorer.sh, or set SIOP_SCORER_URL"


class RolloutError(SiopError, ValueError):
    """A rollout cannot be used: its mask, its length, its question or its label is not what the method needs."""


class GameError(SiopError, ValueError):
    """A game cannot be set up or played: an unknown name, an impossible board, a step after its end."""


class InvalidRequest(SiopError, ValueError):
    """A request to the scorer is not valid; the message names the offending field and its value (HTTP 422)."""


class SequenceTooLong(InvalidRequest):
    """A sequence or text is longer than the model takes; the message names it and both lengths (HTTP 413)."""
