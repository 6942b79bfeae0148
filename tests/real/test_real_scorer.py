"""Both engines with SmolLM2: the scores are those of plain full sequences."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from real_cases import real_request
from scoring_cases import assert_agrees, plain_support, trie_nodes
from transformers import AutoModelForCausalLM
from verl.utils.siop.scorer.engines.base import RolloutQuery
from verl.utils.siop.scorer.engines.transformers_engine import TransformersEngine

Expected = list[list[list[float]]]


@pytest.fixture(scope="module")
def rollouts(smollm2: Path) -> list[RolloutQuery]:
    return real_request(smollm2)


@pytest.fixture(scope="module")
def expected(smollm2: Path, rollouts: list[RolloutQuery]) -> Expected:
    model = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    return plain_support(model, rollouts)


def test_transformers_engine(smollm2: Path, rollouts: list[RolloutQuery], expected: Expected) -> None:
    result = TransformersEngine.from_pretrained(str(smollm2)).support(rollouts)
    assert_agrees(result, expected)
    assert result.computed_tokens == trie_nodes(rollouts) < result.requested_tokens / 3
    assert min(np.ptp(np.array(scores), axis=0).min() for scores in result.support) > 0.1  # contexts do matter


@pytest.mark.vllm
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs bash scripts/setup_env.sh --vllm")
def test_vllm_engine(smollm2: Path, rollouts: list[RolloutQuery], expected: Expected) -> None:
    from verl.utils.siop.scorer.engines.vllm_engine import VllmEngine

    engine = VllmEngine.from_pretrained(str(smollm2), dtype="float32", max_model_len=512, kv_cache_bytes=1 << 28)
    try:
        assert_agrees(engine.support(rollouts), expected)
    finally:
        engine.close()
