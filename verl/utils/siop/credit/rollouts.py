"""What goes into the method and what comes out: rollouts, requests to a scorer, turn rewards."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol


@dataclass
class Rollout:
    """One sampled answer to a question.

    Args:
        uid: the question's group; rollouts with the same uid form a group, in list order.
        question: the bare user question, without chat template.
        prompt_ids: tokens of the rendered prompt, without padding.
        response_ids: L tokens: assistant turns and tool observations.
        response_mask: L values, 1 on the tokens that the policy sampled.
        gold: gold answers; used by ``siop_use_gold_ref`` only.
        executed_calls: for each of the T assistant turns its tool calls that were executed, as (name, arguments in
            JSON); None if nobody recorded them.
        turn_scores: a verifier's score of each of the T assistant turns, from the agent loop; None if there is none.
        outcome: the verifier's word on the whole rollout; None if there is none.
    """

    uid: str
    question: str
    prompt_ids: list[int]
    response_ids: list[int]
    response_mask: list[int]
    gold: list[str] | None = None
    executed_calls: list[list[tuple[str, str]]] | None = None
    turn_scores: list[float] | None = None
    outcome: float | None = None


@dataclass(frozen=True)
class Reference:
    """A reference answer as a probe: ``token_ids`` follow a prefix, the mean runs over ``token_ids[start:end]``."""

    text: str
    token_ids: list[int]
    start: int
    end: int


@dataclass(frozen=True)
class SupportRequest:
    """One rollout to be scored: every reference after ``prompt_ids + response_ids[:boundary]`` for every boundary.

    ``openings`` holds the tokens that stand between each boundary's context and the references; empty: none at any.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    boundaries: list[int]
    references: list[Reference]
    openings: list[list[int]] = field(default_factory=list)

    def opened(self) -> list[tuple[int, list[int]]]:
        """Each boundary with its opening."""
        return list(zip(self.boundaries, self.openings or [[] for _ in self.boundaries], strict=True))


class SiopScorer(Protocol):
    """What the method asks of a scorer. Every call answers all of its input or raises; it never makes up a value."""

    async def cluster(self, question: str, answers: list[str]) -> list[int]:
        """Cluster ids of one question's answers, given in rollout order."""
        ...

    async def entailment(self, pairs: list[tuple[str, str]]) -> list[float]:
        """P(premise entails hypothesis) of each (premise, hypothesis)."""
        ...

    async def support(self, rollouts: list[SupportRequest]) -> list[list[list[float]]]:
        """Mean log-prob of the reference's own tokens, [rollout][boundary][reference]."""
        ...


@dataclass
class GroupRewards:
    """What the method found, one entry per rollout in the order given; for rollouts without an answer see each field.

    Args:
        turn_rewards: T rewards; empty if the rollout gets none (it has no answer).
        target_mass: target q of the rollout's cluster; 0 without an answer.
        references: reference texts of the rollout's cluster; empty without an answer.
        cluster_ids: the scorer's cluster id; None without an answer, or if the method needs no clusters.
        support: p_t at the T + 1 boundaries; empty where it was not needed.
        answers: final answer; empty if there is none.
        evidence: rho of the rollout's cluster; None where it was not needed.
        masses: m of the rollout's cluster; None where it has none.
        votes: v of the rollout's cluster; None where no votes were passed on (``siop_vote=informed``).
    """

    turn_rewards: list[list[float]]
    target_mass: list[float]
    references: list[list[str]]
    cluster_ids: list[int | None]
    support: list[list[float]]
    answers: list[str] = field(default_factory=list)
    evidence: list[float | None] = field(default_factory=list)
    masses: list[float | None] = field(default_factory=list)
    votes: list[float | None] = field(default_factory=list)
