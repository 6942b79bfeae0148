"""``siop_scorer=policy``: support measured by the policy that is being trained, so that no second LM is in memory."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from verl.utils import tensordict_utils as tu
from verl.utils.seqlen_balancing import calculate_workload, get_seqlen_balanced_partitions
from verl.utils.siop.errors import ScorerError
from verl.utils.siop.siop_process_reward import SiopScorer, SupportRequest

# Tokens of one call of the actor for each data parallel rank. verl's division into micro-batches slows down with more
# than the square of their number: 0.2 s for this many tokens in sequences of 1k to 8k, 12 s for eight times as many.
RANK_TOKENS = 500_000


class PolicyScorer:
    """A :class:`SiopScorer` whose support comes from the actor, and whose clusters and entailment from another scorer.

    The weights are the actor's before the update of the step. Each distinct prompt + response[:boundary] + opening +
    probe, up to the last reference token, is one sequence of ``compute_log_prob``, by which every training engine of
    verl computes the old log-probs. Log-probs are those at temperature 1, whatever ``rollout.temperature`` is.

    An exception inside the actor is passed on as it is and ends the run: other ranks may be waiting for the one that
    failed, so that a second attempt would hang.

    Args:
        nli: answers ``cluster`` and ``entailment``.
        actor: verl's worker group with the mesh "actor" and the method ``compute_log_prob``.
        rollout: ``actor_rollout_ref.rollout``, whose ``log_prob_*`` keys bound the micro-batches.

    Attributes:
        computed_tokens: tokens that went through the actor, padding rows not counted.
        requested_tokens: tokens of all (boundary, reference) pairs as separate full sequences.
    """

    def __init__(self, nli: SiopScorer, actor: Any, rollout: DictConfig) -> None:
        self._nli, self._actor, self._rollout = nli, actor, rollout
        self.computed_tokens = self.requested_tokens = 0

    async def cluster(self, question: str, answers: list[str]) -> list[int]:
        return await self._nli.cluster(question, answers)

    async def entailment(self, pairs: list[tuple[str, str]]) -> list[float]:
        return await self._nli.entailment(pairs)

    async def support(self, rollouts: list[SupportRequest]) -> list[list[list[float]]]:
        """Mean log-prob of each reference at each boundary, [rollout][boundary][reference].

        Raises:
            ScorerError: the actor returned something else than a finite log-prob of every token asked for.
        """
        dp_size = max(self._actor._query_dispatch_info("actor")) + 1
        support: list[list[list[float]]] = []
        for call in _calls(rollouts, RANK_TOKENS * dp_size):
            support += self._support(call, dp_size)
        return support

    def _support(self, rollouts: Sequence[SupportRequest], dp_size: int) -> list[list[list[float]]]:
        rows: dict[bytes, int] = {}
        row_of: list[int] = []  # of every (rollout, boundary, reference), in this order
        for rollout in rollouts:
            context = np.array(rollout.prompt_ids + rollout.response_ids, dtype=np.int64)
            for boundary, opening in rollout.opened():
                prefix = np.concatenate([context[: len(rollout.prompt_ids) + boundary], opening]).astype(np.int64)
                for reference in rollout.references:
                    # The last reference token is the last of the sequence: what follows it does not matter.
                    probe = np.array(reference.token_ids[: reference.end], dtype=np.int64)
                    row_of.append(rows.setdefault(np.concatenate([prefix, probe]).tobytes(), len(rows)))
                    self.requested_tokens += len(prefix) + len(reference.token_ids)
        sequences = [torch.tensor(np.frombuffer(row, dtype=np.int64)) for row in rows]
        self.computed_tokens += sum(map(len, sequences))
        longest_probe = max(reference.end for rollout in rollouts for reference in rollout.references)
        longest_probe += max(len(opening) for rollout in rollouts for _, opening in rollout.opened())
        log_probs = self._log_probs(sequences, longest_probe, dp_size)

        asked = iter(row_of)
        support: list[list[list[float]]] = [[[] for _ in rollout.boundaries] for rollout in rollouts]
        for i, rollout in enumerate(rollouts):
            for b, boundary in enumerate(rollout.boundaries):
                for reference in rollout.references:
                    count = reference.end - reference.start
                    scored = log_probs[next(asked)][-count - 1 : -1].double()
                    if len(scored) != count or not bool(torch.isfinite(scored).all()):
                        raise ScorerError(
                            f"the actor gave no finite log-prob for each of the {count} tokens of reference "
                            f"{reference.text!r} at boundary {boundary} of a rollout: {scored.tolist()}"
                        )
                    support[i][b].append(float(scored.mean()))
        return support

    def _log_probs(self, sequences: list[torch.Tensor], longest_probe: int, dp_size: int) -> list[torch.Tensor]:
        """For each sequence of L tokens, [L]: at index k the log-prob of token k + 1 (the last entry means nothing)."""
        # Every rank gets as many rows, and without dynamic batches as many full micro-batches.
        micro_batch = 1 if self._rollout.log_prob_use_dynamic_bsz else self._rollout.log_prob_micro_batch_size_per_gpu
        padding = [min(sequences, key=len)] * (-len(sequences) % (dp_size * micro_batch))
        padded = [*sequences, *padding]
        workload = calculate_workload(torch.tensor([len(row) for row in padded])).tolist()
        partitions = get_seqlen_balanced_partitions(workload, k_partitions=dp_size, equal_size=True)
        order = list(itertools.chain.from_iterable(partitions))

        input_ids = _jagged([padded[row] for row in order])
        options = {"calculate_entropy": False, "compute_loss": False, "temperature": 1.0}
        if self._rollout.log_prob_use_dynamic_bsz:
            # A rollout fits into verl's limit; an opening and a probe come on top of it.
            options["max_token_len_per_gpu"] = self._rollout.log_prob_max_token_len_per_gpu + longest_probe
        data = tu.get_tensordict(
            {
                "input_ids": input_ids,
                "position_ids": _jagged([torch.arange(len(padded[row])) for row in order]),
                "loss_mask": torch.ones_like(input_ids),
            },
            options,
        )
        output = tu.get(self._actor.compute_log_prob(data), "log_probs")
        found = list(output.unbind()) if isinstance(output, torch.Tensor) else []
        if [len(row) for row in found] != [len(padded[row]) for row in order]:
            raise ScorerError(f"the actor was asked for log-probs of {len(order)} sequences and did not return them")
        of_row = dict(zip(order, found, strict=True))
        return [of_row[row] for row in range(len(sequences))]


def _calls(rollouts: Sequence[SupportRequest], max_tokens: int) -> list[list[SupportRequest]]:
    """Consecutive rollouts of about ``max_tokens`` together; equal prompts share sequences and stay together."""
    calls: list[list[SupportRequest]] = []
    size = 0
    for _, same_prompt in itertools.groupby(rollouts, key=lambda rollout: rollout.prompt_ids):
        group = list(same_prompt)
        tokens = sum(
            len(rollout.references)
            * sum(len(rollout.prompt_ids) + boundary + len(opening) for boundary, opening in rollout.opened())
            for rollout in group
        )
        if not calls or size + tokens > max_tokens:
            calls.append([])
            size = 0
        calls[-1] += group
        size += tokens
    return calls


def _jagged(rows: list[torch.Tensor]) -> torch.Tensor:
    return torch.nested.as_nested_tensor(rows, layout=torch.jagged)
