"""A probe: a reference answer with the texts around it, after a context that ends where the policy's turn begins.

    context …<|im_end|> \\n<|im_start|>assistant\\n   <answer>\\n   Paris   \\n</answer><|im_end|>
                        opening                      prefix       reference suffix

What is inserted (the opening) and what ``auto`` stands for follow from the tokenizer's chat template and from the
rendered prompt, whose end shows how a turn of the policy begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from verl.utils.siop.credit.config import AUTO
from verl.utils.siop.credit.rollouts import Reference
from verl.utils.siop.errors import RolloutError
from verl.utils.siop.turn_utils import OPENING_TOKENS, THINKING, open_thinking, special_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from verl.utils.siop.credit.config import SiopConfig

ANSWER = "<answer>\n"
# The release's words, which end a thought.
_DONE = "Now there's enough information to answer\n</think>\n"
DONE_THINKING = f"{_DONE}{ANSWER}"
_MARK = "SIOP"


@dataclass(frozen=True)
class TurnForm:
    """What a chat template writes around an assistant's turn.

    Args:
        end: after its text, the end token first: ``<|im_end|>\\n``.
        header: before it, without thinking: ``<|im_start|>assistant\\n``; empty if the template has no such thing.
        thinking: the tags around the model's thinking, if the template opens it or leaves it empty; else None.
        channel: what else it writes between the header and an answer's text: ``<|channel|>final<|message|>``, mostly
            nothing.
    """

    end: str
    header: str
    thinking: tuple[str, str] | None
    channel: str = ""


def turn_form(tokenizer: PreTrainedTokenizerBase) -> TurnForm | None:
    """The form of the assistant's turns by the tokenizer's chat template; None if it has none.

    Raises:
        RolloutError: the template cannot render a question with its answer, or not so that the two can be found.
    """
    template = getattr(tokenizer, "chat_template", None)
    return _rendered_form(tokenizer, str(template)) if template else None


@lru_cache(maxsize=4)
def _rendered_form(tokenizer: PreTrainedTokenizerBase, template: str) -> TurnForm:
    """Rendered once for all questions of a run; ``template`` tells one that has been changed since."""
    question = [{"role": "user", "content": _MARK}]
    answered = [*question, {"role": "assistant", "content": _MARK}]

    def render(messages: list[dict[str, str]], **options: Any) -> str:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))

    def opening(**options: Any) -> str:
        closed = render(question, **options)
        opened = render(question, add_generation_prompt=True, **options)
        if not opened.startswith(closed):
            raise RolloutError("add_generation_prompt changes more than the end of the text")
        return opened.removeprefix(closed)

    try:
        whole = render(answered)
        if whole.count(_MARK) != 2:
            raise RolloutError(f"messages {_MARK!r} and {_MARK!r} become {whole!r}")
        _, before, end = whole.split(_MARK)
        opened, unthinking = opening(), opening(enable_thinking=False)
    except Exception as error:  # a template is a program that came with the model, and may raise anything
        raise RolloutError(f"the chat template cannot render a question and its answer: {error}") from error
    # A template without thinking may write the closing tag alone.
    header = min((opened.partition(tag)[0] for tags in THINKING for tag in tags), key=len)
    lead = before.rpartition(header)[2] if header and header in before else ""
    thinking = next((tags for tags in THINKING if tags[0] in opened + unthinking + lead), None)
    for tag in (tag for tags in THINKING for tag in tags):
        lead = lead.replace(tag, "")
    return TurnForm(end, header, thinking, lead.strip())


class Prober:
    """Builds the probes of rollouts that one tokenizer has rendered.

    Args:
        tokenizer: the policy's fast tokenizer.
        config: the texts around a reference, and whether contexts are opened (``siop_probe_opening``).

    Raises:
        RolloutError: the tokenizer gives no character offsets, or its chat template cannot be rendered.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: SiopConfig) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise RolloutError(
                f"the tokenizer {type(tokenizer).__name__} gives no character offsets; use a fast tokenizer"
            )
        self._tokenizer, self._config = tokenizer, config
        self._form = turn_form(tokenizer)
        self._special = frozenset(special_tokens(tokenizer))
        self._built: dict[tuple[str, str, str], Reference] = {}
        self._texts: dict[tuple[int, ...], tuple[str, str]] = {}  # by the end of the prompt

    def texts(self, prompt_ids: Sequence[int]) -> tuple[str, str]:
        """Prefix and suffix of a reference in rollouts of this prompt; those of the configuration, unless ``auto``.

        ``auto`` closes the thinking that the prompt has opened; opens and closes it where the model thinks and the
        prompt leaves that to it; goes on with what the template writes before an answer's text (``channel``), and with
        ``<answer>``. The suffix ends the turn as the template does.

        Args:
            prompt_ids: the rendered prompt; empty for one without thinking.
        """
        end = tuple(prompt_ids[-OPENING_TOKENS:])
        if end not in self._texts:
            self._texts[end] = self._texts_after(end)
        return self._texts[end]

    def _texts_after(self, prompt_ids: Sequence[int]) -> tuple[str, str]:
        prefix, suffix = self._config.siop_reference_prefix, self._config.siop_reference_suffix
        if prefix == AUTO:
            own, channel = (self._form.thinking, self._form.channel) if self._form else (None, "")
            written = self._opening_text(prompt_ids)
            if opened := open_thinking(prompt_ids, self._tokenizer):
                thought = _DONE.replace("</think>", opened[1])
            elif own and own[1] not in written:
                thought = f"{own[0]}\n{_DONE.replace('</think>', own[1])}"
            else:
                thought = ""
            prefix = thought + ("" if channel in written else channel) + ANSWER
        if suffix == AUTO:
            suffix = "\n</answer>" + (self._form.end.strip() if self._form else "")
        return prefix, suffix

    def reference(self, text: str, prompt_ids: Sequence[int] = ()) -> Reference:
        """Probe: ``prefix + text + suffix`` tokenised alone, and which of its tokens are the reference's.

        A token that overlaps the reference's characters belongs to it, also if it starts before or ends after them.

        Args:
            text: the reference.
            prompt_ids: the rendered prompt.

        Raises:
            RolloutError: no token overlaps the reference.
        """
        prefix, suffix = self.texts(prompt_ids)
        key = (prefix, text, suffix)
        if key not in self._built:
            self._built[key] = self._tokenised(*key)
        return self._built[key]

    def _tokenised(self, prefix: str, text: str, suffix: str) -> Reference:
        first, last = len(prefix), len(prefix) + len(text)
        encoded = self._tokenizer(
            prefix + text + suffix,
            add_special_tokens=False,
            return_offsets_mapping=True,
            return_attention_mask=False,
            truncation=False,
        )
        inside = [
            position
            for position, (start, end) in enumerate(encoded["offset_mapping"])
            if start < end and start < last and end > first
        ]
        if not inside:
            raise RolloutError(f"reference {text!r} has no token of its own in the probe text")
        return Reference(text=text, token_ids=list(encoded["input_ids"]), start=inside[0], end=inside[-1] + 1)

    def openings(
        self,
        prompt_ids: Sequence[int],
        response_ids: Sequence[int],
        turn_ends: Sequence[int],
        boundaries: Sequence[int],
    ) -> list[list[int]]:
        """What is inserted between the context of each boundary and a probe: nothing, where a turn begins there.

        At the end of a turn: what the template writes there, as far as the turn has not, and the opening of the next
        turn as it stands at the end of the prompt.

        Args:
            prompt_ids: the rendered prompt.
            response_ids: L response tokens.
            turn_ends: T exclusive ends of the assistant turns.
            boundaries: exclusive ends into the response, 0 being the prompt alone.

        Returns:
            Token ids for each boundary; an empty list if there are none at any (a tokenizer without chat template, or
            ``siop_probe_opening=false``).

        Raises:
            RolloutError: the prompt does not end with the opening of a turn.
        """
        ends = set(turn_ends)
        if self._form is None or not self._config.siop_probe_opening or not ends.intersection(boundaries):
            return []
        opening = self._opening(prompt_ids)
        end = self._encode(self._form.end)
        # After the end token, before which a template may write white space.
        rest = next((end[index + 1 :] for index, token in enumerate(end) if token in self._special), end)

        def at(boundary: int) -> list[int]:
            # The policy writes the end token itself; a model may have several.
            return [*(rest if response_ids[boundary - 1] in self._special else end), *opening]

        return [at(boundary) if boundary in ends else [] for boundary in boundaries]

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def _after_last_end(self, ids: Sequence[int]) -> list[int]:
        """The ids after the last token that ends a turn, if that is a control token; else all of them."""
        assert self._form is not None
        ends = {token for token in self._encode(self._form.end) if token in self._special}
        last = next((place for place in range(len(ids) - 1, -1, -1) if ids[place] in ends), -1)
        return list(ids[last + 1 :])

    def _opening(self, prompt_ids: Sequence[int]) -> list[int]:
        """The end of the prompt from the header of the policy's turn on."""
        assert self._form is not None
        if not self._form.header:
            return []
        # An earlier turn of the assistant, in a prompt with several, has ended.
        tail = self._after_last_end(prompt_ids[-OPENING_TOKENS:])
        # Without its white space, which may be one token with what follows.
        for header in (self._encode(self._form.header), self._encode(self._form.header.rstrip())):
            for start in range(len(tail) - len(header), -1, -1):
                if tail[start : start + len(header)] == header:
                    return tail[start:]
        # A header of plain text has other tokens in a text than alone where a tokenizer marks the beginning of words.
        for start in range(len(tail) - 1, -1, -1):
            if str(self._tokenizer.decode(tail[start:])).lstrip().startswith(self._form.header.strip()):
                return tail[start:]
        raise RolloutError(
            f"a prompt does not end with the opening of the assistant's turn, {self._form.header!r} in the tokenizer's "
            f"chat template, but with {self._tokenizer.decode(tail)!r}; if it was rendered otherwise, set "
            "algorithm.siop_probe_opening=false, or siop_boundary=observation"
        )

    def _opening_text(self, prompt_ids: Sequence[int]) -> str:
        text = str(self._tokenizer.decode(list(prompt_ids[-OPENING_TOKENS:])))
        header = self._form.header.strip() if self._form else ""
        return text.rpartition(header)[2] if header else text


def build_reference(
    text: str, tokenizer: PreTrainedTokenizerBase, config: SiopConfig, prompt_ids: Sequence[int] = ()
) -> Reference:
    """Probe of one reference, see :meth:`Prober.reference`.

    Raises:
        RolloutError: no token overlaps the reference, or the tokenizer gives no character offsets.
    """
    return Prober(tokenizer, config).reference(text, prompt_ids)
