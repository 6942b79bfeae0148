"""verl's custom reward function (EM and F1 of answers), and the placement of turn rewards on tokens.

``compute_score`` needs labels: it serves validation and the outcome metrics, never the verifier-free rewards.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from verl.utils.siop.credit.answers import exact_match, f1_score, parse_aliases
from verl.utils.siop.errors import RolloutError
from verl.utils.siop.turn_utils import parse_answer

# Keys of a rollout's extra_fields, which verl hands to the reward function inside of extra_info: the answer that the
# response mask says, by the agent loop worker; and what our agent loop noted (ToolRecord).
ANSWER, _RECORD = "siop_answer", "siop_tools"

_OBSERVATION = re.compile(r"<tool_response>.*?(?:</tool_response>|\Z)", re.DOTALL)
_ASSISTANT_HEADER = "<|im_start|>assistant"
# What decoding without special tokens leaves of a chat header: the role alone on its line. Not inside an answer.
_BARE_ASSISTANT = re.compile(r"(?<!<answer>\n)^assistant[ \t]*$", re.MULTILINE)
_CHAT_MARKERS = re.compile(r"<\|im_end\|>|(?:<\|im_start\|>|^)(?:user|assistant|tool)[ \t]*$", re.MULTILINE)


def last_assistant_text(solution_str: str) -> str:
    """The last assistant turn of a decoded response, which also holds tool output and chat headers.

    Works on text decoded with special tokens (``<|im_start|>assistant``) and without (a line ``assistant``). Text
    cannot tell a tag that a tool returned, or that the policy wrote, from a real one; token masks can.
    """
    segments = _OBSERVATION.split(solution_str)
    with_text = [segment for segment in segments if _CHAT_MARKERS.sub("", segment).strip()]
    if not with_text:
        return ""
    return _BARE_ASSISTANT.split(with_text[-1].rpartition(_ASSISTANT_HEADER)[2])[-1]


def final_answer(solution_str: str, extra_info: Mapping[str, Any] | None = None) -> str:
    """The final answer of a rollout, empty if there is none; see :func:`parse_answer`.

    Args:
        solution_str: the decoded response. Read (:func:`last_assistant_text`) only where ``extra_info`` has no answer.
        extra_info: in a run of this project ``siop_answer``, the answer by the response mask, the same that is
            clustered. Else whether the prompt opened the thinking may stand in ``["siop_tools"]["thinking"]``; without
            it, the turn begins outside.
    """
    if isinstance(known := (extra_info or {}).get(ANSWER), str):
        return known
    record = (extra_info or {}).get(_RECORD) or {}
    return parse_answer(last_assistant_text(solution_str), thinking=bool(record.get("thinking")))


def compute_score(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: dict[str, Any] | None = None, **kwargs: Any
) -> dict[str, float | None]:
    """verl's custom reward function: EM and F1 of the final answer.

    Args:
        data_source: not used; verl passes it.
        solution_str: the decoded response, tool output included; see :func:`final_answer`.
        ground_truth: see :func:`parse_aliases`.
        extra_info: see :func:`final_answer`.
        **kwargs: not used.

    Returns:
        ``{"score": em, "em": em, "f1": f1}``. Without a label: score 0.0 and None for em and f1, so that the keys
        are the same for every row (verl needs that) and verl's validation metrics, which leave out None, average
        em and f1 over the labelled rows only.
    """
    aliases = parse_aliases(ground_truth)
    if not aliases:
        return {"score": 0.0, "em": None, "f1": None}
    answer = final_answer(solution_str, extra_info)
    em = exact_match(answer, aliases)
    return {"score": em, "em": em, "f1": f1_score(answer, aliases)}


def turn_spans(mask_BL: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the N assistant turns of a batch lie, row by row.

    Args:
        mask_BL: bool, true on the policy's tokens; a turn is a maximal run of true in a row.

    Returns:
        For each turn its row, the index of its first token and the index after its last token, the two indices into the
        flat [B·L] tokens.
    """
    # Every row begins and ends outside of a turn, so its edges alternate between starts and ends of turns.
    edges_BL1 = np.diff(mask_BL, axis=1, prepend=False, append=False)
    edges_N2 = np.flatnonzero(edges_BL1).reshape(-1, 2)
    rows_N = edges_N2[:, 0] // edges_BL1.shape[1]
    return rows_N, edges_N2[:, 0] - rows_N, edges_N2[:, 1] - rows_N


def _placed(turn_rewards: Sequence[Sequence[float]], mask_BL: torch.Tensor) -> torch.Tensor:
    if not ((mask_BL == 0) | (mask_BL == 1)).all():
        raise RolloutError("a response mask holds only 0 and 1")
    assistant = (mask_BL == 1).cpu().numpy()
    rows_N, _, ends_N = turn_spans(assistant)
    turns = np.bincount(rows_N, minlength=len(assistant))
    given = np.array([len(rewards) for rewards in turn_rewards], dtype=int)
    wrong = np.flatnonzero((given > 0) & (given != turns))
    if len(wrong):
        row = wrong[0]
        raise RolloutError(f"rollout {row} has {turns[row]} assistant turns in its mask, but {given[row]} turn rewards")
    rewarded_N = given[rows_N] > 0
    values = np.array([reward for rewards in turn_rewards for reward in rewards], dtype=np.float64)
    beyond = np.flatnonzero(~(np.abs(values) <= np.finfo(np.float32).max))
    if len(beyond):
        row = rows_N[rewarded_N][beyond[0]]
        raise RolloutError(f"rollout {row} has a turn reward that is no finite number in float32: {values[beyond[0]]}")
    placed = np.zeros(assistant.size, dtype=np.float32)
    placed[ends_N[rewarded_N] - 1] = values
    return torch.from_numpy(placed.reshape(assistant.shape)).to(mask_BL.device)


def place_turn_rewards(
    turn_rewards: Sequence[Sequence[float]], response_mask: torch.Tensor | np.ndarray | Sequence[Any]
) -> torch.Tensor | list[torch.Tensor]:
    """Token rewards of a batch: reward t of a rollout on the last token of its assistant turn t, 0 elsewhere.

    Args:
        turn_rewards: for each of B rollouts T rewards, or none (no reward at all).
        response_mask: [B, L] tensor or array, or B masks of different lengths as lists, arrays or tensors.

    Returns:
        float32, of the same form: a [B, L] tensor, or a list of B tensors with the lengths of their masks.

    Raises:
        RolloutError: the numbers of rollouts differ, a rollout's number of rewards is not its number of turns, or a
            reward is not finite.

    >>> place_turn_rewards([[0.5, 2.0], []], [[1, 1, 0, 1], [1, 0]])
    [tensor([0.0000, 0.5000, 0.0000, 2.0000]), tensor([0., 0.])]
    """
    if len(turn_rewards) != len(response_mask):
        raise RolloutError(f"{len(turn_rewards)} rollouts have turn rewards, but {len(response_mask)} have masks")
    if isinstance(response_mask, torch.Tensor | np.ndarray):
        mask_BL = torch.as_tensor(response_mask)
        if mask_BL.ndim != 2:
            raise RolloutError(f"a batch of response masks has two dimensions, got shape {tuple(mask_BL.shape)}")
        return _placed(turn_rewards, mask_BL)
    if not len(response_mask):
        return []
    rows = [torch.as_tensor(row) for row in response_mask]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0)
    return [placed[: len(row)] for placed, row in zip(_placed(turn_rewards, padded), rows, strict=True)]
