"""A scripted agent that answers the questions well and badly, in hermes tool calls.

Its ways (:data:`WAYS`) are those that credit assignment has to tell apart: it stops after the first hop, goes on with
the wrong entity, repeats a search, searches for what nobody needs, or answers the same whatever it finds.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass

from examples.real_world.world import QUERIES, Question, answers, facts

TOOL = "search"
SYSTEM = (
    "Answer the question. To look something up, write\n"
    '<tool_call>\n{"name": "search", "arguments": {"query": "what to look for"}}\n</tool_call>\n'
    "and read the result; you may search several times. When you know the answer, write it alone, in as few words as "
    "possible, for example <answer>Mount Everest</answer>"
)

RIGHT, LAZY, WRONG, REPEATED, UNNEEDED, STALE = WAYS = ("right", "lazy", "wrong", "repeated", "unneeded", "stale")
# Shares of a mixture in which a wrong answer is often the most frequent one.
SHARES = {RIGHT: 0.2, LAZY: 0.3, WRONG: 0.15, REPEATED: 0.1, UNNEEDED: 0.1, STALE: 0.15}
# What a model that does not look would say, by what is asked for; the second where the first is right.
STALE_ANSWERS = {"capital": ("Paris", "London"), "currency": ("dollar", "euro"), "code": ("+1", "+44")}


@dataclass(frozen=True)
class Search:
    """One search turn with its result."""

    query: str
    found: str

    @property
    def text(self) -> str:
        """What the agent writes."""
        return call_text(self.query)


@dataclass(frozen=True)
class Transcript:
    """One rollout: searches, then an answer; ``way`` is one of :data:`WAYS`."""

    way: str
    searches: tuple[Search, ...]
    answer: str

    @property
    def answer_text(self) -> str:
        """What the agent writes in its last turn."""
        return f"<answer>{self.answer}</answer>"


def call_text(query: str) -> str:
    """A hermes call of the search tool."""
    call = {"name": TOOL, "arguments": {"query": query}}
    return f"<tool_call>\n{json.dumps(call, ensure_ascii=False)}\n</tool_call>"


def stale_answer(question: Question) -> str:
    """The answer that is given whatever is found; never the right one."""
    first, second = STALE_ANSWERS[question.asked]
    return second if question.gold == first else first


def wrong_entities(question: Question, count: int, rng: random.Random) -> list[str]:
    """Answers of the kind asked for that are neither right, stale, nor in the question."""
    excluded = {question.gold, stale_answer(question), *question.chain}
    return rng.sample([name for name in answers(question.asked) if name not in excluded], count)


def transcript(question: Question, way: str, search: Callable[[str], str], rng: random.Random) -> Transcript:
    """Plays one way.

    - ``right``: both hops, the right answer
    - ``lazy``: the first hop, the intermediate entity
    - ``wrong``: the first hop, then the question of the second about another entity, and what is found there
    - ``repeated``: as right, but one of the two searches twice
    - ``unneeded``: as right, with a search for something else before the first, between the two or after them
    - ``stale``: none, one or both hops, or searches for something else; always :func:`stale_answer`

    Args:
        question: what to answer.
        way: one of :data:`WAYS`.
        search: the tool, from query to result text.
        rng: source of randomness.
    """
    first, second = question.queries

    def played(queries: list[str], answer: str) -> Transcript:
        return Transcript(way, tuple(Search(query, search(query)) for query in queries), answer)

    def elsewhere() -> str:
        other = rng.choice([name for name in answers("country") if name not in question.chain])
        relation = rng.choice([name for name in ("capital", "currency", "code") if name != question.asked])
        return QUERIES[relation].format(s=other)

    if way == RIGHT:
        return played([first, second], question.gold)
    if way == LAZY:
        return played([first], question.bridge)
    if way == WRONG:
        by_answer = {fact.object: fact.subject for fact in facts() if fact.relation == question.asked}
        answer = wrong_entities(question, 1, rng)[0]
        return played([first, QUERIES[question.asked].format(s=by_answer[answer])], answer)
    if way == REPEATED:
        return played(rng.choice([[first, first, second], [first, second, second]]), question.gold)
    if way == UNNEEDED:
        queries = [first, second]
        queries.insert(rng.randrange(3), elsewhere())
        return played(queries, question.gold)
    if way == STALE:
        queries = rng.choice([[], [first], [elsewhere()], [first, second], [elsewhere(), elsewhere()]])
        return played(queries, stale_answer(question))
    raise ValueError(f"there is no way {way!r}; there are {', '.join(WAYS)}")


def mixture(question: Question, count: int, search: Callable[[str], str], seed: int = 0) -> list[Transcript]:
    """``count`` transcripts of one question, drawn by :data:`SHARES`; a larger number begins with the smaller one."""
    found = []
    for number in range(count):
        rng = random.Random(f"real world {seed}: {number} of {question.text}")
        (way,) = rng.choices(list(SHARES), weights=list(SHARES.values()))
        found.append(transcript(question, way, search, rng))
    return found


def needed_facts_found(question: Question, played: Transcript) -> list[bool]:
    """For each turn, whether it is the right one: its search returned the next needed fact, or it gives the right
    answer after both were found."""
    found, labels = 0, []
    for search in played.searches:
        before = found
        while found < 2 and question.facts[found].passage in search.found:
            found += 1
        labels.append(found > before)
    return [*labels, found == 2 and played.answer == question.gold]
