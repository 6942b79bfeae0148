"""Exact scoring with a transformers causal LM: one prefix-tree forward for a whole request, on CPU or GPU.

All (boundary, reference) paths of all rollouts of a request become one prefix tree (:mod:`prefix_tree`), so that every
distinct token prefix is computed once. The tree goes through the model in chunks with a KV cache, from which the
columns of finished subtrees are dropped; the language-model head sees only the rows that predict a reference token.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from verl.utils.siop.errors import SiopConfigError
from verl.utils.siop.scorer.engines.base import EngineInfo, RolloutQuery, SupportResult, TokenArray
from verl.utils.siop.scorer.engines.loading import as_config_error, dtype_on, is_cpu, log_loaded
from verl.utils.siop.scorer.engines.lora import merge_adapter
from verl.utils.siop.scorer.engines.prefix_tree import IntArray, PrefixTree, build_prefix_tree
from verl.utils.siop.scorer.engines.token_paths import (
    TOKEN_BYTES,
    ScoredPath,
    decode_path,
    run_self_test,
    score_request,
)

DEFAULT_CHUNK_TOKENS = {"cpu": 256, "cuda": 2048}
# Bound on the elements of one [rows, vocabulary] block of logits (fp32: 256 MiB).
MAX_LOGITS_ELEMENTS = 1 << 26


def check_architecture(config: Any, max_model_len: int | None = None) -> None:
    """Refuse, by name, a model that a packed prefix tree would score wrongly.

    Args:
        config: the model's transformers configuration.
        max_model_len: longest sequence that will be scored, None for the model's own limit.

    Raises:
        SiopConfigError: some layer is not full attention, or positions are rescaled with the length of the input.
    """
    text = config.get_text_config()
    name = f"{getattr(config, '_name_or_path', '') or 'the model'} ({config.model_type})"
    layer_types: Any = None
    for key in ("layer_types", "layers_block_type", "attention_layers"):
        layer_types = layer_types or getattr(text, key, None)
    other = {str(kind) for kind in layer_types or () if kind not in ("full_attention", "attention", "global")}
    refused = f"has layers of type {', '.join(sorted(other))}" if other else ""
    if not layer_types and getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True):
        refused = f"uses sliding-window attention (sliding_window={text.sliding_window})"
    if refused:
        raise SiopConfigError(
            f"{name} {refused}; the transformers engine scores a packed prefix tree, which only full attention scores "
            "exactly: use a scorer model whose layers are all full attention"
        )
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    kind = rope.get("rope_type", rope.get("type"))
    if kind in ("dynamic", "longrope"):
        original = rope.get("original_max_position_embeddings") or getattr(
            text, "original_max_position_embeddings", text.max_position_embeddings
        )
        if (max_model_len or text.max_position_embeddings) > original:
            raise SiopConfigError(
                f"{name} rescales its positions with the length of the input (rope_type={kind}), so sequences of "
                f"different lengths cannot be packed; set max_model_len to at most {original}"
            )


class TransformersEngine:
    """Prefix-tree scorer over a loaded causal LM.

    Args:
        model: a transformers causal LM in eval mode on its device; its weights may change between calls.
        name: what messages and ``info`` call the model.
        max_model_len: longest sequence (prompt + response + reference) taken; None for the model's own limit.
        chunk_tokens: tree nodes per forward pass; None for 256 on CPU, 2048 on GPU.
        self_test: compare a small tree with plain forward passes at start.

    Raises:
        SiopConfigError: the model cannot be packed, its forward lacks ``position_ids`` or ``logits_to_keep``, or
            ``max_model_len`` is more than the model takes.
    """

    def __init__(
        self,
        model: Any,
        name: str | None = None,
        max_model_len: int | None = None,
        chunk_tokens: int | None = None,
        self_test: bool = True,
    ) -> None:
        config = model.config
        name = name or getattr(config, "_name_or_path", "") or type(model).__name__
        check_architecture(config, max_model_len)
        if getattr(model, "_is_stateful", False):
            raise SiopConfigError(
                f"{name} ({config.model_type}) has recurrent layers, which a packed prefix tree breaks"
            )
        accepted = inspect.signature(model.forward).parameters
        for argument in ("position_ids", "logits_to_keep", "past_key_values", "attention_mask"):
            if argument not in accepted:
                raise SiopConfigError(
                    f"{name} ({config.model_type}): its forward takes no {argument}, which scoring needs"
                )
        limit = getattr(config.get_text_config(), "max_position_embeddings", None)
        if max_model_len is None:
            max_model_len = limit
        if max_model_len is None:
            raise SiopConfigError(f"{name} ({config.model_type}) states no longest sequence; set max_model_len")
        if not 1 <= max_model_len <= (limit or max_model_len):
            raise SiopConfigError(f"max_model_len = {max_model_len} is outside what {name} takes (1..{limit})")

        self._model = model
        self._dtype = str(model.dtype).removeprefix("torch.")
        self._chunk_tokens = chunk_tokens or DEFAULT_CHUNK_TOKENS.get(model.device.type, 2048)
        vocab_size = int(model.get_input_embeddings().weight.shape[0])
        self._max_rows = max(16, MAX_LOGITS_ELEMENTS // vocab_size)
        self.info = EngineInfo(engine="transformers", model=name, max_model_len=max_model_len, vocab_size=vocab_size)
        if self_test:
            self._self_test()

    @classmethod
    def from_pretrained(
        cls,
        path: str,
        device: str = "cpu",
        dtype: str = "auto",
        max_model_len: int | None = None,
        trust_remote_code: bool = False,
        chunk_tokens: int | None = None,
        gpu_memory: float | None = None,
        lora_path: str | None = None,
    ) -> TransformersEngine:
        """Load a model directory or hub id.

        Args:
            path: model directory or hub id.
            device: torch device.
            dtype: ``auto`` (float32 on CPU, the checkpoint's own type on GPU), ``float32``, ``bfloat16``, ``float16``.
            max_model_len: see the class.
            trust_remote_code: run Python code that comes with the model.
            chunk_tokens: see the class.
            gpu_memory: share of the GPU's memory that this process may take; None for no limit.
            lora_path: LoRA adapter to merge into the model.

        Raises:
            SiopConfigError: the model cannot be loaded or cannot be scored by this engine.
        """
        import transformers

        started = time.monotonic()
        transformers.utils.logging.disable_progress_bar()
        with as_config_error(f"cannot load the scorer model {path}"):
            config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
            check_architecture(config, max_model_len)  # before the weights: they may take minutes
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(
                path,
                config=config,
                dtype=dtype_on(device, dtype),
                attn_implementation="sdpa",
                trust_remote_code=trust_remote_code,
            )
        if gpu_memory is not None and not is_cpu(device):
            torch.cuda.set_per_process_memory_fraction(gpu_memory)
        model = model.to(device)
        if lora_path is not None:
            model = merge_adapter(model, lora_path)
        engine = cls(model.eval(), path, max_model_len, chunk_tokens)
        log_loaded(
            f"scorer model {path}: {sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, "
            f"{engine._dtype} on {device}, max_model_len {engine.info.max_model_len}",
            started,
        )
        return engine

    def support(self, rollouts: Sequence[RolloutQuery]) -> SupportResult:
        """Mean log-probability of every reference at every boundary; see :class:`ScoringEngine`."""
        return score_request(rollouts, self.info, self._score)

    def _score(self, paths: list[ScoredPath]) -> tuple[np.ndarray, int]:
        if not paths:
            return np.empty(0), 0
        # The last reference token is only predicted, never read.
        tree = build_prefix_tree(
            [path.tokens[:-TOKEN_BYTES] for path in paths],
            [np.arange(path.first - 1, len(path) - 1) for path in paths],
        )
        # Duplicate rollouts and nested references ask for the same (row, token) pair: look it up once.
        targets = np.concatenate([decode_path(path.tokens)[path.first :] for path in paths])
        distinct, inverse = np.unique(np.concatenate(tree.rows) * self.info.vocab_size + targets, return_inverse=True)
        logprobs = self._forward(tree, *np.divmod(distinct, self.info.vocab_size))[inverse]
        counts = np.array([len(rows) for rows in tree.rows])
        return np.add.reduceat(logprobs, np.cumsum(counts) - counts) / counts, len(tree)

    @torch.inference_mode()
    def _forward(self, tree: PrefixTree, rows: IntArray, targets: IntArray) -> np.ndarray:
        """Log-probability of ``targets[m]`` after node ``rows[m]``.

        Args:
            tree: the packed tree of N nodes.
            rows: [M] node indices, ascending.
            targets: [M] token ids.

        Returns:
            [M] float64.
        """
        from transformers import DynamicCache

        device, dtype = self._model.device, self._model.dtype
        tokens_N, depth_N, end_N, targets_M = (
            torch.from_numpy(array).to(device) for array in (tree.tokens, tree.depth, tree.end, targets)
        )
        cache: Any = DynamicCache()  # without a config every layer keeps all its columns
        columns = torch.empty(0, dtype=torch.long, device=device)  # node of each cached column
        results: list[torch.Tensor] = []
        for start, stop in self._chunks(len(tree), rows):
            columns = _drop_columns(cache, columns, end_N[columns] > start)
            queries = torch.arange(start, stop, device=device)
            columns = torch.cat([columns, queries])
            visible = (columns[None] <= queries[:, None]) & (queries[:, None] < end_N[columns][None])
            mask = torch.zeros(visible.shape, dtype=dtype, device=device)
            mask.masked_fill_(~visible, torch.finfo(dtype).min)
            pairs = slice(*np.searchsorted(rows, [start, stop]))
            chunk_rows, at = (torch.from_numpy(a).to(device) for a in np.unique(rows[pairs], return_inverse=True))
            logits = self._model(
                input_ids=tokens_N[None, start:stop],
                position_ids=depth_N[None, start:stop],
                attention_mask=mask[None, None],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=chunk_rows - start,
            ).logits[0]
            if len(chunk_rows):
                logits = logits.float()
                results.append((logits[at, targets_M[pairs]] - logits.logsumexp(-1)[at]).double())
        return torch.cat(results).cpu().numpy()

    def _chunks(self, num_nodes: int, rows: IntArray) -> Iterator[tuple[int, int]]:
        """Bounds of the nodes of each forward pass, with no more rows of logits than fit."""
        distinct = np.unique(rows)
        start = 0
        while start < num_nodes:
            stop = min(start + self._chunk_tokens, num_nodes)
            full = int(np.searchsorted(distinct, start)) + self._max_rows
            if full < len(distinct):
                stop = min(stop, int(distinct[full]))
            yield start, stop
            start = stop

    @torch.inference_mode()
    def _self_test(self) -> None:
        """Score a small tree with branches and dead columns, packed and plainly, and compare."""

        def plain(tokens: TokenArray, first: int) -> float:
            ids = torch.from_numpy(tokens).to(self._model.device)
            logprobs = self._model(input_ids=ids[None], use_cache=False).logits[0].float().log_softmax(-1)
            return float(logprobs[first - 1 : -1].gather(1, ids[first:, None]).mean())

        chunk, self._chunk_tokens = self._chunk_tokens, 5
        try:
            run_self_test(self, 12, self._dtype, plain, "the transformers engine cannot score this model")
        finally:
            self._chunk_tokens = chunk


def _drop_columns(cache: Any, columns: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    """Keep the columns of the cache that are live; returns their nodes."""
    if bool(live.all()):
        return columns
    keep = live.nonzero().flatten()
    for layer in cache.layers:
        layer.keys = layer.keys.index_select(2, keep)
        layer.values = layer.values.index_select(2, keep)
    return columns[keep]
