"""The page on scaling says what its script computes, and the script what arithmetic by hand gives."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import scaling

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_holds_the_scripts_table() -> None:
    text = (ROOT / "docs" / "scaling.md").read_text().partition(scaling.BEGIN)[2].partition(scaling.END)[0]
    assert text.strip() == scaling.table()


def test_tokens_of_the_scorer() -> None:
    setting = scaling.Setting(rollouts=2, turns=2, prompt=10, turn=4, observation=6, references=3, probe=5)
    tree, full = scaling.scorer_tokens(setting)
    # Prompt once, of each rollout what lies before its last turn, and at three boundaries three probes without the last
    # token of each; at the prompt they are the same for both rollouts.
    assert tree == 10 + 2 * 10 + 3 * 4 + 2 * 2 * 3 * 4
    assert full == 2 * 3 * sum(10 + end + 5 for end in (0, 4, 10))


def test_more_gpus_take_less_time_and_memory() -> None:
    model, device, setting = scaling.QWEN3[0], scaling.Device(), scaling.Setting()
    few, many = (scaling.step(model, device, setting, training, 4) for training in (6, 12))
    assert many["update"] == pytest.approx(few["update"] / 2)
    assert (
        many["support"]
        == few["support"]
        == pytest.approx(
            setting.questions
            * scaling.scorer_tokens(setting)[0]
            * (2 * 4.02e9 + 4 * 36 * 2560 * 1900)
            / (4 * 0.4 * 989e12)
        )
    )
    assert many["step"] < few["step"] and many["train GB"] < few["train GB"]
