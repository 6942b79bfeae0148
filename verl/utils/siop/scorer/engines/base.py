"""What every scoring engine takes, gives and checks. No torch here: the HTTP front uses the checks too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from verl.utils.siop.errors import InvalidRequest

TokenArray = NDArray[np.int64]

# Engine and model of a scorer without a language model, as ``--model`` names them.
NO_MODEL = "none"
NO_MODEL_MESSAGE = f"this scorer has no language model (--model {NO_MODEL}): it answers /cluster and /nli_score only"


@dataclass(frozen=True)
class Probe:
    """Reference to score: the mean log-probability of ``token_ids[start:end]`` is taken."""

    token_ids: TokenArray
    start: int
    end: int


@dataclass(frozen=True)
class RolloutQuery:
    """One rollout with the boundaries at which each of its references is scored.

    Attributes:
        prompt_ids: [P] token ids.
        response_ids: [L] token ids.
        boundaries: exclusive ends into ``response_ids``, 0 is the prompt alone; any order.
        probes: the references.
        openings: for each boundary the token ids between it and a reference; empty: none at any.
    """

    prompt_ids: TokenArray
    response_ids: TokenArray
    boundaries: Sequence[int]
    probes: Sequence[Probe]
    openings: Sequence[TokenArray] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens of the rollout and its probes: the measure of work by which requests are spread over workers."""
        added = sum(map(len, self.openings)) + sum(len(probe.token_ids) for probe in self.probes)
        return len(self.prompt_ids) + len(self.response_ids) + added

    @property
    def opened(self) -> list[tuple[int, TokenArray]]:
        """Each boundary with its opening."""
        openings = self.openings or [np.empty(0, dtype=np.int64)] * len(self.boundaries)
        return list(zip(self.boundaries, openings, strict=True))


@dataclass(frozen=True)
class SupportResult:
    """Scores of a request.

    Attributes:
        support: [rollout][boundary][reference] mean log-probability; ``[]`` for a rollout with an error.
        computed_tokens: tokens that went through the model.
        requested_tokens: tokens of all (boundary, reference) pairs as separate full sequences, of scored rollouts.
        errors: why a rollout was not scored, by its index; see :func:`too_long`.
    """

    support: list[list[list[float]]]
    computed_tokens: int
    requested_tokens: int
    errors: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class EngineInfo:
    """Limits and identity of a loaded engine.

    Attributes:
        engine: its name.
        model: directory or hub id.
        max_model_len: longest sequence in tokens.
        vocab_size: rows of the embedding: ids from there on are refused.
        tokenizer: :func:`~verl.utils.siop.tokenizer_digest.tokenizer_digest` of the model's tokenizer, None where the
            model comes without one.
    """

    engine: str
    model: str
    max_model_len: int
    vocab_size: int
    tokenizer: str | None = None


class ScoringEngine(Protocol):
    """A causal language model that scores references after the prefixes of rollouts."""

    info: EngineInfo

    def support(self, rollouts: Sequence[RolloutQuery]) -> SupportResult:
        """Mean log-probability of every reference at every boundary; see :class:`SupportResult`.

        A rollout that is longer than ``info.max_model_len`` with one of its probes is an entry of ``errors``; the
        others are scored.

        Raises:
            InvalidRequest: a field is out of range.
        """
        ...


class NoEngine:
    """The engine of a scorer that is there for clusters and entailment only: it refuses every request."""

    info = EngineInfo(engine=NO_MODEL, model=NO_MODEL, max_model_len=0, vocab_size=0)

    def support(self, rollouts: Sequence[RolloutQuery]) -> SupportResult:
        raise InvalidRequest(NO_MODEL_MESSAGE)


def _check_ids(name: str, token_ids: TokenArray, vocab_size: int) -> None:
    if token_ids.size and not 0 <= int(token_ids.min()) <= int(token_ids.max()) < vocab_size:
        bad = int(np.flatnonzero((token_ids < 0) | (token_ids >= vocab_size))[0])
        raise InvalidRequest(
            f"{name}[{bad}] = {int(token_ids[bad])} is not a token id of the model (0..{vocab_size - 1})"
        )


def check_rollouts(rollouts: Sequence[RolloutQuery], info: EngineInfo, field: str = "rollouts") -> None:
    """Validate a request against the model's limits.

    Args:
        rollouts: the request.
        info: limits of the engine.
        field: how messages name the list.

    Raises:
        InvalidRequest: a token id outside the vocabulary, a boundary outside the response, an empty or impossible
            reference range, or a reference token without any token before it; any request to :class:`NoEngine`.
    """
    if info.engine == NO_MODEL:
        raise InvalidRequest(NO_MODEL_MESSAGE)
    for index, rollout in enumerate(rollouts):
        name = f"{field}[{index}]"
        _check_ids(f"{name}.prompt_ids", rollout.prompt_ids, info.vocab_size)
        _check_ids(f"{name}.response_ids", rollout.response_ids, info.vocab_size)
        for b, boundary in enumerate(rollout.boundaries):
            if not 0 <= boundary <= len(rollout.response_ids):
                raise InvalidRequest(
                    f"{name}.boundaries[{b}] = {boundary} is outside the response (0..{len(rollout.response_ids)})"
                )
        if rollout.openings and len(rollout.openings) != len(rollout.boundaries):
            raise InvalidRequest(
                f"{name}.openings: {len(rollout.openings)} lists for {len(rollout.boundaries)} boundaries"
            )
        for b, opening in enumerate(rollout.openings):
            _check_ids(f"{name}.openings[{b}]", opening, info.vocab_size)
        first = len(rollout.prompt_ids) + min((end + len(opening) for end, opening in rollout.opened), default=0)
        for r, probe in enumerate(rollout.probes):
            where = f"{name}.references[{r}]"
            if not 0 <= probe.start < probe.end <= len(probe.token_ids):
                raise InvalidRequest(
                    f"{where}: start = {probe.start}, end = {probe.end} is not a non-empty range of its "
                    f"{len(probe.token_ids)} token_ids"
                )
            _check_ids(f"{where}.token_ids", probe.token_ids, info.vocab_size)
            if first + probe.start < 1:
                raise InvalidRequest(
                    f"{where}.start = 0 with an empty prompt at boundary 0: the first reference token has no context"
                )


def too_long(rollouts: Sequence[RolloutQuery], info: EngineInfo) -> dict[int, str]:
    """Rollouts that the model cannot take: prompt + response up to a boundary + reference is over ``max_model_len``.

    Returns:
        Index of each such rollout -> how long it is, as text that follows "the rollout is".
    """
    errors = {}
    for index, rollout in enumerate(rollouts):
        context = len(rollout.prompt_ids) + max((end + len(opening) for end, opening in rollout.opened), default=0)
        # The last token that counts is only predicted, so what follows it in the reference takes no room.
        reference = max((probe.end for probe in rollout.probes), default=0)
        if reference and context + reference > info.max_model_len:
            errors[index] = (
                f"too long: {context + reference} tokens ({context} of prompt and response, {reference} of its longest "
                f"reference), max_model_len is {info.max_model_len}"
            )
    return errors
