"""``actor_rollout_ref.rollout.name=hf_cpu``: a verl rollout replica that samples from a transformers model."""

from __future__ import annotations

import array
import asyncio
import hashlib
import logging
import os
import random
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.siop.cpu.prefixes import Prefixes, joined, row_of
from verl.workers.config import HFModelConfig, RolloutConfig
from verl.workers.rollout.base import BaseRollout
from verl.workers.rollout.replica import RolloutReplica, TokenOutput

logger = logging.getLogger(__name__)

# How long a decode waits for more requests to join its batch, in seconds: agent loops answer within milliseconds.
GATHER_S = 0.01


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters of one request, in vLLM's names; what this rollout cannot do is refused by name."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    stop_token_ids: frozenset[int] = frozenset()
    logprobs: bool = False

    @classmethod
    def from_request(cls, params: dict[str, Any], max_tokens: int) -> Sampling:
        params = dict(params)
        penalty = params.pop("repetition_penalty", 1.0)
        if penalty != 1.0:
            raise ValueError(f"rollout hf_cpu: repetition_penalty={penalty} is not supported; only 1.0 is")
        limits = [params.pop(key, None) for key in ("max_tokens", "max_new_tokens")]
        known = {key: params.pop(key) for key in ("temperature", "top_p", "top_k") if key in params}
        stops = frozenset(params.pop("stop_token_ids", None) or ())
        logprobs = params.pop("logprobs", False)
        if params:
            raise ValueError(f"rollout hf_cpu: unsupported sampling parameters {sorted(params)}")
        return cls(
            max_tokens=min([max_tokens] + [int(x) for x in limits if x]),
            stop_token_ids=stops,
            logprobs=logprobs is not False and logprobs is not None,
            **known,
        )


@dataclass
class Generation:
    """One request while it is decoded."""

    prompt_ids: list[int]
    sampling: Sampling
    token_ids: list[int]
    log_probs: list[float]
    random: random.Random
    future: asyncio.Future


def sample_next(
    logits: torch.Tensor, sampling: list[Sampling], uniform: list[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token per row and return its log-probability under the distribution it was drawn from.

    Args:
        logits: [B, V] in float32.
        sampling: B parameters; temperature 0 means greedy (its log-probability is that at temperature 1).
        uniform: B numbers in [0, 1), each of which picks its row's token from the cumulative distribution.

    Returns:
        token ids [B] and log-probabilities [B].
    """
    temperature = torch.tensor([s.temperature if s.temperature > 0 else 1.0 for s in sampling])
    scaled = logits / temperature[:, None]
    if any(s.top_p < 1 or s.top_k > 0 for s in sampling):
        ordered, index = scaled.sort(-1, descending=True)
        probability = ordered.softmax(-1)
        rank = torch.arange(logits.shape[-1])
        top_p = torch.tensor([s.top_p for s in sampling])[:, None]
        top_k = torch.tensor([s.top_k if s.top_k > 0 else logits.shape[-1] for s in sampling])[:, None]
        drop = (probability.cumsum(-1) - probability >= top_p) | (rank >= top_k)
        drop[:, 0] = False
        scaled = scaled.scatter(-1, index, ordered.masked_fill(drop, float("-inf")))
    log_prob = scaled.log_softmax(-1)
    cumulative = log_prob.double().exp().cumsum(-1)
    # At the largest uniform number rounding must not lead past the last token that can be drawn.
    threshold = torch.tensor(uniform, dtype=torch.float64)[:, None] * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    greedy = torch.tensor([s.temperature <= 0 for s in sampling])
    token = torch.where(greedy, logits.argmax(-1), drawn)
    return token, log_prob.gather(-1, token[:, None])[:, 0]


class HfServer:
    """A transformers model behind verl's token-in, token-out server interface.

    All requests that wait when a batch starts are decoded together (left padding, KV cache). A row that ends resolves
    at once and leaves the batch, so its agent loop goes on while the rest decodes. The next turn of a rollout finds the
    keys and values of its earlier ones (:class:`~verl.utils.siop.cpu.prefixes.Prefixes`).
    """

    def __init__(self, config: Any, model_config: Any, replica_rank: int = 0) -> None:
        from transformers import AutoModelForCausalLM

        self.config: RolloutConfig = omega_conf_to_dataclass(config)
        self.model_config: HFModelConfig = omega_conf_to_dataclass(model_config, dataclass_type=HFModelConfig)
        self.model = AutoModelForCausalLM.from_pretrained(
            self.model_config.local_path,
            dtype=getattr(torch, self.config.dtype),
            trust_remote_code=self.model_config.trust_remote_code,
        ).eval()
        tokenizer = self.model_config.tokenizer
        eos = self.model.generation_config.eos_token_id
        self.eos = frozenset(eos if isinstance(eos, list) else [eos]) | {tokenizer.eos_token_id}
        self.eos -= {None}
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        self.vocabulary = len(tokenizer)
        self.replica_rank = replica_rank
        self.global_steps: int | None = None
        self.asked: Counter[bytes] = Counter()  # how often each context came since the last weights
        self.prefixes = Prefixes()
        self.waiting: list[Generation] = []
        self.arrived = asyncio.Event()
        self.model_lock = asyncio.Lock()  # a weight update never falls into a decode
        self.decoder: asyncio.Task | None = None

    async def ready(self) -> bool:
        if self.decoder is None:
            self.decoder = asyncio.create_task(self._decode_forever())
        return True

    async def generate(
        self, prompt_ids: list[int], sampling_params: dict[str, Any], request_id: str, **multimodal: Any
    ) -> TokenOutput:
        """Continue one prompt until an end token or the length limit.

        Raises:
            ValueError: unsupported input or parameters, or a prompt that leaves no room for an answer.
        """
        unsupported = sorted(key for key, value in multimodal.items() if value)
        if unsupported:
            raise ValueError(f"rollout hf_cpu handles text only, but got {unsupported}")
        await self.ready()
        total = self.config.prompt_length + self.config.response_length
        room = min(self.config.response_length, min(self.config.max_model_len or total, total) - len(prompt_ids))
        if room < 1:
            raise ValueError(
                f"a context of {len(prompt_ids)} tokens leaves no room to generate: data.max_prompt_length + "
                f"data.max_response_length is {total}, rollout.max_model_len is {self.config.max_model_len}"
            )
        sampling = Sampling.from_request(sampling_params, room)
        future = asyncio.get_running_loop().create_future()
        request = Generation(list(prompt_ids), sampling, [], [], self._random(prompt_ids), future)
        self.waiting.append(request)
        self.arrived.set()
        await request.future
        return TokenOutput(
            token_ids=request.token_ids,
            log_probs=request.log_probs if sampling.logprobs else None,
            stop_reason="completed",
            extra_fields={"global_steps": self.global_steps},
        )

    def _random(self, prompt_ids: list[int]) -> random.Random:
        """Randomness of one request: from the seed, the weights' step, the context, and how often it came before.

        Rollouts of a question start from the same context and are exchangeable, so a step samples the same set of
        rollouts whatever the order in which requests arrive and are batched.
        """
        context = array.array("q", prompt_ids).tobytes()
        source = (self.config.seed, self.replica_rank, self.global_steps, self.asked[context])
        self.asked[context] += 1
        return random.Random(hashlib.blake2b(repr(source).encode() + context).digest())

    async def _decode_forever(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self.arrived.wait()
            await asyncio.sleep(GATHER_S)
            async with self.model_lock:
                limit = self.config.max_num_seqs
                batch, self.waiting = self.waiting[:limit], self.waiting[limit:]
                if not self.waiting:
                    self.arrived.clear()
                try:
                    await loop.run_in_executor(None, self._decode, loop, batch)
                except Exception as error:  # noqa: BLE001  (handed to every caller of the batch, who raises it)
                    for request in batch:
                        if not request.future.done():
                            request.future.set_exception(error)

    @torch.inference_mode()
    def _decode(self, loop: asyncio.AbstractEventLoop, rows: list[Generation]) -> None:
        known = [self.prefixes.find(row.prompt_ids) for row in rows]
        cache, mask = joined(known)
        new = [row.prompt_ids[prefix.length if prefix else 0 :] for row, prefix in zip(rows, known, strict=True)]
        width = max(map(len, new))
        ids = torch.tensor([[self.pad] * (width - len(tokens)) + tokens for tokens in new])
        mask = torch.cat([mask, torch.tensor([[0] * (width - len(tokens)) + [1] * len(tokens) for tokens in new])], -1)
        position = (mask.cumsum(-1) - 1).clamp(min=0)[:, -width:]
        while rows:
            out = self.model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=position,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = out.past_key_values
            # Rows of the embedding beyond the tokenizer (padding of the matrix) are no tokens.
            logits = out.logits[:, -1, : self.vocabulary].float()
            token, log_prob = sample_next(logits, [row.sampling for row in rows], [row.random.random() for row in rows])
            keep = []
            for index, (row, token_id, value) in enumerate(zip(rows, token.tolist(), log_prob.tolist(), strict=True)):
                row.token_ids.append(token_id)
                row.log_probs.append(value)
                ended = token_id in row.sampling.stop_token_ids or (token_id in self.eos and not self.config.ignore_eos)
                if ended or len(row.token_ids) >= row.sampling.max_tokens:
                    if prefix := row_of(cache, index, mask[index]):
                        self.prefixes.add([*row.prompt_ids, *row.token_ids[:-1]], prefix)
                    loop.call_soon_threadsafe(_finish, row.future)
                else:
                    keep.append(index)
            if len(keep) < len(rows):
                rows = [rows[index] for index in keep]
                if not rows:
                    return
                chosen = torch.tensor(keep)
                cache.batch_select_indices(chosen)
                token, mask, position = token[chosen], mask[chosen], position[chosen]
            ids = token[:, None]
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], -1)
            position = position[:, -1:] + 1

    async def update_weights(self, weights: dict[str, torch.Tensor], global_steps: int | None = None) -> None:
        """Replace all weights; a missing or unknown name raises KeyError."""
        async with self.model_lock:
            self.prefixes.clear()
            missing, unexpected = self.model.load_state_dict(weights, strict=False)
            tied = set(getattr(self.model, "_tied_weights_keys", None) or ())
            missing = [name for name in missing if name not in tied]
            if missing or unexpected:
                raise KeyError(f"rollout hf_cpu: weights missing {missing}, unknown {unexpected}")
            self.global_steps = global_steps
            self.asked.clear()

    async def _nothing(self, *args: Any, **kwargs: Any) -> None:
        return None

    # No second copy of the weights and no persistent KV cache: there is nothing to free or to wake.
    wake_up = sleep = resume_generation = clear_kv_cache = release_kv_cache = resume_kv_cache = _nothing
    start_profile = stop_profile = _nothing

    async def abort_all_requests(self, reject_request: bool = False) -> dict[str, Any]:
        return {"aborted_count": 0, "request_ids": []}


def _finish(future: asyncio.Future) -> None:
    if not future.done():
        future.set_result(None)


class HfReplica(RolloutReplica):
    """One :class:`HfServer` actor on the node of its training worker."""

    async def launch_servers(self) -> None:
        node_id = await self.workers[0].__ray_call__.remote(lambda self: ray.get_runtime_context().get_node_id())
        name = _server_name(self.config, self.replica_rank)
        actor: Any = ray.remote(HfServer)
        server = actor.options(
            name=name,
            num_cpus=0,
            max_concurrency=self.max_concurrency,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=node_id, soft=False),
        ).remote(self.config, self.model_config, self.replica_rank)
        await server.ready.remote()
        self.servers, self._server_handle, self._server_address = [server], server, name


def _server_name(config: RolloutConfig, replica_rank: int) -> str:
    return f"{config.name}_server_{replica_rank}_0"


class HfServerAdapter(BaseRollout):
    """Lives in the training worker and hands the actor's weights to the server after each step."""

    def __init__(self, config: Any, model_config: Any, device_mesh: Any, replica_rank: int = -1) -> None:
        super().__init__(config, model_config, device_mesh)
        rank, ranks_per_replica = int(os.environ["RANK"]), self.config.tensor_model_parallel_size
        self.replica_rank = rank // ranks_per_replica if replica_rank == -1 else replica_rank
        self.sends = rank % ranks_per_replica == 0
        self.server: Any = None

    async def resume(self, tags: list[str]) -> None:
        return None

    async def release(self) -> None:
        return None

    @torch.no_grad()
    async def update_weights(
        self, weights: Iterable[tuple[str, torch.Tensor]], wire_format: str = "named_tensors", **kwargs: Any
    ) -> None:
        if wire_format != "named_tensors" or kwargs.get("peft_config"):
            raise ValueError("rollout hf_cpu takes full weights only (no delta flush, no LoRA adapter)")
        # Every rank must walk the generator: it all-gathers the shards.
        named = {name: tensor.detach().to("cpu", copy=True) for name, tensor in weights}
        if not self.sends:
            return
        if self.server is None:
            self.server = ray.get_actor(_server_name(self.config, self.replica_rank))
        await self.server.update_weights.remote(named, kwargs.get("global_steps"))
