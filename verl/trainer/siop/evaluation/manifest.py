"""``manifest.json`` of an evaluation: what was evaluated, with what, and the results."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError
from verl.trainer.siop.evaluation.questions import QUESTIONS_FILE, EvaluationError, Sample, read_lines
from verl.trainer.siop.evaluation.summary import Summary

MANIFEST_FILE = "manifest.json"
# Changes with the definition of a score or a count.
METRICS = 1


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
        retriever: address -> its /health, the same at the start and the end.
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

    def content(self) -> bytes:
        """The file."""
        return (json.dumps(self.model_dump(), indent=1, ensure_ascii=False) + "\n").encode()


def read_manifest(folder: Path) -> Manifest:
    """The manifest in a folder, or in the folder ``validation`` in it, as ``eval_siop.sh`` leaves it.

    Raises:
        EvaluationError: there is no finished evaluation, or one of another version.
    """
    path = _home(folder) / MANIFEST_FILE
    try:
        return Manifest.model_validate_json(path.read_bytes())
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


def read_evaluation(folder: Path) -> tuple[Manifest, list[Sample]]:
    """The manifest and the samples that belong to it.

    Raises:
        EvaluationError: as :func:`read_manifest`; the samples are missing, or are not those of the manifest.
    """
    manifest, path = read_manifest(folder), _home(folder) / QUESTIONS_FILE
    try:
        content = path.read_bytes()
    except OSError as error:
        raise EvaluationError(f"{folder} has no {QUESTIONS_FILE}: {error.strerror}") from error
    if hashlib.sha256(content).hexdigest() != manifest.questions_sha256:
        raise EvaluationError(f"{path} is not the file that {MANIFEST_FILE} was written for; evaluate again")
    return manifest, read_lines(content, path)


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
