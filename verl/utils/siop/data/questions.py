"""Reads questions from the shapes in which they are published; a file's columns tell which it is.

========== ======================================= ==================================================================
shape      columns                                 the question, the aliases
========== ======================================= ==================================================================
flashrag   question, golden_answers                as they are
searchr1   question, golden_answers, data_source,  as they are; the prompt's instructions are left behind
           prompt, reward_model
verl       data_source, prompt, reward_model       ``extra_info.question``, else the user's message, else what follows
                                                   "Question:" in it; ``ground_truth`` in any form of ``parse_aliases``
plain      question and answer or answers          as they are, with ``answer_aliases`` where there are any
unlabelled question                                as it is, for training without labels
========== ======================================= ==================================================================

Optional everywhere: ``id`` (or ``_id``), ``data_source`` (or ``dataset``), ``split``, and these in ``extra_info``.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm
from verl.utils.siop.credit.answers import parse_aliases
from verl.utils.siop.data.presets import SET_NAMES
from verl.utils.siop.data.sources import SPLITS, SourceError, SourceFile

SHAPES = {
    "searchr1": (("question",), ("golden_answers",), ("data_source",), ("prompt",), ("reward_model",)),
    "flashrag": (("question",), ("golden_answers",)),
    "verl": (("data_source",), ("prompt",), ("reward_model",)),
    "plain": (("question",), ("answer", "answers")),
    "unlabelled": (("question",),),
}
# All that is ever read: the metadata of some sets has no common type.
COLUMNS = (
    "id", "_id", "question", "golden_answers", "answers", "answer", "answer_aliases", "data_source", "dataset", "split",
    "prompt", "reward_model", "extra_info",
)  # fmt: skip
SHOWN_BYTES = 1 << 22  # a larger file gets a progress bar
_SET = re.compile(r"[a-z0-9][a-z0-9_.-]*")


@dataclass(slots=True)
class Question:
    """One question as it was published; ``line`` counts from 1, rows of parquet too.

    ``lacks`` says why there are no aliases.
    """

    set: str
    split: str
    id: str
    text: str
    aliases: list[str]
    line: int
    file: str
    lacks: str = "no answer"


@dataclass
class Reading:
    """What one file gave: ``dropped`` counts by set, split and reason, ``rows`` all rows of the file."""

    shape: str
    rows: int = 0
    questions: list[Question] = field(default_factory=list)
    dropped: Counter[tuple[str, str, str]] = field(default_factory=Counter)


def shape_of(columns: Collection[str], where: str) -> str:
    """The shape of a file with these columns.

    Raises:
        SourceError: none fits; the message names the columns and what each shape needs.
    """
    for shape, needed in SHAPES.items():
        if all(any(name in columns for name in names) for names in needed):
            return shape
    forms = "; ".join(f"{shape}: {', '.join('|'.join(each) for each in needed)}" for shape, needed in SHAPES.items())
    raise SourceError(f"{where}: the columns {', '.join(sorted(columns)) or '(none)'} fit no known shape ({forms})")


def read_questions(file: SourceFile) -> Reading:
    """All questions of a file that are wanted.

    Args:
        file: what to read.

    Raises:
        SourceError: the file cannot be read to its end, or a row is not of the file's shape; names file and line.
    """
    rows = _rows(file.path)
    reading: Reading | None = None
    made: Counter[str] = Counter()
    for line, row in rows:
        where = f"{file.path}: line {line}"
        if not isinstance(row, dict):
            raise SourceError(f"{where}: a row is an object with named columns, got {type(row).__name__}")
        reading = reading or Reading(shape_of(row.keys(), str(file.path)))
        reading.rows += 1
        try:
            _take(row, line, file, reading, made)
        except RecursionError as error:
            raise SourceError(f"{where}: nested too deeply") from error
        except ValueError as error:
            raise SourceError(f"{where}: {error}") from error
    if reading is None:
        raise SourceError(f"{file.path}: the file has no rows")
    return reading


def _take(row: Mapping[str, Any], line: int, file: SourceFile, reading: Reading, made: Counter[str]) -> None:
    extra, label = row.get("extra_info") or {}, row.get("reward_model") or {}
    if not isinstance(extra, dict) or not isinstance(label, dict):
        raise ValueError("'extra_info' and 'reward_model' are objects with named fields")
    name = set_name(str(row.get("data_source") or row.get("dataset") or extra.get("set") or file.set))
    if file.wanted and name not in file.wanted:
        return
    text = _text(row, extra, reading.shape)
    aliases, lacks = _aliases(row, reading.shape)
    split = str(row.get("split") or extra.get("split") or file.split)
    given = next((found for found in (row.get("id"), row.get("_id"), extra.get("id"), extra.get("index"))
                  if found is not None), None)  # fmt: skip
    for key, value in (("question", text), ("answer", "".join(aliases)), ("split", split), ("id", str(given))):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{key!r} has half a surrogate pair: {error}") from error
    if not text:
        reading.dropped[name, split, "no question"] += 1
        return
    id_ = str(given) if given is not None else _made_id(name, text, made)
    reading.questions.append(Question(name, split, id_, text, aliases, line, str(file.path), lacks))


def set_name(text: str) -> str:
    """The one name of a set: lower case, without the prefix ``searchR1_``, ``tq`` and ``2wiki`` written out.

    Raises:
        ValueError: it is none.
    """
    name = text.strip().lower().removeprefix("searchr1_")
    name = SET_NAMES.get(name, name)
    if not _SET.fullmatch(name):
        raise ValueError(
            f"the set is called {text!r}; a name has letters, digits, '_', '.' and '-'; give one with --source "
            "train:SET=FILE or a column data_source"
        )
    return name


def _made_id(name: str, text: str, made: Counter[str]) -> str:
    """An id from set and question, which does not change with the rows around it; of equal ones the second has ``.2``.

    Nothing of the label is in it: it is written, and decides the sample, where there must be no labels.
    """
    key = hashlib.sha256(json.dumps([name, text]).encode()).hexdigest()[:16]
    made[key] += 1
    return key if made[key] == 1 else f"{key}.{made[key]}"


def _text(row: Mapping[str, Any], extra: Mapping[str, Any], shape: str) -> str:
    named = extra.get("question") if shape == "verl" else row.get("question")
    if named is None and shape == "verl":
        prompt = row.get("prompt")
        messages = [each for each in prompt if isinstance(each, dict)] if isinstance(prompt, list) else []
        users = [message.get("content") for message in messages if message.get("role") == "user"]
        if not users or not isinstance(users[-1], str):
            raise ValueError("no user message with text in 'prompt', and no extra_info.question")
        _, found, named = users[-1].rpartition("Question:")
        if not found and "\n" in users[-1].strip():
            raise ValueError(
                "the user's message has several lines and no 'Question:', so that the question cannot be told from its "
                "instructions; give it as extra_info.question"
            )
    if named is None:
        raise ValueError("'question' is missing")
    if not isinstance(named, str):
        raise ValueError(f"'question' is a text, got {type(named).__name__}")
    return named.strip()


def _aliases(row: Mapping[str, Any], shape: str) -> tuple[list[str], str]:
    """Aliases, and why the row has none that a short answer could be compared with, if it has none."""
    if shape == "verl":
        return parse_aliases((row.get("reward_model") or {}).get("ground_truth")), "no answer"
    column = next(name for name in ("golden_answers", "answers", "answer") if name in row or name == "answer")
    value = row.get(column)
    if isinstance(value, bool | dict) or (column == "answer" and isinstance(value, list)):
        return [], f"answer is a {type(value).__name__}"
    # Before its own aliases, so that the first one is the answer of the set.
    return parse_aliases([value, row.get("answer_aliases")]), "no answer"


# ---------------------------------------------------------------------- rows of a file
def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        size = path.stat().st_size
        with tqdm(total=size, desc=f"read {path.name}", unit="B", unit_scale=True, disable=size < SHOWN_BYTES) as bar:
            if path.name.endswith(".parquet"):
                yield from _parquet(path, bar)
            elif path.name.endswith(".json"):
                yield from _json(path)
            else:
                yield from _jsonl(path, bar)
    except OSError as error:
        raise SourceError(f"{path}: cannot be read: {error.strerror or error}") from error


def _jsonl(path: Path, bar: tqdm[Any]) -> Iterator[tuple[int, Any]]:
    number = 0
    try:
        with path.open("rb") as raw:
            lines: Iterable[bytes] = gzip.GzipFile(fileobj=raw) if path.name.endswith(".gz") else raw
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield number, _parsed(line, f"{path}: line {number}")
                if number % 4096 == 0:
                    bar.update(raw.tell() - bar.n)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise SourceError(f"{path}: damaged after line {number}: {error}; fetch or copy the file again") from error


def _parsed(text: bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        shown = text[:80].decode(errors="replace").strip()
        raise SourceError(f"{where}: not JSON: {error}; it begins {shown!r}") from error


def _json(path: Path) -> Iterator[tuple[int, Any]]:
    rows = _parsed(path.read_bytes(), str(path))
    if not isinstance(rows, list):
        raise SourceError(f"{path}: a .json file holds a list of rows, got {type(rows).__name__}")
    yield from enumerate(rows, 1)


def _parquet(path: Path, bar: tqdm[Any]) -> Iterator[tuple[int, Any]]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            shape_of(columns, str(path))
            for batch in file.iter_batches(batch_size=8192, columns=[name for name in COLUMNS if name in columns]):
                yield from enumerate(batch.to_pylist(), number + 1)
                number += batch.num_rows
                bar.update(bar.total * batch.num_rows // file.metadata.num_rows)
    except SourceError:
        raise
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise SourceError(f"{path}: not a whole parquet file: {reason}; fetch or copy the file again") from error
    except (ValueError, OverflowError) as error:  # a text that is not UTF-8, a time that Python does not have
        raise SourceError(f"{path}: a value after row {number} cannot be read: {error}") from error


# ---------------------------------------------------------------------- all files
def check_ids(questions: Iterable[Question]) -> None:
    """Refuse two rows of one set and split with the same id: sampling and comparisons go by it.

    Raises:
        SourceError: naming the id and both lines.
    """
    first: dict[tuple[str, str, str], Question] = {}
    for question in questions:
        earlier = first.setdefault((question.set, question.split, question.id), question)
        if earlier is not question:
            raise SourceError(
                f"{question.file}: line {question.line}: id {question.id!r} of set {question.set!r}, split "
                f"{question.split!r} is that of line {earlier.line} of {earlier.file}; ids are unique in a split"
            )


def part_of(file: SourceFile, split: str, line: int = 0) -> str:
    """Whether questions of a split train or evaluate: as the user says, else by its name.

    Raises:
        SourceError: neither tells it.
    """
    part = file.part or SPLITS.get(split, "")
    if not part:
        raise SourceError(
            f"{file.path}{f': line {line}' if line else ''}: the split {split!r} tells neither train nor eval "
            f"({', '.join(SPLITS)} do); give the file as train=FILE or eval=FILE"
        )
    return part
