"""Prefix-sharing scoring against one full sequence per (boundary, reference): exactness, CPU time, bytes, memory.

    python benchmarks/scoring.py [--threads 1 2] [--rounds 2] [--ways WAY ...]    the standard batch on CPU
    python benchmarks/scoring.py --memory                                         peak memory, 151,936-token vocabulary

The standard batch: 2 questions with 8 rollouts of 1,500 to 2,500 tokens after a prompt of 300, T = 4 turns (so 5
boundaries), R = 3 references, all token ids random with a fixed seed; a random Qwen3 of 8 layers. Rollouts of
a question share their prompt and nothing else. The ways take turns, round after round, in one process per thread count;
the best round of each counts. The vLLM ways run where vLLM is importable, inside the same process.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

QUESTIONS, ROLLOUTS, TURNS, REFERENCES = 2, 8, 4, 3
PROMPT_TOKENS, RESPONSE_TOKENS = 300, (1500, 2500)
PROBE_PREFIX, PROBE_SUFFIX, REFERENCE_TOKENS = 18, 4, (2, 9)
VOCAB_SIZE, LARGE_VOCAB_SIZE = 8192, 151_936
PADDED_BATCH_TOKENS = 8192

TREE, ONE, ROWS, PADDED = "tree", "full", "full-rows", "full-padded"
VLLM, VLLM_FULL = "vllm", "vllm-full"
WAYS = {
    PADDED: "transformers, full sequences in padded batches, all logits",
    ONE: "transformers, full sequences one by one, all logits",
    ROWS: "transformers, full sequences one by one, reference logits only",
    TREE: "transformers engine (prefix tree)",
    VLLM_FULL: "vLLM, full sequences with prompt_logprobs",
    VLLM: "vLLM engine (prefix cache)",
}
BASELINE = {TREE: (PADDED, ONE, ROWS), VLLM: (VLLM_FULL,)}

Sequence_ = tuple[np.ndarray, int, int]  # token ids of a full sequence; the range of the reference in it


def make_batch(
    rollouts: int = ROLLOUTS,
    questions: int = QUESTIONS,
    response_tokens: tuple[int, int] = RESPONSE_TOKENS,
    vocab_size: int = VOCAB_SIZE,
) -> list[Any]:
    """Random rollouts of the standard shape as :class:`RolloutQuery`."""
    from verl.utils.siop.scorer.engines.base import Probe, RolloutQuery

    rng = np.random.default_rng(0)

    def draw(size: int) -> np.ndarray:
        return rng.integers(0, vocab_size, size)

    batch = []
    prefix, suffix = draw(PROBE_PREFIX), draw(PROBE_SUFFIX)
    for _ in range(questions):
        prompt, probes = draw(PROMPT_TOKENS), []
        for _ in range(REFERENCES):
            size = int(rng.integers(*REFERENCE_TOKENS))
            probes.append(Probe(np.concatenate([prefix, draw(size), suffix]), PROBE_PREFIX, PROBE_PREFIX + size))
        for _ in range(rollouts):
            size = int(rng.integers(response_tokens[0], response_tokens[1] + 1))
            ends = np.sort(rng.choice(np.arange(1, size), TURNS - 1, replace=False)).tolist()
            batch.append(RolloutQuery(prompt, draw(size), [0, *ends, size], probes))
    return batch


def full_sequences(batch: Sequence[Any]) -> list[Sequence_]:
    """One sequence per (rollout, boundary, reference)."""
    sequences = []
    for rollout in batch:
        for boundary in rollout.boundaries:
            context = np.concatenate([rollout.prompt_ids, rollout.response_ids[:boundary]])
            for probe in rollout.probes:
                first = len(context)
                sequences.append((np.concatenate([context, probe.token_ids]), first + probe.start, first + probe.end))
    return sequences


def model_config(vocab_size: int = VOCAB_SIZE, **overrides: Any) -> Any:
    """The benchmark's Qwen3 configuration."""
    from transformers import Qwen3Config

    options = {
        "vocab_size": vocab_size,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 16384,
        "tie_word_embeddings": False,
        "initializer_range": 0.05,
    }
    return Qwen3Config(**{**options, **overrides})


def make_model(config: Any, device: str = "cpu", dtype: str = "float32") -> Any:
    """Random weights for a configuration."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    return model.eval()


# ---------------------------------------------------------------------------------------------- the ways to score
def score_one_by_one(model: Any, sequences: Iterable[Sequence_], rows_only: bool = False) -> list[float]:
    """Each sequence in its own forward pass, without padding."""
    import torch

    scores = []
    with torch.inference_mode():
        for ids, first, last in sequences:
            tokens = torch.from_numpy(ids).to(model.device)
            rows = torch.arange(first - 1, last - 1, device=model.device)
            if rows_only:
                logits = model(input_ids=tokens[None], use_cache=False, logits_to_keep=rows).logits[0]
            else:
                logits = model(input_ids=tokens[None], use_cache=False).logits[0, rows]
            logprobs = logits.float().log_softmax(-1)
            scores.append(float(logprobs.gather(1, tokens[rows + 1, None]).mean()))
    return scores


def score_padded(model: Any, sequences: Sequence[Sequence_]) -> list[float]:
    """Batches of similar lengths, padded on the right, at most ``PADDED_BATCH_TOKENS`` tokens each."""
    import torch

    order = sorted(range(len(sequences)), key=lambda index: len(sequences[index][0]))
    scores = [0.0] * len(sequences)
    with torch.inference_mode():
        while order:
            size = 1
            while size < len(order) and (size + 1) * len(sequences[order[size]][0]) <= PADDED_BATCH_TOKENS:
                size += 1
            part, order = order[:size], order[size:]
            longest = len(sequences[part[-1]][0])
            ids = torch.zeros(size, longest, dtype=torch.long)
            mask = torch.zeros(size, longest, dtype=torch.long)
            for row, index in enumerate(part):
                tokens = torch.from_numpy(sequences[index][0])
                ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            for row, index in enumerate(part):
                _, first, last = sequences[index]
                logprobs = logits[row, first - 1 : last - 1].float().log_softmax(-1)
                scores[index] = float(logprobs.gather(1, ids[row, first:last, None]).mean())
            del logits
    return scores


def vllm_full(path: str) -> Callable[[Sequence[Sequence_]], list[float]]:
    """The first release's way: every sequence as a request with ``prompt_logprobs``."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    from vllm import LLM, SamplingParams

    llm = LLM(
        path,
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        max_model_len=4096,
        max_num_batched_tokens=4096,
        kv_cache_memory_bytes=1 << 30,
    )
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1, detokenize=False)

    def score(sequences: Sequence[Sequence_]) -> list[float]:
        prompts = [{"prompt_token_ids": ids.tolist()} for ids, _, _ in sequences]
        scores = []
        for (ids, first, last), output in zip(sequences, llm.generate(prompts, params, use_tqdm=False), strict=True):
            scores.append(float(np.mean([output.prompt_logprobs[p][int(ids[p])].logprob for p in range(first, last)])))
        return scores

    return score


def build_way(name: str, model: Any, path: str) -> Callable[[Sequence[Any]], tuple[list[float], int]]:
    """A function from a batch to its scores and the number of computed tokens."""
    from verl.utils.siop.scorer.engines.transformers_engine import TransformersEngine

    def flat(support: list[list[list[float]]]) -> list[float]:
        return [score for rows in support for row in rows for score in row]

    def of_engine(engine: Any) -> Callable[[Sequence[Any]], tuple[list[float], int]]:
        def score(batch: Sequence[Any]) -> tuple[list[float], int]:
            result = engine.support(batch)
            return flat(result.support), result.computed_tokens

        return score

    if name == TREE:
        return of_engine(TransformersEngine(model))
    if name == VLLM:
        from verl.utils.siop.scorer.engines.vllm_engine import VllmEngine

        return of_engine(VllmEngine.from_pretrained(path, dtype="float32", max_model_len=4096))
    full: Callable[[Sequence[Sequence_]], list[float]]
    if name == VLLM_FULL:
        full = vllm_full(path)
    elif name == PADDED:
        full = partial(score_padded, model)
    else:
        full = partial(score_one_by_one, model, rows_only=name == ROWS)

    def score(batch: Sequence[Any]) -> tuple[list[float], int]:
        sequences = full_sequences(batch)
        return full(sequences), sum(len(ids) for ids, _, _ in sequences)

    return score


# ------------------------------------------------------------------------------------------------------- CPU times
def time_ways(names: Sequence[str], rounds: int, threads: int, path: str) -> dict[str, Any]:
    """Score the standard batch in every way, in turns. Runs in a process of its own."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="sdpa").eval()
    batch = make_batch()
    ways = {name: build_way(name, model, path) for name in names}
    for way in ways.values():
        way(make_batch(rollouts=1, questions=1, response_tokens=(50, 60)))
    found: dict[str, Any] = {name: {"cpu": [], "wall": []} for name in names}
    for number in range(rounds):
        for name, way in ways.items():
            cpu, wall = time.process_time(), time.monotonic()
            scores, tokens = way(batch)
            found[name]["cpu"].append(time.process_time() - cpu)
            found[name]["wall"].append(time.monotonic() - wall)
            found[name] |= {"scores": scores, "tokens": tokens}
            print(
                f"  {threads} thread(s), round {number + 1}: {name} {found[name]['cpu'][-1]:.1f} CPU s",
                file=sys.stderr,
                flush=True,
            )
    return found


def print_times(threads: int, found: dict[str, Any]) -> None:
    """The table of one thread count."""
    reference = next(name for name in (ONE, ROWS, PADDED, VLLM_FULL, *found) if name in found)
    print(f"\n{threads} thread(s){'':33}{'tokens':>9}{'CPU s':>8}{'wall s':>8}  max difference")
    for name, label in WAYS.items():
        if name not in found:
            if name in (VLLM, VLLM_FULL) and importlib.util.find_spec("vllm") is None:
                print(f"{label:62}vLLM is not installed")
            continue
        way = found[name]
        difference = np.abs(np.subtract(way["scores"], found[reference]["scores"])).max()
        print(f"{label:62}{way['tokens']:9,}{min(way['cpu']):8.1f}{min(way['wall']):8.1f}  {difference:.1e}")
    for name, baselines in BASELINE.items():
        for baseline in baselines:
            if name in found and baseline in found:
                ratios = {key: min(found[baseline][key]) / min(found[name][key]) for key in ("cpu", "wall")}
                print(
                    f"{name} against {baseline}: {found[baseline]['tokens'] / found[name]['tokens']:.1f} times fewer "
                    f"tokens, {ratios['cpu']:.1f} times less CPU time, {ratios['wall']:.1f} times less wall time"
                )


def print_bytes(batch: Sequence[Any]) -> None:
    """Request bodies: /support against /score with one item per (boundary, reference)."""
    from verl.utils.siop.http.content import compress
    from verl.utils.siop.http.json_body import parse_body, parse_packed
    from verl.utils.siop.http.packed import pack, pack_ids
    from verl.utils.siop.scorer.wire import MAX_ITEM_TOKENS, MAX_ITEMS, SupportBody

    rollouts: list[dict[str, Any]] = []
    items: list[dict[str, Any]] = []
    for rollout in batch:
        references = [
            {"token_ids": probe.token_ids.tolist(), "start": probe.start, "end": probe.end} for probe in rollout.probes
        ]
        prompt, response = rollout.prompt_ids.tolist(), rollout.response_ids.tolist()
        rollouts.append(
            {
                "prompt_ids": prompt,
                "response_ids": response,
                "boundaries": rollout.boundaries,
                "references": references,
            }
        )
        items += [
            {
                "prompt_ids": prompt + response[:boundary],
                "response_ids": reference["token_ids"],
                "ref_start": reference["start"],
                "ref_end": reference["end"],
            }
            for boundary in rollout.boundaries
            for reference in references
        ]
    theirs = json.dumps({"items": items}).encode()
    plain = json.dumps({"rollouts": rollouts}, separators=(",", ":")).encode()
    for rollout in rollouts:
        rollout.update({name: pack_ids(rollout[name]) for name in ("prompt_ids", "response_ids")})
        for reference in rollout["references"]:
            reference["token_ids"] = pack_ids(reference["token_ids"])
    packed = pack({"rollouts": rollouts})
    limits = SupportBody, MAX_ITEMS, MAX_ITEM_TOKENS
    read = {
        "plain JSON": (plain, lambda: parse_body(plain, *limits)),
        "MessagePack": (packed, lambda: parse_packed(packed, *limits)),
    }
    print(f"request bytes, {len(theirs):,} as one /score item per (boundary, reference), against /support:")
    for name, (content, parse) in read.items():
        seconds = min(timeit.repeat(parse, number=1, repeat=7))
        sent = compress(content)
        print(
            f"    {name:<12} {len(content):>9,}  {len(theirs) / len(content):5.1f} times fewer   "
            f"with gzip {len(sent):>9,}  {len(theirs) / len(sent):5.1f} times fewer   read in {1e3 * seconds:.1f} ms"
        )


# ---------------------------------------------------------------------------------------------------------- memory
def peak_memory(name: str, path: str) -> dict[str, int]:
    """Peak resident memory above that of the loaded model, in bytes (Linux). Runs in a process of its own."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = None
    if name not in (VLLM, VLLM_FULL):
        model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="sdpa").eval()
    way = build_way(name, model, path)
    shape: dict[str, Any] = {"rollouts": 1, "questions": 1, "vocab_size": LARGE_VOCAB_SIZE}
    way(make_batch(**shape, response_tokens=(50, 60)))

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])

    Path("/proc/self/clear_refs").write_text("5")  # sets the peak back to the present
    before = status("VmRSS")
    way(make_batch(**shape, response_tokens=(2000, 2000)))
    return {"before": before, "peak": status("VmHWM")}


# ------------------------------------------------------------------------------------------------------------ main
def _child(arguments: list[str], threads: int) -> Any:
    """Run this script again in a process of its own and read its last line as JSON."""
    run = subprocess.run(
        [sys.executable, __file__, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--ways", nargs="+", choices=list(WAYS), default=list(WAYS), metavar="WAY", help=", ".join(WAYS)
    )
    parser.add_argument("--memory", action="store_true", help="peak memory instead of times")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)  # what to measure, directory of the model
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error("--rounds must be at least 1")
    if args.child:
        what, path = args.child
        if what == "memory":
            print(json.dumps(peak_memory(args.ways[0], path)))
        else:
            print(json.dumps(time_ways(args.ways, args.rounds, args.threads[0], path)))
        return
    ways = list(args.ways)
    if importlib.util.find_spec("vllm") is None:
        ways = [name for name in ways if name not in (VLLM, VLLM_FULL)]
    with tempfile.TemporaryDirectory(prefix="siop-scoring-") as path:
        make_model(
            model_config(LARGE_VOCAB_SIZE, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
            if args.memory
            else model_config()
        ).save_pretrained(path)
        if args.memory:
            print("peak memory above the loaded model's; one rollout of 2,000 tokens, 151,936 tokens in the vocabulary")
            for name in ways:
                found = _child(["--child", "memory", path, "--ways", name], 1)
                print(f"{WAYS[name]:62}{(found['peak'] - found['before']) / 2**20:9,.0f} MiB", flush=True)
            return
        print_bytes(make_batch())
        for threads in args.threads:
            options = ["--ways", *ways, "--rounds", str(args.rounds), "--threads", str(threads)]
            print_times(threads, _child(["--child", "times", path, *options], threads))


if __name__ == "__main__":
    main()
