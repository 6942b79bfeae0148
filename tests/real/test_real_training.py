"""One training step of SmolLM2 through the launchers: retriever, scorer and policy are what a user starts."""

from __future__ import annotations

import itertools
import math
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dumps import rows_of

from benchmarks.toy_services import toy_services
from examples.real_world.agent import call_text
from examples.real_world.build import write_world

ROOT = Path(__file__).parents[2]
# The template renders no tools, so the prompt has to show how they are called.
SHOTS = [
    message
    for country, capital in (("Italy", "Rome"), ("Spain", "Madrid"))
    for message in (
        {"role": "user", "content": f"What is the capital of {country}?"},
        {"role": "assistant", "content": call_text(f"capital of {country}")},
        {"role": "tool", "content": f"[1] {capital} is the capital of {country}."},
        {"role": "assistant", "content": f"<answer>{capital}</answer>"},
    )
]


@pytest.fixture(scope="module")
def step(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """Output folder and log of a training of one step, 2 questions x 3 rollouts."""
    folder = tmp_path_factory.mktemp("real_training")
    world, out, logs = folder / "world", folder / "out", folder / "logs"
    write_world(world, train=2, held_out=2, shots=SHOTS)
    with toy_services(world, logs, SIOP_MODEL=str(smollm2)) as env:
        command = [
            "bash",
            "train_siop.sh",
            "experiment=real_world",
            "trainer.total_training_steps=1",
            "trainer.save_freq=-1",
            "data.train_batch_size=2",
            "actor_rollout_ref.actor.ppo_mini_batch_size=2",
            "data.max_prompt_length=384",
            "data.max_response_length=128",
            "actor_rollout_ref.rollout.max_model_len=512",
            "actor_rollout_ref.rollout.n=3",
            # Colder than in a training: what it was shown is followed more often.
            "actor_rollout_ref.rollout.temperature=0.6",
            "actor_rollout_ref.rollout.multi_turn.max_assistant_turns=3",
        ]
        run = {
            "MODEL_PATH": str(smollm2),
            "TRAIN_FILE": str(world / "train.parquet"),
            "VAL_FILE": str(world / "eval.parquet"),
            "OUTPUT_DIR": str(out),
        }
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, **env, **run}, capture_output=True, text=True, timeout=900
        )
        log = (logs / "siop_train.log").read_text() if (logs / "siop_train.log").is_file() else ""
        assert done.returncode == 0, done.stdout + done.stderr + log[-5000:]
        yield out, log


def metrics_of(log: str) -> dict[str, float]:
    (line,) = re.findall(r"^.*\bstep:1 - .*$", log, re.MULTILINE)
    return {name: float(value) for name, value in re.findall(r"(\S+):(-?[\d.]+(?:e-?\d+)?|nan|inf)\b", line)}


def test_a_step_of_a_real_model(step: tuple[Path, str]) -> None:
    out, log = step
    metrics = metrics_of(log)
    assert math.isfinite(metrics["actor/grad_norm"]) and metrics["actor/grad_norm"] > 0
    # The rollout's model and the trainer's are the same in float32.
    assert metrics["training/rollout_probs_diff_max"] < 1e-3
    rows: list[dict[str, Any]] = rows_of(out / "rollouts" / "1.jsonl")
    assert len(rows) == 6
    assert sum(row["siop_tools"]["executed"] for row in rows) > 0
    assert all(row["siop_tools"]["executed"] <= row["output"].count("<|im_start|>tool") for row in rows)
    assert metrics["siop/no_answer"] == pytest.approx(sum(not row["answer"] for row in rows) / 6)


def test_its_turn_rewards_are_the_formulas(step: tuple[Path, str]) -> None:
    out, _ = step
    rows = rows_of(out / "rollouts" / "1.jsonl")
    answered = [row for row in rows if row["answer"]]
    assert answered
    for row in answered:
        target, support = row["target"], row["support"]
        assert all(0 <= p <= 1 for p in support)
        gains = [after - before for before, after in itertools.pairwise(itertools.accumulate(support, max))] or [0.0]
        expected = [target * gain for gain in gains]
        expected[-1] += 0.5 * target
        assert row["turn_rewards"] == pytest.approx(expected, abs=1e-6)
