"""What the vLLM engine runs, in which order: branches of the token paths of a request, in waves that fit the KV cache.

Only plans: no vLLM here.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from verl.utils.siop.scorer.engines.prefix_tree import IntArray, build_prefix_tree
from verl.utils.siop.scorer.engines.token_paths import TOKEN_BYTES, ScoredPath, common_prefix, decode_path

# Candidate tokens of one request; vLLM's own bound is 20 unless it is raised.
MAX_CANDIDATES = 16


@dataclass
class Branch:
    """A path without its last token, with what is to be predicted on and after it.

    Attributes:
        prompt: the path.
        context: the longest context that it continues.
        nodes: position in the path -> node of the token there, from the first that counts or may be another branch's.
        wanted: positions in the path whose tokens count.
        last: tokens to predict after the path -> their node. Only the first ``MAX_CANDIDATES`` are asked for with it.
    """

    prompt: bytes
    context: bytes = b""
    nodes: dict[int, int] = field(default_factory=dict)
    wanted: set[int] = field(default_factory=set)
    last: dict[int, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompt) // TOKEN_BYTES

    @property
    def candidates(self) -> list[int]:
        """The tokens to ask for after the path."""
        return list(self.last)[:MAX_CANDIDATES]

    def token(self, position: int) -> int:
        """The token of the path there."""
        return int.from_bytes(self.prompt[TOKEN_BYTES * position : TOKEN_BYTES * (position + 1)], "little")


def plan_branches(paths: Sequence[ScoredPath], block_size: int) -> tuple[list[Branch], list[IntArray], int]:
    """The distinct branches of the paths.

    A node is a distinct prefix of the paths, so that a log-probability has one place whichever branch it comes from.

    Returns:
        The branches, the nodes of each path's tokens that count, and the number of nodes.
    """
    # Also the nodes that end the context: a reference may begin like the rollout goes on.
    starts = [max(0, len(path.context) // TOKEN_BYTES - block_size) for path in paths]
    depths = [np.arange(start, len(path)) for start, path in zip(starts, paths, strict=True)]
    tree = build_prefix_tree([path.tokens for path in paths], depths)
    branches: dict[bytes, Branch] = {}
    for path, start, nodes in zip(paths, starts, tree.rows, strict=True):
        prompt, last = path.tokens[:-TOKEN_BYTES], len(path) - 1
        branch = branches.setdefault(prompt, Branch(prompt, path.context))
        branch.context = max(branch.context, path.context, key=len)
        branch.nodes.update(zip(range(start, last), nodes[:-1].tolist(), strict=True))
        branch.wanted.update(range(path.first, last))
        branch.last[int(decode_path(path.tokens)[last])] = int(nodes[-1])
    counted = [nodes[path.first - start :] for path, start, nodes in zip(paths, starts, tree.rows, strict=True)]
    return list(branches.values()), counted, len(tree)


def plan_waves(
    branches: Sequence[Branch], block_size: int, num_blocks: int
) -> Iterator[tuple[list[Branch], list[Branch]]]:
    """Waves of a call that fit the KV cache: within one, no context is dropped before its branches have been scored.

    Returns:
        For each wave, the branches with nothing to predict that fill the cache, and those that are run after them.
    """
    maximal = _maximal({branch.context for branch in branches})
    # A context begins the first maximal one that is not before it.
    by_context = [(maximal[bisect_left(maximal, branch.context)], branch) for branch in branches]
    contexts: list[bytes] = []
    wave: list[Branch] = []
    used, last = 0, b""
    for context, branch in sorted(by_context, key=lambda pair: (pair[0], pair[1].prompt)):
        blocks = len(context) // TOKEN_BYTES // block_size
        new = 0 if context == last else blocks - common_prefix(decode_path(last), decode_path(context)) // block_size
        # One more, for a branch that has to be run again for a single token.
        own = -(-len(branch) // block_size) - len(branch.context) // TOKEN_BYTES // block_size + 1
        if wave and used + new + own > num_blocks:
            yield _cached(contexts, block_size), wave
            contexts, wave, used, new, last = [], [], 0, blocks, b""
        if context != last:
            contexts.append(context)
        wave.append(branch)
        used, last = used + new + own, context
    yield _cached(contexts, block_size), wave


def plan_single_tokens(branches: Sequence[Branch], values: np.ndarray) -> list[Branch]:
    """Branches without wanted positions for the tokens whose node has no value (NaN) yet."""
    missing: dict[bytes, dict[int, int]] = {}
    for branch in branches:
        for position in branch.wanted:
            node = branch.nodes[position]
            if np.isnan(values[node]):
                missing.setdefault(branch.prompt[: TOKEN_BYTES * position], {})[branch.token(position)] = node
        for token, node in branch.last.items():
            if np.isnan(values[node]):
                missing.setdefault(branch.prompt, {})[token] = node
    return [
        Branch(prompt, last=dict(list(tokens.items())[start : start + MAX_CANDIDATES]))
        for prompt, tokens in missing.items()
        for start in range(0, len(tokens), MAX_CANDIDATES)
    ]


def _cached(contexts: Sequence[bytes], block_size: int) -> list[Branch]:
    # Only whole blocks are cached, so nothing is gained by running the rest of a context.
    whole = TOKEN_BYTES * block_size
    return [Branch(prompt) for prompt in _maximal({c[: len(c) // whole * whole] for c in contexts} - {b""})]


def _maximal(paths: set[bytes]) -> list[bytes]:
    """The paths that begin no other one, in order."""
    ordered = sorted(paths)
    return [a for a, b in itertools.zip_longest(ordered, ordered[1:]) if b is None or not b.startswith(a)]
