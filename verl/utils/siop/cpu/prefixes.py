"""Contexts that the rollout has computed: a rollout's next turn computes only what is new in it."""

from __future__ import annotations

import array
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

MAX_BYTES = 1 << 30


@dataclass(frozen=True)
class Prefix:
    """Keys and values of the first ``length`` tokens of a context, a pair of [heads, length, dimension] a layer."""

    length: int
    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    @property
    def bytes(self) -> int:
        return sum(keys.nbytes + values.nbytes for keys, values in self.layers)


class Prefixes:
    """Computed contexts by their tokens, for one version of the weights; above ``max_bytes`` the oldest go."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self.max_bytes = max_bytes
        self.clear()

    def clear(self) -> None:
        self._known: OrderedDict[tuple[int, bytes], Prefix] = OrderedDict()
        self._lengths: Counter[int] = Counter()
        self.bytes = 0

    def find(self, ids: Sequence[int]) -> Prefix | None:
        """The longest known prefix of a context that leaves at least its last token to compute."""
        tokens = array.array("q", ids)
        for length in sorted((length for length in self._lengths if length < len(ids)), reverse=True):
            if known := self._known.get((length, tokens[:length].tobytes())):
                return known
        return None

    def add(self, ids: Sequence[int], prefix: Prefix) -> None:
        key = (len(ids), array.array("q", ids).tobytes())
        if key in self._known:
            return
        self._known[key] = prefix
        self._lengths[prefix.length] += 1
        self.bytes += prefix.bytes
        while self.bytes > self.max_bytes:
            _, oldest = self._known.popitem(last=False)
            self.bytes -= oldest.bytes
            self._lengths[oldest.length] -= 1
            if not self._lengths[oldest.length]:
                del self._lengths[oldest.length]


def joined(prefixes: Sequence[Prefix | None]) -> tuple[DynamicCache | None, torch.Tensor]:
    """One cache for a batch, padded on the left, and its mask [B, longest]; no cache if nothing is known."""
    longest = max((prefix.length for prefix in prefixes if prefix), default=0)
    mask = torch.zeros(len(prefixes), longest, dtype=torch.long)
    if not longest:
        return None, mask
    pairs = []
    for layer, like in enumerate(next(prefix for prefix in prefixes if prefix).layers):
        pair = [part.new_zeros(len(prefixes), part.shape[0], longest, part.shape[2]) for part in like]
        for row, prefix in enumerate(prefixes):
            if prefix:
                for whole, part in zip(pair, prefix.layers[layer], strict=True):
                    whole[row, :, longest - prefix.length :] = part
        pairs.append(tuple(pair))
    for row, prefix in enumerate(prefixes):
        if prefix:
            mask[row, longest - prefix.length :] = 1
    return DynamicCache(pairs), mask


def row_of(cache: DynamicCache, row: int, mask: torch.Tensor) -> Prefix | None:
    """What a batch's cache holds of one row.

    Args:
        cache: after a forward pass.
        row: its index in the batch.
        mask: [columns of the cache] of the row, 0 where it is padded.

    Returns:
        None for a model whose cache is not simply all keys and values (sliding windows, recurrent states).
    """
    columns = mask.nonzero()[:, 0]
    layers = []
    for layer in cache.layers:
        if type(layer) is not DynamicLayer or layer.keys is None or layer.values is None:
            return None
        layers.append((layer.keys[row][:, columns], layer.values[row][:, columns]))
    return Prefix(len(columns), tuple(layers))
