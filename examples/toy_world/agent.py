"""A scripted agent that answers the toy questions imperfectly; the warm start imitates it.

Its faults are the ones that reinforcement learning is to remove: it guesses without searching, leaves the relation out
of its query or asks for a wrong one, copies from the wrong passage, repeats searches and stops after the first hop. In
``founder_spouse`` it mostly stops with the founder, so that the majority answer is wrong. In the chains it makes fewer
faults at each hop and does not stop early, unless a build asks for that: there are more hops to make them at.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from examples.toy_world.tokenizer import answer_turn_text, search_turn_text
from examples.toy_world.world import CHAINS, KINDS, MIXED, RELATIONS, STALE_ANSWERS, TWO_HOP, Question, World


@dataclass(frozen=True)
class Faults:
    """Probabilities of the agent's faults.

    Args:
        guess: answer at once with a random entity.
        lazy_first, lazy_later: a query of the entity alone, without the relation, in the first and in later hops.
        wrong_first, wrong_later: a query for a related relation instead.
        miscopy: take the value of another passage although the right one was found.
        early: answer with the bridge entity after a hop that is not the last.
        redundant: repeat the search of a later hop (half as often that of the first); search for what the question
            states.
    """

    guess: float = 0.04
    lazy_first: float = 0.15
    wrong_first: float = 0.10
    miscopy: float = 0.08
    early: float = 0.08
    redundant: float = 0.12
    lazy_later: float = 0.20
    wrong_later: float = 0.10


# Searches after which the agent answers with what it has.
MAX_SEARCHES = 7

_TYPICAL = Faults()
_IN_CHAINS = Faults(
    guess=0.02,
    lazy_first=0.12,
    wrong_first=0.10,
    miscopy=0.05,
    early=0.0,
    redundant=0.15,
    lazy_later=0.12,
    wrong_later=0.10,
)
IMPERFECT = (
    {key: _TYPICAL for key in TWO_HOP.templates}
    | {key: _IN_CHAINS for key in CHAINS.templates}
    | {
        "chief_born": replace(_TYPICAL, lazy_later=0.65, wrong_later=0.05, redundant=0.05, early=0.05),
        "chief_lives": replace(_TYPICAL, redundant=0.45, wrong_later=0.05),
        "founder_spouse": replace(_TYPICAL, early=0.60, lazy_later=0.10, wrong_later=0.05, redundant=0.05),
        "base_mayor": replace(_TYPICAL, guess=0.35),
    }
    # Here a search is always one too many.
    | {key: replace(_TYPICAL, redundant=0.35) for key, template in MIXED.templates.items() if template.given}
)
PERFECT = {key: Faults(*[0.0] * 8) for kind in KINDS.values() for key in kind.templates}
# Always copies what it found, but from a hop too early or of the wrong relation now and then: copying is learnt fast
# when the text before a value always determines it.
COPYING = {
    key: replace(clean, early=0.25, redundant=0.05, wrong_first=0.25, wrong_later=0.25)
    for key, clean in PERFECT.items()
}

_CONFUSED_WITH = {
    "founder": ("chief",),
    "chief": ("founder",),
    "base": ("founder", "chief"),
    "born": ("lives", "visited"),
    "lives": ("born", "visited"),
    "spouse": ("born", "lives"),
    "mayor": ("twin",),
    "twin": ("mayor",),
}
# What the agent does after a lazy query that missed: search properly, make something up, or take what it sees.
_RETRY, _INVENT = 0.35, 0.50
_INVENTED_BRIDGE = 0.30

_PASSAGES = [
    (relation, re.compile(re.escape(spec.passage).replace(r"\{s\}", "(.+)").replace(r"\{o\}", "(.+)")))
    for relation, spec in RELATIONS.items()
]


@dataclass(frozen=True)
class Segment:
    """A piece of a trajectory: an assistant turn, or the tool's result after it."""

    text: str
    from_agent: bool


def read_observation(observation: str) -> list[tuple[str, str, str]]:
    """(subject, relation, object) of each passage in a tool result, in its order."""
    found = []
    for line in observation.splitlines():
        # Decoded tokens have a space at the end of a line.
        body = line.split("] ", 1)[-1].strip()
        for relation, pattern in _PASSAGES:
            match = pattern.fullmatch(body)
            if match:
                found.append((match[1], relation, match[2]))
                break
    return found


def trajectory(
    question: Question,
    world: World,
    search: Callable[[str], str],
    faults: dict[str, Faults],
    rng: random.Random,
    stale: float = 0.0,
) -> list[Segment]:
    """Plays one episode after the prompt.

    Args:
        question: what to answer.
        world: supplies random entities for guesses.
        search: the tool, from query text to result text.
        faults: fault probabilities of each template.
        rng: source of randomness.
        stale: probability of answering at once with the stale answer; above 0 the agent gives that answer, instead of
            a random entity, wherever it does not know.

    Returns:
        Assistant turns (text with the end token) and tool results (bare content) in turn, an answer last.
    """
    template, p = world.kind.templates[question.template], faults[question.template]
    segments: list[Segment] = []

    def searches() -> int:
        return len(segments) // 2

    def look_up(relation: str, query: str) -> list[tuple[str, str, str]]:
        segments.append(Segment(search_turn_text(relation, query), True))
        segments.append(Segment(search(query), False))
        return read_observation(segments[-1].text)

    def answer(value: str) -> list[Segment]:
        return [*segments, Segment(answer_turn_text(value), True)]

    def random_entity(relation: str) -> str:
        return rng.choice(world.entities[RELATIONS[relation].object])

    def guess() -> list[Segment]:
        relation = template.relations[-1]
        return answer(STALE_ANSWERS[RELATIONS[relation].object] if stale else random_entity(relation))

    def hop(subject: str, relation: str, lazy: float, wrong: float, redundant: float) -> str | None:
        """Searches for the relation; the value taken, or None when nothing usable was found."""
        draw, asked = rng.random(), relation
        if draw < wrong:
            asked = rng.choice(_CONFUSED_WITH[relation])
        is_lazy = wrong <= draw < wrong + lazy
        query = subject if is_lazy else f"{asked} {subject}"
        seen = look_up(relation, query)
        if rng.random() < redundant and searches() < MAX_SEARCHES:
            seen = look_up(relation, query)
        if is_lazy and not any(s == subject and r == relation for s, r, _ in seen):
            draw = rng.random()
            if draw < _RETRY and searches() < MAX_SEARCHES:
                seen = look_up(relation, f"{relation} {subject}")
            elif draw < _RETRY + _INVENT:
                return None
        hits = [value for s, r, value in seen if s == subject and r == asked]
        wanted = RELATIONS[relation].object
        others = [v for s, r, v in seen if not (s == subject and r == asked) and RELATIONS[r].object == wanted]
        if others and (not hits or rng.random() < p.miscopy):
            return rng.choice(others)
        return hits[0] if hits else None

    if rng.random() < max(p.guess, stale):
        return guess()
    if template.given:
        if rng.random() < p.redundant:
            look_up(template.relations[0], f"{template.relations[0]} {question.company}")
        return answer(random_entity(template.relations[0]) if rng.random() < p.miscopy else question.gold)
    value: str | None = question.company
    for number, relation in enumerate(template.relations):
        if number:
            if value is None and rng.random() < _INVENTED_BRIDGE:
                value = random_entity(template.relations[number - 1])
            if value is None:
                return guess()
            if rng.random() < p.early or searches() >= MAX_SEARCHES:
                return answer(value)
        lazy, wrong, redundant = (
            (p.lazy_later, p.wrong_later, p.redundant) if number else (p.lazy_first, p.wrong_first, p.redundant / 2)
        )
        assert value is not None
        value = hop(value, relation, lazy, wrong, redundant)
    return guess() if value is None else answer(value)
