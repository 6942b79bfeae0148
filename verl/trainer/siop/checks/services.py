"""The scorer and the search tools: that they answer, and that scorer and policy mean the same by a token id."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Mapping
from typing import Any

from verl.tools.search_common import SearchTool
from verl.trainer.siop.checks.policy import Policy
from verl.utils.siop.data.chat import sample_arguments
from verl.utils.siop.errors import ScorerUnavailable, SiopConfigError, SiopError
from verl.utils.siop.scoring_client import LEXICAL, ScoringClient
from verl.utils.siop.siop_process_reward import SiopConfig, SupportRequest, build_reference
from verl.utils.siop.tokenizer_digest import largest_id, tokenizer_digest

NO_MODEL = "none"  # what /health says of a scorer without a language model
_PATIENCE_S = 1.0  # before a line says what is being waited for
# What it cannot do decides what is learnt from its answers.
LEXICAL_WARNING = (
    "the scorer at {url} has no NLI model and compares words: answers that say the same in other words are different "
    "clusters, a passage is evidence for an answer if it holds its words, whatever it says about them, and no passage "
    "is evidence for an answer that is a sentence of its own; start the scorer with SIOP_NLI_MODEL for both by meaning"
)


async def check_scorer(
    siop: SiopConfig,
    policy: Policy | None,
    warn: Callable[[str], None],
    wait_s: float,
    sample: str | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> str:
    """Check that the scorer is up, lets us in, and reads the policy's token ids as the policy does.

    Args:
        siop: address and who measures support.
        policy: whose ids are sent; without one nothing is checked about ids, and a warning says so.
        warn: gets what could not be checked.
        wait_s: longest wait for it to be ready.
        sample: if given, this text is scored once.
        say: gets that it is being waited for.

    Raises:
        ScorerUnavailable: it does not answer in time.
        ScorerError: it refuses the token, or its score is no log-probability.
        SiopConfigError: it has no language model where one is needed, or another tokenizer than the policy.
    """
    # The client says at its deadline what was wrong with the last answer.
    limit = min(wait_s, siop.siop_scorer_timeout_s)
    async with ScoringClient(siop.siop_scorer_url, timeout_s=limit, deadline_s=limit) as client:
        try:
            health = await client.wait_ready(timeout_s=min(_PATIENCE_S, limit))
        except ScorerUnavailable as error:
            if limit <= _PATIENCE_S:
                raise
            say(f"waiting for the scorer at {siop.siop_scorer_url}, {limit:g} s at most: {error.last_error}")
            health = await client.wait_ready(timeout_s=limit)
        await client.check_token()
        found = f"{siop.siop_scorer_url}: {health.get('model')} ({health.get('engine')}), NLI {health.get('nli')}"
        if health.get("nli") == LEXICAL and not siop.siop_use_gold_ref:
            warn(LEXICAL_WARNING.format(url=siop.siop_scorer_url))
        if siop.siop_scorer != "server":
            return found
        if health.get("engine") == NO_MODEL:
            raise SiopConfigError(
                f"algorithm.siop_scorer=server, but the scorer at {siop.siop_scorer_url} has no language model: start "
                "it with one (SIOP_MODEL), or set algorithm.siop_scorer=policy"
            )
        if policy is None:
            warn("not compared with the policy's tokenizer, for there is no policy")
            return found
        check_tokenizers(health, siop, policy, warn)
        if sample is not None:
            prompt = policy.tokenizer(sample, add_special_tokens=False)["input_ids"]
            request = SupportRequest(prompt, [], [0], [build_reference(sample, policy.tokenizer, siop)])
            ((score,),) = (await client.support([request]))[0]
            found += f"; mean log-probability of a known text {score:.3f}"
    return found


def check_tokenizers(health: Mapping[str, Any], siop: SiopConfig, policy: Policy, warn: Callable[[str], None]) -> None:
    """Compare what ``/health`` says about the scorer's tokenizer with the policy's.

    Raises:
        SiopConfigError: they differ, or the policy has ids that the scorer's embedding has not; both models are named.
    """
    models = f"the scorer at {siop.siop_scorer_url} has {health.get('model')}, the policy is {policy.path}"
    digest = health.get("tokenizer")
    if digest is None:
        warn(
            f"{models}: the scorer tells no digest of its tokenizer, so whether both mean the same by a token id could "
            "not be checked; if they do not, support is about 0 and SIOP becomes majority voting"
        )
    elif digest != tokenizer_digest(policy.tokenizer):
        raise SiopConfigError(
            f"{models}: their tokenizers differ, so that the policy's token ids would be scored as other words; start "
            "the scorer with a model of the policy's tokenizer (SIOP_MODEL), or set algorithm.siop_scorer=policy"
        )
    rows, largest = health.get("vocab_size"), largest_id(policy.tokenizer)
    if rows is not None and (not isinstance(rows, int) or isinstance(rows, bool)):
        raise SiopConfigError(f"{models}: the scorer says vocab_size={rows!r}, which is no whole number")
    if rows is not None and largest >= rows:
        raise SiopConfigError(
            f"{models}: the policy's tokenizer has ids up to {largest}, the scorer's embedding has {rows} rows; start "
            "the scorer with a model of the policy's tokenizer (SIOP_MODEL), or set algorithm.siop_scorer=policy"
        )


async def check_search(tools: Mapping[str, Any], sample: str, warn: Callable[[str], None], wait_s: float) -> str:
    """Make one query with every search tool, of every replica of its service.

    Args:
        tools: those of the run; others than search tools are not called, for calls may have effects.
        sample: the query.
        warn: gets the names of tools that find nothing, or whose replicas differ.
        wait_s: longest wait for each.

    Raises:
        SearchUnavailable, SearchRefused: as the tool raises them.
        SiopError: no answer in time.
    """
    found = []
    for name, tool in tools.items():
        if not isinstance(tool, SearchTool):
            found.append(f"{name} is not called")
            continue
        texts = {}
        for service in tool.each_service():
            texts[service.address], hits = await _query(name, service, sample, warn, wait_s)
            found.append(f"{name} at {service.address}: {hits} passages for {sample!r:.60}")
        if len(set(texts.values())) > 1:
            warn(f"{name}: the replicas {tool.address} do not find the same for {sample!r}; they must serve one index")
    return "; ".join(found) or "no tools"


async def _query(
    name: str, tool: SearchTool, sample: str, warn: Callable[[str], None], wait_s: float
) -> tuple[str, int]:
    """The text of the result, and the number of its passages."""
    try:
        result, _, metrics = await asyncio.wait_for(
            tool.execute(uuid.uuid4().hex, sample_arguments(tool, sample)), wait_s
        )
    except asyncio.TimeoutError as error:
        raise SiopError(f"no answer from {tool.address} to a query of {name!r} within {wait_s:g} s") from error
    finally:
        await tool.aclose()
    hits = metrics.get("search/hits", 0)
    if not hits:
        warn(f"{name} at {tool.address} answers, but finds nothing for {sample!r}: {(result.text or '')[:100]!r}")
    return result.text or "", hits
