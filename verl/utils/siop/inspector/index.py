"""The questions of a dump in an SQLite file beside it, so that a thousand steps can be searched page by page.

A row per question and step, a row per step. A step's file is read once, and again when it has changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import sqlite3
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from verl.utils.siop.inspector.dump import Dump, Unfinished
from verl.utils.siop.inspector.schema import DumpedRollout, DumpError, NotThere
from verl.utils.siop.inspector.summary import FLAGS, by_question, question_summary, step_summary

logger = logging.getLogger("siop.inspector")

INDEX_FILE = ".inspector.sqlite"
# Of the tables; an index of another one is made anew.
INDEX_VERSION = 2
MAX_PAGE = 500

_COLUMNS = {
    "question": "TEXT", "rollouts": "INTEGER", "clusters": "INTEGER", "outcome": "REAL", "turns_min": "INTEGER",
    "turns_max": "INTEGER", "reward_min": "REAL", "reward_max": "REAL", "advantage_min": "REAL",
    "advantage_max": "REAL", "answer": "TEXT", "answer_key": "TEXT", "gold_nowhere": "INTEGER",
    "right_negative": "INTEGER", "stale_paid": "INTEGER", "no_answer": "INTEGER", "no_update": "INTEGER",
    "dropped": "INTEGER",
}  # fmt: skip
_TABLES = f"""
CREATE TABLE files (step INTEGER PRIMARY KEY, size INTEGER, changed INTEGER, version INTEGER, problem TEXT);
CREATE TABLE steps (step INTEGER PRIMARY KEY, summary TEXT);
CREATE TABLE metrics (step INTEGER PRIMARY KEY, metrics TEXT);
CREATE TABLE questions (
    step INTEGER, "group" TEXT, place INTEGER, places TEXT, changed INTEGER DEFAULT 0,
    {", ".join(f"{name} {kind}" for name, kind in _COLUMNS.items())},
    PRIMARY KEY (step, "group")
) WITHOUT ROWID;
CREATE INDEX by_question ON questions (question, step);
"""
# Which questions were answered otherwise the last time that they were asked.
_CHANGED = """
UPDATE questions SET changed = coalesce(answer_key != '' AND answer_key != (
    SELECT before.answer_key FROM questions AS before
    WHERE before.question = questions.question AND before.step < questions.step AND before.answer_key != ''
    ORDER BY before.step DESC LIMIT 1), 0)
WHERE question IN (SELECT question FROM questions WHERE step = ?)
"""

Sort = Literal[
    "step", "question", "clusters", "outcome", "reward_min", "reward_max", "advantage_min", "advantage_max",
    "turns_min", "turns_max",
]  # fmt: skip


MAX_INT = 2**63 - 1  # SQLite's
Whole = Annotated[int, Field(ge=-MAX_INT, le=MAX_INT)]


class Search(BaseModel):
    """What to list. A range holds for some rollout of the question where rollouts differ (turns, reward, advantage).

    Args:
        text: in the question or in the heaviest answer, whatever the case.
        flags: names of ``FLAGS``; all must hold.
        sort, descending: order; among equals by step.
        offset, limit: the page.
        step_from, …: inclusive bounds; ``outcome`` is the mean over the question's rollouts.
    """

    model_config = ConfigDict(extra="forbid")

    text: str = Field(default="", max_length=1000)
    flags: list[str] = Field(default_factory=list, max_length=len(FLAGS))
    sort: Sort = "step"
    descending: bool = False
    offset: int = Field(default=0, ge=0, le=MAX_INT)
    limit: int = Field(default=100, ge=1, le=MAX_PAGE)
    step_from: Whole | None = None
    step_to: Whole | None = None
    clusters_from: Whole | None = None
    clusters_to: Whole | None = None
    outcome_from: float | None = None
    outcome_to: float | None = None
    reward_from: float | None = None
    reward_to: float | None = None
    advantage_from: float | None = None
    advantage_to: float | None = None
    turns_from: Whole | None = None
    turns_to: Whole | None = None

    def where(self) -> tuple[str, dict[str, Any]]:
        """The condition in SQL, and its values.

        Raises:
            ValueError: an unknown flag.
        """
        unknown = [flag for flag in self.flags if flag not in FLAGS]
        if unknown:
            raise ValueError(f"flags={unknown[0]!r} is not allowed; choose one of {', '.join(FLAGS)}")
        conditions, values = [f"{flag} > 0" for flag in self.flags], self.model_dump()
        for name in ("step", "clusters", "outcome"):
            conditions += [f"{name} >= :{name}_from"] * (values[f"{name}_from"] is not None)
            conditions += [f"{name} <= :{name}_to"] * (values[f"{name}_to"] is not None)
        for name in ("reward", "advantage", "turns"):
            conditions += [f"{name}_max >= :{name}_from"] * (values[f"{name}_from"] is not None)
            conditions += [f"{name}_min <= :{name}_to"] * (values[f"{name}_to"] is not None)
        if self.text:
            values["pattern"] = "%" + "".join(f"\\{c}" if c in "\\%_" else c for c in self.text) + "%"
            conditions.append("(question LIKE :pattern ESCAPE '\\' OR answer LIKE :pattern ESCAPE '\\')")
        del values["flags"]
        return " AND ".join(conditions) or "1", values


class RunIndex:
    """The index of one dump.

    Args:
        dump: the run.
        path: the file; by default beside the dump, or where that cannot be written in the user's cache, or where that
            cannot either, and before there is a dump, in a temporary file.
    """

    def __init__(self, dump: Dump, path: Path | None = None) -> None:
        self.dump, self._lock = dump, threading.RLock()
        self._refreshing = threading.Lock()
        self._path = path
        self._connection = self._opened()
        # The byte of steps.jsonl up to which it is read; None before the first time.
        self._metrics_at: int | None = None
        self._metrics_problems: list[str] = []
        # Files that end within a line: their size and time, and what is wrong with them.
        self._unfinished: dict[int, tuple[tuple[int, int], str]] = {}
        # Why nothing more is taken in.
        self.trouble = ""
        # Goes up with every change.
        self.revision = 0

    def close(self) -> None:
        """Close the file."""
        with self._lock:
            self._connection.close()

    # ------------------------------------------------------------------ reading the dump
    def refresh(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Take in what is new; one at a time.

        Args:
            progress: called with the files done and all that are new.

        Raises:
            DumpError, OSError: the folder is gone, or the index cannot be written; what was taken in is still there.
        """
        try:
            try:
                self._refresh(progress)
            except sqlite3.Error:  # its file is another one, as of a run that was moved away and begun anew
                self._reopen()
                self._refresh(progress)
        except sqlite3.Error as error:
            raise DumpError(f"the index of {self.dump.rollouts} cannot be written: {error}") from error

    def _opened(self) -> sqlite3.Connection:
        self._early = not self.dump.rollouts.is_dir()
        if self._early:
            return _open("")
        return _open(self._path) if self._path else _open_anywhere(self.dump.rollouts)

    def _reopen(self) -> None:
        with self._lock:
            self._connection.close()
            self._connection, self._metrics_at = self._opened(), None

    def _refresh(self, progress: Callable[[int, int], None] | None) -> None:
        with self._refreshing:
            if self._early and self.dump.rollouts.is_dir():
                self._reopen()
            known = {row[0]: row[1:] for row in self._rows("SELECT step, size, changed FROM files")}
            found = {}
            for step in self.dump.steps():
                with contextlib.suppress(FileNotFoundError):
                    found[step] = self._state_of(step)
            self._unfinished = {step: one for step, one in self._unfinished.items() if step in found}
            for step in known.keys() - found.keys():
                self._replace(step, None)
            tried = {step: state for step, (state, _) in self._unfinished.items()}
            new = [step for step, state in found.items() if state not in (known.get(step), tried.get(step))]
            for done, step in enumerate(new):
                if progress:
                    progress(done, len(new))
                self._take(step, found[step])
            self._take_metrics()

    def _state_of(self, step: int) -> tuple[int, int]:
        status = self.dump.file(step).stat()
        return status.st_size, status.st_mtime_ns

    def _take(self, step: int, state: tuple[int, int]) -> None:
        try:
            lines = self.dump.read(step)
            self._unfinished.pop(step, None)
        except FileNotFoundError:
            return
        except Unfinished as error:  # when it has grown
            self._unfinished[step] = state, str(error)
            return
        except (DumpError, OSError) as error:
            self._unfinished.pop(step, None)
            logger.warning("step %d is left out: %s", step, error)
            self._replace(step, (*state, 0, str(error)))
            return
        groups = by_question(lines, lambda line: line[1].group)
        rows = []
        for number, group in enumerate(groups):
            summary = question_summary([rollout for _, rollout in group])
            places = json.dumps([place for place, _ in group])
            rows.append((step, group[0][1].group, number, places, *(summary[name] for name in _COLUMNS)))
        curves = step_summary([[rollout for _, rollout in group] for group in groups])
        version = min(rollout.dump_version for _, rollout in lines)
        self._replace(step, (*state, version, None), rows, curves)

    def _replace(
        self, step: int, file: tuple[Any, ...] | None, rows: list[tuple[Any, ...]] | None = None, curves: Any = None
    ) -> None:
        with self._lock, self._connection as connection:
            for table in ("files", "steps", "questions"):
                connection.execute(f"DELETE FROM {table} WHERE step = ?", (step,))
            if file:
                connection.execute("INSERT INTO files VALUES (?, ?, ?, ?, ?)", (step, *file))
            if rows:
                names = ", ".join(("step", '"group"', "place", "places", *_COLUMNS))
                marks = ", ".join("?" * (4 + len(_COLUMNS)))
                connection.executemany(f"INSERT INTO questions ({names}) VALUES ({marks})", rows)
                connection.execute("INSERT INTO steps VALUES (?, ?)", (step, json.dumps(curves)))
                connection.execute(_CHANGED, (step,))
            self.revision += 1

    def _take_metrics(self) -> None:
        if self._metrics_at is None or self.dump.metrics_size() < self._metrics_at:  # another file than before
            with self._lock, self._connection as connection:
                connection.execute("DELETE FROM metrics")
            self._metrics_at, self._metrics_problems = 0, []
        for end, step in self.dump.metrics(self._metrics_at):
            if isinstance(step, DumpError):
                self._metrics_problems.append(str(step))
            else:
                with self._lock, self._connection as connection:
                    row = (step.step, json.dumps(step.metrics))
                    connection.execute("INSERT OR REPLACE INTO metrics VALUES (?, ?)", row)
            self._metrics_at = end
            self.revision += 1

    # ------------------------------------------------------------------ answers
    def _rows(self, query: str, values: Any = ()) -> list[tuple[Any, ...]]:
        with self._lock:
            return self._connection.execute(query, values).fetchall()

    def search(self, search: Search) -> dict[str, Any]:
        """A page of questions: ``total``, and ``questions`` as dicts.

        Raises:
            ValueError: see :meth:`Search.where`.
        """
        where, values = search.where()
        names = ["step", '"group"', "changed", *_COLUMNS]
        ((total,),) = self._rows(f"SELECT count(*) FROM questions WHERE {where}", values)
        direction = "DESC" if search.descending else "ASC"
        # Without a value: last, in either direction.
        order = f"{search.sort} IS NULL, {search.sort} {direction}, step {direction}, place"
        rows = self._rows(
            f"SELECT {', '.join(names)} FROM questions WHERE {where} ORDER BY {order} LIMIT :limit OFFSET :offset",
            values,
        )
        return {"total": total, "questions": _named(names, rows)}

    def rollouts(self, step: int, group: str) -> list[DumpedRollout]:
        """The rollouts of a question, from the dump.

        Raises:
            NotThere: there is no such question.
            DumpError, OSError: the file cannot be read, or is gone.
        """
        try:
            return self._read(step, group)
        except DumpError:  # written anew since it was read
            self._take(step, self._state_of(step))
        return self._read(step, group)

    def _read(self, step: int, group: str) -> list[DumpedRollout]:
        found = self._rows('SELECT places FROM questions WHERE step = ? AND "group" = ?', (step, group))
        if not found:
            raise NotThere(f"no question {group} in step {step}")
        rollouts = self.dump.read_places(step, json.loads(found[0][0]))
        if any((rollout.step, rollout.group) != (step, group) for rollout in rollouts):
            raise DumpError(f"{self.dump.file(step)} has changed since it was read")
        return rollouts

    def same_question(self, question: str) -> list[dict[str, Any]]:
        """Every time that the question was asked, in the order of steps."""
        names = ["step", '"group"', "outcome", "clusters", "answer"]
        rows = self._rows(f"SELECT {', '.join(names)} FROM questions WHERE question = ? ORDER BY step", (question,))
        return _named(names, rows)

    def curves(self) -> dict[int, dict[str, float]]:
        """The metrics of each step: those of the logs where they were dumped, the others from the rollouts."""
        found = {step: json.loads(text) for step, text in self._rows("SELECT step, summary FROM steps ORDER BY step")}
        for step, text in self._rows("SELECT step, metrics FROM metrics"):
            if step in found:
                answers = "siop/no_answer" in found[step]  # a game asks for none, whatever the logs count
                found[step].update(json.loads(text))
                if not answers:
                    found[step].pop("siop/no_answer", None)
        return found

    def state(self) -> dict[str, Any]:
        """How much of the run is in the index, and what could not be read."""
        ((steps, first, last, questions, rollouts),) = self._rows(
            "SELECT count(DISTINCT step), min(step), max(step), count(*), coalesce(sum(rollouts), 0) FROM questions"
        )
        ((version,),) = self._rows("SELECT min(version) FROM files WHERE problem IS NULL")
        unread = [text for (text,) in self._rows("SELECT problem FROM files WHERE problem IS NOT NULL ORDER BY step")]
        return {
            "revision": self.revision,
            "steps": steps,
            "first_step": first,
            "last_step": last,
            "questions": questions,
            "rollouts": rollouts,
            "version": version,
            "problems": [
                *([self.trouble] if self.trouble else []),
                *unread,
                *(f"{text}: it is being written, or cut" for _, text in self._unfinished.values()),
                *self._metrics_problems,
            ],
        }


def _named(columns: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> list[dict[str, Any]]:
    names = [column.strip('"') for column in columns]
    return [dict(zip(names, row, strict=True)) for row in rows]


def _open(path: Path | str) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=30, check_same_thread=False)
    try:
        ((version,),) = connection.execute("PRAGMA user_version").fetchall()
        if version != INDEX_VERSION:
            with connection:
                tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
                for (name,) in tables:
                    connection.execute(f"DROP TABLE {name}")
                for statement in _TABLES.split(";"):
                    connection.execute(statement)
                connection.execute(f"PRAGMA user_version = {INDEX_VERSION}")
        connection.execute("PRAGMA synchronous = OFF")  # it can be made anew
        with connection:
            connection.execute("CREATE TABLE IF NOT EXISTS writable (x)")
    except sqlite3.Error:
        connection.close()
        raise
    return connection


def _open_anywhere(folder: Path) -> sqlite3.Connection:
    own = folder / INDEX_FILE
    try:
        if os.access(folder, os.W_OK):
            return _open(own)
    except sqlite3.DatabaseError as error:
        if "not a database" not in str(error) and "malformed" not in str(error):
            logger.warning("%s: %s", own, error)
        else:
            own.unlink()
            return _open(own)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "siop-inspector"
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16] + ".sqlite"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        return _open(cache / name)
    except (OSError, sqlite3.Error) as error:
        logger.warning("%s cannot be written (%s): the index lasts for this time only", cache, error)
        return _open("")  # SQLite's own temporary file
