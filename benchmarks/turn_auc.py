"""How well each method's turn advantage separates turns that find the next needed fact from turns that do not.

    python benchmarks/turn_auc.py [--worlds two_hop,chains,stale] [--methods siop,release,...]

No training: the start model answers questions of the training world once, and all methods give credit for the same
rollouts, with the real scorer and the real estimator. The facts of the world serve only as the label that the advantage
is compared with. Writes runs/toy_table/WORLD/turn_auc.json, which `toy_table.py` takes into its table.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from omegaconf import DictConfig
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from verl.experimental.agent_loop.tool_parser import HermesToolParser
from verl.trainer.ppo.core_algos import get_adv_estimator_fn
from verl.utils.reward_score.siop_reward import exact_match, place_turn_rewards
from verl.utils.siop.retriever.bm25 import Bm25Index
from verl.utils.siop.scoring_client import ScoringClient
from verl.utils.siop.siop_process_reward import (
    Rollout,
    SiopConfig,
    SiopScorer,
    SupportRequest,
    compute_group_rewards,
)
from verl.utils.siop.turn_utils import (
    extract_answer,
    extract_observations,
    get_assistant_turn_ranges,
    parse_answer,
)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.toy_results import (  # noqa: E402
    Turn,
    config_of,
    needed_fact_found,
    question_of,
    read_rows,
    resampled,
    turn_auc,
    turns_of,
)
from benchmarks.toy_services import toy_services  # noqa: E402
from benchmarks.toy_table import METHODS, RUNS, WORLDS, build_world  # noqa: E402
from benchmarks.training_table import chosen  # noqa: E402
from examples.toy_world.tokenizer import observation_text, prompt_text  # noqa: E402
from examples.toy_world.warm_start import search_in  # noqa: E402
from examples.toy_world.world import STALE_ANSWERS  # noqa: E402

Search = Callable[[str], str]
_AT_ONCE = 64


@torch.no_grad()
def play(
    model: Any, tokenizer: PreTrainedTokenizerBase, question: str, search: Search, turns: int, tokens: int
) -> tuple[str, str]:
    """Samples one rollout as the trainer's agent loop does, at temperature 1.

    Args:
        model: the policy, a transformers model.
        tokenizer: its tokenizer.
        question: the user's message.
        search: the tool, from query to result text.
        turns: most assistant turns.
        tokens: most response tokens.

    Returns:
        The prompt and the response as decoded texts.
    """
    prompt = ids = tokenizer.encode(prompt_text(question), add_special_tokens=False)
    for turn in range(turns):
        left = len(prompt) + tokens - len(ids)
        drawn = model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), do_sample=True, top_k=0, max_new_tokens=left
        )[0].tolist()
        _, calls = asyncio.run(HermesToolParser(tokenizer).extract_tool_calls(drawn[len(ids) :]))
        ids = drawn
        if not calls or turn == turns - 1:
            break
        query = json.loads(calls[0].arguments).get("query", "")
        observation = tokenizer.encode(observation_text(search(query.strip())), add_special_tokens=False)
        if len(ids) + len(observation) >= len(prompt) + tokens:
            break
        ids = ids + observation
    return str(tokenizer.decode(prompt)), str(tokenizer.decode(ids[len(prompt) :]))


def start_rollouts(world: str, questions: int, rollouts: int) -> list[dict[str, Any]]:
    """Rollouts of the start model on training questions, in the form in which the trainer dumps them; made once."""
    file = RUNS / world / f"start-rollouts-{questions}x{rollouts}.jsonl"
    if not file.is_file():
        toy = WORLDS[world].toy
        settings = config_of([f"experiment={WORLDS[world].settings}"])
        limits = (settings.actor_rollout_ref.rollout.multi_turn.max_assistant_turns, settings.data.max_response_length)
        tokenizer = AutoTokenizer.from_pretrained(toy / "model")
        model = AutoModelForCausalLM.from_pretrained(toy / "model", dtype=torch.float32).eval()
        documents = read_rows(toy / "corpus.jsonl")
        search = search_in(Bm25Index.from_documents(documents))
        asked = pq.read_table(toy / "train.parquet")["extra_info"].to_pylist()[:questions]
        torch.manual_seed(0)
        rows = []
        for number, extra in enumerate(tqdm(asked, desc=f"rollouts, {world}", unit=" questions")):
            for session in range(rollouts):
                prompt, output = play(model, tokenizer, extra["question"], search, *limits)
                answer, gold = parse_answer(turns_of(output)[-1]), question_of(prompt, toy).gold
                em = exact_match(answer, [gold])
                rows.append({"input": prompt, "output": output, "uid": f"{number}_{session}_0", "em": em})
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_rows(file)


def rollout_of(row: dict[str, Any], toy: Path, tokenizer: PreTrainedTokenizerBase) -> Rollout:
    """A dumped rollout as tokens again: a policy turn goes to its end token, the tool's result to the next turn."""
    header, end = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>assistant\n", "<|im_end|>"))
    response: list[int] = tokenizer.encode(row["output"], add_special_tokens=False)
    mask, policy = [], True
    for token in response:
        mask.append(int(policy))
        if policy and token == end:
            policy = False
        elif not policy and token == header:
            policy = True
    question = question_of(row["input"], toy)
    return Rollout(
        uid=row["uid"].rsplit("_", 2)[0],
        question=question.text,
        prompt_ids=tokenizer.encode(row["input"], add_special_tokens=False),
        response_ids=response,
        response_mask=mask,
        gold=[question.gold],
    )


def labels_of(rollout: Rollout, toy: Path, tokenizer: PreTrainedTokenizerBase) -> list[bool]:
    """Whether each turn is right (:func:`needed_fact_found`)."""
    turns = get_assistant_turn_ranges(rollout.response_mask)
    observations = extract_observations(rollout.response_ids, turns, tokenizer)
    if len(observations) != len(turns) - 1:
        raise ValueError(
            f"{len(turns)} turns but {len(observations)} observations in a rollout of {rollout.question!r}"
        )
    answer = extract_answer(rollout.response_ids, turns, tokenizer, rollout.prompt_ids)
    return needed_fact_found(question_of(rollout.question, toy), observations, answer)


@dataclass
class Memory:
    """Answers of the scorer: the methods ask much the same about the same rollouts."""

    url: str
    known: dict[tuple[Any, ...], Any] = field(default_factory=dict)

    async def _ask(
        self, keys: list[tuple[Any, ...]], items: Sequence[Any], call: Callable[[list[Any]], Any]
    ) -> list[Any]:
        missing = {key: item for key, item in zip(keys, items, strict=True) if key not in self.known}
        new = list(missing)
        # No more in one request than a training step has rollouts.
        for part in (new[start : start + _AT_ONCE] for start in range(0, len(new), _AT_ONCE)):
            self.known.update(zip(part, await call([missing[key] for key in part]), strict=True))
        return [self.known[key] for key in keys]

    def scorer(self, client: ScoringClient) -> SiopScorer:
        memory = self

        class Remembered:
            async def cluster(self, question: str, answers: list[str]) -> list[int]:
                async def ask(_: list[Any]) -> list[list[int]]:
                    return [await client.cluster(question, answers)]

                return (await memory._ask([("cluster", question, *answers)], [answers], ask))[0]

            async def entailment(self, pairs: list[tuple[str, str]]) -> list[float]:
                return await memory._ask([("entailment", *pair) for pair in pairs], pairs, client.entailment)

            async def support(self, rollouts: list[SupportRequest]) -> list[list[list[float]]]:
                return await memory._ask([("support", repr(rollout)) for rollout in rollouts], rollouts, client.support)

        return Remembered()


async def advantages_of(
    rollouts: Sequence[Rollout],
    outcomes: Sequence[float],
    tokenizer: PreTrainedTokenizerBase,
    algorithm: DictConfig,
    memory: Memory,
) -> list[list[float]]:
    """The advantage of each turn of each rollout, as the trainer would compute it.

    Args:
        rollouts: B rollouts.
        outcomes: B exact matches, the reward where the estimator is not ``siop``.
        tokenizer: the policy's.
        algorithm: the ``algorithm`` section.
        memory: of the scorer, for all methods.
    """
    masks = torch.nn.utils.rnn.pad_sequence([torch.tensor(r.response_mask) for r in rollouts], batch_first=True)
    ranges = [get_assistant_turn_ranges(rollout.response_mask) for rollout in rollouts]
    if algorithm.adv_estimator == "siop":
        config = SiopConfig.from_algorithm(algorithm)
        async with ScoringClient(memory.url, timeout_s=600.0) as client:
            scorer = memory.scorer(client)
            rewards = (await compute_group_rewards(rollouts, tokenizer, config, scorer)).turn_rewards
    else:
        rewards = [[0.0] * (len(turns) - 1) + [em] for turns, em in zip(ranges, outcomes, strict=True)]
    advantages_BL, _ = get_adv_estimator_fn(algorithm.adv_estimator)(
        token_level_rewards=place_turn_rewards(rewards, masks),
        response_mask=masks,
        index=np.array([rollout.uid for rollout in rollouts], dtype=object),
        config=algorithm,
        norm_adv_by_std_in_grpo=algorithm.get("norm_adv_by_std_in_grpo", True),
    )
    return [[float(advantages_BL[row, start]) for start, _ in turns] for row, turns in enumerate(ranges)]


def measure(world: str, methods: Sequence[str], questions: int, rollouts: int) -> Path:
    """Turn AUC of the methods in one world, added to its file after each method; returns the file."""
    toy = WORLDS[world].toy
    tokenizer = AutoTokenizer.from_pretrained(toy / "model")
    rows = start_rollouts(world, questions, rollouts)
    parsed = [rollout_of(row, toy, tokenizer) for row in rows]
    labels = [labels_of(rollout, toy, tokenizer) for rollout in parsed]
    answers = [parse_answer(turns_of(row["output"])[-1]) for row in rows]
    flat = [label for right in labels for label in right]
    measured: dict[str, Any] = {
        "questions": questions,
        "rollouts": len(rows),
        "em": sum(row["em"] for row in rows) / len(rows),
        "stale": sum(answer in STALE_ANSWERS.values() for answer in answers) / len(rows),
        "right_share": sum(flat) / len(flat),
    }
    file = RUNS / world / "turn_auc.json"
    known = json.loads(file.read_text()) if file.is_file() else {}
    same = all(known.get(name) == value for name, value in measured.items())
    result: dict[str, Any] = known["methods"] if same else {}
    draws: dict[str, np.ndarray] = {}
    with toy_services(toy, RUNS / world / "logs") as env:
        memory = Memory(env["SIOP_SCORER_URL"])
        for method in tqdm(methods, desc=f"turn AUC, {world}", unit=" methods"):
            algorithm = config_of(METHODS[method]).algorithm
            values = asyncio.run(advantages_of(parsed, [row["em"] for row in rows], tokenizer, algorithm, memory))
            turns = [
                Turn(rollout.uid, index, index < len(right) - 1, value, label)
                for rollout, right, advantages in zip(parsed, labels, values, strict=True)
                for index, (value, label) in enumerate(zip(advantages, right, strict=True))
            ]
            areas, draws[method] = turn_auc(turns), resampled(turns)
            result[method] = areas
            areas["error"] = float(draws[method].std(ddof=1))
            if "siop" in draws:
                areas["gain"] = areas["same_index"] - result["siop"]["same_index"]
                areas["gain_error"] = float((draws[method] - draws["siop"]).std(ddof=1))
            file.write_text(json.dumps({**measured, "methods": result}, indent=1) + "\n")
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", default=",".join(WORLDS), help="default: all")
    # The number of rollouts is the same for all here.
    fixed = [name for name, overrides in METHODS.items() if not any("rollout.n=" in text for text in overrides)]
    parser.add_argument("--methods", default=",".join(fixed), help=f"default: {','.join(fixed)}")
    parser.add_argument("--questions", type=int, default=60, help="training questions (default: 60)")
    parser.add_argument("--rollouts", type=int, default=8, help="rollouts of each (default: 8)")
    args = parser.parse_args()
    for world in chosen(args.worlds, WORLDS, "--worlds"):
        build_world(world)
        file = measure(world, chosen(args.methods, METHODS, "--methods"), args.questions, args.rollouts)
        print(f"wrote {file}")
        for name, areas in json.loads(file.read_text())["methods"].items():
            print(f"  {name:28}" + "  ".join(f"{key} {value:.3f}" for key, value in areas.items()))


if __name__ == "__main__":
    main()
