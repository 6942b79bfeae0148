"""Bodies and answers of the scoring service's endpoints, and their limits that do not depend on its options."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, Field, ValidationInfo, field_validator

if TYPE_CHECKING:
    from verl.utils.siop.scorer.engines.base import TokenArray as TokenIds
else:
    # An array at once: a list of Python integers takes ten times the memory, and time to throw away. The first wrong id
    # is enough of an error.
    TokenIds = Annotated[
        list[Annotated[int, Field(ge=0, lt=2**31)]],
        FailFast(),
        AfterValidator(lambda token_ids: np.array(token_ids, dtype=np.int64)),
    ]

MAX_TEXT = 200_000  # characters

Text = Annotated[str, Field(max_length=MAX_TEXT)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


def _check_range(start: int | None, end: int, size: int | None) -> int:
    # None: the field itself was not valid and has its own error.
    if start is not None and size is not None and not start < end <= size:
        raise ValueError(f"{start}..{end} is not a non-empty range of {size} tokens")
    return end


class SupportReference(_Model):
    """Reference to score: the mean log-probability of ``token_ids[start:end]`` is taken."""

    token_ids: TokenIds = Field(min_length=1)
    start: int = Field(ge=0)
    end: int

    @field_validator("end")
    @classmethod
    def _range(cls, end: int, info: ValidationInfo) -> int:
        token_ids = info.data.get("token_ids")
        return _check_range(info.data.get("start"), end, None if token_ids is None else len(token_ids))


class SupportRollout(_Model):
    """Rollout with the boundaries (exclusive ends into ``response_ids``, 0 is the prompt alone) and references."""

    prompt_ids: TokenIds
    response_ids: TokenIds
    boundaries: Annotated[list[int], FailFast()] = Field(min_length=1, max_length=1024)
    references: list[SupportReference] = Field(min_length=1, max_length=256)

    @field_validator("boundaries")
    @classmethod
    def _inside(cls, boundaries: list[int], info: ValidationInfo) -> list[int]:
        response_ids = info.data.get("response_ids")
        if response_ids is not None:
            for index, boundary in enumerate(boundaries):
                if not 0 <= boundary <= len(response_ids):
                    raise ValueError(
                        f"boundaries[{index}] = {boundary} is outside the response (0..{len(response_ids)})"
                    )
        return boundaries


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


class ScoreItem(_Model):
    """One full sequence; scored: the mean log-probability of ``response_ids[ref_start:ref_end]``."""

    prompt_ids: TokenIds
    response_ids: TokenIds = Field(min_length=1)
    ref_start: int = Field(ge=0)
    ref_end: int

    @field_validator("ref_end")
    @classmethod
    def _range(cls, ref_end: int, info: ValidationInfo) -> int:
        response_ids = info.data.get("response_ids")
        return _check_range(info.data.get("ref_start"), ref_end, None if response_ids is None else len(response_ids))


class ScoreBody(_Model):
    """Body of ``POST /score``."""

    items: Annotated[list[ScoreItem], FailFast()]


class ScoresAnswer(BaseModel):
    """One score per item or pair."""

    scores: list[float]
    elapsed_ms: float


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
