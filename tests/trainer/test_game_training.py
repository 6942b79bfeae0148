"""A step of training on a small game with every preset, as its user starts it: no retriever, no scorer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dumps import rows_of
from verl.utils.siop.envs.games import make

from examples.games import build

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def game(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tic-Tac-Toe with a policy that has learnt to write actions."""
    folder = tmp_path_factory.mktemp("game") / "tictactoe"
    words = ["--game", "tictactoe", "--train-boards", "16", "--eval-boards", "8"]
    assert build.main([*words, "--right-steps", "60", "--faulty-steps", "60", "--out", str(folder)]) == 0
    return folder


def _trained(game: Path, out: Path, *overrides: str) -> str:
    """Output of a training of one step with 16 rollouts."""
    command = [sys.executable, "-u", "-m", "verl.trainer.siop.main", "--config-dir", str(ROOT / "config")]
    done = subprocess.run(
        [
            *command,
            "experiment=games",
            "hardware=cpu",
            f"actor_rollout_ref.model.path={game / 'model'}",
            f"data.train_files={game / 'train.parquet'}",
            f"data.val_files={game / 'eval.parquet'}",
            "data.train_batch_size=4",
            "actor_rollout_ref.actor.ppo_mini_batch_size=4",
            "actor_rollout_ref.rollout.n=4",
            "trainer.total_training_steps=1",
            "trainer.save_freq=-1",
            "trainer.logger=[console]",
            f"trainer.default_local_dir={out}",
            # Nobody answers there.
            "algorithm.siop_scorer_url=http://127.0.0.1:9",
            *overrides,
        ],
        cwd=ROOT,
        env={**os.environ, "VERL_PLATFORM": "cpu", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    for name in ("success", "completion", "oracle_rate", "invalid", "ceiling_success"):
        assert f"siop/outcome/{name}:" in done.stdout
    assert "siop/no_answer" not in done.stdout
    return done.stdout


@pytest.mark.parametrize("preset", ["vpr", "vpr_loo", "vpr_return", "grpo"])
def test_a_step_of_training(preset: str, game: Path, tmp_path: Path) -> None:
    weight = ["algorithm.siop_outcome_weight=0.5"] if preset == "vpr_return" else []
    told = _trained(game, tmp_path / "out", f"ablation={preset}", *weight)
    assert ("siop/turn_reward/mean:" in told) == (preset != "grpo")
    rows = rows_of(tmp_path / "out" / "rollouts" / "1.jsonl")
    assert len(rows) == 16
    for row in rows:
        scores = row["turn_scores"]
        assert len(scores) == len(row["actions"]) >= 1
        # The dump is enough to judge every turn again.
        env = make(row["game"]["name"])
        env.reset(json.loads(row["game"]["spec"]))
        assert [env.step(text).score for text in row["actions"]] == scores
        expected = [*scores[:-1], scores[-1] + 0.5 * row["success"]] if weight else scores
        if preset == "grpo":
            assert row["score"] == row["success"]
        else:
            assert row["turn_rewards"] == expected


def test_a_step_of_training_with_a_rollout_for_every_turn(game: Path, tmp_path: Path) -> None:
    states = ROOT / "config" / "game_states.yaml"
    told = _trained(
        game,
        tmp_path / "out",
        "ablation=vpr_loo",
        f"actor_rollout_ref.rollout.agent.agent_loop_config_path={states}",
        "actor_rollout_ref.rollout.n=1",
        "trainer.test_freq=1",
    )
    assert "siop/turn_reward/mean:" in told and "success/mean@1:" in told
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows_of(tmp_path / "out" / "rollouts" / "1.jsonl"):
        groups.setdefault(row["group"], []).append(row)
    assert len(groups) > 4  # questions
    learnt = 0
    for rows in groups.values():
        assert [row["session"] for row in rows] == list(range(rows[0]["session"], rows[0]["session"] + 4))
        assert len({row["input"] for row in rows}) == 1
        env = make("tictactoe")
        env.reset(json.loads(rows[0]["game"]["spec"]))
        for text in rows[0]["game"]["played"]:
            env.step(text)
        scores = []
        for row in rows:
            scores += row["turn_scores"]
            assert env.branch().step(*row["actions"]).score == row["turn_scores"][0] == row["turn_rewards"][0]
        # Compared with those of the same state alone.
        for row in rows:
            (advantage,) = row["turn_advantages"]
            assert np.sign(advantage) == np.sign(row["turn_scores"][0] - np.mean(scores))
        learnt += len(set(scores)) > 1
    assert learnt
