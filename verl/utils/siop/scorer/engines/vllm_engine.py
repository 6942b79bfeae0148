"""Exact scoring with vLLM: every shared prefix is computed once, through vLLM's prefix cache.

A request is scored in waves that fit the KV cache. Each wave first runs its contexts (the rollouts up to their last
boundary) to fill the cache, then one short branch per (boundary, reference), which computes only what follows the
cached blocks. The log-probability of a reference token is

    of its last token                in the branch's output: a generated token's distribution is always computed;
    of a token that was computed     in the branch's prompt log-probabilities, counted from their end;
    of a token inside a cached block in those of the branch that computed the block, else in a request of its own.

Needs vLLM 0.24 or later. The engine runs in this process, so that it dies with it; with tensor parallelism vLLM's
worker processes watch this one.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from verl.utils.siop.errors import EngineFailed, ScorerError, SiopConfigError
from verl.utils.siop.scorer.engines.base import EngineInfo, RolloutQuery, SupportResult, TokenArray
from verl.utils.siop.scorer.engines.loading import as_config_error, dtype_on, is_cpu, log_loaded, one_line
from verl.utils.siop.scorer.engines.lora import VLLM_RANKS, Adapter, read_vllm_adapter
from verl.utils.siop.scorer.engines.token_paths import (
    ScoredPath,
    decode_path,
    encode_path,
    run_self_test,
    score_request,
)
from verl.utils.siop.scorer.engines.vllm_logprobs import VllmLogprobs, num_cached
from verl.utils.siop.scorer.engines.vllm_waves import Branch, plan_branches, plan_single_tokens, plan_waves

logger = logging.getLogger(__name__)

DEFAULT_GPU_MEMORY = 0.15  # the rest is the trainer's, as in the first release
CPU_KV_CACHE_BYTES = 2 << 30
ENGINE_OPTIONS = {
    "enable_prefix_caching": True,
    "enforce_eager": True,  # compiled graphs help decoding; this only reads prompts
    "skip_tokenizer_init": True,
    "generation_config": "vllm",
    # Logits are computed for at most so many tokens at a time, also if the cache fails and contexts are computed again.
    "max_num_batched_tokens": 4096,
    "max_num_seqs": 256,
}


@dataclass
class CallStatistics:
    """What one call of :meth:`VllmEngine.support` did.

    Attributes:
        waves: parts of the call that fit the KV cache.
        from_siblings: reference tokens inside a cached block whose value another branch had.
        single_tokens: reference tokens inside a cached block that were asked one by one.
        computed_tokens: tokens that went through the model.
    """

    waves: int = 0
    from_siblings: int = 0
    single_tokens: int = 0
    computed_tokens: int = 0


class VllmEngine:
    """Scorer over vLLM's offline engine.

    Calls may come from several threads; they run one after the other.

    Args:
        llm: a ``vllm.LLM`` with prefix caching.
        sampling_params: ``vllm.SamplingParams``.
        lora_request: ``vllm.lora.request.LoRARequest``.
        name: what messages and ``info`` call the model.
        self_test: compare a few branches with plain full sequences at start.

    Raises:
        SiopConfigError: prefix caching is off, or the self-test fails.
    """

    def __init__(
        self, llm: Any, sampling_params: Any, lora_request: Any = None, name: str | None = None, self_test: bool = True
    ) -> None:
        self._llm, self._lora_request = llm, lora_request
        self._logprobs = VllmLogprobs(sampling_params)
        self._build: Callable[[str], Any] | None = None
        self._lora: Any = None
        self._lora_count = 0
        self._lock = threading.Lock()
        self._failed: str | None = None
        self.last_call = CallStatistics()
        self._read_config(name)
        if not self_test:
            return
        try:
            self._self_test()
        except (ScorerError, SiopConfigError) as error:  # from_position needs vLLM's V2 model runner
            if not self._logprobs.from_position:
                raise
            logger.warning("scoring without prompt_logprob_start: %s", error)
            self._logprobs.from_position, self._failed = False, None
            self._self_test()

    def _read_config(self, name: str | None) -> None:
        config = self._llm.llm_engine.vllm_config
        name = name or str(config.model_config.model)
        if not config.cache_config.enable_prefix_caching:
            raise SiopConfigError(f"vLLM cannot cache prefixes of {name}; use the transformers engine or another model")
        self._block_size = int(config.cache_config.block_size)
        self._num_blocks = int(config.cache_config.num_gpu_blocks) - 1  # vLLM keeps one
        self._dtype = str(config.model_config.dtype).removeprefix("torch.")
        self.info = EngineInfo(
            engine="vllm",
            model=name,
            max_model_len=int(config.model_config.max_model_len),
            vocab_size=int(config.model_config.get_vocab_size()),
        )

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        device: str = "cpu",
        dtype: str = "auto",
        max_model_len: int | None = None,
        trust_remote_code: bool = False,
        tensor_parallel_size: int = 1,
        gpu_memory: float | None = None,
        lora_path: str | None = None,
        block_size: int | None = None,
        kv_cache_bytes: int | None = None,
    ) -> VllmEngine:
        """Load a model directory or hub id.

        Args:
            path, dtype, max_model_len, trust_remote_code: see :meth:`TransformersEngine.from_pretrained`.
            device: ``cpu`` or ``cuda``; must be the one that the installed vLLM was built for.
            tensor_parallel_size: GPUs that share the model.
            gpu_memory: share of each GPU's memory for weights and KV cache; None for ``DEFAULT_GPU_MEMORY``.
            lora_path: LoRA adapter on top of the model; None: the engine takes no adapters, see :meth:`load_lora`.
            block_size: tokens in a block of the KV cache, which is what can be shared; None: on CPU the smallest that
                vLLM computes there (its default, 128, would share too little), vLLM's choice on GPU.
            kv_cache_bytes: size of the KV cache; None: ``VLLM_CPU_KVCACHE_SPACE`` (GiB) or 2 GiB on CPU, what
                ``gpu_memory`` leaves on GPU.

        Raises:
            SiopConfigError: the model cannot be loaded or scored.
        """
        started = time.monotonic()
        if gpu_memory is not None and not 0 < gpu_memory <= 1:
            raise SiopConfigError(
                f"gpu_memory = {gpu_memory} is not a share of a GPU's memory (more than 0, at most 1)"
            )
        options: dict[str, Any] = {
            "dtype": dtype_on(device, dtype),
            "max_model_len": max_model_len,
            "trust_remote_code": trust_remote_code,
            "tensor_parallel_size": tensor_parallel_size,
            "gpu_memory_utilization": DEFAULT_GPU_MEMORY if gpu_memory is None else gpu_memory,
            **ENGINE_OPTIONS,
        }
        if tensor_parallel_size > 1:
            options["distributed_executor_backend"] = "mp"  # in a Ray actor vLLM would ask Ray for more actors
        if kv_cache_bytes or (is_cpu(device) and "VLLM_CPU_KVCACHE_SPACE" not in os.environ):
            options["kv_cache_memory_bytes"] = kv_cache_bytes or CPU_KV_CACHE_BYTES
        if lora_path is not None:
            options |= _lora_options(read_vllm_adapter(lora_path))
        llm, sampling_params, lora_request = _import_vllm(device)
        if block_size or is_cpu(device):
            options["block_size"] = block_size or _least_cpu_block()

        def build(model: str) -> Any:
            with as_config_error(f"vLLM cannot load the scorer model {model}", Exception):
                return llm(model=model, **options)

        engine = cls(build(path), sampling_params, lora_request, path)
        engine._build = build
        if lora_path is not None:
            engine.load_lora(lora_path)
        log_loaded(
            f"scorer model {path}: vLLM, {engine._dtype} on {device}, "
            f"{0 if is_cpu(device) else tensor_parallel_size} GPU(s), max_model_len {engine.info.max_model_len}, "
            f"KV cache of {engine._num_blocks * engine._block_size} tokens",
            started,
        )
        return engine

    def load_lora(self, path: str | None) -> None:
        """Score with another LoRA adapter from the next call on; None for the model alone.

        The engine must have been built with an adapter of at least this rank for at least these layers.

        Raises:
            SiopConfigError: it was not, or the adapter cannot be loaded. The adapter of before stays.
        """
        with self._lock:
            self._check_usable()
            request = None
            if path is not None:
                adapter, config = read_vllm_adapter(path), self._llm.llm_engine.vllm_config.lora_config
                if config is None:
                    raise SiopConfigError(f"LoRA adapter {path}: the engine was built without an adapter")
                other = adapter.modules - set(config.target_modules)
                if adapter.rank > config.max_lora_rank or other:
                    raise SiopConfigError(
                        f"LoRA adapter {path} has rank {adapter.rank} and changes {', '.join(sorted(adapter.modules))};"
                        f" the engine was built for rank {config.max_lora_rank} and "
                        f"{', '.join(sorted(config.target_modules))}"
                    )
                # A new number each time: vLLM keeps adapters by number, and the same folder may hold new weights.
                self._lora_count += 1
                request = self._lora_request(f"adapter-{self._lora_count}", self._lora_count, path)
                with as_config_error(f"vLLM cannot load the LoRA adapter {path}", Exception):
                    self._llm.llm_engine.add_lora(request)
            if self._lora is not None:
                self._llm.llm_engine.remove_lora(self._lora.lora_int_id)
            self._lora = request

    def load_weights(self, path: str) -> None:
        """Score with the weights of another checkpoint, without an adapter, from the next call on.

        vLLM is started anew for it: its own reload leaves the head of a model with tied embeddings as it was.

        Raises:
            SiopConfigError: the checkpoint cannot be loaded; the engine is closed.
        """
        assert self._build is not None, "an engine over a given vllm.LLM loads nothing"
        self.close()
        with self._lock:
            self._llm = self._build(path)
            self._read_config(path)
            self._failed = None

    def close(self) -> None:
        """Free the model. Every later call fails."""
        with self._lock:
            if self._llm is not None:
                self._llm.llm_engine.engine_core.shutdown()
            self._llm = self._lora = None
            self._failed = "it is closed"

    def support(self, rollouts: Sequence[RolloutQuery]) -> SupportResult:
        """Mean log-probability of every reference at every boundary; see :class:`ScoringEngine`.

        Raises:
            InvalidRequest: a field is out of range.
            ScorerError: vLLM gave no value, or one that is not finite, for a token.
            EngineFailed: vLLM failed, now or before; the engine has to be built anew.
        """
        return score_request(rollouts, self.info, self._score)

    def _score(self, paths: list[ScoredPath]) -> tuple[np.ndarray, int]:
        with self._lock:
            self._check_usable()
            self.last_call = CallStatistics()
            if not paths:
                return np.empty(0), 0
            branches, counted, num_nodes = plan_branches(paths, self._block_size)
            values = np.full(num_nodes, np.nan)  # log-probability of each node
            salt = uuid.uuid4().hex
            for contexts, wave in plan_waves(branches, self._block_size, self._num_blocks):
                self._run_wave(contexts, wave, values, salt)
            return np.array([values[nodes].mean() for nodes in counted]), self.last_call.computed_tokens

    def _run_wave(self, contexts: list[Branch], branches: list[Branch], values: np.ndarray, salt: str) -> None:
        """Fill ``values`` at all nodes that the branches want."""
        # Contexts and branches in one call could run in one step, before the context is in the cache.
        self._run(contexts, values, salt)
        cached = self._run(branches, values, salt)
        single = plan_single_tokens(branches, values)
        self.last_call.waves += 1
        self.last_call.single_tokens += sum(len(branch.last) for branch in single)
        self.last_call.from_siblings += sum(
            position <= count and not np.isnan(values[branch.nodes[position]])
            for branch, count in zip(branches, cached, strict=True)
            for position in branch.wanted
        )
        self._run(single, values, salt)

    def _run(self, branches: list[Branch], values: np.ndarray, salt: str) -> list[int]:
        """Fill ``values`` with what vLLM computes for the branches; returns how many tokens of each were cached."""
        params = [self._logprobs.params(branch) for branch in branches]
        outputs = self._generate([branch.prompt for branch in branches], params, salt)
        for branch, output in zip(branches, outputs, strict=True):
            self.last_call.computed_tokens += len(branch) - num_cached(output)
            for node, value in self._logprobs.values(branch, output):
                if not np.isfinite(value):
                    raise ScorerError(f"vLLM gave a log-probability of {self.info.model} that is not finite: {value}")
                values[node] = value
        return [num_cached(output) for output in outputs]

    def _generate(self, prompts: Sequence[bytes], params: Sequence[Any], salt: str) -> list[Any]:
        if not prompts:
            return []
        requests = [{"prompt_token_ids": decode_path(prompt).tolist(), "cache_salt": salt} for prompt in prompts]
        try:
            outputs: list[Any] = self._llm.generate(requests, list(params), use_tqdm=False, lora_request=self._lora)
            if [len(output.prompt_token_ids) for output in outputs] != [len(r["prompt_token_ids"]) for r in requests]:
                raise RuntimeError(f"{len(outputs)} answers to {len(requests)} requests")
        except Exception as error:
            # Its scheduler may still hold requests of this call, whose answers would come with those of the next one.
            self._failed = f"vLLM failed: {one_line(error)}"
            raise EngineFailed(f"{self._failed} (model {self.info.model})") from error
        return outputs

    def _check_usable(self) -> None:
        if self._failed:
            raise EngineFailed(f"the engine of {self.info.model} cannot be used any more: {self._failed}")

    def _self_test(self) -> None:
        """Score branches that share cached blocks, and the same as plain full sequences, and compare."""

        def plain(tokens: TokenArray, first: int) -> float:
            (output,) = self._generate([encode_path(tokens)], [self._logprobs.plain_params()], uuid.uuid4().hex)
            rows = output.prompt_logprobs
            return float(np.mean([rows.logprobs[rows.start_indices[p]] for p in range(first, len(tokens))]))

        advice = "use the transformers engine or another version of vLLM"
        run_self_test(self, max(8, 3 * self._block_size), self._dtype, plain, advice)


def _import_vllm(device: str) -> tuple[Any, Any, Any]:
    """``LLM``, ``SamplingParams`` and ``LoRARequest`` of a vLLM that was built for the device.

    Raises:
        SiopConfigError: there is none.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # an engine process of its own could outlive this one
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    if is_cpu(device):
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    with as_config_error("engine vllm cannot be used", ImportError):
        from vllm import LLM, SamplingParams
        from vllm.lora.request import LoRARequest
        from vllm.platforms import current_platform
    if is_cpu(device) != current_platform.is_cpu():
        built = "CPU" if current_platform.is_cpu() else "GPU"
        raise SiopConfigError(f"the installed vLLM is a {built} build, which cannot run on device {device}")
    return LLM, SamplingParams, LoRARequest


def _least_cpu_block() -> int:
    """16 up to vLLM 0.28, 32 in 0.32."""
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    # Numbers, and vLLM's "multiple of".
    sizes = CPUAttentionBackend.get_supported_kernel_block_sizes()
    return min(int(getattr(size, "base", size)) for size in sizes)


def _lora_options(adapter: Adapter) -> dict[str, Any]:
    return {
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": next(rank for rank in VLLM_RANKS if rank >= adapter.rank),
        # Not the head: vLLM applies an adapter there to sampled tokens only, not to those of a prompt.
        "lora_target_modules": sorted(adapter.modules),
    }
