"""Bodies and answers of the scoring service's endpoints, and their limits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, Field, ValidationInfo, WrapValidator
from verl.utils.siop.http.packed import MAX_ID, PackedIds, unpack_ids
from verl.utils.siop.scorer.engines.base import Probe, RolloutQuery

if TYPE_CHECKING:
    from verl.utils.siop.scorer.engines.base import TokenArray as TokenIds
else:
    # An array at once: a list of Python integers takes ten times the memory, and time to throw away. The first wrong id
    # is enough of an error.
    TokenIds = Annotated[
        list[Annotated[int, Field(ge=0, lt=MAX_ID + 1)]],
        FailFast(),
        WrapValidator(
            lambda ids, check: unpack_ids(ids) if isinstance(ids, PackedIds) else np.array(check(ids), dtype=np.int64)
        ),
    ]

MAX_TEXT = 200_000  # characters
MAX_ITEMS = 65_536  # of a request, by default
MAX_ITEM_TOKENS = 262_144  # of an item with its references, by default

Text = Annotated[str, Field(max_length=MAX_TEXT)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class _Scored(_Model):
    def query(self) -> RolloutQuery:
        raise NotImplementedError

    @property
    def num_tokens(self) -> int:
        """Its token ids, those of its references too."""
        return self.query().num_tokens


def _end_of_range(start: str, token_ids: str) -> AfterValidator:
    def check(end: int, info: ValidationInfo) -> int:
        # A field that is missing here was not valid and has its own error.
        first, ids = info.data.get(start), info.data.get(token_ids)
        if first is not None and ids is not None and not first < end <= len(ids):
            raise ValueError(f"{first}..{end} is not a non-empty range of {len(ids)} tokens")
        return end

    return AfterValidator(check)


class SupportReference(_Model):
    """Reference to score: the mean log-probability of ``token_ids[start:end]`` is taken."""

    token_ids: TokenIds = Field(min_length=1)
    start: int = Field(ge=0)
    end: Annotated[int, _end_of_range("start", "token_ids")]


def _inside(boundaries: list[int], info: ValidationInfo) -> list[int]:
    response_ids: Any = info.data.get("response_ids")
    if response_ids is not None:
        for index, boundary in enumerate(boundaries):
            if not 0 <= boundary <= len(response_ids):
                raise ValueError(f"boundaries[{index}] = {boundary} is outside the response (0..{len(response_ids)})")
    return boundaries


def _one_each(openings: list[TokenIds], info: ValidationInfo) -> list[TokenIds]:
    boundaries = info.data.get("boundaries")
    if boundaries is not None and openings and len(openings) != len(boundaries):
        raise ValueError(f"{len(openings)} lists for {len(boundaries)} boundaries; one for each, or none at all")
    return openings


class SupportRollout(_Scored):
    """Rollout with the boundaries (exclusive ends into ``response_ids``, 0 is the prompt alone) and references.

    ``openings``, if there are any: for each boundary the tokens between it and a reference.
    """

    prompt_ids: TokenIds
    response_ids: TokenIds
    boundaries: Annotated[list[int], FailFast(), Field(min_length=1, max_length=1024), AfterValidator(_inside)]
    openings: Annotated[list[TokenIds], AfterValidator(_one_each)] = Field(default=[], max_length=1024)
    references: list[SupportReference] = Field(min_length=1, max_length=256)

    def query(self) -> RolloutQuery:
        """The rollout for an engine."""
        probes = [Probe(reference.token_ids, reference.start, reference.end) for reference in self.references]
        return RolloutQuery(self.prompt_ids, self.response_ids, self.boundaries, probes, self.openings)


class SupportBody(_Model):
    """Body of ``POST /support``."""

    rollouts: Annotated[list[SupportRollout], FailFast()]


class RolloutFailure(BaseModel):
    """Why the rollout of this index was not scored."""

    rollout: int
    detail: str


class SupportAnswer(BaseModel):
    """``support[rollout][boundary][reference]``: mean log-probabilities.

    ``errors`` is there only if some rollouts are too long for the model; their support is null.
    """

    support: list[list[list[float]] | None]
    computed_tokens: int
    requested_tokens: int
    elapsed_ms: float
    errors: list[RolloutFailure] | None = None


class ScoreItem(_Scored):
    """One full sequence; scored: the mean log-probability of ``response_ids[ref_start:ref_end]``."""

    prompt_ids: TokenIds
    response_ids: TokenIds = Field(min_length=1)
    ref_start: int = Field(ge=0)
    ref_end: Annotated[int, _end_of_range("ref_start", "response_ids")]

    def query(self) -> RolloutQuery:
        """The item for an engine: a rollout of its prompt alone, with its response as the only reference."""
        probe = Probe(self.response_ids, self.ref_start, self.ref_end)
        return RolloutQuery(self.prompt_ids, np.empty(0, dtype=np.int64), [0], [probe])


class ScoreBody(_Model):
    """Body of ``POST /score``."""

    items: Annotated[list[ScoreItem], FailFast()]


class ScoresAnswer(BaseModel):
    """One score per item or pair; ``nli`` is who scored pairs, as in ``/health``."""

    scores: list[float]
    elapsed_ms: float
    nli: str | None = None


class ClusterGroup(_Model):
    """Answers to one question. ``strict``: equivalent if each entails the other; else if neither direction
    contradicts and not both are neutral."""

    group_id: Text
    question: Text
    answers: list[Text] = Field(max_length=1024)
    strict: bool = True


class ClusterBody(_Model):
    """Body of ``POST /cluster``."""

    groups: Annotated[list[ClusterGroup], FailFast()]


class ClusterInfo(BaseModel):
    """One cluster: its size, its share of the answers, its first answer, the indices of its answers."""

    count: int
    frequency: float
    reference: str
    members: list[int]


class ClusterGroupAnswer(BaseModel):
    """``semantic_ids``: cluster of each answer, 0, 1, … in order of opening."""

    group_id: str
    semantic_ids: list[int]
    cluster_info: dict[str, ClusterInfo]


class ClusterAnswer(BaseModel):
    """One result per group, in the order of the request."""

    results: list[ClusterGroupAnswer]
    elapsed_ms: float


class NliPair(_Model):
    """Scored: P(premise entails hypothesis)."""

    premise: Text
    hypothesis: Text


class NliBody(_Model):
    """Body of ``POST /nli_score``."""

    pairs: Annotated[list[NliPair], FailFast()]


class FieldError(BaseModel):
    """One field that is not valid: its place, what is wrong, and pydantic's name for that."""

    loc: list[str | int]
    msg: str
    type: str


class ErrorAnswer(BaseModel):
    """Why a request was refused: a message, or one entry per field that is not valid."""

    detail: str | list[FieldError]
