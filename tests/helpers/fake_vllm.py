"""Stands in for ``vllm.LLM`` where the real one cannot be had: other versions, other model runners, failures.

Its prefix cache works in whole blocks, salted, least recently used first out, and is read by later requests of the same
call. Scores come from plain forward passes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

GARBAGE = -0.123  # what a row that was not computed holds


@dataclass
class SamplingParams:
    """Those of vLLM up to 0.31."""

    max_tokens: int = 16
    temperature: float = 1.0
    detokenize: bool = True
    logprobs: int | None = None
    logprob_token_ids: list[int] | None = None
    prompt_logprobs: int | None = None
    flat_logprobs: bool = False
    skip_reading_prefix_cache: bool | None = None

    __struct_fields__: tuple[str, ...] = ("prompt_logprobs", "logprob_token_ids")


@dataclass
class NewSamplingParams(SamplingParams):
    """Those of vLLM from 0.32."""

    prompt_logprob_start: int | None = None
    prompt_logprob_token_ids: list[list[int]] | None = None

    __struct_fields__ = (*SamplingParams.__struct_fields__, "prompt_logprob_start", "prompt_logprob_token_ids")


@dataclass
class FlatLogprobs:
    """Rows of (token, log-probability) pairs in flat lists."""

    start_indices: list[int] = field(default_factory=list)
    end_indices: list[int] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.start_indices)

    def add(self, *pairs: tuple[int, float]) -> None:
        """Append a row."""
        self.start_indices.append(len(self.logprobs))
        self.token_ids += [token for token, _ in pairs]
        self.logprobs += [value for _, value in pairs]
        self.end_indices.append(len(self.logprobs))


class FakeLlm:
    """The parts of ``vllm.LLM`` that the engine uses.

    Args:
        model: transformers causal LM.
        max_model_len: longest prompt with the generated token.
        block_size: tokens in a block of the KV cache.
        num_blocks: its blocks; one is never used.
        cached_rows: whether prompt log-probabilities have rows, which hold garbage, for cached tokens (V1 model runner)
            or leave them out (V2).
    """

    def __init__(
        self, model: Any, max_model_len: int, block_size: int = 16, num_blocks: int = 1000, cached_rows: bool = True
    ) -> None:
        self.model, self.block_size, self.num_blocks, self.cached_rows = model, block_size, num_blocks, cached_rows
        self.cache: dict[tuple[str, tuple[int, ...]], None] = {}
        self.calls: list[tuple[list[list[int]], list[SamplingParams]]] = []
        self.scores: dict[tuple[int, ...], list[list[float]]] = {}
        self.spoil: Any = None  # changes the outputs of a call
        self.llm_engine = SimpleNamespace(
            vllm_config=SimpleNamespace(
                model_config=SimpleNamespace(
                    model="fake",
                    max_model_len=max_model_len,
                    dtype=torch.float32,
                    get_vocab_size=lambda: model.config.vocab_size,
                ),
                cache_config=SimpleNamespace(
                    enable_prefix_caching=True, block_size=block_size, num_gpu_blocks=num_blocks
                ),
            )
        )

    def generate(self, requests, params, use_tqdm, lora_request):
        """One output per request."""
        assert not use_tqdm
        self.calls.append(([request["prompt_token_ids"] for request in requests], params))
        outputs = [self._run(request, p) for request, p in zip(requests, params, strict=True)]
        return self.spoil(outputs) if self.spoil else outputs

    @torch.inference_mode()
    def _logprobs(self, prompt: list[int]) -> list[list[float]]:
        if tuple(prompt) not in self.scores:
            logits = self.model(input_ids=torch.tensor([prompt]), use_cache=False).logits[0]
            self.scores[tuple(prompt)] = logits.log_softmax(-1).tolist()
        return self.scores[tuple(prompt)]

    def _cached(self, salt: str, prompt: list[int]) -> int:
        """Tokens found in the cache; the last one is always computed."""
        found = 0
        for end in range(self.block_size, len(prompt), self.block_size):
            key = (salt, tuple(prompt[:end]))
            if key not in self.cache:
                break
            self.cache[key] = self.cache.pop(key)
            found = end
        return found

    def _run(self, request, params):
        prompt, salt = request["prompt_token_ids"], request["cache_salt"]
        assert 0 < len(prompt) < self.llm_engine.vllm_config.model_config.max_model_len
        assert (params.max_tokens, params.temperature, params.detokenize) == (1, 0.0, False)
        cached = 0 if params.skip_reading_prefix_cache else self._cached(salt, prompt)
        for end in range(self.block_size, len(prompt) + 1, self.block_size):
            self.cache[(salt, tuple(prompt[:end]))] = None
        while len(self.cache) > self.num_blocks - 1:
            del self.cache[next(iter(self.cache))]
        logprobs = self._logprobs(prompt)
        output = SimpleNamespace(prompt_token_ids=prompt, num_cached_tokens=cached, prompt_logprobs=None)
        if params.prompt_logprobs is not None:
            output.prompt_logprobs = FlatLogprobs()
            output.prompt_logprobs.add()
            for position in range(1, len(prompt)):
                if position >= cached + 1:
                    output.prompt_logprobs.add((prompt[position], logprobs[position - 1][prompt[position]]))
                elif self.cached_rows:
                    output.prompt_logprobs.add((prompt[position], GARBAGE))
        if getattr(params, "prompt_logprob_token_ids", None) is not None:
            start, rows = params.prompt_logprob_start, params.prompt_logprob_token_ids
            assert len(rows) == len(prompt) - 1 - start
            output.prompt_token_id_logprobs = None
            if cached <= start:
                values = [[logprobs[start + i][token] for token in row] for i, row in enumerate(rows)]
                output.prompt_token_id_logprobs = np.array(values, dtype=np.float32)
        sampled = None
        if params.logprob_token_ids:
            assert params.logprobs == len(params.logprob_token_ids) <= 20
            best = int(np.argmax(logprobs[-1]))
            sampled = FlatLogprobs()
            sampled.add(*((token, logprobs[-1][token]) for token in [best, *params.logprob_token_ids]))
        output.outputs = [SimpleNamespace(logprobs=sampled)]
        return output
