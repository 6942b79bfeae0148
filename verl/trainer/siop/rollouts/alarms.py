"""A step from which nothing can be learnt says so, with an example, the likely causes and the keys to change."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig
from verl.utils.siop.errors import SiopError

logger = logging.getLogger(__name__)

# Steps that count as the start, unless something was learnt before.
START_STEPS = 10
# Rollouts that steps in a row must have for a stop, so that it is no chance: what one rollout in four does stays away
# from 16 with a probability of 1 %. A right answer is rarer; one in twenty stays away from 100 with 0.6 %.
_ENOUGH, _ENOUGH_VARIANCE = 16, 100
_START_ONLY = ("no_call", "no_variance")
_EXAMPLE_CHARS = 400
_README = "README, 'What a prompt must ask for'"


class NothingLearnt(SiopError, RuntimeError):
    """Steps in a row gave nothing to learn from; the text says what was seen and what to change."""


@dataclass(frozen=True)
class Step:
    """What the rollouts of one training step did, in one order.

    Args:
        number: the training step, from 1.
        answers: final answers, empty where there is none.
        records: what became of the tool calls; empty where the agent loop did not count.
        learns: whether some advantage is not 0; None if nobody looked.
        text: what the policy itself wrote in a rollout, by its index.
        wanted: what ``answers`` holds, and the tags around it: answers, or the actions of games.
    """

    number: int
    answers: Sequence[str]
    records: Sequence[Mapping[str, Any]]
    learns: bool | None
    text: Callable[[int], str]
    wanted: str = "answer"


@dataclass(frozen=True)
class Finding:
    """One way of learning nothing.

    Args:
        kind: its name.
        weight: number of rollouts that say so.
        seen: what was seen, with its share.
        example: index of a rollout that shows it.
        causes: likely ones, most likely first, each with the key to change.
        enough: how many rollouts in steps in a row end the run; None if something is learnt all the same.
    """

    kind: str
    weight: int
    seen: str
    example: int
    causes: tuple[str, ...]
    enough: int | None = _ENOUGH


class NothingLearntAlarm:
    """Looks at every step (``algorithm.siop_on_nothing_learnt``).

    Until a step shows all that learning needs, and for the first 10 steps at most:

    - no rollout has an answer
    - most of the rollouts that have a tool try no call, and none is executed
    - most of them try one, and none is executed
    - all advantages are 0

    The second and the last come about in a healthy training, too (a policy that knows its few questions by heart), so
    afterwards only the other two are looked at, the third without calls that were merely dropped. With ``stop`` the
    same finding in two or more steps in a row ends the run as soon as these have 16 rollouts that say so; for the last
    one 100, unless all answers are the same or none; the second never does while some advantage is not 0. The first
    such step is a warning. With ``warn`` each kind is told once.

    Args:
        action: ``stop`` or ``warn``.
        config: verl's whole configuration, for the values that the text names.
    """

    def __init__(self, action: str, config: DictConfig) -> None:
        self.action, self.config = action, config
        self.starting = True
        self._told: set[str] = set()
        self._rows: dict[str, tuple[int, int, int]] = {}  # kind -> steps in a row, their rollouts, how many end the run

    def look(self, step: Step) -> None:
        """Warns, or ends the run.

        Raises:
            NothingLearnt: ``stop``, and the steps before were no better.
        """
        self.starting = self.starting and step.number <= START_STEPS
        findings = [found for found in self._findings(step) if self.starting or found.kind not in _START_ONLY]
        self.starting = self.starting and bool(findings)
        before, self._rows = self._rows, {}
        for finding in findings if self.action == "stop" else []:
            if finding.enough is not None:
                steps, rollouts, enough = before.get(finding.kind, (0, 0, 0))
                row = (steps + 1, rollouts + finding.weight, max(enough, finding.enough))
                self._rows[finding.kind] = row
        over = [steps for steps, rollouts, enough in self._rows.values() if steps > 1 and rollouts >= enough]
        if over:
            raise NothingLearnt(self._block(step, findings, f"stopped after {max(over)} such steps in a row"))
        new = [finding for finding in findings if finding.kind not in self._told]
        if new:
            self._told.update(finding.kind for finding in new)
            rows = [self._rows[finding.kind] for finding in new if finding.kind in self._rows]
            outlook = "more such steps end the run" if rows else "going on"
            if any(rollouts + rollouts // steps >= enough for steps, rollouts, enough in rows):
                outlook = "the next such step ends the run"
            logger.warning("%s", self._block(step, new, outlook))

    def _findings(self, step: Step) -> list[Finding]:
        found, count = [], len(step.answers)
        rollout = self.config.actor_rollout_ref.rollout
        truncated = sum(record["truncated"] for record in step.records)
        causes: tuple[str, ...]
        if not any(step.answers):
            tags = f"<{step.wanted}>…</{step.wanted}>"
            causes = (
                f"the prompt does not ask for {tags}: {_README} has a text (data.train_files)",
                "the model does not keep to the form: use an instruction-tuned one, or warm-start it "
                "(actor_rollout_ref.model.path)",
            )
            if 2 * truncated > count:
                cut = f"{truncated} of {count} rollouts were cut: raise data.max_response_length"
                causes = (f"{cut} (now {self.config.data.max_response_length})", *causes)
            seen = f"no {step.wanted} in {count} of {count} rollouts"
            found.append(Finding("no_answer", count, seen, 0, causes))
        found += self._call_findings(step)
        if step.learns is False:
            causes = (
                "the rollouts of a question are all alike: raise actor_rollout_ref.rollout.temperature (now "
                f"{rollout.temperature}) or actor_rollout_ref.rollout.n (now {rollout.n})",
                "the questions are too easy or too hard for the policy: choose other data (data.train_files)",
            )
            if found:
                causes = ("it follows from the above", *causes)
            seen = f"every advantage is 0 in {count} of {count} rollouts: no question's rollouts differ in their worth"
            enough = _ENOUGH if len(set(step.answers)) == 1 else _ENOUGH_VARIANCE
            found.append(Finding("no_variance", count, seen, 0, causes, enough))
        return found

    def _call_findings(self, step: Step) -> list[Finding]:
        offered = [index for index, record in enumerate(step.records) if record["offered"]]
        records, count = [step.records[index] for index in offered], len(offered)
        total = {key: sum(r[key] for r in records) for key in ("calls", "executed", *_CALL_CAUSES)}
        tool_format = self.config.actor_rollout_ref.rollout.multi_turn.format
        if not records or total["executed"]:
            return []
        reasons = sorted((key for key in _CALL_CAUSES if total[key]), key=lambda key: -total[key])
        shares = ", ".join(f"{total[key]} {_CALL_CAUSES[key][0]}" for key in reasons)
        tools = ", ".join(sorted({name for record in records for name in record["offered"]}))
        causes = tuple(_CALL_CAUSES[key][1].format(format=tool_format, tools=tools) for key in reasons)
        unmet = f"none of {total['calls']} tool calls was executed: {shares}"
        tried = sum(record["calls"] > (0 if self.starting else record["dropped"]) for record in records)
        if 2 * tried >= count:
            example = next(index for index in offered if step.records[index][reasons[0]])
            return [Finding("no_call_executed", tried, unmet, example, causes)]
        causes = (
            "the model is not told of its tools: a chat template that does not render them needs a prompt that "
            f"describes them ({_README})",
            f"the model writes calls in a form that is not recognised: "
            f"actor_rollout_ref.rollout.multi_turn.format={tool_format}",
            *causes,
        )
        silent = [index for index in offered if not step.records[index]["calls"]]
        seen = f"no tool call in {len(silent)} of {count} rollouts that had a tool" + (f", {unmet}" if reasons else "")
        example = (silent or offered)[0]
        return [Finding("no_call", count, seen, example, causes, None if step.learns else _ENOUGH)]

    def _block(self, step: Step, findings: Sequence[Finding], outlook: str) -> str:
        learnt = "no use of tools" if all(finding.enough is None for finding in findings) else "nothing"
        lines = [f"{learnt} can be learnt from step {step.number} ({outlook})"]
        for finding in findings:
            lines += [f"  {finding.seen}", *(f"    - {cause}" for cause in finding.causes)]
        lines.append(f"  end of what a rollout wrote: {shown(step.text(findings[0].example))}")
        folder = self.config.trainer.get("rollout_data_dir")
        lines.append(
            (f"  all rollouts of earlier steps: {folder}; " if folder else "  ")
            + f"algorithm.siop_on_nothing_learnt={self.action} (stop, warn)"
        )
        return "\n".join(lines)


# Why a call was not executed: how it is counted, and what to change.
_CALL_CAUSES = {
    "unparsed": (
        "not read",
        "what the model writes is not the form actor_rollout_ref.rollout.multi_turn.format={format}: name the format "
        "that fits the model, or ask for this one in the prompt",
    ),
    "unknown_tool": (
        "of an unknown tool",
        "the model calls other tools than {tools}: name these in the prompt, or change "
        "actor_rollout_ref.rollout.multi_turn.tool_config_path",
    ),
    "invalid_arguments": (
        "with invalid arguments",
        "the arguments are not those of the tool's schema: describe them in the prompt, or change tool_schema in "
        "actor_rollout_ref.rollout.multi_turn.tool_config_path",
    ),
    "failed": ("failed", "the tool raised: the log has 'Error executing tool' with the reason"),
    "dropped": (
        "dropped",
        "no turn is left for the result, or too many calls are in one turn: raise actor_rollout_ref.rollout.multi_turn."
        "max_assistant_turns or max_parallel_calls",
    ),
}


def shown(text: str) -> str:
    """The end of a text on one line, control characters escaped."""
    end = text[-_EXAMPLE_CHARS:]
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in end)
    return ("…" if len(end) < len(text) else "") + escaped
