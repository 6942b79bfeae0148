"""The toy worlds: made-up companies, people and towns, one passage per fact, and questions that need several searches.

Three kinds share names and passages: ``two_hop`` asks for two relations in a row, ``chains`` for three or four,
``mixed`` for two or for one that the question itself states.
Everything follows from a seed. The name words (and so the vocabulary) and the split of name combinations do not: they
are the same for every seed, so that a model trained with one seed can be evaluated on the facts of another, and a name
of a held-out entity is never the name of a training entity, whatever the seeds.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
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
    """A question about the entity that a company's relations lead to, one after another.

    Args:
        relations: that lead to the answer.
        wording: of the question, with ``{x}`` for the company.
        given: the wording also states the answer, as ``{answer}``: no search is needed.
    """

    relations: tuple[str, ...]
    wording: str
    given: bool = False

    @property
    def depth(self) -> int:
        """Searches that the question needs."""
        return 0 if self.given else len(self.relations)


@dataclass(frozen=True)
class Kind:
    """A family of worlds.

    Args:
        name: its name on the command line.
        templates: the questions asked for every company.
        paired: relations that hold both ways, so that a search for one finds no third entity.
        avoided: names that no entity has.
    """

    name: str
    templates: Mapping[str, Template]
    paired: tuple[str, ...] = ()
    avoided: frozenset[str] = field(default=frozenset())

    @property
    def data_source(self) -> str:
        return f"toy_{self.name}"


def _templates(*wordings: tuple[tuple[str, ...], str]) -> Mapping[str, Template]:
    return MappingProxyType({"_".join(relations): Template(relations, wording) for relations, wording in wordings})


# An answer that the agent gives instead of searching (``build --stale``), for each type of answer.
STALE_ANSWERS: Final = MappingProxyType({"person": "gosa pakuson", "town": "dido pagville"})

TWO_HOP: Final = Kind(
    "two_hop",
    _templates(
        (("founder", "born"), "where was the founder of {x} born ?"),
        (("founder", "lives"), "where lives the founder of {x} ?"),
        (("founder", "spouse"), "who is the spouse of the founder of {x} ?"),
        (("chief", "born"), "where was the chief of {x} born ?"),
        (("chief", "lives"), "where lives the chief of {x} ?"),
        (("chief", "spouse"), "who is the spouse of the chief of {x} ?"),
        (("base", "mayor"), "who is the mayor of the base of {x} ?"),
    ),
)
CHAINS: Final = Kind(
    "chains",
    _templates(
        (("founder", "spouse", "born"), "where was the spouse of the founder of {x} born ?"),
        (("chief", "spouse", "lives"), "where lives the spouse of the chief of {x} ?"),
        (("base", "mayor", "spouse"), "who is the spouse of the mayor of the base of {x} ?"),
        (
            ("founder", "spouse", "born", "mayor"),
            "who is the mayor of where the spouse of the founder of {x} was born ?",
        ),
        (("chief", "spouse", "lives", "mayor"), "who is the mayor of where the spouse of the chief of {x} lives ?"),
        (("base", "mayor", "spouse", "born"), "where was the spouse of the mayor of the base of {x} born ?"),
        (("base", "twin", "mayor", "lives"), "where lives the mayor of the twin of the base of {x} ?"),
        (
            ("founder", "born", "mayor", "spouse"),
            "who is the spouse of the mayor of where the founder of {x} was born ?",
        ),
    ),
    paired=("spouse", "twin"),
    avoided=frozenset(STALE_ANSWERS.values()),
)
# Half of the questions need no search: they state the fact that they ask for.
_STATED: Final = MappingProxyType(
    {
        f"stated_{relation}": Template(
            (relation,),
            f"{RELATIONS[relation].passage.format(s='{x}', o='{answer}')} {asked} is the {relation} of {{x}} ?",
            given=True,
        )
        for relation, asked in (("founder", "who"), ("chief", "who"), ("base", "where"))
    }
)
MIXED: Final = Kind(
    "mixed",
    MappingProxyType({key: TWO_HOP.templates[key] for key in ("founder_born", "chief_lives", "base_mayor")} | _STATED),
)
KINDS: Final = MappingProxyType({kind.name: kind for kind in (TWO_HOP, CHAINS, MIXED)})

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
    """A question; ``chain`` holds the company, what each hop finds and the answer, ``depth`` the searches it needs."""

    text: str
    template: str
    chain: tuple[str, ...]
    depth: int

    @property
    def company(self) -> str:
        return self.chain[0]

    @property
    def bridge(self) -> str:
        """What the last hop but one finds."""
        return self.chain[-2]

    @property
    def gold(self) -> str:
        return self.chain[-1]


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
    # The same for all kinds: what is built for one can be loaded for another.
    wordings = [r.passage for r in RELATIONS.values()] + [t.wording for t in TWO_HOP.templates.values()]
    function_words = {w for text in wordings for w in text.split() if "{" not in w} | set(RELATIONS)
    shell = ["find", "done", "nothing", "found", "[1]", "[2]", "[3]"]
    names = [word for positions in name_words().values() for words in positions for word in words]
    return [*shell, *sorted(function_words), *names]


class World:
    """Entities drawn from a pool of names, and one fact for each entity and relation.

    A company's founder and chief differ; a person was born, lives and visited in three different towns.

    Args:
        names: the pool of names of each entity type.
        sizes: how many entities of each type, even where the kind pairs them.
        seed: any text; equal arguments give an equal world.
        kind: the questions, and which relations are paired.

    Raises:
        ValueError: a pool has fewer names than asked for.
    """

    def __init__(
        self, names: Mapping[str, tuple[str, ...]], sizes: Mapping[str, int], seed: str, kind: Kind = TWO_HOP
    ) -> None:
        rng = random.Random(seed)
        self.kind = kind
        pools = {entity: [name for name in names[entity] if name not in kind.avoided] for entity in ENTITY_TYPES}
        for entity, pool in pools.items():
            if sizes[entity] > len(pool):
                raise ValueError(f"{sizes[entity]} entities of type {entity} asked for, but only {len(pool)} names")
        self.entities = {entity: rng.sample(pools[entity], sizes[entity]) for entity in ENTITY_TYPES}
        self._objects: dict[tuple[str, str], str] = {}
        for relation, spec in RELATIONS.items():
            subjects = self.entities[spec.subject]
            if relation in kind.paired:
                order = rng.sample(subjects, len(subjects))
                for one, other in zip(order[::2], order[1::2], strict=True):
                    self._objects[one, relation], self._objects[other, relation] = other, one
                continue
            for subject in subjects:
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
        """Every template for every company, but for chains that come back to an entity."""
        out = []
        for company in self.entities["company"]:
            for key, template in self.kind.templates.items():
                chain = [company]
                for relation in template.relations:
                    chain.append(self.lookup(chain[-1], relation))
                if len(set(chain)) == len(chain):
                    text = template.wording.format(x=company, answer=chain[-1])
                    out.append(Question(text, key, tuple(chain), template.depth))
        return out


def _distinct_from(relation: str) -> tuple[str, ...]:
    groups = (("founder", "chief"), ("born", "lives", "visited"))
    return next((g for g in groups if relation in g), ())


def train_world(seed: int, kind: Kind = TWO_HOP) -> World:
    """The world of the training questions."""
    return World(name_split()[0], TRAIN_SIZES, f"toy world {seed}: train", kind)


def held_out_world(seed: int, kind: Kind = TWO_HOP) -> World:
    """The world of the evaluation questions: names that no training or warm-start world uses."""
    return World(name_split()[1], HELD_OUT_SIZES, f"toy world {seed}: held out", kind)


def warm_start_world(seed: int, index: int, kind: Kind = TWO_HOP) -> World:
    """A small world for supervised training; many of them, so that only copying, not facts, can be learnt."""
    sizes = {"company": 40, "person": 80, "town": 40}
    return World(name_split()[0], sizes, f"toy world {seed}: warm start {index}", kind)


def sample_questions(world: World, count: int, seed: int) -> list[Question]:
    """``count`` questions without repetition, the templates as evenly as they divide, in random order.

    Raises:
        ValueError: the world has fewer than ``count`` questions.
    """
    rng = random.Random(f"toy world {seed}: questions")
    by_template: dict[str, list[Question]] = {key: [] for key in world.kind.templates}
    for question in world.questions():
        by_template[question.template].append(question)
    for group in by_template.values():
        rng.shuffle(group)
    # As many rounds as the template with the fewest questions has.
    rounds = zip(*by_template.values(), strict=False)
    pool = [question for one_of_each in rounds for question in one_of_each]
    if not 0 < count <= len(pool):
        raise ValueError(f"this world has {len(pool)} questions, as many of each template; {count} were asked for")
    chosen = pool[:count]
    rng.shuffle(chosen)
    return chosen


def corpus(seed: int, kind: Kind = TWO_HOP) -> list[dict[str, str]]:
    """Passages of both worlds as retriever documents, in random order so that ties in the ranking mean nothing."""
    documents = [
        {"id": f"{part}-{i}", "contents": fact.passage}
        for part, world in (("train", train_world(seed, kind)), ("heldout", held_out_world(seed, kind)))
        for i, fact in enumerate(world.facts())
    ]
    random.Random(f"toy world {seed}: corpus").shuffle(documents)
    return documents
