"""The transformers rollout: its tokens, log-probabilities and weights, against plain forwards of the same model."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_module
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicSlidingWindowLayer
from verl.utils.siop.cpu.prefixes import Prefix, Prefixes, row_of
from verl.utils.siop.cpu.rollout import HfServer, Sampling, sample_next

from benchmarks import rollout as rollout_benchmark

PROMPTS = [[72, 101, 108, 108, 111], [65], list(range(40, 70)), [10, 20, 30]]


@pytest.fixture(scope="module")
def config(tiny_model: Path) -> Any:
    with initialize_config_module("verl.trainer.siop.config", version_base=None):
        composed = compose(
            "siop_trainer",
            overrides=[
                "hardware=cpu",
                f"actor_rollout_ref.model.path={tiny_model}",
                "data.train_files=x",
                "data.val_files=x",
                "data.max_prompt_length=64",
                "data.max_response_length=32",
                "actor_rollout_ref.rollout.max_model_len=80",
                "actor_rollout_ref.model.external_lib=null",
            ],
        )
    return composed.actor_rollout_ref


@pytest.fixture
def server(config: Any) -> Iterator[HfServer]:
    yield HfServer(config.rollout, config.model)


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


async def _generate_all(server: HfServer, params: list[dict[str, Any]], prompts: list[list[int]]) -> list[Any]:
    calls = [server.generate(p, s, request_id=str(i)) for i, (p, s) in enumerate(zip(prompts, params, strict=True))]
    return await asyncio.gather(*calls)


def _log_probs(model: torch.nn.Module, prompt: list[int], tokens: list[int], temperature: float) -> torch.Tensor:
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1, :259] / temperature
    return logits.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])[:, 0]


def test_log_probs_match_a_full_forward(server: HfServer, model: torch.nn.Module) -> None:
    temperatures = [1.0, 0.7, 1.3, 1.0]
    params = [{"temperature": t, "logprobs": True, "repetition_penalty": 1.0} for t in temperatures]
    outputs = asyncio.run(_generate_all(server, params, PROMPTS))
    for prompt, temperature, output in zip(PROMPTS, temperatures, outputs, strict=True):
        assert 1 <= len(output.token_ids) <= 32
        expected = _log_probs(model, prompt, output.token_ids, temperature)
        assert torch.allclose(torch.tensor(output.log_probs), expected, atol=1e-4)


def test_greedy_matches_step_by_step_argmax_and_ignores_batch_mates(server: HfServer, model: torch.nn.Module) -> None:
    params = [{"temperature": 0, "max_tokens": 6 + 3 * i} for i in range(len(PROMPTS))]
    outputs = asyncio.run(_generate_all(server, params, PROMPTS))
    for prompt, sampling, output in zip(PROMPTS, params, outputs, strict=True):
        tokens: list[int] = []
        while len(tokens) < sampling["max_tokens"] and 258 not in tokens:
            with torch.no_grad():
                tokens.append(int(model(input_ids=torch.tensor([prompt + tokens])).logits[0, -1, :259].argmax()))
        assert output.token_ids == tokens
        assert output.log_probs is None


def test_stops_at_a_stop_token_and_keeps_it(server: HfServer) -> None:
    first = asyncio.run(_generate_all(server, [{"temperature": 0, "max_tokens": 5}], [PROMPTS[0]]))[0].token_ids
    again = {"temperature": 0, "max_tokens": 5, "stop_token_ids": [first[1]]}
    fresh = HfServer(server.config, server.model_config)
    assert asyncio.run(_generate_all(fresh, [again], [PROMPTS[0]]))[0].token_ids == first[: first.index(first[1]) + 1]


def test_no_room_and_unknown_parameters_are_refused_by_name(server: HfServer) -> None:
    with pytest.raises(ValueError, match=r"96 tokens.*max_model_len is 80"):
        asyncio.run(_generate_all(server, [{}], [[5] * 96]))
    with pytest.raises(ValueError, match="min_p"):
        asyncio.run(_generate_all(server, [{"min_p": 0.1}], [[5]]))
    with pytest.raises(ValueError, match="repetition_penalty"):
        asyncio.run(_generate_all(server, [{"repetition_penalty": 1.1}], [[5]]))


def test_a_failed_decode_reaches_every_caller(server: HfServer) -> None:
    async def failing() -> list[Any]:
        server.model.forward = None  # type: ignore[assignment]
        calls = [server.generate([5], {}, request_id=str(i)) for i in range(3)]
        return await asyncio.gather(*calls, return_exceptions=True)

    assert [type(x) for x in asyncio.run(failing())] == [TypeError] * 3


def test_new_weights_are_used_and_wrong_names_refused(server: HfServer, model: torch.nn.Module) -> None:
    async def run() -> tuple[list[int], list[int]]:
        greedy = {"temperature": 0, "max_tokens": 8}
        before = (await server.generate(PROMPTS[0], greedy, request_id="a")).token_ids
        torch.manual_seed(3)
        weights = {k: torch.randn_like(v) if v.dim() > 1 else v.clone() for k, v in server.model.state_dict().items()}
        await server.update_weights(weights, global_steps=7)
        output = await server.generate(PROMPTS[0], greedy, request_id="b")
        assert output.extra_fields["global_steps"] == 7
        with pytest.raises(KeyError, match="nowhere"):
            await server.update_weights({**weights, "nowhere": torch.zeros(1)})
        return before, output.token_ids

    before, after = asyncio.run(run())
    assert before != after


def test_a_next_turn_computes_only_what_is_new(server: HfServer, model: torch.nn.Module) -> None:
    widths: list[int] = []
    forward = server.model.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        widths.append(kwargs["input_ids"].shape[1])
        return forward(*args, **kwargs)

    server.model.forward = counted  # type: ignore[assignment]
    params: list[dict[str, Any]] = [{"logprobs": True, "max_tokens": 3 + i} for i in range(len(PROMPTS))]

    async def checked(contexts: list[list[int]]) -> None:
        outputs = await _generate_all(server, params[: len(contexts)], contexts)
        for context, output in zip(contexts, outputs, strict=True):
            expected = _log_probs(model, context, output.token_ids, 1.0)
            assert torch.allclose(torch.tensor(output.log_probs), expected, atol=1e-4)

    async def run() -> None:
        first = await _generate_all(server, params, PROMPTS)
        # Observations of several lengths.
        turns = enumerate(zip(PROMPTS, first, strict=True))
        contexts = [prompt + output.token_ids + [50 + i] * (1 + 2 * i) for i, (prompt, output) in turns]
        widths.clear()
        await checked(contexts)
        # The last token of a turn was drawn and not computed.
        assert widths[0] == 2 * len(PROMPTS) and set(widths[1:]) <= {1}
        await checked([contexts[0], [7] * 20])  # a rollout that begins beside another
        await server.update_weights(server.model.state_dict(), global_steps=1)
        assert server.prefixes.find(contexts[0]) is None and server.prefixes.bytes == 0

    asyncio.run(run())


def test_the_benchmark_of_it_compares_the_same_tokens(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "--rollouts 3 --turns 2 --rounds 1 --threads 1"
    monkeypatch.setattr("sys.argv", ["rollout.py", *words.split()])
    rollout_benchmark.main()
    out = capsys.readouterr().out
    assert "the same tokens in 3 rollouts" in out and "times as fast" in out


def test_old_prefixes_go_when_there_is_no_room() -> None:
    def prefix(length: int) -> Prefix:
        return Prefix(length, ((torch.ones(2, length, 4), torch.ones(2, length, 4)),))

    known = Prefixes(max_bytes=10 * prefix(1).bytes)
    known.add([1, 2, 3], prefix(3))
    known.add([1, 2, 3, 4, 5], prefix(5))
    known.add([1, 2, 3], prefix(3))
    assert known.bytes == 8 * prefix(1).bytes
    assert known.find([1, 2, 3, 4]).length == 3  # type: ignore[union-attr]
    assert known.find([1, 2, 3, 4, 5, 6]).length == 5  # type: ignore[union-attr]
    assert known.find([1, 2, 3]) is None, "its last token must be computed"
    assert known.find([9, 2, 3, 4]) is None
    known.add([6, 7, 8, 9], prefix(4))
    assert known.bytes == 9 * prefix(1).bytes and known.find([1, 2, 3, 4]) is None
    known.add([0] * 11, prefix(11))
    assert known.bytes == 0, "what does not fit is not kept"


def test_caches_that_forget_are_not_kept() -> None:
    sliding = DynamicCache()
    sliding.layers.append(DynamicSlidingWindowLayer(sliding_window=4))
    assert row_of(sliding, 0, torch.ones(6)) is None


def test_same_seed_same_rollouts_in_any_order_of_arrival(config: Any) -> None:
    requests = [[72, 101]] * 4 + [[65, 66, 67]] * 2

    async def sample(order: list[int], one_by_one: bool) -> list[tuple[int, ...]]:
        server = HfServer(config.rollout, config.model)
        calls = [server.generate(requests[i], {"max_tokens": 8}, request_id=str(i)) for i in order]
        outputs = [await call for call in calls] if one_by_one else await asyncio.gather(*calls)
        return sorted(tuple(requests[i] + out.token_ids) for i, out in zip(order, outputs, strict=True))

    first = asyncio.run(sample([0, 1, 2, 3, 4, 5], one_by_one=False))
    assert asyncio.run(sample([5, 3, 1, 0, 4, 2], one_by_one=True)) == first
    assert len(set(first)) > 3


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    uniform = [i / 10_000 for i in range(10_000)]
    drawn = sample_next(logits.expand(10_000, -1), [Sampling(1)] * 10_000, uniform)[0]
    shares = torch.bincount(drawn, minlength=4) / 10_000
    assert torch.allclose(shares, logits.softmax(-1)[0], atol=2e-4)


def test_top_k_and_top_p_restrict_what_is_drawn() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]]).repeat(3, 1)
    sampling = [Sampling(1, top_k=1), Sampling(1, top_p=0.7), Sampling(1)]
    uniform = [0.0, 0.2, 0.5, 0.7, 0.9, 0.97, 1 - 2**-53]
    drawn = torch.stack([sample_next(logits, sampling, [u] * 3)[0] for u in uniform])
    assert set(drawn[:, 0].tolist()) == {0}
    assert set(drawn[:, 1].tolist()) == {0, 1}
    assert set(drawn[:, 2].tolist()) == {0, 1, 2, 3}
    # The log-probability is that of the restricted distribution.
    assert float(sample_next(logits, sampling, [0.5] * 3)[1][0]) == pytest.approx(0.0, abs=1e-6)
