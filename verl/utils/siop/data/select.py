"""Chooses the questions of a data folder: reads files, drops, de-duplicates, decontaminates, samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from verl.utils.siop.data.presets import PARTS, Preset, preset_of
from verl.utils.siop.data.questions import Question, Reading, check_ids, part_of, read_questions, set_name
from verl.utils.siop.data.rows import question_key, rank
from verl.utils.siop.data.sources import SourceError, SourceFile, fetch, own_files, preset_files
from verl.utils.siop.errors import SiopConfigError

ALL, NONE = "all", "none"


@dataclass(frozen=True)
class Options:
    """What to build; the names are those of the command line, where they are described."""

    out: Path
    source: tuple[str, ...] = ("hub",)
    preset: str | None = None
    train: str = ALL
    eval: str = ALL
    train_per_set: int = 0
    eval_per_set: int = 0
    seed: int = 1
    prompt: str | None = None
    question_mark: str = "keep"
    dedupe: str = "pair"
    decontaminate: str = "exact"
    max_alias_words: int = 10
    label_free: bool = False
    revision: str | None = None
    model: str | None = None
    tool_config: str | None = None
    force: bool = False


@dataclass
class Part:
    """The questions of ``train`` or ``eval`` by set, and what was dropped of each."""

    questions: dict[str, list[Question]] = field(default_factory=dict)
    read: Counter[str] = field(default_factory=Counter)
    dropped: dict[str, Counter[str]] = field(default_factory=dict)

    def drop(self, name: str, reason: str, count: int = 1) -> None:
        """Count dropped questions of a set."""
        self.dropped.setdefault(name, Counter())[reason] += count

    def keep(self, name: str, kept: list[Question], reason: str) -> None:
        """Put ``kept`` in the place of a set's questions and count the others."""
        if lost := len(self.questions[name]) - len(kept):
            self.drop(name, reason, lost)
        self.questions[name] = kept


# ---------------------------------------------------------------------- what to read
def _sets(chosen: str, known: Iterable[str], key: str) -> list[str]:
    """The sets of ``all``, ``none`` or a list with commas."""
    names, known = list(known), list(known)
    if chosen in (ALL, NONE):
        return names if chosen == ALL else []
    try:
        wanted = [set_name(name) for name in chosen.split(",")]
    except ValueError as error:
        raise SiopConfigError(f"--{key} {chosen}: {error}") from error
    if unknown := [name for name in wanted if name not in known]:
        raise SiopConfigError(
            f"--{key} {chosen}: there is no {unknown[0]!r}; choose of {', '.join(known)}, {ALL}, {NONE}"
        )
    return [name for name in names if name in wanted]


def find_files(options: Options) -> list[SourceFile]:
    """The files to read, fetched where they have to be.

    Raises:
        SiopConfigError: options that mean nothing together.
        SourceError: a file is missing or cannot be fetched.
    """
    hub = options.source == ("hub",)
    if options.preset is None:
        if hub:
            raise SiopConfigError("name a --preset to fetch, or your own files with --source FILE ...")
        if options.revision:
            raise SiopConfigError(f"--revision {options.revision} has no effect on files of your own")
        return own_files(options.source)
    preset = preset_of(options.preset)
    sets: dict[str, Sequence[str]] = {part: _sets(getattr(options, part), preset.files(part), part) for part in PARTS}
    if hub:
        stems = [preset.files(part)[name] for part in PARTS for name in sets[part]]
        return preset_files(preset, sets, *fetch(preset, stems, options.revision))
    if options.revision:
        raise SiopConfigError(f"--revision {options.revision} has no effect with --source {' '.join(options.source)}")
    if len(options.source) == 1 and (root := Path(options.source[0]).expanduser()).is_dir():
        return preset_files(preset, sets, root, {})
    return own_files(options.source)


def read_parts(options: Options, files: Sequence[SourceFile]) -> tuple[dict[str, Part], list[Reading]]:
    """The questions of all files, by part and set.

    Raises:
        SourceError: a file cannot be read, an id is there twice, or a set has no question.
    """
    parts = {part: Part() for part in PARTS}
    readings = []
    for file in files:
        reading = read_questions(file)
        readings.append(reading)
        for question in reading.questions:
            key = part_of(file, question.split, question.line)
            part = parts[key]
            part.questions.setdefault(question.set, [])
            if options.label_free and key == "train":
                question.aliases = []  # so that nothing of what follows knows them
            elif not question.aliases:
                part.drop(question.set, question.lacks)
                continue
            if options.question_mark == "add" and not question.text.endswith("?"):
                question.text += "?"
            part.questions[question.set].append(question)
        for (name, split, reason), count in reading.dropped.items():
            part = parts[part_of(file, split)]
            part.questions.setdefault(name, [])
            part.drop(name, reason, count)
    _choose_sets(options, parts, files)
    for part in parts.values():
        check_ids(question for questions in part.questions.values() for question in questions)
        for name, questions in part.questions.items():
            dropped = part.dropped.setdefault(name, Counter())
            part.read[name] = len(questions) + dropped.total()
    _check_not_empty(parts, files)
    return parts, readings


def _choose_sets(options: Options, parts: dict[str, Part], files: Sequence[SourceFile]) -> None:
    """Leave the sets that are asked for; each must be there."""
    for key, part in parts.items():
        found = part.questions
        if options.preset is None:
            wanted = _sets(getattr(options, key), found, key)
        else:
            wanted = _sets(getattr(options, key), preset_of(options.preset).files(key), key)
        if missing := [name for name in wanted if name not in found]:
            raise SourceError(
                f"{', '.join(str(file.path) for file in files)}: no row of set {missing[0]!r} for {key}; found "
                f"{', '.join(found) or 'none'}; leave it out with --{key}"
            )
        part.questions = {name: found[name] for name in wanted}
        part.dropped = {name: part.dropped.get(name, Counter()) for name in wanted}


def _check_not_empty(parts: dict[str, Part], files: Sequence[SourceFile]) -> None:
    for key, part in parts.items():
        for name, questions in part.questions.items():
            if not questions:
                why = ", ".join(f"{count} {reason}" for reason, count in part.dropped[name].items()) or "no rows"
                raise SourceError(
                    f"set {name!r} has no question left for {key} ({why}); leave it out with --{key}, or use "
                    "--label-free for training without answers"
                )
    if not any(part.questions for part in parts.values()):
        raise SourceError(f"nothing to build: no set of {', '.join(str(file.path) for file in files)} is asked for")


# ---------------------------------------------------------------------- what to leave out
def dedupe(part: Part, seed: int) -> None:
    """Leave one of the questions of a set with the same text and aliases: the one with the lowest rank.

    Never by the text alone where there are labels: PopQA asks the same question about several entities of one name.
    """
    for name, questions in part.questions.items():
        best: dict[tuple[str, frozenset[str]], tuple[str, Question]] = {}
        for question in questions:
            key = question_key(question.text), frozenset(question.aliases)
            ranked = rank(seed, question), question
            if key not in best or ranked[0] < best[key][0]:
                best[key] = ranked
        kept = {id(question) for _, question in best.values()}
        part.keep(name, [question for question in questions if id(question) in kept], "duplicate")


def decontaminate(train: Part, evaluation: Part) -> dict[str, list[str]]:
    """Drop from the training every question that any evaluation set asks, sampled or not; returns their ids by set."""
    asked = {question_key(question.text) for questions in evaluation.questions.values() for question in questions}
    ids = {}
    for name, questions in train.questions.items():
        kept = [question for question in questions if question_key(question.text) not in asked]
        clean = {id(question) for question in kept}
        if found := [question.id for question in questions if id(question) not in clean]:
            ids[name] = found
        train.keep(name, kept, "in evaluation")
    return ids


def sample(part: Part, count: int, seed: int) -> None:
    """Leave of each set the ``count`` questions with the lowest ranks (0: all), in the order of the source."""
    for name, questions in part.questions.items():
        if count and len(questions) > count:
            chosen = {id(question) for question in sorted(questions, key=lambda each: rank(seed, each))[:count]}
            part.keep(name, [question for question in questions if id(question) in chosen], "not sampled")


def leave_out(parts: Mapping[str, Part], options: Options, preset: Preset | None) -> dict[str, list[str]]:
    """Duplicates, training questions of the evaluation, and what is not sampled; returns the ids of the second."""
    train, evaluation = parts["train"], parts["eval"]
    if options.dedupe == "pair":
        for part in (train,) if preset and preset.whole else (train, evaluation):
            dedupe(part, options.seed)
    contaminated = decontaminate(train, evaluation) if options.decontaminate == "exact" else {}
    for name, questions in train.questions.items():
        if not questions:
            raise SourceError(
                f"every question of training set {name!r} is in an evaluation set; leave it out with --train"
            )
    sample(train, options.train_per_set, options.seed)
    sample(evaluation, options.eval_per_set, options.seed)
    return contaminated
