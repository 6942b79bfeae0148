"""Transcripts as the tokens that verl's agent loop makes of them with a model's chat template."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from verl.tools.search_common import format_hits
from verl.utils.siop.data.chat import Chat, call_message
from verl.utils.siop.data.fit import load_chat
from verl.utils.siop.retriever.bm25 import Bm25Index
from verl.utils.siop.siop_process_reward import Rollout

from examples.real_world.agent import SYSTEM, TOOL, Transcript
from examples.real_world.world import Question, corpus

TOPK, MAX_CHARS = 3, 400
_TOOL_CONFIG = Path(__file__).resolve().parents[2] / "config" / "local_search_tool_config.yaml"


def chat_of(model: str) -> Chat:
    """Tokenizer, template and search tool of a model, as a run has them.

    Raises:
        SiopConfigError: the model cannot be loaded or has no chat template.
    """
    return load_chat(model, str(_TOOL_CONFIG))


def search_tool() -> Callable[[str], str]:
    """The search tool without its service: from a query to the text of the result."""
    index, known = Bm25Index.from_documents(corpus()), dict[str, str]()

    def search(query: str) -> str:
        if query not in known:
            (hits,) = index.search([query], TOPK)
            known[query] = format_hits([document["contents"] for document, _ in hits], MAX_CHARS)
        return known[query]

    return search


def messages_of(question: str) -> list[dict[str, str]]:
    """The prompt of a question as chat messages."""
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]


def rollout_of(question: Question, played: Transcript, chat: Chat, uid: str) -> Rollout:
    """A transcript as a rollout: the agent's tokens end with the end token; the builder adds what stands between."""
    schemas = chat.schemas()
    messages: list[dict[str, Any]] = list(messages_of(question.text))
    prompt_ids = chat.prompt_ids(messages, schemas)
    ids, mask = list(prompt_ids), [0] * len(prompt_ids)

    def write(text: str) -> None:
        own = chat.tokenizer(text + chat.tokenizer.eos_token, add_special_tokens=False)["input_ids"]
        ids.extend(own)
        mask.extend([1] * len(own))

    for search in played.searches:
        write(search.text)
        messages.append(call_message(TOOL, {"query": search.query}))
        result = {"role": "tool", "content": search.found}
        ids = list(chat.builder.merge_context_tokens(messages, [*messages, result], ids, tools=schemas).token_ids)
        mask.extend([0] * (len(ids) - len(mask)))
        messages.append(result)
    write(played.answer_text)
    start = len(prompt_ids)
    return Rollout(uid, question.text, prompt_ids, ids[start:], mask[start:], gold=[question.gold])
