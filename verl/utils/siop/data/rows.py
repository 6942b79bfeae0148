"""Rows of the data that is written: one fixed schema, and what is said of a question beside its text."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from verl.utils.siop.data.questions import Question
from verl.utils.siop.nli_clustering import normalize_answer

# verl's RL format. Every file has it, so that several are read as one table.
SCHEMA = pa.schema(
    [
        ("data_source", pa.string()),
        ("agent_name", pa.string()),
        ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("ability", pa.string()),
        (
            "reward_model",
            pa.struct([("style", pa.string()), ("ground_truth", pa.struct([("target", pa.list_(pa.string()))]))]),
        ),
        (
            "extra_info",
            pa.struct(
                [
                    ("index", pa.int64()),
                    ("id", pa.string()),
                    ("set", pa.string()),
                    ("split", pa.string()),
                    ("question", pa.string()),
                    ("answer_type", pa.string()),
                    ("reachable", pa.bool_()),
                    ("duplicate_of", pa.string()),
                ]
            ),
        ),
    ]
)

_MONTH = r"(?:jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*"
_DATE = re.compile(
    rf"(?:1\d{{3}}|20\d{{2}})|\d{{4}}-\d{{1,2}}-\d{{1,2}}|(?=.*\d)(?:\d+\w*\s+)?(?:of\s+)?{_MONTH}[\s\d,]*"
)
_NUMBER = re.compile(r"[-+]?[$£€]?\d[\d,. ]*(?:%|percent|thousand|million|billion|trillion)?")


def answer_type(aliases: Sequence[str]) -> str:
    """``yes_no``, ``date`` (a year from 1000 to 2099, or with a month), ``number`` or ``span``, by the first alias.

    >>> [answer_type([alias]) for alias in ("Yes", "4 July 1776", "1969", "3,000", "Paris")]
    ['yes_no', 'date', 'date', 'number', 'span']
    """
    first = aliases[0].strip().rstrip(".").lower()
    if first in ("yes", "no"):
        return "yes_no"
    for name, pattern in (("date", _DATE), ("number", _NUMBER)):
        if pattern.fullmatch(first):
            return name
    return "span"


def reachable(aliases: Sequence[str], max_words: int) -> bool:
    """Whether an answer of at most ``max_words`` words can equal an alias."""
    return any(len(normalize_answer(alias).split()) <= max_words for alias in aliases)


def question_key(text: str) -> str:
    """Normal form in which questions are compared: NFKC, lower case, no punctuation, one space.

    What changes the meaning stays: symbols, ``#``, ``%``, dashes (as ``-``), and what stands between two digits, except
    for a comma. A question of punctuation alone stays as it is.

    >>> [question_key(text) for text in ("Who  wrote “Emma”?", "Who made C++?", "Is 7–5 or 3.5 over 1,000?")]
    ['who wrote emma', 'who made c++', 'is 7-5 or 3.5 over 1000']
    """
    folded = unicodedata.normalize("NFKC", text).lower()
    kept = []
    for before, c, after in zip(f" {folded}", folded, f"{folded[1:]} ", strict=False):
        kind = unicodedata.category(c)
        in_number = c != "," and before.isdecimal() and after.isdecimal()
        if kind == "Pd":
            kept.append("-")
        elif not (kind.startswith("P") or c == "`") or c in "#%" or in_number:  # (some write quotes with backticks)
            kept.append(c)
    return " ".join("".join(kept).split()) or " ".join(folded.split())


def rank(seed: int, question: Question) -> str:
    """Place of a question in the sample of its set: of N questions those with the lowest ranks are taken.

    SHA-256 of seed, set and id alone, so that no other row has a part in it.
    """
    return hashlib.sha256(json.dumps([seed, question.set, question.id]).encode()).hexdigest()


def row_of(
    question: Question,
    index: int,
    prompt: list[dict[str, str]],
    labelled: bool,
    max_words: int,
    duplicate_of: str | None,
) -> dict[str, Any]:
    """A question as a row of :data:`SCHEMA`; without its label, nothing that was computed from it stays either."""
    aliases = question.aliases if labelled else []
    return {
        "data_source": question.set,
        "agent_name": "tool_agent",
        "prompt": prompt,
        "ability": "search",
        "reward_model": {"style": "rule", "ground_truth": {"target": aliases} if aliases else None},
        "extra_info": {
            "index": index,
            "id": question.id,
            "set": question.set,
            "split": question.split,
            "question": question.text,
            "answer_type": answer_type(aliases) if aliases else None,
            "reachable": reachable(aliases, max_words) if aliases else None,
            "duplicate_of": duplicate_of,
        },
    }


def canonical(row: dict[str, Any]) -> bytes:
    """A row as a line of JSON that does not depend on how parquet writes it: sorted keys, no spaces, UTF-8."""
    return json.dumps(row, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
