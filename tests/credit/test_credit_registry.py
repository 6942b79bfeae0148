"""A credit method and a baseline from a user's module: the example of the documentation, run as it stands there."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from method_helpers import run, search_rollout
from turn_tensors import batch_of, by_turn
from verl.trainer.siop.advantage import compute_siop_advantage
from verl.utils.siop.credit.registry import BASELINES, CREDIT_METHODS, register_baseline, register_credit
from verl.utils.siop.errors import SiopConfigError
from verl.utils.siop.siop_process_reward import SiopConfig

DOCUMENT = Path(__file__).parents[2] / "docs" / "credit_assignment.md"


@pytest.fixture
def example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (code,) = re.findall(r"```python\n# my_credit.py\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    (tmp_path / "my_credit.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    yield "my_credit"
    sys.modules.pop("my_credit", None)
    CREDIT_METHODS._functions.pop("brief_majority", None)
    BASELINES._functions.pop("question_mean", None)


def test_the_documented_example(example: str) -> None:
    keys = {"siop_import": example, "siop_reward_mode": "brief_majority"}
    batch = [search_rollout("a", answer, ["D"] * n) for answer, n in (("x", 1), ("X", 3), ("y", 0), (None, 1))]
    rewards = run(batch, **keys)
    assert rewards.turn_rewards == [[0.0, 2 / 3 / 2], [0.0, 0.0, 0.0, 2 / 3 / 4], [1 / 3], []]
    assert rewards.target_mass == [2 / 3, 2 / 3, 1 / 3, 0.0]

    tokens, mask, index = batch_of([[1.0, 2.0], [0.5], [4.0]], ["a", "a", "b"])
    config = {"siop_import": example, "siop_baseline": "question_mean"}
    advantages, returns = compute_siop_advantage(tokens, mask, index=index, config=config)
    assert by_turn(advantages, mask) == [[1.25, 0.25], [-1.25], [0.0]]
    assert torch.equal(returns, compute_siop_advantage(tokens, mask, index=index)[1])


def test_without_the_import_the_names_are_unknown_and_the_known_ones_are_listed() -> None:
    known = "process, majority_binary, cluster_frequency, query_consensus"
    with pytest.raises(SiopConfigError, match=f"siop_reward_mode='brief_majority' is not allowed.*{known}"):
        SiopConfig(siop_reward_mode="brief_majority")
    with pytest.raises(SiopConfigError, match="leave_one_out, pooled, turn_index, turn_group"):
        SiopConfig(siop_baseline="question_mean")
    with pytest.raises(SiopConfigError, match=r"siop_baseline='x' is not allowed.*turn_group, trace$"):
        BASELINES["x"]


def test_a_name_belongs_to_one_function(example: str) -> None:
    SiopConfig(siop_import=example)
    del sys.modules[example]
    SiopConfig(siop_import=example)  # the same functions once more
    with pytest.raises(SiopConfigError, match=r"pooled.*wants the name 'process', which belongs to .*process"):
        register_credit("process")(BASELINES["pooled"])  # type: ignore[arg-type, type-var]
    with pytest.raises(SiopConfigError, match=r"which belongs to my_credit\.question_mean"):
        register_baseline("question_mean")(BASELINES["pooled"])
