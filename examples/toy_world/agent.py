"""A scripted agent that answers the toy questions imperfectly; the warm start imitates it.

Its faults are the ones that reinforcement learning is to remove: it guesses without searching, leaves the relation out
of its query or asks for a wrong one, copies from the wrong passage, repeats searches and stops after the first hop. In
``founder_spouse`` it mostly stops with the founder, so that the majority answer is wrong.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from examples.toy_world.tokenizer import answer_turn_text, search_turn_text
from examples.toy_world.world import RELATIONS, TEMPLATES, Question, World


@dataclass(frozen=True)
class Faults:
    """Probabilities of the agent's faults.

    Args:
        guess: answer at once with a random entity.
        lazy_first, lazy_second: a query of the entity alone, without the relation.
        wrong_first, wrong_second: a query for a related relation instead.
        miscopy: take the value of another passage although the right one was found.
        early: answer with the bridge entity after the first hop.
        redundant: repeat the search of the second hop (half as often that of the first).
    """

    guess: float = 0.04
    lazy_first: float = 0.15
    wrong_first: float = 0.10
    miscopy: float = 0.08
    early: float = 0.08
    redundant: float = 0.12
    lazy_second: float = 0.20
    wrong_second: float = 0.10


_TYPICAL = Faults()
IMPERFECT = {key: _TYPICAL for key in TEMPLATES} | {
    "chief_born": replace(_TYPICAL, lazy_second=0.65, wrong_second=0.05, redundant=0.05, early=0.05),
    "chief_lives": replace(_TYPICAL, redundant=0.45, wrong_second=0.05),
    "founder_spouse": replace(_TYPICAL, early=0.60, lazy_second=0.10, wrong_second=0.05, redundant=0.05),
    "base_mayor": replace(_TYPICAL, guess=0.35),
}
PERFECT = {key: Faults(*[0.0] * 8) for key in TEMPLATES}
# Always copies what it found, but from a hop too early or of the wrong relation now and then: copying is learnt fast
# when the text before a value always determines it.
COPYING = {
    key: replace(clean, early=0.25, redundant=0.05, wrong_first=0.25, wrong_second=0.25)
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
        body = line.split("] ", 1)[-1]
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
) -> list[Segment]:
    """Plays one episode after the prompt.

    Args:
        question: what to answer.
        world: supplies random entities for guesses.
        search: the tool, from query text to result text.
        faults: fault probabilities of each template.
        rng: source of randomness.

    Returns:
        Assistant turns (text with the end token) and tool results (bare content) in turn, an answer last.
    """
    template, p = TEMPLATES[question.template], faults[question.template]
    segments: list[Segment] = []

    def look_up(relation: str, query: str) -> list[tuple[str, str, str]]:
        segments.append(Segment(search_turn_text(relation, query), True))
        segments.append(Segment(search(query), False))
        return read_observation(segments[-1].text)

    def answer(value: str) -> list[Segment]:
        return [*segments, Segment(answer_turn_text(value), True)]

    def random_entity(relation: str) -> str:
        return rng.choice(world.entities[RELATIONS[relation].object])

    def hop(subject: str, relation: str, lazy: float, wrong: float, redundant: float) -> str | None:
        """Searches for the relation; the value taken, or None when nothing usable was found."""
        draw, asked = rng.random(), relation
        if draw < wrong:
            asked = rng.choice(_CONFUSED_WITH[relation])
        is_lazy = wrong <= draw < wrong + lazy
        query = subject if is_lazy else f"{asked} {subject}"
        seen = look_up(relation, query)
        if rng.random() < redundant:
            seen = look_up(relation, query)
        if is_lazy and not any(s == subject and r == relation for s, r, _ in seen):
            draw = rng.random()
            if draw < _RETRY:
                seen = look_up(relation, f"{relation} {subject}")
            elif draw < _RETRY + _INVENT:
                return None
        hits = [value for s, r, value in seen if s == subject and r == asked]
        wanted = RELATIONS[relation].object
        others = [v for s, r, v in seen if not (s == subject and r == asked) and RELATIONS[r].object == wanted]
        if others and (not hits or rng.random() < p.miscopy):
            return rng.choice(others)
        return hits[0] if hits else None

    if rng.random() < p.guess:
        return answer(random_entity(template.second))
    bridge = hop(question.company, template.first, p.lazy_first, p.wrong_first, p.redundant / 2)
    if bridge is None and rng.random() < _INVENTED_BRIDGE:
        bridge = random_entity(template.first)
    if bridge is None:
        return answer(random_entity(template.second))
    if rng.random() < p.early:
        return answer(bridge)
    value = hop(bridge, template.second, p.lazy_second, p.wrong_second, p.redundant)
    return answer(random_entity(template.second) if value is None else value)
