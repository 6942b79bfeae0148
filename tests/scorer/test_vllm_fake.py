"""The vLLM engine over a stand-in for vLLM: all layouts of its answers, small caches, answers that are wrong."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from fake_vllm import FakeLlm, NewSamplingParams, SamplingParams
from hypothesis import given, settings
from hypothesis import strategies as st
from scoring_cases import (
    CASES,
    MAX_MODEL_LEN,
    assert_agrees,
    case_model,
    plain_support,
    query,
    requests,
    trie_nodes,
)
from verl.utils.siop.errors import EngineFailed, InvalidRequest, ScorerError, SiopConfigError
from verl.utils.siop.scorer.engines import vllm_waves
from verl.utils.siop.scorer.engines.lora import read_adapter
from verl.utils.siop.scorer.engines.vllm_engine import VllmEngine

# (sampling parameters, rows for cached tokens)
VERSIONS = {
    "V1 runner": (SamplingParams, True),
    "V2 runner": (SamplingParams, False),
    "vLLM 0.32": (NewSamplingParams, False),
}
EDGE = next(case for case in CASES if "edge of a block" in case.name)


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return case_model()


def build(model, version="V1 runner", **options) -> VllmEngine:
    params, cached_rows = VERSIONS[version]
    return VllmEngine(FakeLlm(model, MAX_MODEL_LEN, cached_rows=cached_rows, **options), params, self_test=False)


def test_cases(model):
    engines = [build(model, version, block_size=block_size) for version in VERSIONS for block_size in (16, 32)]
    for case in [EDGE, *CASES[::9]]:
        expected = plain_support(model, case.rollouts, case.too_long)
        for engine in engines:
            assert_agrees(engine.support(case.rollouts), expected, case.too_long)


@settings(max_examples=40)
@given(requests(), st.sampled_from(sorted(VERSIONS)), st.sampled_from([1, 2, 4]), st.sampled_from([12, 1000]))
def test_scores_are_those_of_full_sequences(model, rollouts, version, block_size, num_blocks):
    # Blocks of one to four tokens, so that references part inside, at and after their edges.
    engine = build(model, version, block_size=block_size, num_blocks=num_blocks * (8 // block_size))
    assert_agrees(engine.support(rollouts), plain_support(model, rollouts))


@pytest.mark.parametrize("version", VERSIONS)
def test_cached_reference_tokens_come_from_siblings_or_are_asked_one_by_one(model, version):
    engine = build(model, version)
    assert_agrees(engine.support(EDGE.rollouts), plain_support(model, EDGE.rollouts))
    assert engine.last_call.from_siblings > 100
    assert engine.last_call.single_tokens > 10


def test_contexts_and_branches_are_never_in_one_call_and_share_a_salt_of_their_own(model):
    llm = FakeLlm(model, MAX_MODEL_LEN)
    engine = VllmEngine(llm, SamplingParams, self_test=False)
    salts = []
    run = llm._run
    llm._run = lambda request, params: salts.append(request["cache_salt"]) or run(request, params)
    rollouts = [query(range(20), range(40), [0, 20, 40], (range(5), 1, 5))]
    first = engine.support(rollouts)
    assert [len(prompts) for prompts, _ in llm.calls] == [1, 3]
    assert llm.calls[0][0] == [[*range(20), *range(28)]]  # whole blocks of the longest context
    assert all(p.logprob_token_ids is None and p.prompt_logprobs is None for p in llm.calls[0][1])
    assert all(p.logprob_token_ids == [4] and p.prompt_logprobs == 0 for p in llm.calls[1][1])
    assert len(set(salts)) == 1
    assert engine.support(rollouts) == first
    assert len(set(salts)) == 2


def test_from_vllm_0_32_only_the_rows_of_the_reference_are_asked_for(model):
    llm = FakeLlm(model, MAX_MODEL_LEN)
    VllmEngine(llm, NewSamplingParams, self_test=False).support([query(range(20), [], [0], (range(30, 36), 2, 6))])
    (params,) = llm.calls[1][1]
    assert params.prompt_logprobs is None
    assert params.prompt_logprob_start == 21  # of the token before the first that counts
    assert params.prompt_logprob_token_ids == [[32], [33], [34]]
    assert params.logprob_token_ids == [35]


def test_a_runner_that_refuses_the_rows_of_the_reference_is_asked_for_all(model):
    llm = FakeLlm(model, MAX_MODEL_LEN)
    run = llm._run

    def refuse(request, params):
        if params.prompt_logprob_token_ids is not None:
            raise ValueError("needs the V2 model runner")
        return run(request, params)

    llm._run = refuse
    engine = VllmEngine(llm, NewSamplingParams)
    assert_agrees(engine.support(EDGE.rollouts), plain_support(model, EDGE.rollouts))


def test_a_request_larger_than_the_cache_goes_in_waves_that_fit(model):
    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(0, 500, n).tolist()  # noqa: E731
    rollouts = [query(draw(16), draw(200), [0, 60, 130, 200], (draw(9), 1, 9), (draw(5), 1, 4)) for _ in range(6)]
    engine = build(model, num_blocks=40)
    result = engine.support(rollouts)
    assert_agrees(result, plain_support(model, rollouts))
    assert engine.last_call.waves > 2
    whole = build(model)
    # Waves hold whole rollouts, so what they cost is the prompt and the last block of a context once more.
    assert result.computed_tokens - whole.support(rollouts).computed_tokens <= 6 * 32
    assert whole.last_call.waves == 1


def test_the_branches_of_one_rollout_are_split_if_they_alone_are_too_many(model):
    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(0, 500, n).tolist()  # noqa: E731
    rollouts = [query(draw(16), draw(100), [0, 50, 100], *[(draw(12), 1, 12) for _ in range(12)])]
    engine = build(model, num_blocks=20)
    assert_agrees(engine.support(rollouts), plain_support(model, rollouts))
    assert engine.last_call.waves > 2


def test_computed_tokens_are_counted_and_few(model):
    rng = np.random.default_rng(0)
    draw = lambda n: rng.integers(0, 500, n).tolist()  # noqa: E731
    prompt, references = draw(40), [([1, *draw(6)], 1, 7) for _ in range(3)]
    rollouts = [query(prompt, draw(200), [0, 60, 130, 200], *references) for _ in range(8)]
    llm = FakeLlm(model, MAX_MODEL_LEN)
    engine = VllmEngine(llm, SamplingParams)
    llm.calls.clear()
    cached = []
    llm.spoil = lambda outputs: cached.extend(o.num_cached_tokens for o in outputs) or outputs
    result = engine.support(rollouts)
    prompts = [prompt for call, _ in llm.calls for prompt in call]
    assert result.computed_tokens == sum(map(len, prompts)) - sum(cached)
    assert trie_nodes(rollouts) <= result.computed_tokens < 1.6 * trie_nodes(rollouts) < result.requested_tokens / 4


def test_many_references_that_part_at_one_token(model):
    rollouts = [query([1, 2], [3, 4, 5], [0, 3], *[([7, 8, token], 1, 3) for token in range(40)])]
    engine = build(model)
    assert_agrees(engine.support(rollouts), plain_support(model, rollouts))
    assert engine.last_call.single_tokens == 2 * (40 - vllm_waves.MAX_CANDIDATES)


def _rows(change):
    def spoil(outputs):
        for output in outputs:
            if output.prompt_logprobs is not None:
                change(output.prompt_logprobs)
        return outputs

    return spoil


def _sampled(change):
    def spoil(outputs):
        for output in outputs:
            if output.outputs[0].logprobs is not None:
                change(output.outputs[0].logprobs)
        return outputs

    return spoil


def _no_rows(rows):
    del rows.start_indices[:], rows.end_indices[:]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_rows(lambda rows: rows.logprobs.__setitem__(-1, float("nan"))), "not finite: nan"),
        (_rows(lambda rows: rows.logprobs.__setitem__(-1, float("-inf"))), "not finite: -inf"),
        (_rows(lambda rows: rows.token_ids.__setitem__(-1, 499)), "no log-probability of token"),
        (_rows(_no_rows), "0 rows of log-probabilities"),
        (_sampled(lambda rows: rows.logprobs.__setitem__(-1, float("nan"))), "not finite: nan"),
        (_sampled(lambda rows: rows.token_ids.__setitem__(-1, 499)), "as next token"),
        (_sampled(_no_rows), "as next token"),
    ],
)
def test_a_missing_or_odd_value_is_an_error(model, spoil, message):
    llm = FakeLlm(model, MAX_MODEL_LEN)
    engine = VllmEngine(llm, SamplingParams)
    llm.spoil = spoil
    rollouts = [query([1, 2], [3, 4, 5], [0, 3], ([7, 8, 9], 0, 3))]
    with pytest.raises(ScorerError, match=message):
        engine.support(rollouts)
    llm.spoil = None
    assert_agrees(engine.support(rollouts), plain_support(model, rollouts))


@pytest.mark.parametrize("spoil", [lambda outputs: outputs[:-1], lambda outputs: outputs[::-1], None])
def test_a_failure_of_vllm_ends_the_engine(model, spoil):
    llm = FakeLlm(model, MAX_MODEL_LEN)
    engine = VllmEngine(llm, SamplingParams)

    def crash(outputs):
        raise RuntimeError("out of memory")

    llm.spoil = spoil or crash
    rollouts = [query([1, 2], [3, 4, 5], [0, 3], ([7, 8, 9], 0, 3))]
    with pytest.raises(EngineFailed, match="vLLM failed"):
        engine.support(rollouts)
    llm.spoil = None
    with pytest.raises(EngineFailed, match="cannot be used any more: vLLM failed"):
        engine.support(rollouts)


def test_bad_input_is_named_and_does_not_end_the_engine(model):
    engine = build(model)
    with pytest.raises(InvalidRequest, match=r"prompt_ids\[1\] = 512"):
        engine.support([query([1, 512], [3], [0], ([7], 0, 1))])
    assert engine.support([]).support == []
    over = query([1], [2] * MAX_MODEL_LEN, [0, MAX_MODEL_LEN], ([3], 0, 1))
    assert engine.support([over]).support == [[]]


def test_a_vllm_that_gives_wrong_rows_fails_the_self_test(model):
    llm = FakeLlm(model, MAX_MODEL_LEN)
    run = llm._run

    def wrong(request, params):
        output = run(request, params)
        if output.num_cached_tokens:
            output.num_cached_tokens -= llm.block_size  # garbage then counts as computed
        return output

    llm._run = wrong
    with pytest.raises(SiopConfigError, match="self-test"):
        VllmEngine(llm, SamplingParams)


def test_a_model_without_prefix_cache_is_refused(model):
    llm = FakeLlm(model, MAX_MODEL_LEN)
    llm.llm_engine.vllm_config.cache_config.enable_prefix_caching = False
    with pytest.raises(SiopConfigError, match="cannot cache prefixes"):
        VllmEngine(llm, SamplingParams)


def adapter_config(**changes):
    return {"peft_type": "LORA", "r": 8, "target_modules": ["q_proj"], "bias": "none", **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is IA3"),
        ({"r": "x"}, "no LoRA adapter"),
        ({"use_dora": True}, "use_dora"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"target_modules": ".*proj"}, "pattern"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
        ({"r": 1024}, "rank 1024"),
    ],
)
def test_adapters_that_vllm_would_apply_in_part_are_refused(tmp_path, changes, message):
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter_config(**changes)))
    with pytest.raises(SiopConfigError, match=message):
        VllmEngine.from_pretrained("unused", lora_path=str(tmp_path))


def test_adapter_config(tmp_path):
    with pytest.raises(SiopConfigError, match=str(tmp_path)):
        read_adapter(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter_config()))
    adapter = read_adapter(str(tmp_path))
    assert (adapter.rank, adapter.modules, adapter.extras) == (8, frozenset({"q_proj"}), ())


@pytest.mark.parametrize("share", [0, -0.5, 1.5])
def test_gpu_memory_outside_its_range_is_named(share):
    with pytest.raises(SiopConfigError, match=rf"gpu_memory = {share}"):
        VllmEngine.from_pretrained("unused", gpu_memory=share)
