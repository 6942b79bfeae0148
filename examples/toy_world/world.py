"""The toy world: made-up companies, people and towns, one passage per fact, and questions that need two searches.

Everything follows from a seed. The name words (and so the vocabulary) and the split of name combinations do not: they
are the same for every seed, so that a model trained with one seed can be evaluated on the facts of another, and a name
of a held-out entity is never the name of a training entity, whatever the seeds.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Final

ENTITY_TYPES: Final = ("company", "person", "town")
WORDS_PER_POSITION: Final = 32
HELD_OUT_SHARE: Final = 0.25
_ENDINGS: Final = {"company": ("co", "ex"), "person": ("a", "son"), "town": ("o", "ville")}


@dataclass(frozen=True)
class Relation:
    """A relation between a subject and an object type, with the wording of its passages."""

    subject: str
    object: str
    passage: str


RELATIONS: Final = MappingProxyType(
    {
        "founder": Relation("company", "person", "the founder of {s} is {o} ."),
        "chief": Relation("company", "person", "the chief of {s} is {o} ."),
        "base": Relation("company", "town", "the base of {s} is {o} ."),
        "born": Relation("person", "town", "{s} was born in {o} ."),
        "lives": Relation("person", "town", "{s} lives in {o} ."),
        "spouse": Relation("person", "person", "the spouse of {s} is {o} ."),
        "visited": Relation("person", "town", "{s} once visited {o} ."),
        "mayor": Relation("town", "person", "the mayor of {s} is {o} ."),
        "twin": Relation("town", "town", "the twin of {s} is {o} ."),
    }
)


@dataclass(frozen=True)
class Template:
    """A question about the second relation of the object of the first one, for a company."""

    first: str
    second: str
    wording: str


TEMPLATES: Final = MappingProxyType(
    {
        f"{first}_{second}": Template(first, second, wording)
        for first, second, wording in (
            ("founder", "born", "where was the founder of {x} born ?"),
            ("founder", "lives", "where lives the founder of {x} ?"),
            ("founder", "spouse", "who is the spouse of the founder of {x} ?"),
            ("chief", "born", "where was the chief of {x} born ?"),
            ("chief", "lives", "where lives the chief of {x} ?"),
            ("chief", "spouse", "who is the spouse of the chief of {x} ?"),
            ("base", "mayor", "who is the mayor of the base of {x} ?"),
        )
    }
)

TRAIN_SIZES: Final = MappingProxyType({"company": 200, "person": 300, "town": 150})
HELD_OUT_SIZES: Final = MappingProxyType({"company": 100, "person": 150, "town": 80})


@dataclass(frozen=True)
class Fact:
    subject: str
    relation: str
    object: str

    @property
    def passage(self) -> str:
        return RELATIONS[self.relation].passage.format(s=self.subject, o=self.object)


@dataclass(frozen=True)
class Question:
    """A two-hop question; ``bridge`` is the entity that the first hop finds, ``gold`` the answer."""

    text: str
    template: str
    company: str
    bridge: str
    gold: str


@lru_cache(maxsize=1)
def name_words() -> dict[str, tuple[tuple[str, ...], tuple[str, ...]]]:
    """First and last name words of each entity type; a word belongs to one type and one position."""
    rng = random.Random("toy world: name words")
    consonants, vowels = "bdfgklmnprstvz", "aeiou"
    used: set[str] = set()

    def draw(ending: str) -> tuple[str, ...]:
        words: list[str] = []
        while len(words) < WORDS_PER_POSITION:
            stem = rng.choice(consonants) + rng.choice(vowels) + rng.choice(consonants)
            word = stem + (rng.choice(vowels) if rng.random() < 0.4 else "") + ending
            if word not in used:
                used.add(word)
                words.append(word)
        return tuple(words)

    return {kind: (draw(first), draw(last)) for kind, (first, last) in _ENDINGS.items()}


@lru_cache(maxsize=1)
def name_split() -> tuple[dict[str, tuple[str, ...]], dict[str, tuple[str, ...]]]:
    """(training names, held-out names) of each type: disjoint combinations of the same words."""
    rng = random.Random("toy world: name split")
    train, held_out = {}, {}
    for kind, (firsts, lasts) in name_words().items():
        names = [f"{first} {last}" for first in firsts for last in lasts]
        rng.shuffle(names)
        cut = round(len(names) * HELD_OUT_SHARE)
        held_out[kind], train[kind] = tuple(names[:cut]), tuple(names[cut:])
    return train, held_out


def vocabulary() -> list[str]:
    """All words that questions, passages, searches and answers are made of, in a fixed order."""
    wordings = [r.passage for r in RELATIONS.values()] + [t.wording for t in TEMPLATES.values()]
    function_words = {w for text in wordings for w in text.split() if "{" not in w} | set(RELATIONS)
    shell = ["find", "done", "nothing", "found", "[1]", "[2]", "[3]"]
    names = [word for positions in name_words().values() for words in positions for word in words]
    return [*shell, *sorted(function_words), *names]


class World:
    """Entities drawn from a pool of names, and one fact for each entity and relation.

    A company's founder and chief differ; a person was born, lives and visited in three different towns.

    Args:
        names: the pool of names of each entity type.
        sizes: how many entities of each type.
        seed: any text; equal arguments give an equal world.

    Raises:
        ValueError: a pool has fewer names than asked for.
    """

    def __init__(self, names: dict[str, tuple[str, ...]], sizes: dict[str, int], seed: str) -> None:
        rng = random.Random(seed)
        for kind in ENTITY_TYPES:
            if sizes[kind] > len(names[kind]):
                raise ValueError(f"{sizes[kind]} entities of type {kind} asked for, but only {len(names[kind])} names")
        self.entities = {kind: rng.sample(names[kind], sizes[kind]) for kind in ENTITY_TYPES}
        self._objects: dict[tuple[str, str], str] = {}
        for relation, spec in RELATIONS.items():
            for subject in self.entities[spec.subject]:
                taken = {subject} | {self._objects.get((subject, other), "") for other in _distinct_from(relation)}
                value = rng.choice(self.entities[spec.object])
                while value in taken:
                    value = rng.choice(self.entities[spec.object])
                self._objects[subject, relation] = value

    def lookup(self, subject: str, relation: str) -> str:
        return self._objects[subject, relation]

    def facts(self) -> list[Fact]:
        return [Fact(subject, relation, value) for (subject, relation), value in self._objects.items()]

    def questions(self) -> list[Question]:
        """Every template for every company."""
        out = []
        for company in self.entities["company"]:
            for key, template in TEMPLATES.items():
                bridge = self.lookup(company, template.first)
                gold = self.lookup(bridge, template.second)
                out.append(Question(template.wording.format(x=company), key, company, bridge, gold))
        return out


def _distinct_from(relation: str) -> tuple[str, ...]:
    groups = (("founder", "chief"), ("born", "lives", "visited"))
    return next((g for g in groups if relation in g), ())


def train_world(seed: int) -> World:
    """The world of the training questions."""
    return World(name_split()[0], dict(TRAIN_SIZES), f"toy world {seed}: train")


def held_out_world(seed: int) -> World:
    """The world of the evaluation questions: names that no training or warm-start world uses."""
    return World(name_split()[1], dict(HELD_OUT_SIZES), f"toy world {seed}: held out")


def warm_start_world(seed: int, index: int) -> World:
    """A small world for supervised training; many of them, so that only copying, not facts, can be learnt."""
    return World(name_split()[0], {"company": 40, "person": 80, "town": 40}, f"toy world {seed}: warm start {index}")


def sample_questions(world: World, count: int, seed: int) -> list[Question]:
    """``count`` questions without repetition, the templates as evenly as they divide, in random order.

    Raises:
        ValueError: the world has fewer than ``count`` questions.
    """
    rng = random.Random(f"toy world {seed}: questions")
    by_template: dict[str, list[Question]] = {key: [] for key in TEMPLATES}
    for question in world.questions():
        by_template[question.template].append(question)
    for group in by_template.values():
        rng.shuffle(group)
    rounds = zip(*by_template.values(), strict=True)
    pool = [question for one_of_each in rounds for question in one_of_each]
    if not 0 < count <= len(pool):
        raise ValueError(f"this world has {len(pool)} questions; {count} were asked for")
    chosen = pool[:count]
    rng.shuffle(chosen)
    return chosen


def corpus(seed: int) -> list[dict[str, str]]:
    """Passages of both worlds as retriever documents, in random order so that ties in the ranking mean nothing."""
    documents = [
        {"id": f"{part}-{i}", "contents": fact.passage}
        for part, world in (("train", train_world(seed)), ("heldout", held_out_world(seed)))
        for i, fact in enumerate(world.facts())
    ]
    random.Random(f"toy world {seed}: corpus").shuffle(documents)
    return documents
