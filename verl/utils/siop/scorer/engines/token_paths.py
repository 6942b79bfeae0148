"""A request as token paths, one for each (boundary, reference), and its scores from theirs.

An engine only has to score paths. No torch here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from verl.utils.siop.errors import ScorerError, SiopConfigError
from verl.utils.siop.scorer.engines.base import (
    EngineInfo,
    Probe,
    RolloutQuery,
    ScoringEngine,
    SupportResult,
    TokenArray,
    check_rollouts,
    too_long,
)

# Paths are `bytes`, which hash and sort (memcmp) fast. Any order that is lexicographic over whole tokens will do.
TOKEN_DTYPE = np.dtype(np.uint32)
TOKEN_BYTES = TOKEN_DTYPE.itemsize
# By the model's dtype. A wrongly packed or cached model is off by far more than rounding is.
SELF_TEST_TOLERANCE = {"float64": 1e-3, "float32": 1e-3, "float16": 0.1, "bfloat16": 0.5}


def encode_path(token_ids: Sequence[int] | NDArray[np.integer]) -> bytes:
    """Token ids as a path; slices and sums of paths at ``TOKEN_BYTES`` steps are paths again."""
    return np.asarray(token_ids, dtype=TOKEN_DTYPE).tobytes()


def decode_path(path: bytes) -> NDArray[np.uint32]:
    """Token ids of a path."""
    return np.frombuffer(path, dtype=TOKEN_DTYPE)


def common_prefix(a: NDArray, b: NDArray) -> int:
    """Length of the longest common prefix of two arrays of token ids."""
    size = min(len(a), len(b))
    different = a[:size] != b[:size]
    return int(different.argmax()) if different.any() else size


@dataclass(frozen=True)
class ScoredPath:
    """A path of which the mean log-probability of the last tokens is wanted.

    Attributes:
        tokens: context and reference up to its last token that counts.
        context: the rollout up to the boundary.
        first: position of the first token that counts.
    """

    tokens: bytes
    context: bytes
    first: int

    def __len__(self) -> int:
        return len(self.tokens) // TOKEN_BYTES


def score_request(
    rollouts: Sequence[RolloutQuery],
    info: EngineInfo,
    score: Callable[[list[ScoredPath]], tuple[NDArray[np.float64], int]],
) -> SupportResult:
    """Answer a request with an engine that scores paths.

    Args:
        rollouts: the request.
        info: limits of the engine.
        score: the mean log-probability of each path, and the tokens that went through the model for all.

    Raises:
        InvalidRequest: see :func:`check_rollouts`.
        ScorerError: a score is not finite.
    """
    check_rollouts(rollouts, info)
    errors = too_long(rollouts, info)
    paths: list[ScoredPath] = []
    requested = 0
    for index, rollout in enumerate(rollouts):
        if index in errors:
            continue
        whole = encode_path(rollout.prompt_ids) + encode_path(rollout.response_ids)
        references = [encode_path(probe.token_ids[: probe.end]) for probe in rollout.probes]
        for boundary, opening in rollout.opened:
            context = whole[: TOKEN_BYTES * (len(rollout.prompt_ids) + boundary)]
            opened = context + encode_path(opening)
            length = len(opened) // TOKEN_BYTES
            for probe, reference in zip(rollout.probes, references, strict=True):
                paths.append(ScoredPath(opened + reference, context, length + probe.start))
                requested += length + len(probe.token_ids)
    means, computed = score(paths)
    support: list[list[list[float]]] = []
    offset = 0
    for index, rollout in enumerate(rollouts):
        if index in errors:
            support.append([])
            continue
        shape = (len(rollout.boundaries), len(rollout.probes))
        block: NDArray[Any] = means[offset : offset + shape[0] * shape[1]]
        offset += len(block)
        if not np.isfinite(block).all():
            raise ScorerError(f"{info.model} gave a log-probability that is not finite for rollouts[{index}]")
        support.append(block.reshape(shape).tolist())
    return SupportResult(support, computed, requested, errors)


def run_self_test(
    engine: ScoringEngine, size: int, dtype: str, plain: Callable[[TokenArray, int], float], advice: str
) -> None:
    """Compare an engine's scores of two random rollouts, which share prefixes, with those of plain full sequences.

    Args:
        engine: the engine.
        size: tokens of prompt and response, if the model takes as many.
        dtype: the model's, by name.
        plain: mean log-probability of the tokens from a position on, from the sequence alone.
        advice: what the user can do about a failure.

    Raises:
        SiopConfigError: a score is another one.
    """
    rng, info = np.random.default_rng(0), engine.info
    size = min(size, info.max_model_len - 5)  # a reference of four, and the token that vLLM generates after it
    if size < 3:
        raise SiopConfigError(f"max_model_len = {info.max_model_len} is too short to score anything")

    def draw(count: int) -> TokenArray:
        return rng.integers(0, info.vocab_size, size=count, dtype=np.int64)

    prompt, probes = draw(size // 2), [Probe(draw(4), 1, 4), Probe(draw(3), 0, 3)]
    rollouts = [RolloutQuery(prompt, draw(size - len(prompt)), [0, 2, size - len(prompt)], probes) for _ in range(2)]
    for rollout, rows in zip(rollouts, engine.support(rollouts).support, strict=True):
        for boundary, row in zip(rollout.boundaries, rows, strict=True):
            context = np.concatenate([rollout.prompt_ids, rollout.response_ids[:boundary]])
            for probe, score in zip(probes, row, strict=True):
                expected = plain(np.concatenate([context, probe.token_ids]), len(context) + probe.start)
                if not abs(expected - score) <= SELF_TEST_TOLERANCE[dtype]:
                    raise SiopConfigError(
                        f"{info.model} fails the self-test of the {info.engine} engine: it scores {score:.4f} where "
                        f"the plain sequence gives {expected:.4f}; {advice}"
                    )
