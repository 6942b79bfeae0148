"""The vLLM engine with vLLM itself on CPU; tests/scorer/test_vllm_fake.py has what needs no real one.

bash scripts/setup_env.sh --vllm && .venv/vllm/bin/python -m pytest tests/scorer/test_vllm_engine.py
"""

from __future__ import annotations

import contextlib
import importlib.util
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings
from scorer_process import ROOT, free_port, scorer_env
from scoring_cases import (
    CASES,
    MAX_MODEL_LEN,
    assert_agrees,
    case_model,
    flat,
    plain_support,
    probe,
    query,
    requests,
    save_case_model,
    trie_nodes,
)
from tiny_models import save_causal_lm
from verl.utils.siop.errors import EngineFailed, ScorerError, SiopConfigError
from verl.utils.siop.scorer.engines.base import EngineInfo
from verl.utils.siop.scorer.engines.transformers_engine import TransformersEngine
from verl.utils.siop.scorer.engines.vllm_engine import VllmEngine, _least_cpu_block

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs bash scripts/setup_env.sh --vllm"),
]

EDGE = next(case for case in CASES if "edge of a block" in case.name)
SMALL_CACHE = 1 << 24


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two checkpoints with different weights, by name."""
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("models")
    return {name: save_case_model(root / name, seed) for seed, name in enumerate("ab")}


@pytest.fixture(scope="module")
def engine(models):
    engine = VllmEngine.from_pretrained(str(models["a"]), max_model_len=MAX_MODEL_LEN, kv_cache_bytes=SMALL_CACHE)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def model():
    return case_model()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(engine, model, case):
    result = engine.support(case.rollouts)
    assert_agrees(result, plain_support(model, case.rollouts, case.too_long), case.too_long)


@settings(max_examples=25)
@given(requests())
def test_scores_are_those_of_full_sequences(engine, model, rollouts):
    assert_agrees(engine.support(rollouts), plain_support(model, rollouts))


def test_info(engine, models):
    assert engine.info == EngineInfo("vllm", str(models["a"]), MAX_MODEL_LEN, 512)


def test_cached_reference_tokens_come_from_siblings_or_are_asked_one_by_one(engine, model):
    assert_agrees(engine.support(EDGE.rollouts), plain_support(model, EDGE.rollouts))
    assert engine.last_call.from_siblings > 100
    assert engine.last_call.single_tokens > 10


def test_the_same_request_twice_computes_everything_twice(engine):
    first = engine.support(EDGE.rollouts)
    again = engine.support(EDGE.rollouts)
    assert again.computed_tokens == first.computed_tokens  # nothing is taken from an earlier call
    np.testing.assert_allclose(flat(again.support), flat(first.support), rtol=0, atol=1e-5)


def test_requests_at_once(engine, model):
    with ThreadPoolExecutor(4) as threads:
        results = list(threads.map(engine.support, [case.rollouts for case in CASES[10:18]]))
    for case, result in zip(CASES[10:18], results, strict=True):
        assert_agrees(result, plain_support(model, case.rollouts))


def test_the_longest_sequence_that_the_model_itself_takes(models, model):
    limit = model.config.max_position_embeddings
    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(0, 512, n).tolist()  # noqa: E731
    exact = query(draw(30), draw(limit - 36), [0, limit - 36], (draw(6), 1, 6))
    over = query(draw(30), draw(limit - 35), [0, limit - 35], (draw(6), 1, 6))
    engine = VllmEngine.from_pretrained(str(models["a"]), kv_cache_bytes=SMALL_CACHE)
    assert engine.info.max_model_len == limit
    assert_agrees(engine.support([exact, over]), plain_support(model, [exact, over], {1}), {1})
    with pytest.raises(SiopConfigError, match=str(limit)):
        VllmEngine.from_pretrained(str(models["a"]), max_model_len=limit + 1)


def test_a_request_larger_than_the_cache(models, model):
    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(0, 512, n).tolist()  # noqa: E731
    rollouts = [query(draw(16), draw(200), [0, 60, 130, 200], (draw(9), 1, 9), (draw(5), 1, 4)) for _ in range(6)]
    # 40 blocks of 16 tokens: two layers with keys and values of 32 float32 numbers.
    engine = VllmEngine.from_pretrained(
        str(models["a"]), max_model_len=MAX_MODEL_LEN, kv_cache_bytes=40 * 16 * 2 * 2 * 32 * 4
    )
    result = engine.support(rollouts)
    assert_agrees(result, plain_support(model, rollouts))
    assert engine.last_call.waves > 2
    # Larger blocks share less.
    assert result.computed_tokens < (1.5 if _least_cpu_block() == 16 else 1.7) * trie_nodes(rollouts)


def test_two_processes_share_a_model(models, model):
    engine = VllmEngine.from_pretrained(
        str(models["a"]), max_model_len=MAX_MODEL_LEN, kv_cache_bytes=SMALL_CACHE, tensor_parallel_size=2
    )
    assert_agrees(engine.support(EDGE.rollouts), plain_support(model, EDGE.rollouts))
    engine.close()


def save_adapter(path: Path, seed: int, rank: int, modules=("q_proj", "v_proj", "down_proj")):
    """A random LoRA adapter; returns the model with it."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(modules), init_lora_weights=False)
    model = get_peft_model(case_model(), config)
    model.save_pretrained(str(path))
    return model.eval()


def test_adapters_and_weights_change_between_calls(models, model, tmp_path):
    rollouts = CASES[5].rollouts
    first, second, other = save_adapter(tmp_path / "1", 1, 8), save_adapter(tmp_path / "2", 2, 4), case_model(1)
    save_adapter(tmp_path / "big", 3, 16)
    save_adapter(tmp_path / "more", 4, 8, ("q_proj", "o_proj"))
    engine = VllmEngine.from_pretrained(
        str(models["a"]), max_model_len=MAX_MODEL_LEN, kv_cache_bytes=SMALL_CACHE, lora_path=str(tmp_path / "1")
    )
    assert_agrees(engine.support(rollouts), plain_support(first, rollouts))
    engine.load_lora(str(tmp_path / "2"))
    assert_agrees(engine.support(rollouts), plain_support(second, rollouts))
    for refused in ("big", "more"):
        with pytest.raises(SiopConfigError, match="was built for rank 8"):
            engine.load_lora(str(tmp_path / refused))
    assert_agrees(engine.support(rollouts), plain_support(second, rollouts))
    engine.load_lora(None)
    assert_agrees(engine.support(rollouts), plain_support(model, rollouts))
    second.save_pretrained(tmp_path / "1")  # the same folder, other weights
    engine.load_lora(str(tmp_path / "1"))
    assert_agrees(engine.support(rollouts), plain_support(second, rollouts))
    engine.load_weights(str(models["b"]))
    assert_agrees(engine.support(rollouts), plain_support(other, rollouts))
    engine.close()
    with pytest.raises(EngineFailed, match="closed"):
        engine.support(rollouts)


def test_an_engine_without_adapters_refuses_one(engine, tmp_path):
    save_adapter(tmp_path, 0, 4)
    with pytest.raises(SiopConfigError, match="without an adapter"):
        engine.load_lora(str(tmp_path))


def test_a_model_with_nan_weights_gives_an_error_and_no_score(tmp_path):
    broken = case_model()
    with torch.no_grad():
        broken.model.norm.weight[0] = float("nan")
    broken.save_pretrained(tmp_path)
    with pytest.raises((ScorerError, SiopConfigError), match=r"not finite|self-test"):
        VllmEngine.from_pretrained(str(tmp_path), max_model_len=MAX_MODEL_LEN, kv_cache_bytes=SMALL_CACHE)


def standard_batch(vocab_size: int):
    """2 questions of 8 rollouts of 1,500 to 2,500 tokens in 4 turns, 3 references each."""
    rng = np.random.default_rng(0)
    rollouts = []
    for answers in (("the Eiffel Tower", "Eiffel Tower (1889)", "the tower in Paris, France"), ("Curie", "Marie", "P")):
        prompt = rng.integers(0, vocab_size, 300).tolist()
        probes = [probe(answer) for answer in answers]
        for _ in range(8):
            response = rng.integers(0, vocab_size, rng.integers(1200, 2200)).tolist()
            cuts = sorted(rng.integers(1, len(response), 3).tolist())
            rollouts.append(query(prompt, response, [0, *cuts, len(response)], *probes))
    return rollouts


@pytest.mark.parametrize(("block_size", "bound"), [(16, 1.25), (32, 1.4)])
def test_tokens_of_the_standard_batch(tmp_path, block_size, bound):
    if block_size < _least_cpu_block():
        pytest.skip(f"this vLLM has no blocks of {block_size} tokens on a CPU")
    path = save_causal_lm(tmp_path, vocab_size=512, head_dim=32, num_hidden_layers=1, max_position_embeddings=4096)
    rollouts = standard_batch(512)
    engine = VllmEngine.from_pretrained(str(path), block_size=block_size)
    result = engine.support(rollouts)
    engine.close()
    expected = TransformersEngine.from_pretrained(str(path)).support(rollouts)
    np.testing.assert_allclose(flat(result.support), flat(expected.support), rtol=0, atol=1e-4)
    print(f"block size {block_size}: {result.computed_tokens / expected.computed_tokens:.3f} of the tree's tokens")
    assert expected.computed_tokens < result.computed_tokens <= bound * expected.computed_tokens
    assert engine.last_call.waves == 1


def body(rollouts):
    return {
        "rollouts": [
            {
                "prompt_ids": rollout.prompt_ids.tolist(),
                "response_ids": rollout.response_ids.tolist(),
                "boundaries": list(rollout.boundaries),
                "openings": [opening.tolist() for opening in rollout.openings],
                "references": [
                    {"token_ids": p.token_ids.tolist(), "start": p.start, "end": p.end} for p in rollout.probes
                ],
            }
            for rollout in rollouts
        ]
    }


def test_service_through_the_launcher(models, tmp_path):
    port = free_port()
    env = scorer_env(
        SIOP_MODEL=str(models["a"]),
        SIOP_ENGINE="vllm",
        SIOP_NUM_GPUS="0",
        SIOP_PORT=str(port),
        SIOP_DTYPE="float32",
        SIOP_MAX_MODEL_LEN=str(MAX_MODEL_LEN),
        SIOP_START_TIMEOUT="200",
        VLLM_CPU_KVCACHE_SPACE="1",
        LOG_DIR=str(tmp_path),
        VIRTUAL_ENV=sys.prefix,
    )
    launcher = ["bash", str(ROOT / "launch_siop_scorer.sh")]
    processes: list[psutil.Process] = []
    try:
        started = subprocess.run(launcher, env=env, capture_output=True, text=True, timeout=240)
        assert started.returncode == 0, started.stdout + started.stderr + (tmp_path / "siop_scorer.log").read_text()
        url = f"http://127.0.0.1:{port}"
        health = httpx.get(f"{url}/health", timeout=10).json()
        assert (health["engine"], health["max_model_len"]) == ("vllm", MAX_MODEL_LEN)
        local = TransformersEngine.from_pretrained(str(models["a"]), max_model_len=MAX_MODEL_LEN)
        chosen = [EDGE, *CASES[12:18], next(case for case in CASES if case.name == "one over max_model_len")]
        with ThreadPoolExecutor(4) as threads:
            answers = list(
                threads.map(lambda case: httpx.post(f"{url}/support", json=body(case.rollouts), timeout=60), chosen)
            )
        for case, response in zip(chosen, answers, strict=True):
            answer = response.json()
            expected = local.support(case.rollouts)
            scores = [rows or [] for rows in answer["support"]]
            np.testing.assert_allclose(flat(scores), flat(expected.support), rtol=0, atol=1e-4)
            assert [error["rollout"] for error in answer.get("errors", [])] == sorted(case.too_long)
        # Killed, not stopped: vLLM must not outlive the service.
        server = psutil.Process(int((tmp_path / "siop_scorer.pid").read_text().split()[0]))
        processes += [server, *server.children(recursive=True)]
        workers = [process for process in processes if "ScoringWorker" in " ".join(process.cmdline())]
        assert len(workers) == 1
        server.kill()
        assert psutil.wait_procs(workers, timeout=60)[1] == []
    finally:
        subprocess.run([*launcher, "stop"], env=env, capture_output=True, timeout=90)
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
