"""Exact scoring with a transformers causal LM: one prefix-tree forward for a whole request, on CPU or GPU.

All (boundary, reference) paths of all rollouts of a request become one prefix tree (:mod:`prefix_tree`), so that every
distinct token prefix is computed once. The tree goes through the model in chunks with a KV cache, from which the
columns of finished subtrees are dropped; the language-model head sees only the rows that predict a reference token.
"""

from __future__ import annotations

import inspect
import logging
import time
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from verl.utils.siop.errors import ScorerError, SiopConfigError
from verl.utils.siop.scorer.engines.base import EngineInfo, Probe, RolloutQuery, SupportResult, check_rollouts, too_long
from verl.utils.siop.scorer.engines.lora import read_adapter
from verl.utils.siop.scorer.engines.prefix_tree import TOKEN_BYTES, IntArray, build_prefix_tree, encode_path

logger = logging.getLogger(__name__)

DEFAULT_CHUNK_TOKENS = {"cpu": 256, "cuda": 2048}
# Bound on the elements of one [rows, vocabulary] block of logits (fp32: 256 MiB).
MAX_LOGITS_ELEMENTS = 1 << 26
# A wrongly packed model is off by far more than rounding is.
SELF_TEST_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5}


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
    advice = "use a scorer model whose layers are all full attention"
    layer_types: Any = None
    for key in ("layer_types", "layers_block_type", "attention_layers"):
        layer_types = layer_types or getattr(text, key, None)
    if layer_types:
        other = sorted({str(kind) for kind in layer_types if kind not in ("full_attention", "attention", "global")})
        if other:
            raise SiopConfigError(
                f"{name} has layers of type {', '.join(other)}; the transformers engine scores a packed prefix tree, "
                f"which only full_attention layers score exactly: {advice}"
            )
    elif getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True):
        raise SiopConfigError(
            f"{name} uses sliding-window attention (sliding_window={text.sliding_window}); the transformers engine "
            f"scores a packed prefix tree, which only full attention scores exactly: {advice}"
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
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        started = time.monotonic()
        torch_dtype: Any = "auto" if dtype == "auto" else getattr(torch, dtype)
        if dtype == "auto" and torch.device(device).type == "cpu":
            torch_dtype = torch.float32
        try:
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
            check_architecture(config, max_model_len)  # before the weights: they may take minutes
            model: Any = AutoModelForCausalLM.from_pretrained(
                path, config=config, dtype=torch_dtype, attn_implementation="sdpa", trust_remote_code=trust_remote_code
            )
        except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
            if isinstance(error, SiopConfigError):
                raise
            raise SiopConfigError(f"cannot load the scorer model {path}: {_one_line(error)}") from error
        if gpu_memory is not None and torch.device(device).type == "cuda":
            torch.cuda.set_per_process_memory_fraction(gpu_memory)
        model = model.to(device)
        if lora_path is not None:
            model = _with_adapter(model, lora_path)
        engine = cls(model.eval(), path, max_model_len, chunk_tokens)
        logger.info(
            "scorer model %s: %.1fM parameters, %s on %s, max_model_len %d, loaded in %.1f s",
            path,
            sum(p.numel() for p in model.parameters()) / 1e6,
            str(model.dtype).removeprefix("torch."),
            device,
            engine.info.max_model_len,
            time.monotonic() - started,
        )
        return engine

    def support(self, rollouts: Sequence[RolloutQuery]) -> SupportResult:
        """Mean log-probability of every reference at every boundary; see :class:`ScoringEngine`."""
        check_rollouts(rollouts, self.info)
        errors = too_long(rollouts, self.info)
        paths: list[bytes] = []
        depths: list[IntArray] = []
        targets: list[IntArray] = []
        requested = 0
        for index, rollout in enumerate(rollouts):
            if index in errors:
                continue
            num_prompt = len(rollout.prompt_ids)
            context = encode_path(rollout.prompt_ids) + encode_path(rollout.response_ids)
            # The last reference token is only predicted, never read.
            branches = [encode_path(probe.token_ids[: probe.end - 1]) for probe in rollout.probes]
            for boundary in rollout.boundaries:
                length = num_prompt + boundary
                prefix = context[: TOKEN_BYTES * length]
                for probe, branch in zip(rollout.probes, branches, strict=True):
                    paths.append(prefix + branch)
                    depths.append(np.arange(length + probe.start - 1, length + probe.end - 1))
                    targets.append(np.asarray(probe.token_ids[probe.start : probe.end], dtype=np.int64))
                    requested += length + len(probe.token_ids)
        if not paths:
            empty: list[list[list[float]]] = [
                [] if index in errors else [[] for _ in r.boundaries] for index, r in enumerate(rollouts)
            ]
            return SupportResult(empty, 0, requested, errors)

        tree = build_prefix_tree(paths, depths)
        # Duplicate rollouts and nested references ask for the same (row, token) pair: look it up once.
        keys = np.concatenate(tree.rows) * self.info.vocab_size + np.concatenate(targets)
        distinct, inverse = np.unique(keys, return_inverse=True)
        rows, tokens = np.divmod(distinct, self.info.vocab_size)
        logprobs = self._forward(tree.tokens, tree.depth, tree.end, rows, tokens)[inverse]
        counts = np.array([len(target) for target in targets])
        means = np.add.reduceat(logprobs, np.cumsum(counts) - counts) / counts

        support: list[list[list[float]]] = []
        offset = 0
        for index, rollout in enumerate(rollouts):
            if index in errors:
                support.append([])
                continue
            shape = (len(rollout.boundaries), len(rollout.probes))
            block = means[offset : offset + shape[0] * shape[1]]
            offset += len(block)
            if not np.isfinite(block).all():
                raise ScorerError(f"{self.info.model} gave a log-probability that is not finite for rollouts[{index}]")
            support.append(block.reshape(shape).tolist())
        return SupportResult(support=support, computed_tokens=len(tree), requested_tokens=requested, errors=errors)

    @torch.inference_mode()
    def _forward(
        self, tokens: IntArray, depth: IntArray, end: IntArray, rows: IntArray, targets: IntArray
    ) -> np.ndarray:
        """Log-probability of ``targets[m]`` after node ``rows[m]``.

        Args:
            tokens, depth, end: [N] the packed tree.
            rows: [M] node indices, ascending.
            targets: [M] token ids.

        Returns:
            [M] float64.
        """
        from transformers import DynamicCache

        device, dtype = self._model.device, self._model.dtype
        num_nodes = len(tokens)
        tokens_N, depth_N, end_N, rows_M, targets_M = (
            torch.from_numpy(array).to(device) for array in (tokens, depth, end, rows, targets)
        )
        row_list = np.unique(rows)
        cache: Any = DynamicCache()  # without a config every layer keeps all its columns
        columns = torch.empty(0, dtype=torch.long, device=device)  # node of each cached column
        results: list[torch.Tensor] = []
        masked = torch.finfo(dtype).min
        start, next_row, next_pair = 0, 0, 0
        while start < num_nodes:
            stop = min(start + self._chunk_tokens, num_nodes)
            if next_row + self._max_rows < len(row_list):
                stop = min(stop, int(row_list[next_row + self._max_rows]))
            live = end_N[columns] > start
            if len(columns) and not bool(live.all()):
                keep = live.nonzero().flatten()
                for layer in cache.layers:
                    layer.keys = layer.keys.index_select(2, keep)
                    layer.values = layer.values.index_select(2, keep)
                columns = columns[keep]
            queries = torch.arange(start, stop, device=device)
            columns = torch.cat([columns, queries])
            visible = (columns[None] <= queries[:, None]) & (queries[:, None] < end_N[columns][None])
            mask = torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill_(~visible, masked)
            row_stop = int(np.searchsorted(row_list, stop))
            chunk_rows = torch.from_numpy(row_list[next_row:row_stop]).to(device)
            logits = self._model(
                input_ids=tokens_N[None, start:stop],
                position_ids=depth_N[None, start:stop],
                attention_mask=mask[None, None],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=chunk_rows - start,
            ).logits[0]
            if len(chunk_rows):
                pair_stop = int(np.searchsorted(rows, stop))
                at = torch.searchsorted(chunk_rows, rows_M[next_pair:pair_stop])
                logits = logits.float()
                chosen = logits[at, targets_M[next_pair:pair_stop]]
                results.append((chosen - logits.logsumexp(-1)[at]).double())
                next_pair = pair_stop
            start, next_row = stop, row_stop
        return torch.cat(results).cpu().numpy()

    @torch.inference_mode()
    def _self_test(self) -> None:
        """Score a small tree with branches and dead columns, packed and plainly, and compare."""
        rng = np.random.default_rng(0)
        length = min(12, self.info.max_model_len - 4)
        if length < 4:
            raise SiopConfigError(f"max_model_len = {self.info.max_model_len} is too short to score anything")

        def draw(size: int) -> IntArray:
            return rng.integers(0, self.info.vocab_size, size=size, dtype=np.int64)

        prompt, probes = draw(length // 2), [Probe(draw(4), 1, 4), Probe(draw(3), 0, 3)]
        rollouts = [RolloutQuery(prompt, draw(length - len(prompt)), [0, 2], probes) for _ in range(2)]
        chunk, self._chunk_tokens = self._chunk_tokens, 5
        try:
            packed = self.support(rollouts).support
        finally:
            self._chunk_tokens = chunk
        for rollout, scores in zip(rollouts, packed, strict=True):
            for boundary, row in zip(rollout.boundaries, scores, strict=True):
                for probe, score in zip(rollout.probes, row, strict=True):
                    context = np.concatenate([rollout.prompt_ids, rollout.response_ids[:boundary]])
                    ids = torch.from_numpy(np.concatenate([context, probe.token_ids]))[None].to(self._model.device)
                    logprobs = self._model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
                    at = torch.arange(len(context) + probe.start, len(context) + probe.end, device=ids.device)
                    plain = float(logprobs[at - 1, ids[0, at]].mean())
                    if not abs(plain - score) <= SELF_TEST_TOLERANCE[self._model.dtype]:
                        raise SiopConfigError(
                            f"{self.info.model} ({self._model.config.model_type}) fails the self-test of packed "
                            f"scoring: {score:.4f} packed, {plain:.4f} plain; the transformers engine cannot score it"
                        )


def _with_adapter(model: Any, path: str) -> Any:
    """The model with a LoRA adapter merged into its weights.

    Raises:
        SiopConfigError: the folder holds no LoRA adapter, or not one that can be merged into this model.
    """
    tied = read_adapter(path).modules & {"lm_head", "embed_tokens"}
    if tied and model.config.get_text_config().tie_word_embeddings:
        raise SiopConfigError(
            f"LoRA adapter {path} changes {', '.join(sorted(tied))}, whose weights the model uses in two places"
        )
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            # peft would go on without them, as if there were no adapter.
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(model, path).merge_and_unload()
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, UserWarning) as error:
        raise SiopConfigError(f"cannot load the LoRA adapter {path}: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
