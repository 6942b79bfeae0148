"""A step of training on a small game with every preset, as its user starts it: no retriever, no scorer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

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


@pytest.mark.parametrize("preset", ["vpr", "vpr_loo", "vpr_return", "grpo"])
def test_a_step_of_training(preset: str, game: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-u", "-m", "verl.trainer.siop.main", "--config-dir", str(ROOT / "config")]
    weight = ["algorithm.siop_outcome_weight=0.5"] if preset == "vpr_return" else []
    done = subprocess.run(
        [
            *command,
            "experiment=games",
            "hardware=cpu",
            f"ablation={preset}",
            *weight,
            f"actor_rollout_ref.model.path={game / 'model'}",
            f"data.train_files={game / 'train.parquet'}",
            f"data.val_files={game / 'eval.parquet'}",
            "data.train_batch_size=4",
            "actor_rollout_ref.actor.ppo_mini_batch_size=4",
            "actor_rollout_ref.rollout.n=4",
            "trainer.total_training_steps=1",
            "trainer.save_freq=-1",
            "trainer.logger=[console]",
            f"trainer.default_local_dir={tmp_path / 'out'}",
            # Nobody answers there.
            "algorithm.siop_scorer_url=http://127.0.0.1:9",
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
    assert ("siop/turn_reward/mean:" in done.stdout) == (preset != "grpo")
    assert "siop/no_answer" not in done.stdout
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
