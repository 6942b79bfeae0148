"""What a run's folder ``rollouts`` holds, version 2: the contract between the trainer and the page.

- ``STEP.jsonl``: a :class:`DumpedRollout` per line, the rollouts of a question one after the other
- ``steps.jsonl``: a :class:`DumpedStep` per line; of two with one step, from a run that was resumed, the later counts
- ``settings-HASH.json``: :class:`DumpedSettings`; every rollout names the one it was trained under

Version 1, the lines without ``dump_version``, has texts, support and turn rewards, but neither spans nor what the
estimator made of the rewards. It is read as far as it goes. Suffixes: T turns, L tokens.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from verl.utils.siop.errors import SiopError

DUMP_VERSION = 2
STEPS_FILE = "steps.jsonl"
SETTINGS_FILE = "settings-{}.json"
# Numbers of a line that say how good the outcome is, by name; others stand in its ``outcome``.
OUTCOMES = ("em", "f1", "success", "completion")


class DumpError(SiopError, ValueError):
    """A dump cannot be read, or is of a version that this one does not know; the message names the file and line."""


class Span(BaseModel):
    """A turn of the policy, or what came between two turns.

    Args:
        role: who wrote it: ``assistant`` (response mask 1) or ``tool`` (0: results, and the markup of the chat).
        tokens: half-open range of the response tokens; None in version 1.
        chars: half-open range of ``output``.
    """

    role: Literal["assistant", "tool"]
    tokens: tuple[int, int] | None
    chars: tuple[int, int]


class DumpedRollout(BaseModel):
    """One rollout: its texts, and what each stage of the method and the estimator made of it.

    What a method does not have is empty or None: GRPO has no clusters, and a rollout without an answer no target.
    Fields that are not named here are kept (``model_extra``). Numbers are those of the update: turn values are float32.

    Args:
        dump_version: of this schema.
        uid: ``{group}_{session}_{trajectory}``, the rollout's key.
        group, session: the uid of the question in this step, which its rollouts share, and the rollout's number in it.
        step: of the training, from 1.
        settings: hash of the :class:`DumpedSettings`.
        method: ``siop_reward_mode``, or the name of another advantage estimator.
        seed: ``data.seed``.
        question: without instructions and chat template.
        input, output: the prompt and the response, decoded with special tokens.
        gts: the label as the data has it.
        spans: the response in pieces, assistant and tool in turn; together all of ``output``.
        siop_tools: what became of the tool calls, see ``ToolRecord``; ``executed_calls`` by turn.
        answer: final answer, empty if there is none.
        cluster: id of the answer's cluster within the question; None without one.
        references: of the cluster, by which its support was measured.
        mass, votes, evidence, target: m, v, rho and q of the cluster; v and rho are None where they were not needed.
        boundaries: T + 1 exclusive ends into the response tokens, where the support was measured; 0 is the prompt.
        support: p at the boundaries; empty where it was not needed.
        gains: T gains by ``siop_gain``, from the support alone.
        turn_rewards: T rewards of the method; empty if the rollout gets none, which counts as zeros.
        kl_rewards: T rewards after the KL penalty, where ``algorithm.use_kl_in_reward``; else None.
        turn_returns, turn_advantages: T values of the estimator. One number where all tokens of a turn have the same,
            else the list of its tokens' values. None in version 1.
        turn_scores: T scores of the environment, where it scores turns.
        dropped: the question was left out of the update, because the scorer failed on it.
        em, f1, success, completion, outcome: how good the outcome is, where known; of ``outcome`` the numbers.
        score: sum of the turn rewards.
    """

    model_config = ConfigDict(extra="allow")

    dump_version: int = 1
    uid: str
    step: int
    input: str
    output: str
    group: str = ""
    session: int = 0
    settings: str = ""
    method: str = ""
    seed: int | None = None
    question: str | None = None
    gts: Any = None
    spans: list[Span] | None = None
    siop_tools: dict[str, Any] | None = None
    answer: str | None = None
    cluster: int | None = None
    references: list[str] | None = None
    mass: float | None = None
    votes: float | None = None
    evidence: float | None = None
    target: float | None = None
    boundaries: list[int] | None = None
    support: list[float] | None = None
    gains: list[float] | None = None
    turn_rewards: list[float] | None = None
    kl_rewards: list[float] | None = None
    turn_returns: list[float | list[float]] | None = None
    turn_advantages: list[float | list[float]] | None = None
    turn_scores: list[float] | None = None
    dropped: bool = False
    em: float | None = None
    f1: float | None = None
    success: float | None = None
    completion: float | None = None
    outcome: Any = None
    score: float | None = None

    @property
    def final_answer(self) -> str | None:
        """The answer, empty if it is missing; None where none is asked for: of games, whose turns are scored."""
        return None if self.turn_scores is not None and not self.answer else self.answer

    @property
    def turns(self) -> list[Span]:
        """The T assistant turns."""
        return [span for span in self.spans or () if span.role == "assistant"]

    def text(self, span: Span) -> str:
        """What the span says."""
        return self.output[span.chars[0] : span.chars[1]]

    def outcomes(self) -> dict[str, float]:
        """The known outcome metrics by name."""
        found = {name: getattr(self, name) for name in OUTCOMES}
        if isinstance(self.outcome, Mapping):
            found.update({str(name): value for name, value in self.outcome.items()})
        elif self.outcome is not None:
            found["outcome"] = self.outcome
        return {
            name: float(value)
            for name, value in found.items()
            if isinstance(value, int | float)  # True and False are 1 and 0
        }


class DumpedStep(BaseModel):
    """The metrics of a step, as every logger receives them.

    Args:
        dump_version: of this schema.
        step: of the training, from 1.
        metrics: by name, see README.
    """

    dump_version: int
    step: int
    metrics: dict[str, float]


class DumpedSettings(BaseModel):
    """What a training's credit depends on.

    Args:
        dump_version: of this schema.
        method: see :class:`DumpedRollout`.
        seed: ``data.seed``.
        algorithm: verl's ``algorithm`` section, without the scorer's address and the like.
        rollouts: K, ``actor_rollout_ref.rollout.n``.
        temperature: ``actor_rollout_ref.rollout.temperature``.
    """

    dump_version: int = DUMP_VERSION
    method: str
    seed: int | None
    algorithm: dict[str, Any]
    rollouts: int | None = Field(default=None)
    temperature: float | None = Field(default=None)

    @property
    def hash(self) -> str:
        """12 hexadecimal digits of the SHA-256 of these values."""
        text = json.dumps(self.model_dump(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


class NotThere(SiopError, KeyError):
    """No such run or question."""

    def __str__(self) -> str:
        return str(self.args[0])


def parse_rollout(line: str | bytes, where: str) -> DumpedRollout:
    """One line of a dump, of this version or of version 1, whose missing fields are filled in as far as they are known.

    Args:
        line: JSON.
        where: file and line, for the error.

    Raises:
        DumpError: no JSON, a field that is missing or wrong, or a later version.
    """
    try:
        rollout = DumpedRollout.model_validate_json(_whole_characters(line))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = ".".join(map(str, first["loc"]))
        raise DumpError(f"{where}: {f'{field}: ' if field else ''}{first['msg']}") from error
    if not 1 <= rollout.dump_version <= DUMP_VERSION:
        raise DumpError(
            f"{where}: dump_version is {rollout.dump_version}, this version reads 1 to {DUMP_VERSION}: install the "
            "version that wrote it, or a later one"
        )
    if rollout.dump_version == 1:
        _complete(rollout)
    else:
        _check(rollout, where)
    return rollout


def whole_characters(text: str) -> str:
    """The text with U+FFFD for each half of a surrogate pair that stands alone, which UTF-8 cannot hold."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _whole_characters(line: str | bytes) -> str | bytes:
    r"""A line whose escapes (``\ud83d``) make whole characters; as it is, where it is no JSON."""
    if b"\\ud" not in (line if isinstance(line, bytes) else line.encode("utf-8", "replace")).lower():
        return line
    try:
        return whole_characters(json.dumps(json.loads(line), ensure_ascii=False))
    except (ValueError, RecursionError):
        return line


# Of a rollout with T turns: T values, or none.
_BY_TURN = ("gains", "turn_rewards", "kl_rewards", "turn_returns", "turn_advantages")


def _check(rollout: DumpedRollout, where: str) -> None:
    """What the page takes for granted of version 2.

    Raises:
        DumpError: no group, no spans, a span outside of the text, or values that are not those of the turns.
    """
    for name in ("group", "spans"):
        if getattr(rollout, name) in ("", None):
            raise DumpError(f"{where}: {name}: it is missing")
    for span in rollout.spans or ():
        start, end = span.chars
        if not 0 <= start <= end <= len(rollout.output):
            raise DumpError(f"{where}: spans: {start} to {end} of a text of {len(rollout.output)} characters")
    count = len(rollout.turns)
    for name in _BY_TURN:
        values = getattr(rollout, name)
        if values and len(values) != count:
            raise DumpError(f"{where}: {name}: {len(values)} values for {count} turns")
        if any(value == [] for value in values or ()):
            raise DumpError(f"{where}: {name}: a turn without values")
    if rollout.support and rollout.boundaries and len(rollout.support) != len(rollout.boundaries):
        raise DumpError(f"{where}: support: {len(rollout.support)} values at {len(rollout.boundaries)} boundaries")


def not_finite(rollouts: Iterable[DumpedRollout]) -> list[str]:
    """The fields in which some rollout has NaN or an infinity, which JSON cannot hold."""
    names = ("evidence", "mass", "votes", "target", "score", "support", "turn_scores", *_BY_TURN)
    return [name for name in names if any(not math.isfinite(v) for r in rollouts for v in _flat(getattr(r, name)))]


def _flat(value: Any) -> list[float]:
    if isinstance(value, list):
        return [number for item in value for number in _flat(item)]
    return [] if value is None else [value]


# The turns of a response in the markup of ChatML, which all that version 1 knew is written in.
_TURN_END, _TURN_START = "<|im_end|>", "<|im_start|>assistant\n"


def _complete(rollout: DumpedRollout) -> None:
    """What can be read from the texts of version 1; nothing is computed."""
    parts = rollout.uid.rsplit("_", 2)
    if len(parts) == 3 and parts[1].isdecimal():
        rollout.group, rollout.session = parts[0], int(parts[1])
    else:
        rollout.group = rollout.uid
    spans, at, output = [], 0, rollout.output
    while at < len(output):
        end = output.find(_TURN_END, at)
        end = len(output) if end < 0 else end + len(_TURN_END)
        spans.append(Span(role="assistant", tokens=None, chars=(at, end)))
        start = output.find(_TURN_START, end)
        at = len(output) if start < 0 else start + len(_TURN_START)
        if end < at:
            spans.append(Span(role="tool", tokens=None, chars=(end, at)))
    rollout.spans = spans
