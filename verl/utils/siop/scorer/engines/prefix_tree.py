"""Prefix tree (trie) of token paths, packed for one forward pass without a repeated token.

A node of the tree is a distinct token prefix of the paths. The nodes are listed in depth-first preorder, so that

    attention(q, kv)  <=>  kv <= q and q < end[kv]         (kv is q itself or one of its ancestors)
    position(q)        =   depth[q]

gives every node exactly the context of its path. The number of nodes is the least number of tokens with which all the
paths can be scored exactly. Pure numpy: no torch here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from verl.utils.siop.scorer.engines.token_paths import TOKEN_BYTES, TOKEN_DTYPE, common_prefix, decode_path

IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class PrefixTree:
    """Packed tree with N nodes.

    Attributes:
        tokens: [N] token id of each node, in depth-first preorder.
        depth: [N] its position in its path, 0 for a first token.
        end: [N] index just past the node's subtree: its descendants are ``i + 1 .. end[i] - 1``.
        rows: per input path, the node index at each asked depth.
    """

    tokens: IntArray
    depth: IntArray
    end: IntArray
    rows: list[IntArray]

    def __len__(self) -> int:
        return len(self.tokens)


def build_prefix_tree(paths: Sequence[bytes], depths: Sequence[IntArray]) -> PrefixTree:
    """Pack token paths into a prefix tree.

    Sorts the distinct paths; each then adds only what follows its longest common prefix with its predecessor.

    Args:
        paths: P token paths as :func:`encode_path` gives them; duplicates and paths that are prefixes of each other
            are fine.
        depths: per path, the depths (0-based positions in the path) whose node indices are wanted.

    Returns:
        The packed tree.
    """
    users: dict[bytes, list[int]] = {}
    for index, path in enumerate(paths):
        users.setdefault(path, []).append(index)
    order = sorted(users)

    longest = max((len(path) for path in order), default=0) // TOKEN_BYTES
    on_path = np.zeros(longest, dtype=np.int64)  # node index at each depth of the current path
    tokens: list[NDArray] = [np.empty(0, dtype=np.int64)]  # the nodes that each path adds, and their depths
    depth: list[IntArray] = [np.empty(0, dtype=np.int64)]
    ends: list[tuple[IntArray, int]] = []  # (nodes, index at which their subtrees ended)
    rows: list[IntArray] = [np.empty(0, dtype=np.int64)] * len(paths)

    size = 0
    previous = np.empty(0, dtype=TOKEN_DTYPE)
    for path in order:
        new = decode_path(path)
        shared = common_prefix(previous, new)
        ends.append((on_path[shared : len(previous)].copy(), size))
        tokens.append(new[shared:])
        depth.append(np.arange(shared, len(new)))
        on_path[shared : len(new)] = size - shared + depth[-1]
        size += len(new) - shared
        for index in users[path]:
            rows[index] = on_path[depths[index]]
        previous = new
    ends.append((on_path[: len(previous)].copy(), size))

    end = np.empty(size, dtype=np.int64)
    for nodes, stop in ends:
        end[nodes] = stop
    return PrefixTree(tokens=np.concatenate(tokens), depth=np.concatenate(depth), end=end, rows=rows)
