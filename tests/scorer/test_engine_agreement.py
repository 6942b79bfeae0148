"""The transformers engine gives the scores of plain full-sequence forward passes, alone and behind the service."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import httpx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scorer_process import ScorerProcess
from scoring_cases import (
    CASES,
    MAX_MODEL_LEN,
    TOLERANCE,
    ScoringCase,
    assert_agrees,
    case_model,
    contexts,
    flat,
    plain_support,
    requests,
    save_case_model,
    trie_nodes,
)
from verl.utils.siop.scorer.engines.transformers_engine import TransformersEngine


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model():
    return case_model()


@pytest.fixture(scope="module")
def engine(model):
    return TransformersEngine(model, max_model_len=MAX_MODEL_LEN)


@pytest.fixture(scope="module")
def expected(model):
    """Plain scores of a case, computed once."""
    by_name = {case.name: case for case in CASES}

    @cache
    def compute(name: str):
        return plain_support(model, by_name[name].rollouts, by_name[name].too_long)

    return lambda case: compute(case.name)


def scored(case: ScoringCase) -> list:
    return [rollout for index, rollout in enumerate(case.rollouts) if index not in case.too_long]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_listed_case(engine, expected, case):
    result = engine.support(case.rollouts)
    assert_agrees(result, expected(case), case.too_long)
    assert trie_nodes(scored(case)) <= result.computed_tokens <= 1.02 * trie_nodes(scored(case))
    # The same request again, with whatever the first one left behind.
    assert engine.support(case.rollouts) == result


def test_chunks_that_end_inside_branches(model, expected):
    engine = TransformersEngine(model, max_model_len=MAX_MODEL_LEN, chunk_tokens=37)
    for case in CASES[::5]:
        assert_agrees(engine.support(case.rollouts), expected(case), case.too_long)


@settings(max_examples=25)
@given(requests(), st.sampled_from([1, 3, 7, 256]))
def test_any_request(model, rollouts, chunk_tokens):
    result = TransformersEngine(model, chunk_tokens=chunk_tokens, self_test=False).support(rollouts)
    assert_agrees(result, plain_support(model, rollouts))
    assert trie_nodes(rollouts) <= result.computed_tokens <= 1.02 * trie_nodes(rollouts)
    assert result.requested_tokens == sum(
        len(context) + len(probe.token_ids)
        for rollout in rollouts
        for context in contexts(rollout)
        for probe in rollout.probes
    )


def test_requests_at_once_on_one_engine(engine, expected):
    some = CASES[::3]
    with ThreadPoolExecutor(4) as pool:
        for case, result in zip(some, pool.map(lambda case: engine.support(case.rollouts), some), strict=True):
            assert_agrees(result, expected(case), case.too_long)


def test_requests_at_once_through_the_service(expected, tmp_path):
    some = CASES[1::4] + [case for case in CASES if 0 < len(case.too_long) < len(case.rollouts)]
    process = ScorerProcess(
        ["--model", str(save_case_model(tmp_path / "lm")), "--num-workers", "2", "--max-model-len", str(MAX_MODEL_LEN)],
        tmp_path / "scorer.log",
    )

    def body(case: ScoringCase) -> dict:
        return {
            "rollouts": [
                {
                    "prompt_ids": rollout.prompt_ids.tolist(),
                    "response_ids": rollout.response_ids.tolist(),
                    "boundaries": rollout.boundaries,
                    "openings": [opening.tolist() for opening in rollout.openings],
                    "references": [
                        {"token_ids": probe.token_ids.tolist(), "start": probe.start, "end": probe.end}
                        for probe in rollout.probes
                    ],
                }
                for rollout in case.rollouts
            ]
        }

    async def ask() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=process.url, timeout=60) as client:
            return await asyncio.gather(*(client.post("/support", json=body(case)) for case in some * 2))

    try:
        process.wait_healthy(180)
        answers = asyncio.run(ask())
    finally:
        process.stop()
    for case, answer in zip(some * 2, answers, strict=True):
        assert answer.status_code == 200, answer.text
        data = answer.json()
        assert {error["rollout"] for error in data.get("errors") or []} == case.too_long
        support = [rows or [] for rows in data["support"]]
        np.testing.assert_allclose(flat(support), flat(expected(case)), rtol=0, atol=TOLERANCE)


def changed(before, after) -> bool:
    return bool(np.abs(np.subtract(flat(before), flat(after))).max() > 100 * TOLERANCE)


def test_after_a_weight_update_in_place():
    model, case = case_model(), CASES[10]
    engine = TransformersEngine(model, max_model_len=MAX_MODEL_LEN)
    before = engine.support(case.rollouts).support
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    updated = engine.support(case.rollouts)
    assert_agrees(updated, plain_support(model, case.rollouts))
    model.load_state_dict(case_model(seed=1).state_dict())
    replaced = engine.support(case.rollouts)
    assert_agrees(replaced, plain_support(case_model(seed=1), case.rollouts))
    assert changed(before, updated.support) and changed(updated.support, replaced.support)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_after_a_lora_swap():
    from peft import LoraConfig

    model, case = case_model(), CASES[10]
    engine = TransformersEngine(model, max_model_len=MAX_MODEL_LEN)
    torch.manual_seed(0)
    seen = [engine.support(case.rollouts).support]
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    for name in ("first", "second"):
        model.add_adapter(lora, adapter_name=name)
    for swap in (
        lambda: model.set_adapter("first"),
        lambda: model.set_adapter("second"),
        lambda: model.set_adapter("first"),
        model.disable_adapters,
    ):
        swap()
        result = engine.support(case.rollouts)
        assert_agrees(result, plain_support(model, case.rollouts))
        seen.append(result.support)
    base, first, second, again, disabled = seen
    assert changed(base, first) and changed(first, second) and changed(base, second)
    assert first == again and base == disabled
