"""Records a validation of the trainer as an evaluation: ``questions.jsonl`` and, last of all, ``manifest.json``."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import transfer_queue as tq
from omegaconf import DictConfig
from transfer_queue import KVBatchMeta
from verl.trainer.siop.checks import retrievers
from verl.trainer.siop.evaluation import identity
from verl.trainer.siop.evaluation.manifest import MANIFEST_FILE, METRICS, Manifest
from verl.trainer.siop.evaluation.questions import (
    QUESTIONS_FILE,
    EvaluationError,
    Question,
    digest_of,
    lines_of,
    question_ids,
    sample_of,
)
from verl.trainer.siop.evaluation.summary import summarise
from verl.trainer.siop.replay_buffer import column
from verl.utils.siop.data.chat import build_tools
from verl.utils.siop.files import write_whole

_OF_QUESTION = ("data_source", "raw_prompt", "reward_model", "extra_info")
_OF_SAMPLE = ("responses", "response_mask", "extra_fields")


class Recorder:
    """One evaluation, from its beginning. What an earlier one left in the folder stays until this one is complete.

    Args:
        folder: ``trainer.validation_data_dir``.
        config: the whole configuration.
        tokenizer: the policy's.

    Raises:
        EvaluationError: the weights of the checkpoint cannot be found.
        RetrieverUnavailable: a retriever does not answer.
        SiopConfigError: replicas of a retriever serve different things.
    """

    def __init__(self, folder: Path, config: DictConfig, tokenizer: Any) -> None:
        self._folder, self._config, self._tokenizer = folder, config, tokenizer
        folder.mkdir(parents=True, exist_ok=True)
        tools = build_tools(config.actor_rollout_ref.rollout.multi_turn)
        self._urls, self._unknown = retrievers.retrievers_of(tools), retrievers.unknown_services_of(tools)
        self._healths = retrievers.healths_of(self._urls)
        retrievers.check_replicas(self._healths)
        self._fixed: dict[str, Any] = {
            "metrics": METRICS,
            "model": identity.model_of(config),
            "data": identity.data_of(config),
            "tokenizer": identity.tokenizer_of(config, tokenizer),
            "probe": identity.probe_of(config),
            "decoding": identity.decoding_of(config),
            "tools": identity.tools_of(tools),
            "versions": identity.versions_of(config),
        }
        self._questions: dict[str, Question] = {}
        self._rows: dict[tuple[str, int], Mapping[str, Any]] = {}

    def note(self, batch: KVBatchMeta) -> None:
        """Take in a batch of finished rollouts; of a session with several trajectories the last, as verl does."""
        last: dict[tuple[str, int], tuple[int, str]] = {}
        for key in batch.keys:
            uid, session, trajectory = key.rsplit("_", 2)
            place = uid, int(session)
            last[place] = max(last.get(place, (-1, "")), (int(trajectory), key))
        names = [*_OF_QUESTION, *_OF_SAMPLE]
        data = tq.kv_batch_get(
            keys=[key for _, key in last.values()], partition_id=batch.partition_id, select_fields=names
        )
        columns = [column(data, name) for name in names]
        for (uid, session), values in zip(last, zip(*columns, strict=True), strict=True):
            row = dict(zip(names, values, strict=True))
            if uid not in self._questions:
                self._questions[uid] = Question.of(row)
            self._rows[uid, session] = {name: row[name] for name in _OF_SAMPLE}

    def finish(self) -> Manifest:
        """Write the files; the manifest, which says that all of it is there, last.

        Raises:
            EvaluationError: no question was evaluated, or a retriever is not what it was at the start.
            RetrieverUnavailable: it does not answer any more.
        """
        if not self._rows:
            raise EvaluationError("no question was evaluated")
        max_turns = self._config.actor_rollout_ref.rollout.multi_turn.max_assistant_turns
        names = question_ids(self._questions)
        samples = [
            sample_of(self._questions[uid], row, self._tokenizer, max_turns, name=names[uid], number=session)
            for (uid, session), row in self._rows.items()
        ]
        for url, health in retrievers.healths_of(self._urls).items():
            if health != self._healths[url]:
                what = retrievers.difference(self._healths[url], health, "at the start", "at the end")
                raise EvaluationError(
                    f"the retriever at {url} has changed during the evaluation: {what}; evaluate again"
                )
        asked = sorted(
            (question.data_source, names[uid], question.messages) for uid, question in self._questions.items()
        )
        sets, average = summarise(samples)
        data = {
            **self._fixed.pop("data"),
            "questions": len(asked),
            "ids_sha256": digest_of([[data_source, name] for data_source, name, _ in asked]),
        }
        content = lines_of(samples)
        manifest = Manifest(
            finished=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            questions_sha256=hashlib.sha256(content).hexdigest(),
            data=data,
            prompt={"messages_sha256": digest_of(asked)},
            retriever={**self._healths, **dict.fromkeys(self._unknown)},
            sets=sets,
            average=average,
            **self._fixed,
        )
        write_whole(self._folder / QUESTIONS_FILE, content)
        write_whole(self._folder / MANIFEST_FILE, manifest.content())
        return manifest
