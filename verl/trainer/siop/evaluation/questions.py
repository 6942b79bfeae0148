"""One sample of a question as a line of ``questions.jsonl``: who it is, what was answered, how it was scored."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from verl.trainer.siop.rollouts.rows import TURN_SCORES, outcomes_of, question_of
from verl.trainer.siop.rollouts.tool_calls import FIELD
from verl.utils.reward_score.siop_reward import final_answer
from verl.utils.siop.credit.answers import exact_match, f1_release, f1_score, parse_aliases
from verl.utils.siop.errors import SiopError
from verl.utils.siop.turn_utils import get_assistant_turn_ranges

logger = logging.getLogger(__name__)

QUESTIONS_FILE = "questions.jsonl"


class EvaluationError(SiopError, ValueError):
    """A folder holds no finished evaluation, or two evaluations cannot be compared."""


class Sample(BaseModel):
    """One line of ``questions.jsonl``.

    Attributes:
        data_source: the set.
        id: of the question, unique in its set: ``extra_info.id``, else a digest of question and gold answers.
        question: the bare question.
        sample: number of the sample, from 0.
        answer: the final answer, empty if there is none.
        em, f1, f1_release: scores in [0, 1]; None without a gold answer.
        reachable: ``extra_info.reachable``; None where the data does not say.
        no_answer: the last turn has no complete ``<answer>``.
        turns: the policy's turns.
        turn_limit: the last turn that was allowed gave no answer.
        response_tokens: tokens that the policy wrote.
        searches: executed tool calls; None where the agent loop does not count.
        failed_searches: calls that were tried and not executed (unreadable, unknown, invalid, failed, no turn left).
        truncated: the length limit cut a turn or an observation.
        outcomes: what an agent loop that scores itself says of the rollout, as the success of a game, by its own names.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data_source: str
    id: str
    question: str
    sample: int
    answer: str
    em: float | None
    f1: float | None
    f1_release: float | None
    reachable: bool | None
    no_answer: bool
    turns: int
    turn_limit: bool
    response_tokens: int
    searches: int | None
    failed_searches: int | None
    truncated: bool | None
    outcomes: dict[str, float] = {}

    @property
    def key(self) -> tuple[str, str]:
        """The question in the whole evaluation."""
        return self.data_source, self.id


@dataclass(frozen=True)
class Question:
    """A row of the data.

    Args:
        data_source: the set.
        text: the bare question.
        messages: the prompt.
        aliases: the gold answers, of which there may be none.
        reachable: see :class:`Sample`.
        named: ``extra_info.id``, "" if there is none.
        index: ``extra_info.index``, "" if there is none.
    """

    data_source: str
    text: str
    messages: list[dict[str, Any]]
    aliases: list[str]
    reachable: bool | None
    named: str
    index: str

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Question:
        """Of the fields ``data_source``, ``raw_prompt``, ``reward_model`` and ``extra_info`` of a rollout."""
        extra = row["extra_info"] or {}
        messages = [dict(message) for message in row["raw_prompt"]]
        named, index, reachable = (extra.get(name) for name in ("id", "index", "reachable"))
        try:
            aliases = parse_aliases((row["reward_model"] or {}).get("ground_truth"))
        except ValueError as error:  # a reward function of the user's may read labels of its own form
            logger.warning("a question without scores: %s", error)
            aliases = []
        return cls(
            data_source=str(row["data_source"]),
            text=question_of(messages, extra),
            messages=messages,
            aliases=aliases,
            reachable=None if reachable is None else bool(reachable),
            named="" if named is None else str(named),
            index="" if index is None else str(index),
        )

    @property
    def digest(self) -> str:
        """16 hexadecimal digits that question and gold answers give."""
        return digest_of([self.text, self.aliases])[:16]


def question_ids(questions: Mapping[str, Question]) -> dict[str, str]:
    """An id for each of these questions, unique in its set and the same in every evaluation of the same data.

    The id that the data gives, else the digest; where several questions of a set have one, ``id#2`` and so on.

    Args:
        questions: by the uid of this evaluation.

    Returns:
        uid -> id.
    """
    alike = defaultdict(list)
    for uid, question in questions.items():
        name = question.named or question.digest
        alike[question.data_source, name].append((question.digest, question.index, uid))
    return {
        uid: name if number == 1 else f"{name}#{number}"
        for (_, name), group in alike.items()
        for number, (_, _, uid) in enumerate(sorted(group), start=1)
    }


def sample_of(
    question: Question, row: Mapping[str, Any], tokenizer: Any, max_turns: int | None, *, name: str, number: int
) -> Sample:
    """The scores and counts of one rollout.

    The answer is that of ``compute_score``, so that EM and F1 are its.

    Args:
        question: that was asked.
        row: the rollout's ``responses``, ``response_mask`` and ``extra_fields``.
        tokenizer: the policy's.
        max_turns: ``multi_turn.max_assistant_turns``.
        name: see :func:`question_ids`.
        number: of the sample.
    """
    response = str(tokenizer.decode(row["responses"], skip_special_tokens=True))
    answer, aliases = final_answer(response, row["extra_fields"]), question.aliases
    turns = len(get_assistant_turn_ranges(row["response_mask"]))
    fields = row["extra_fields"]
    tools, game = fields.get(FIELD), bool(fields.get(TURN_SCORES))
    outcomes = outcomes_of(fields) if game else {}
    truncated = bool(tools["truncated"]) if tools else None
    if game:
        truncated = bool(outcomes.pop("truncated", 0.0))
    return Sample(
        data_source=question.data_source,
        id=name,
        question=question.text,
        sample=number,
        answer=answer,
        em=exact_match(answer, aliases) if aliases else None,
        f1=f1_score(answer, aliases) if aliases else None,
        f1_release=f1_release(response, aliases) if aliases else None,
        reachable=question.reachable,
        no_answer=not answer and not game,
        turns=turns,
        turn_limit=bool(max_turns and turns >= max_turns and not answer and not truncated and not game),
        response_tokens=int(row["response_mask"].sum()),
        searches=tools["executed"] if tools else None,
        failed_searches=tools["calls"] - tools["executed"] if tools else None,
        truncated=truncated,
        outcomes=outcomes,
    )


def lines_of(samples: Iterable[Sample]) -> bytes:
    """The file: a JSON object on each line, by set, id and number."""
    ordered = sorted(samples, key=lambda sample: (*sample.key, sample.sample))
    return "".join(json.dumps(sample.model_dump(), ensure_ascii=False) + "\n" for sample in ordered).encode()


def read_lines(content: bytes, where: Path) -> list[Sample]:
    """The samples of such a file.

    Raises:
        EvaluationError: a line is none, there is no line, or a question has the same sample twice.
    """
    samples = []
    # Not splitlines: JSON leaves other line breaks of Unicode in a text as they are.
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            samples.append(Sample.model_validate_json(line))
        except ValidationError as error:
            raise EvaluationError(f"{where}: line {number} is no sample of a question: {error.errors()[0]}") from error
    if not samples:
        raise EvaluationError(f"{where}: no sample of a question stands there; evaluate again")
    if len({(*sample.key, sample.sample) for sample in samples}) < len(samples):
        raise EvaluationError(f"{where}: a sample stands there twice")
    return samples


def digest_of(value: Any) -> str:
    """SHA-256 of a value as JSON, in 64 hexadecimal digits; the order of keys does not count."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
