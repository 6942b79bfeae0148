"""Evaluations that no model made."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from verl.trainer.siop.evaluation.manifest import MANIFEST_FILE, METRICS, Manifest
from verl.trainer.siop.evaluation.questions import QUESTIONS_FILE, Sample, lines_of
from verl.trainer.siop.evaluation.summary import summarise

SECTIONS: dict[str, Any] = {
    "model": {"checkpoint": "runs/a/global_step_7", "step": 7, "weights": "0a"},
    "metrics": METRICS,
    "data": {"files": ["/here/test.parquet"], "sha256": ["1b"], "manifest_sha256": [None], "ids_sha256": "2c"},
    "tokenizer": {"sha256": "3d", "chat_template_sha256": "4e", "chat_template_kwargs": {}},
    "prompt": {"messages_sha256": "5f"},
    "probe": {"prefix": "<answer>", "suffix": "</answer>"},
    "decoding": {"n": 1, "temperature": 0, "max_assistant_turns": 5, "seed": 1},
    "tools": {"search": {"class": "LocalSearchTool", "schema_sha256": "60", "topk": 3}},
    "retriever": {"http://127.0.0.1:8000/retrieve": {"documents": 9, "corpus_sha256": "71"}},
    "versions": {"verl": "0.9.1", "torch": "2.11.0"},
}


@pytest.fixture
def sections() -> dict[str, Any]:
    """A manifest's sections, to be changed."""
    return {name: dict(value) if isinstance(value, dict) else value for name, value in SECTIONS.items()}


@pytest.fixture
def made() -> Callable[..., Sample]:
    """Makes a sample of question ``id`` of ``data_source`` with this EM; F1 is .5 more where it is 0."""

    def make(data_source: str, id: str, em: float | None = 0.0, sample: int = 0, **changes: Any) -> Sample:
        f1 = None if em is None else max(em, 0.5)
        fields = {
            "question": "Where?",
            "answer": "Paris",
            "em": em,
            "f1": f1,
            "f1_release": None if f1 is None else f1 / 2,
            "reachable": None,
            "no_answer": False,
            "turns": 2,
            "turn_limit": False,
            "response_tokens": 30,
            "searches": 1,
            "failed_searches": 0,
            "truncated": False,
        }
        return Sample(**{"data_source": data_source, "id": id, "sample": sample, **fields, **changes})

    return make


@pytest.fixture
def write() -> Callable[[Path, Sequence[Sample], dict[str, Any]], Manifest]:
    """Writes an evaluation into a folder."""

    def evaluation(folder: Path, samples: Sequence[Sample], sections: dict[str, Any]) -> Manifest:
        folder.mkdir(parents=True, exist_ok=True)
        content = lines_of(samples)
        sets, average = summarise(samples)
        manifest = Manifest(
            finished="2026-01-01T00:00:00+00:00",
            questions_sha256=hashlib.sha256(content).hexdigest(),
            sets=sets,
            average=average,
            **sections,
        )
        (folder / QUESTIONS_FILE).write_bytes(content)
        (folder / MANIFEST_FILE).write_bytes(manifest.content())
        return manifest

    return evaluation
