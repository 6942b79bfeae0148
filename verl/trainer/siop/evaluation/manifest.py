"""``manifest.json`` of an evaluation: what was evaluated, with what, and the results."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from verl.trainer.siop.evaluation.questions import QUESTIONS_FILE, EvaluationError, Sample, read_lines
from verl.trainer.siop.evaluation.summary import Summary, summarise

MANIFEST_FILE = "manifest.json"
# Changes with the definition of a score or a count.
METRICS = 2
# What tables and comparisons show of a section.
_SHOWN: dict[str, tuple[str, type]] = {"model": ("checkpoint", str), "decoding": ("n", int)}
_TOLERANCE = 1e-9


class Manifest(BaseModel):
    """See ``docs/evaluation.md``; the sections between ``metrics`` and ``versions`` must be equal for a comparison.

    Attributes:
        format: of this file.
        finished: when, in UTC.
        questions_sha256: of ``questions.jsonl``.
        model: checkpoint, step, weights.
        metrics: version of the definitions.
        data: digests of the files and of the evaluated ids.
        tokenizer: digests of vocabulary and chat template.
        prompt: digest of the messages of all questions.
        probe: texts around a reference.
        decoding: sampling and limits.
        tools: classes, schemas and settings by name.
        retriever: address -> its /health, the same at the start and the end; null of what does not say what it serves.
        versions: of packages.
        sets: results of each.
        average: over the sets.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    finished: str
    questions_sha256: str
    model: dict[str, Any]
    metrics: int
    data: dict[str, Any]
    tokenizer: dict[str, Any]
    prompt: dict[str, Any]
    probe: dict[str, Any]
    decoding: dict[str, Any]
    tools: dict[str, Any]
    retriever: dict[str, Any]
    versions: dict[str, Any]
    sets: dict[str, Summary]
    average: Summary

    @field_validator("model", "decoding")
    @classmethod
    def _has_what_is_shown(cls, section: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        key, kind = _SHOWN[str(info.field_name)]
        if not isinstance(section.get(key), kind):
            raise ValueError(f"needs {key} ({kind.__name__}), got {section.get(key)!r}")
        return section

    def content(self) -> bytes:
        """The file; in ASCII, for a path may be no UTF-8."""
        return (json.dumps(self.model_dump(), indent=1) + "\n").encode()


def read_manifest(folder: Path) -> Manifest:
    """The manifest in a folder, or in the folder ``validation`` in it, as ``eval_siop.sh`` leaves it.

    Raises:
        EvaluationError: there is no finished evaluation, or one of another version.
    """
    path = _home(folder) / MANIFEST_FILE
    try:
        return Manifest.model_validate(json.loads(path.read_bytes()))
    except OSError as error:
        raise EvaluationError(
            f"{folder} holds no finished evaluation ({MANIFEST_FILE}: {error.strerror}); make one with eval_siop.sh"
        ) from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise EvaluationError(
            f"{path} is damaged or of another version ({where}: {first['msg']}); evaluate again"
        ) from error
    except (ValueError, RecursionError) as error:
        raise EvaluationError(f"{path} is damaged or of another version (not JSON: {error}); evaluate again") from error


def read_evaluation(folder: Path) -> tuple[Manifest, list[Sample]]:
    """The manifest and the samples that belong to it; the results in it are computed from them again.

    Raises:
        EvaluationError: as :func:`read_manifest`; the samples are missing, or are not those of the manifest, or its
            results are not theirs.
    """
    manifest, path = read_manifest(folder), _home(folder) / QUESTIONS_FILE
    try:
        content = path.read_bytes()
    except OSError as error:
        raise EvaluationError(f"{folder} has no {QUESTIONS_FILE}: {error.strerror}") from error
    if hashlib.sha256(content).hexdigest() != manifest.questions_sha256:
        raise EvaluationError(f"{path} is not the file that {MANIFEST_FILE} was written for; evaluate again")
    samples = read_lines(content, path)
    sets, average = summarise(samples)
    found = manifest.model_copy(update={"sets": sets, "average": average})
    told, true = _results(manifest), _results(found)
    for name in {**told, **true}:
        if not _equal(told.get(name), true.get(name)):
            raise EvaluationError(
                f"{path.with_name(MANIFEST_FILE)}: {name} is {told.get(name, 'missing')}, but {QUESTIONS_FILE} gives "
                f"{true.get(name, 'nothing')}; evaluate again"
            )
    return found, samples


def _results(manifest: Manifest) -> dict[str, Any]:
    """Counts and means by dotted names. Ends of intervals may move with the version of numpy, which draws them."""
    found = manifest.model_dump(include={"sets", "average"})
    return {name: value for name, value in _leaves(found) if not name.endswith((".low", ".high"))}


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, abs_tol=_TOLERANCE)
    return bool(one == other)


def _home(folder: Path) -> Path:
    inner = folder / "validation"
    return inner if inner.is_dir() and not (folder / MANIFEST_FILE).exists() else folder


# Sections that are compared field by field; the others are what is compared, or the results.
COMPARED = ("metrics", "data", "tokenizer", "prompt", "probe", "decoding", "tools", "retriever", "versions")
# Where a file lies, who made it (its own digest decides), and the seed, may differ.
FREE = ("data.files", "data.manifest_sha256", "decoding.seed")


def fields_of(manifest: Manifest) -> dict[str, Any]:
    """Everything that must be equal for a comparison, by dotted names; of the retrievers what they serve, not where."""
    found = manifest.model_dump(include=set(COMPARED))
    found["retriever"] = _served(manifest.retriever)
    return {name: value for name, value in _leaves(found) if name not in FREE}


def _served(retriever: Mapping[str, Any]) -> Any:
    served = [
        json.loads(text) for text in sorted({json.dumps(health, sort_keys=True) for health in retriever.values()})
    ]
    return served[0] if len(served) == 1 and served[0] is not None else served


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key in sorted(value):
            yield from _leaves(value[key], f"{path}.{key}" if path else str(key))
    else:
        yield path, value
