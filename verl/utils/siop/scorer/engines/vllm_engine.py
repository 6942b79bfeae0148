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

import itertools
import logging
import os
import threading
import time
import uuid
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from verl.utils.siop.errors import EngineFailed, ScorerError, SiopConfigError
from verl.utils.siop.scorer.engines.base import EngineInfo, Probe, RolloutQuery, SupportResult, check_rollouts, too_long
from verl.utils.siop.scorer.engines.lora import Adapter, read_adapter
from verl.utils.siop.scorer.engines.prefix_tree import (
    TOKEN_BYTES,
    TOKEN_DTYPE,
    IntArray,
    build_prefix_tree,
    encode_path,
)

logger = logging.getLogger(__name__)

DEFAULT_GPU_MEMORY = 0.85
CPU_BLOCK_SIZE = 16  # vLLM's default there, 128, would share too little
CPU_KV_CACHE_BYTES = 2 << 30
# Logits are computed for at most this many tokens at a time, also if the cache fails and a context is computed again.
MAX_BATCHED_TOKENS = 4096
MAX_SEQUENCES = 256
# Candidate tokens of one request; vLLM's own bound is 20 unless it is raised.
MAX_CANDIDATES = 16
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
SELF_TEST_TOLERANCE = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.5}


@dataclass
class CallStatistics:
    """What one call of :meth:`VllmEngine.support` did.

    Attributes:
        waves: parts of the call that fit the KV cache.
        contexts: contexts run to fill the cache.
        branches: branches run after them.
        from_siblings: reference tokens inside a cached block whose value another branch had.
        single_tokens: reference tokens inside a cached block that were asked one by one.
    """

    waves: int = 0
    contexts: int = 0
    branches: int = 0
    from_siblings: int = 0
    single_tokens: int = 0


@dataclass
class _Item:
    """One (boundary, reference): ``path`` is context + reference up to its last token that counts."""

    path: bytes
    context: bytes
    first: int  # position of the first token that counts

    @property
    def length(self) -> int:
        return len(self.path) // TOKEN_BYTES


@dataclass
class _Branch:
    """A path without its last token, with what is to be predicted on and after it.

    Attributes:
        prompt: the path.
        context: the longest context that it continues.
        nodes: position in the path -> node of the token there, from the first that counts or may be another branch's.
        wanted: positions in the path whose tokens count.
        last: tokens to predict after the path -> their node.
    """

    prompt: bytes
    context: bytes
    nodes: dict[int, int] = field(default_factory=dict)
    wanted: set[int] = field(default_factory=set)
    last: dict[int, int] = field(default_factory=dict)

    @property
    def length(self) -> int:
        return len(self.prompt) // TOKEN_BYTES


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
        self._llm, self._sampling_params, self._lora_request = llm, sampling_params, lora_request
        self._build: Callable[[str], Any] | None = None
        self._lora: Any = None
        self._lora_count = 0
        self._lock = threading.Lock()
        self._failed: str | None = None
        self.last_call = CallStatistics()
        # From vLLM 0.32: the log-probabilities of given tokens from a given position on.
        self._rows_from = {"prompt_logprob_start", "prompt_logprob_token_ids"} <= _fields(sampling_params)
        self._read_config(name)
        if not self_test:
            return
        if self._rows_from:
            try:
                self._self_test()
                return
            except (ScorerError, SiopConfigError) as error:  # it needs vLLM's V2 model runner
                logger.warning("scoring without prompt_logprob_start: %s", error)
                self._rows_from, self._failed = False, None
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
            path: model directory or hub id.
            device: ``cpu`` or ``cuda``; must be the one that the installed vLLM was built for.
            dtype: ``auto`` (float32 on CPU, the checkpoint's own type on GPU), ``float32``, ``bfloat16``, ``float16``.
            max_model_len: longest sequence (prompt + response + reference) taken; None for the model's own limit.
            trust_remote_code: run Python code that comes with the model.
            tensor_parallel_size: GPUs that share the model.
            gpu_memory: share of each GPU's memory for weights and KV cache; None for ``DEFAULT_GPU_MEMORY``.
            lora_path: LoRA adapter on top of the model; None: the engine takes no adapters, see :meth:`load_lora`.
            block_size: tokens in a block of the KV cache, which is what can be shared; None: 16 on CPU, vLLM's choice
                on GPU.
            kv_cache_bytes: size of the KV cache; None: ``VLLM_CPU_KVCACHE_SPACE`` (GiB) or 2 GiB on CPU, what
                ``gpu_memory`` leaves on GPU.

        Raises:
            SiopConfigError: the model cannot be loaded or scored.
        """
        started = time.monotonic()
        on_cpu = device == "cpu"
        if gpu_memory is not None and not 0 < gpu_memory <= 1:
            raise SiopConfigError(
                f"gpu_memory = {gpu_memory} is not a share of a GPU's memory (more than 0, at most 1)"
            )
        adapter = None if lora_path is None else _check_adapter(lora_path)
        _set_environment(on_cpu)
        try:
            from vllm import LLM, SamplingParams
            from vllm.lora.request import LoRARequest
            from vllm.platforms import current_platform
        except ImportError as error:
            raise SiopConfigError(f"engine vllm cannot be used: {_one_line(error)}") from error
        if on_cpu != current_platform.is_cpu():
            built = "CPU" if current_platform.is_cpu() else "GPU"
            raise SiopConfigError(f"the installed vLLM is a {built} build, which cannot run on device {device}")
        options: dict[str, Any] = {
            "dtype": "float32" if on_cpu and dtype == "auto" else dtype,
            "max_model_len": max_model_len,
            "trust_remote_code": trust_remote_code,
            "tensor_parallel_size": tensor_parallel_size,
            "gpu_memory_utilization": DEFAULT_GPU_MEMORY if gpu_memory is None else gpu_memory,
            "enable_prefix_caching": True,
            "enforce_eager": True,  # compiled graphs help decoding; this only reads prompts
            "skip_tokenizer_init": True,
            "generation_config": "vllm",
            "max_num_batched_tokens": MAX_BATCHED_TOKENS,
            "max_num_seqs": MAX_SEQUENCES,
        }
        if tensor_parallel_size > 1:
            options["distributed_executor_backend"] = "mp"  # in a Ray actor vLLM would ask Ray for more actors
        if block_size or on_cpu:
            options["block_size"] = block_size or CPU_BLOCK_SIZE
        if kv_cache_bytes or (on_cpu and "VLLM_CPU_KVCACHE_SPACE" not in os.environ):
            options["kv_cache_memory_bytes"] = kv_cache_bytes or CPU_KV_CACHE_BYTES
        if adapter is not None:
            options |= {
                "enable_lora": True,
                "max_loras": 1,
                "max_lora_rank": next(rank for rank in LORA_RANKS if rank >= adapter.rank),
                # Not the head: vLLM applies an adapter there to sampled tokens only, not to those of a prompt.
                "lora_target_modules": sorted(adapter.modules),
            }

        def build(model: str) -> Any:
            try:
                return LLM(model=model, **options)
            except Exception as error:
                raise SiopConfigError(f"vLLM cannot load the scorer model {model}: {_one_line(error)}") from error

        engine = cls(build(path), SamplingParams, LoRARequest, path)
        engine._build = build
        if lora_path is not None:
            engine.load_lora(lora_path)
        logger.info(
            "scorer model %s: vLLM, %s on %s, %d GPU(s), max_model_len %d, KV cache of %d tokens, loaded in %.1f s",
            path,
            engine._dtype,
            device,
            0 if on_cpu else tensor_parallel_size,
            engine.info.max_model_len,
            engine._num_blocks * engine._block_size,
            time.monotonic() - started,
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
                adapter, config = _check_adapter(path), self._llm.llm_engine.vllm_config.lora_config
                if config is None:
                    raise SiopConfigError(f"LoRA adapter {path}: the engine was built without an adapter")
                other = adapter.modules - set(config.target_modules)
                if adapter.rank > config.max_lora_rank or other:
                    raise SiopConfigError(
                        f"LoRA adapter {path} has rank {adapter.rank} and changes {_names(adapter.modules)}; the "
                        f"engine was built for rank {config.max_lora_rank} and {_names(config.target_modules)}"
                    )
                # A new number each time: vLLM keeps adapters by number, and the same folder may hold new weights.
                self._lora_count += 1
                request = self._lora_request(f"adapter-{self._lora_count}", self._lora_count, path)
                try:
                    self._llm.llm_engine.add_lora(request)
                except Exception as error:
                    raise SiopConfigError(f"vLLM cannot load the LoRA adapter {path}: {_one_line(error)}") from error
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
        check_rollouts(rollouts, self.info)
        errors = too_long(rollouts, self.info)
        items, requested = _items(rollouts, errors)
        shapes = [(len(r.boundaries), len(r.probes)) for r in rollouts]
        with self._lock:
            self._check_usable()
            means, computed = self._score(items)
        support: list[list[list[float]]] = []
        offset = 0
        for index, (rows, columns) in enumerate(shapes):
            if index in errors:
                support.append([])
                continue
            block = means[offset : offset + rows * columns]
            offset += rows * columns
            if not np.isfinite(block).all():
                raise ScorerError(f"vLLM gave no finite log-probability of {self.info.model} for rollouts[{index}]")
            support.append(block.reshape(rows, columns).tolist())
        return SupportResult(support=support, computed_tokens=computed, requested_tokens=requested, errors=errors)

    def _score(self, items: Sequence[_Item]) -> tuple[np.ndarray, int]:
        """Mean log-probability of each item (NaN where a value is missing) and the tokens computed for all."""
        self.last_call = CallStatistics()
        if not items:
            return np.empty(0), 0
        # Also the nodes that end the context: a reference may begin like the rollout goes on.
        starts = [max(0, len(item.context) // TOKEN_BYTES - self._block_size) for item in items]
        depths = [np.arange(start, item.length) for start, item in zip(starts, items, strict=True)]
        tree = build_prefix_tree([item.path for item in items], depths)
        branches: dict[bytes, _Branch] = {}
        for item, start, nodes in zip(items, starts, tree.rows, strict=True):
            prompt = item.path[:-TOKEN_BYTES]
            branch = branches.setdefault(prompt, _Branch(prompt, item.context))
            branch.context = max(branch.context, item.context, key=len)
            branch.nodes.update(zip(range(start, item.length - 1), nodes[:-1].tolist(), strict=True))
            branch.wanted.update(range(item.first, item.length - 1))
            branch.last[_token(item.path, item.length - 1)] = int(nodes[-1])
        values = np.full(len(tree), np.nan)
        salt = uuid.uuid4().hex
        computed = 0
        for contexts, wave in self._waves(list(branches.values())):
            computed += self._run_wave(contexts, wave, values, salt)
        return np.array(
            [values[nodes[i.first - s :]].mean() for i, s, nodes in zip(items, starts, tree.rows, strict=True)]
        ), computed

    def _waves(self, branches: Sequence[_Branch]) -> Iterator[tuple[list[bytes], list[_Branch]]]:
        """Parts of a call, each with the contexts to run first, that fit the KV cache: within one, no context is
        dropped before its branches have been scored."""
        size = self._block_size
        maximal = _maximal({branch.context for branch in branches})
        by_context: list[list[_Branch]] = [[] for _ in maximal]
        for branch in branches:
            by_context[bisect_left(maximal, branch.context)].append(branch)
        contexts: list[bytes] = []
        wave: list[_Branch] = []
        used = 0
        for context, group in zip(maximal, by_context, strict=True):
            blocks = len(context) // TOKEN_BYTES // size
            shared = _common_tokens(contexts[-1], context) // size if contexts else 0
            for branch in sorted(group, key=lambda branch: branch.prompt):
                new = 0 if contexts and contexts[-1] == context else blocks - shared
                # One more, for a branch that has to be run again for a single token.
                own = -(-branch.length // size) - len(branch.context) // TOKEN_BYTES // size + 1
                if wave and used + new + own > self._num_blocks:
                    self.last_call.waves += 1
                    yield contexts, wave
                    contexts, wave, used, new = [], [], 0, blocks
                if not contexts or contexts[-1] != context:
                    contexts.append(context)
                wave.append(branch)
                used += new + own
        self.last_call.waves += 1
        yield contexts, wave

    def _run_wave(self, contexts: Sequence[bytes], branches: Sequence[_Branch], values: np.ndarray, salt: str) -> int:
        """Fill ``values`` at all nodes that the branches want; returns the tokens computed."""
        # Only whole blocks are cached, so nothing is gained by running the rest of a context.
        whole = TOKEN_BYTES * self._block_size
        prompts = _maximal({context[: len(context) // whole * whole] for context in contexts} - {b""})
        computed = 0
        # Contexts and branches in one call could run in one step, before the context is in the cache.
        outputs = self._generate(prompts, [self._params() for _ in prompts], salt)
        computed += sum(_computed(output) for output in outputs)
        outputs = self._generate([b.prompt for b in branches], [self._branch_params(b) for b in branches], salt)
        own: list[int] = []
        for branch, output in zip(branches, outputs, strict=True):
            computed += _computed(output)
            first = (output.num_cached_tokens or 0) + 1
            own.append(first)
            for position, value in self._prompt_values(branch, output, first):
                if position in branch.nodes:
                    values[branch.nodes[position]] = value
            for token, value in self._sampled_values(output, list(branch.last)[:MAX_CANDIDATES]):
                values[branch.last[token]] = value
        missing: dict[bytes, dict[int, int]] = {}
        for branch, first in zip(branches, own, strict=True):
            for position in branch.wanted:
                node = branch.nodes[position]
                if not np.isnan(values[node]):
                    self.last_call.from_siblings += position < first
                else:
                    parent = branch.prompt[: TOKEN_BYTES * position]
                    missing.setdefault(parent, {})[_token(branch.prompt, position)] = node
            for token, node in branch.last.items():
                if np.isnan(values[node]):
                    missing.setdefault(branch.prompt, {})[token] = node
        asked = [(parent, chunk) for parent, tokens in missing.items() for chunk in _chunks(tokens, MAX_CANDIDATES)]
        outputs = self._generate([p for p, _ in asked], [self._params(candidates=list(c)) for _, c in asked], salt)
        for (_, chunk), output in zip(asked, outputs, strict=True):
            computed += _computed(output)
            for token, value in self._sampled_values(output, list(chunk)):
                values[chunk[token]] = value
        self.last_call.contexts += len(prompts)
        self.last_call.branches += len(branches)
        self.last_call.single_tokens += sum(len(tokens) for tokens in missing.values())
        return computed

    def _params(self, candidates: Sequence[int] = (), **options: Any) -> Any:
        """Sampling parameters that ask for the log-probabilities of ``candidates`` as next token."""
        if candidates:
            options |= {"logprobs": len(candidates), "logprob_token_ids": list(candidates), "flat_logprobs": True}
        return self._sampling_params(
            # detokenize: vLLM would look up the text of uninitialised rows.
            max_tokens=1,
            temperature=0.0,
            detokenize=False,
            skip_reading_prefix_cache=False,
            **options,
        )

    def _branch_params(self, branch: _Branch) -> Any:
        options: dict[str, Any] = {}
        if branch.wanted and self._rows_from:
            first = min(branch.wanted)
            rows = [[_token(branch.prompt, position)] for position in range(first, branch.length)]
            options = {"prompt_logprob_start": first - 1, "prompt_logprob_token_ids": rows}
        elif branch.wanted:
            options = {"prompt_logprobs": 0}
        return self._params(list(branch.last)[:MAX_CANDIDATES], **options)

    def _prompt_values(self, branch: _Branch, output: Any, first: int) -> Iterator[tuple[int, float]]:
        """(position, log-probability of the token there) for the branch's tokens that were computed.

        Args:
            branch: what was asked.
            output: vLLM's answer.
            first: first position whose predecessor was computed and not cached.
        """
        if not branch.wanted:
            return
        if self._rows_from:
            rows = output.prompt_token_id_logprobs
            start = min(branch.wanted)
            if rows is None:  # the cache went past the first row, and vLLM gives all rows or none
                return
            if len(rows) != branch.length - start:
                raise ScorerError(f"vLLM gave {len(rows)} rows of log-probabilities, not {branch.length - start}")
            for position, row in zip(range(start, branch.length), rows, strict=True):
                yield position, self._finite(float(row[0]))
            return
        rows = output.prompt_logprobs
        for position in range(max(first, min(branch.nodes)), branch.length):
            # From the end: depending on its model runner, vLLM gives rows for the cached tokens (not set) or none.
            at = position - branch.length
            if -at > len(rows):
                raise ScorerError(f"vLLM gave {len(rows)} rows of log-probabilities, {-at} were computed")
            entry = rows.start_indices[at]
            expected = _token(branch.prompt, position)
            if rows.end_indices[at] <= entry or rows.token_ids[entry] != expected:
                raise ScorerError(f"vLLM gave no log-probability of token {expected} at position {position}")
            yield position, self._finite(rows.logprobs[entry])

    def _sampled_values(self, output: Any, tokens: Sequence[int]) -> Iterator[tuple[int, float]]:
        """(token, its log-probability as next token) for each of ``tokens``."""
        rows = output.outputs[0].logprobs
        entries = range(rows.start_indices[0], rows.end_indices[0]) if rows is not None and len(rows) else ()
        given = {rows.token_ids[entry]: rows.logprobs[entry] for entry in reversed(entries)} if entries else {}
        for token in tokens:
            if token not in given:
                raise ScorerError(f"vLLM gave no log-probability of token {token} as next token")
            yield token, self._finite(given[token])

    def _finite(self, value: float) -> float:
        if not np.isfinite(value):
            raise ScorerError(f"vLLM gave a log-probability of {self.info.model} that is not finite: {value}")
        return float(value)

    def _generate(self, prompts: Sequence[bytes], params: Sequence[Any], salt: str) -> list[Any]:
        if not prompts:
            return []
        requests = [
            {"prompt_token_ids": np.frombuffer(prompt, dtype=TOKEN_DTYPE).tolist(), "cache_salt": salt}
            for prompt in prompts
        ]
        try:
            outputs = self._llm.generate(requests, list(params), use_tqdm=False, lora_request=self._lora)
        except Exception as error:
            # Its scheduler may still hold requests of this call, whose answers would come with those of the next one.
            raise self._fail("vLLM failed", error) from error
        if len(outputs) != len(requests) or any(
            len(output.prompt_token_ids) != len(request["prompt_token_ids"])
            for output, request in zip(outputs, requests, strict=False)
        ):
            raise self._fail("vLLM failed", RuntimeError(f"{len(outputs)} answers to {len(requests)} requests"))
        return outputs

    def _fail(self, what: str, error: BaseException) -> EngineFailed:
        self._failed = f"{what}: {_one_line(error)}"
        return EngineFailed(f"{self._failed} (model {self.info.model})")

    def _check_usable(self) -> None:
        if self._failed:
            raise EngineFailed(f"the engine of {self.info.model} cannot be used any more: {self._failed}")

    def _self_test(self) -> None:
        """Score branches that share cached blocks, and the same as plain full sequences, and compare."""
        rng = np.random.default_rng(0)
        length = min(max(8, 3 * self._block_size), self.info.max_model_len - 8)
        if length < 4:
            raise SiopConfigError(f"max_model_len = {self.info.max_model_len} is too short to score anything")

        def draw(size: int) -> IntArray:
            return rng.integers(0, self.info.vocab_size, size=size, dtype=np.int64)

        probes = [Probe(draw(6), 1, 6), Probe(draw(3), 0, 3)]
        rollout = RolloutQuery(draw(length // 2), draw(length - length // 2), [0, 2, length - length // 2], probes)
        items, _ = _items([rollout], {})
        scores, _ = self._score(items)
        params = [
            self._sampling_params(
                max_tokens=1,
                temperature=0.0,
                detokenize=False,
                prompt_logprobs=0,
                flat_logprobs=True,
                skip_reading_prefix_cache=True,
            )
            for _ in items
        ]
        outputs = self._generate([item.path for item in items], params, uuid.uuid4().hex)
        for item, score, output in zip(items, scores, outputs, strict=True):
            rows = output.prompt_logprobs
            plain = np.mean([rows.logprobs[rows.start_indices[p]] for p in range(item.first, item.length)])
            if not abs(plain - score) <= SELF_TEST_TOLERANCE[self._dtype]:
                raise SiopConfigError(
                    f"{self.info.model} fails the self-test of scoring through vLLM's prefix cache: {score:.4f} with "
                    f"it, {plain:.4f} without; use the transformers engine or another version of vLLM"
                )


def _items(rollouts: Sequence[RolloutQuery], skip: dict[int, str]) -> tuple[list[_Item], int]:
    """All (boundary, reference) pairs but those of the rollouts in ``skip``, and their tokens as full sequences."""
    items: list[_Item] = []
    requested = 0
    for index, rollout in enumerate(rollouts):
        if index in skip:
            continue
        tokens = encode_path(rollout.prompt_ids) + encode_path(rollout.response_ids)
        for boundary in rollout.boundaries:
            length = len(rollout.prompt_ids) + boundary
            context = tokens[: TOKEN_BYTES * length]
            for probe in rollout.probes:
                items.append(_Item(context + encode_path(probe.token_ids[: probe.end]), context, length + probe.start))
                requested += length + len(probe.token_ids)
    return items, requested


def _maximal(paths: set[bytes]) -> list[bytes]:
    """The paths that begin no other one, in order."""
    ordered = sorted(paths)
    return [a for a, b in itertools.zip_longest(ordered, ordered[1:]) if b is None or not b.startswith(a)]


def _common_tokens(a: bytes, b: bytes) -> int:
    """Length of the longest common prefix."""
    size = min(len(a), len(b))
    different = np.frombuffer(a[:size], TOKEN_DTYPE) != np.frombuffer(b[:size], TOKEN_DTYPE)
    return int(different.argmax()) if different.any() else size // TOKEN_BYTES


def _token(path: bytes, position: int) -> int:
    return int.from_bytes(path[TOKEN_BYTES * position : TOKEN_BYTES * (position + 1)], "little")


def _chunks(tokens: dict[int, int], size: int) -> Iterator[dict[int, int]]:
    entries = iter(tokens.items())
    while chunk := dict(itertools.islice(entries, size)):
        yield chunk


def _computed(output: Any) -> int:
    return len(output.prompt_token_ids) - (output.num_cached_tokens or 0)


def _fields(sampling_params: Any) -> frozenset[str]:
    return frozenset(
        getattr(sampling_params, "__struct_fields__", ()) or getattr(sampling_params, "__annotations__", ())
    )


def _check_adapter(path: str) -> Adapter:
    """The adapter, if vLLM applies all of it.

    Raises:
        SiopConfigError: the folder holds no adapter, or one that vLLM would apply in part.
    """
    adapter = read_adapter(path)
    bad = [*adapter.extras, *sorted(adapter.modules & {"lm_head", "embed_tokens"})]
    if adapter.rank > LORA_RANKS[-1]:
        bad.append(f"rank {adapter.rank} (at most {LORA_RANKS[-1]})")
    if bad:
        raise SiopConfigError(
            f"lora_path: engine vllm cannot apply {', '.join(bad)} of {path}; merge it into the model, or use the "
            "transformers engine"
        )
    return adapter


def _names(modules: Iterable[str]) -> str:
    return ", ".join(sorted(modules))


def _set_environment(on_cpu: bool) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # an engine process of its own could outlive this one
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    if on_cpu:
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__
