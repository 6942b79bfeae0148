"""A run's dump as the trainer writes it: real rewards of the method, the real estimator, the real writer; no model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dumps import rows_of
from method_helpers import Scorer, byte_tokenizer, rollout, run, tool_result
from omegaconf import OmegaConf
from verl.trainer.ppo.v1.trainer_base import PPOTrainer
from verl.trainer.siop.advantage import compute_siop_advantage
from verl.trainer.siop.rollouts import dump
from verl.utils.siop.credit.answers import exact_match, f1_score
from verl.utils.siop.siop_process_reward import Rollout, SiopConfig
from verl.utils.siop.turn_utils import get_assistant_turn_ranges

HOSTILE = (
    "<script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\"></script><!-- @MAIN@ "
    "\u2028\u202e \x00"
)
ANSWERS = ("Paris", "paris", "Lyon", "Paris", None, "Nice", "Paris", "Lyon")


def questions(step: int, number: int = 3, rollouts: int = 4) -> list[Rollout]:
    """The rollouts of a step, by question: searches with shared queries, one without an answer, a hostile passage."""
    found = []
    for place in range(number):
        uid = f"u-{step}-{place}"
        for session in range(rollouts):
            answer = ANSWERS[(session + place + step) % len(ANSWERS)]
            searches = 1 + (session + place) % 3 if session else 0
            queries = [f"query {turn} of {place}" for turn in range(searches)]
            turns = [
                f"<think>step {turn}</think><tool_call>"
                f'{{"name": "search", "arguments": {{"query": "{query}"}}}}</tool_call><|im_end|>'
                for turn, query in enumerate(queries)
            ]
            last = "" if answer is None else f"<answer> {answer} </answer>"
            turns.append(f"<think>done</think>{last}<|im_end|>")
            passages = [f"[1] passage {turn} of {place} {HOSTILE} [2] another é" for turn in range(searches)]
            one = rollout(uid, turns, [tool_result(text) for text in passages])
            calls = [[("search", json.dumps({"query": query}))] for query in queries]
            # Asked again every second step.
            found.append(replace(one, question=f"Where is {place} of {step % 2}?", executed_calls=[*calls, []]))
    return found


def algorithm(**keys: Any) -> Any:
    """A whole configuration, of which the dump keeps the algorithm section."""
    section = {"adv_estimator": "siop", "gamma": 1.0, "norm_adv_by_std_in_grpo": True, **keys}
    rollouts = {"rollout": {"n": 4, "temperature": 1.0}}
    return OmegaConf.create({"algorithm": section, "data": {"seed": 1}, "actor_rollout_ref": rollouts})


def _padded(rows: Sequence[Sequence[float]], dtype: torch.dtype) -> torch.Tensor:
    rows_L = [torch.tensor(row, dtype=dtype) for row in rows]
    return torch.nn.utils.rnn.pad_sequence(rows_L, batch_first=True)


def estimate(rollouts: Sequence[Rollout], turn_rewards: Sequence[Sequence[float]], config: Any) -> dict[str, Any]:
    """The estimator's rewards, advantages and returns of a batch, [B, L]."""
    rewards = []
    for one, row in zip(rollouts, turn_rewards, strict=True):
        tokens = [0.0] * len(one.response_ids)
        for (_, end), value in zip(get_assistant_turn_ranges(one.response_mask), row, strict=False):
            tokens[end - 1] = value
        rewards.append(tokens)
    mask = _padded([one.response_mask for one in rollouts], torch.int64)
    rewards_BL = _padded(rewards, torch.float32)
    uids = np.array([one.uid for one in rollouts], dtype=object)
    advantages, returns = compute_siop_advantage(rewards_BL, mask, index=uids, config=config.algorithm)
    return {"rewards": rewards_BL, "mask": mask, "advantages": advantages, "returns": returns}


def fields(rollouts: Sequence[Rollout], seen: Mapping[str, Any]) -> Any:
    """What the trainer's queue holds of the rollouts once the estimator has run."""

    def rows(name: str) -> list[torch.Tensor]:
        return [row[: len(one.response_ids)] for row, one in zip(seen[name], rollouts, strict=True)]

    return {
        "prompts": [torch.tensor(one.prompt_ids) for one in rollouts],
        "responses": [torch.tensor(one.response_ids) for one in rollouts],
        "rm_scores": rows("rewards"),
        "reward_model": [{"ground_truth": {"target": ["Paris"]}}] * len(rollouts),
        "raw_prompt": [[{"role": "user", "content": one.question}] for one in rollouts],
        "extra_info": [{}] * len(rollouts),
        "advantages": rows("advantages"),
        "returns": rows("returns"),
    }


def write_step(folder: Path, step: int, rollouts: Sequence[Rollout], **keys: Any) -> dict[str, Any]:
    """Dump one step; what the estimator saw and said of it."""
    config = algorithm(**keys)
    siop = SiopConfig.from_algorithm(config.algorithm)
    tokenizer = byte_tokenizer()
    found = run(rollouts, Scorer(), tokenizer, **{k: v for k, v in keys.items() if k.startswith("siop_")})
    seen = estimate(rollouts, found.turn_rewards, config)
    sessions: dict[str, int] = {}
    numbers = []
    for one in rollouts:
        numbers.append(sessions.setdefault(one.uid, 0))
        sessions[one.uid] += 1
    records: list[Mapping[str, Any]] = [
        {
            "em": exact_match(found.answers[i], ["Paris"]),
            "f1": f1_score(found.answers[i], ["Paris"]),
            "question": one.question,
            "answer": found.answers[i],
            "cluster": found.cluster_ids[i],
            "references": found.references[i],
            "mass": found.masses[i],
            "votes": found.votes[i],
            "evidence": found.evidence[i],
            "target": found.target_mass[i],
            "support": found.support[i],
            **({} if one.turn_scores is None else {"turn_scores": one.turn_scores, "success": one.outcome}),
            "turn_rewards": torch.tensor(found.turn_rewards[i], dtype=torch.float32).tolist(),
            "siop_tools": {"executed": 1, "failed": i % 2, "executed_calls": one.executed_calls},
        }
        for i, one in enumerate(rollouts)
    ]
    data = fields(rollouts, seen)
    turns = [get_assistant_turn_ranges(one.response_mask) for one in rollouts]
    dumped = [f"{one.uid}_{number}_0" for one, number in zip(rollouts, numbers, strict=True)]
    settings = dump.settings_of(config, siop)
    dump.write_settings(folder, settings)
    columns = dump.columns(dumped, data, turns, records, tokenizer, settings, siop)
    inputs, outputs, gts, scores = (columns.pop(name) for name in ("input", "output", "gts", "score"))
    PPOTrainer._write_generations(inputs, outputs, gts, scores, columns, str(folder), step)
    dump.append_step(folder, step, {"timing_s/step": 3.0 + step, "timing_s/gen": 2.0, "siop/tokens/computed": 100.0})
    return seen


def lines_of(path: Path) -> list[str]:
    """The lines of a file, each with its end; the texts of a dump hold other line ends than this one, too."""
    return [f"{line}\n" for line in path.read_text().split("\n") if line]


def rewrite(path: Path, **fields: Any) -> list[dict[str, Any]]:
    """Give all rollouts of a step these fields; their lines."""
    lines = [{**row, **fields} for row in rows_of(path)]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return lines


def write_game(folder: Path, steps: int = 2) -> Path:
    """A run of a method without clusters, labels and answers, whose turns the environment scores."""
    write_run(folder, steps)
    own = ("cluster", "references", "mass", "evidence", "target", "support", "gains", "boundaries", "em", "f1", "gts")
    for step in range(1, steps + 1):
        path = folder / "rollouts" / f"{step}.jsonl"
        lines = rewrite(path, **dict.fromkeys(own), answer="", outcome={"solved": 0.25})
        scored = [{**line, "turn_scores": [0.125] * len(line["turn_advantages"])} for line in lines]
        path.write_text("".join(f"{json.dumps(line)}\n" for line in scored))
        unasked = {"siop/tokens/computed": 0.0, "siop/seconds/busy": 0.003, "siop/seconds/exposed": 0.003}
        dump.append_step(folder / "rollouts", step, {"siop/no_answer": 1.0, **unasked})
    return folder


def write_run(folder: Path, steps: int = 6, number: int = 3, **keys: Any) -> Path:
    """A whole run; its folder."""
    for step in range(1, steps + 1):
        write_step(folder / "rollouts", step, questions(step, number), **keys)
    return folder
