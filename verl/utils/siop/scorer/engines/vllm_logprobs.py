"""How vLLM is asked for log-probabilities and what it answers, which differs between its versions and model runners."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from verl.utils.siop.errors import ScorerError
from verl.utils.siop.scorer.engines.vllm_waves import Branch


class VllmLogprobs:
    """Sampling parameters for branches, and the log-probabilities in vLLM's answers.

    Args:
        sampling_params: ``vllm.SamplingParams``.

    Attributes:
        from_position: whether the log-probabilities of given tokens from a given position on are asked for, which
            vLLM can do from 0.32 on, instead of those of all tokens of the prompt.
    """

    def __init__(self, sampling_params: Any) -> None:
        self._sampling_params = sampling_params
        fields = getattr(sampling_params, "__struct_fields__", ()) or getattr(sampling_params, "__annotations__", ())
        self.from_position = {"prompt_logprob_start", "prompt_logprob_token_ids"} <= set(fields)

    def params(self, branch: Branch) -> Any:
        """Sampling parameters that ask for what is to be predicted on and after a branch."""
        options: dict[str, Any] = {}
        if branch.wanted and self.from_position:
            first = min(branch.wanted)
            rows = [[branch.token(position)] for position in range(first, len(branch))]
            options |= {"prompt_logprob_start": first - 1, "prompt_logprob_token_ids": rows}
        elif branch.wanted:
            options["prompt_logprobs"] = 0
        if candidates := branch.candidates:
            options |= {"logprobs": len(candidates), "logprob_token_ids": candidates, "flat_logprobs": True}
        return self._make(skip_reading_prefix_cache=False, **options)

    def plain_params(self) -> Any:
        """Sampling parameters that ask for all tokens of a prompt, computed without the cache."""
        return self._make(skip_reading_prefix_cache=True, prompt_logprobs=0, flat_logprobs=True)

    def _make(self, **options: Any) -> Any:
        # detokenize: vLLM would look up the text of uninitialised rows.
        return self._sampling_params(max_tokens=1, temperature=0.0, detokenize=False, **options)

    def values(self, branch: Branch, output: Any) -> Iterator[tuple[int, float]]:
        """(node, log-probability) of what vLLM computed for a branch.

        Raises:
            ScorerError: something is not there.
        """
        if branch.wanted:
            yield from (_given_rows if self.from_position else _prompt_rows)(branch, output)
        rows = output.outputs[0].logprobs
        entries = range(rows.start_indices[0], rows.end_indices[0]) if rows is not None and len(rows) else ()
        given = {rows.token_ids[entry]: rows.logprobs[entry] for entry in reversed(entries)} if entries else {}
        for token in branch.candidates:
            if token not in given:
                raise ScorerError(f"vLLM gave no log-probability of token {token} as next token")
            yield branch.last[token], given[token]


def num_cached(output: Any) -> int:
    """Tokens of a prompt that came from the cache."""
    return output.num_cached_tokens or 0


def _given_rows(branch: Branch, output: Any) -> Iterator[tuple[int, float]]:
    rows, start = output.prompt_token_id_logprobs, min(branch.wanted)
    if rows is None:  # the cache went past the first row, and vLLM gives all rows or none
        return
    if len(rows) != len(branch) - start:
        raise ScorerError(f"vLLM gave {len(rows)} rows of log-probabilities, not {len(branch) - start}")
    for position, row in enumerate(rows, start):
        yield branch.nodes[position], float(row[0])


def _prompt_rows(branch: Branch, output: Any) -> Iterator[tuple[int, float]]:
    rows = output.prompt_logprobs
    # The first token that was computed predicts the one after it.
    for position in range(max(num_cached(output) + 1, min(branch.nodes)), len(branch)):
        # From the end: depending on its model runner, vLLM gives rows for the cached tokens (not set) or none.
        at = position - len(branch)
        if -at > len(rows):
            raise ScorerError(f"vLLM gave {len(rows)} rows of log-probabilities, {-at} were computed")
        entry, expected = rows.start_indices[at], branch.token(position)
        if rows.end_indices[at] <= entry or rows.token_ids[entry] != expected:
            raise ScorerError(f"vLLM gave no log-probability of token {expected} at position {position}")
        yield branch.nodes[position], rows.logprobs[entry]
