"""The learning table: turn AUC, reading of run folders, averaging, resuming and stopping, with small fake runs."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from method_helpers import Scorer, byte_tokenizer, mixed_batch, query_batch, search_rollout
from verl.utils.siop.credit.batch import CreditBatch
from verl.utils.siop.siop_process_reward import Reference, SiopConfig, SupportRequest, compute_group_rewards
from verl.utils.siop.turn_utils import get_assistant_turn_ranges

from benchmarks import toy_course, toy_results, toy_services, toy_table, turn_auc
from benchmarks.toy_results import Turn, auc, needed_fact_found
from examples.toy_world import build
from examples.toy_world.agent import IMPERFECT, PERFECT, trajectory
from examples.toy_world.tokenizer import build_tokenizer, prompt_text
from examples.toy_world.warm_start import encode_episode, search_in, world_index
from examples.toy_world.world import CHAINS, STALE_ANSWERS, TWO_HOP, Kind, held_out_world, train_world, vocabulary

ROOT = Path(__file__).resolve().parents[2]


# --- turn AUC ---------------------------------------------------------------------------------------------------------


def test_auc_counts_ties_half() -> None:
    assert auc([1, 2, 3, 4], [False, False, True, True]) == (1.0, 4)
    assert auc([4, 3, 2, 1], [False, False, True, True]) == (0.0, 4)
    assert auc([5, 5, 5], [True, False, False]) == (0.5, 2)
    # Pairs (2,1): 1, (2,2): 1/2, (0,1): 0, (0,2): 0.
    assert auc([2, 0, 1, 2], [True, True, False, False]) == (1.5 / 4, 4)
    area, pairs = auc([1.0, 2.0], [True, True])
    assert math.isnan(area) and pairs == 0
    rng = np.random.default_rng(0)
    values, labels = rng.integers(0, 5, 60), rng.random(60) < 0.4
    expected = np.mean([(p > n) + (p == n) / 2 for p in values[labels] for n in values[~labels]])
    assert auc(values.tolist(), labels.tolist())[0] == pytest.approx(float(expected), abs=1e-12)


def test_turn_auc_compares_like_with_like() -> None:
    # Turn 0 is worth more than turn 1 whatever it finds: right overall, wrong at an equal index.
    turns = [
        Turn("a", 0, True, 5.0, False),
        Turn("b", 0, True, 4.0, True),
        Turn("b", 0, True, 4.5, True),
        Turn("a", 1, True, 1.0, False),
        Turn("a", 1, True, 1.0, True),
        Turn("a", 2, False, 9.0, True),
        Turn("b", 2, False, -9.0, False),
    ]
    areas = toy_results.turn_auc(turns)
    # Positives 4, 4.5, 1, 9 against 5, 1, -9.
    assert areas["all"] == pytest.approx((2 + 2 + 1.5 + 3) / 12)
    # Positives 4, 4.5, 1 against 5, 1.
    assert areas["search"] == pytest.approx((1 + 1 + 0.5) / 6)
    # Index 0: two pairs, both lost; index 1: one pair, a tie.
    assert areas["same_index"] == pytest.approx(0.5 / 3)
    # Only question a has both labels at one index.
    assert areas["same_question"] == 0.5


def test_resamples_of_the_questions() -> None:
    # A question whose searches are all judged right and one whose are all judged wrong: 1, 0 or one half.
    turns = [
        *(Turn("a", 0, True, value, value > 1) for value in (1.0, 2.0)),
        *(Turn("b", 1, True, value, value < 2) for value in (1.0, 2.0)),
        Turn("a", 1, False, 0.0, True),
    ]
    draws = toy_results.resampled(turns, 200)
    assert set(draws) == {0.0, 0.5, 1.0} and abs(float(draws.mean()) - 0.5) < 0.1
    assert (toy_results.resampled(turns, 200) == draws).all()


def test_a_turn_is_right_if_it_finds_the_next_fact() -> None:
    world = held_out_world(0, CHAINS)
    question = next(q for q in world.questions() if q.template == "founder_spouse_born")
    company, founder, spouse, town = question.chain
    first, second = f"[1] the founder of {company} is {founder} .", f"[1] the spouse of {founder} is {spouse} ."
    third = f"[1] {spouse} was born in {town} ."
    reverse = f"[1] the spouse of {spouse} is {founder} ."
    assert needed_fact_found(question, [first, second, third], town) == [True, True, True, True]
    assert needed_fact_found(question, [first, reverse, third], town) == [True, True, True, True]
    # Again, the wrong one, and too early: the third fact counts when its turn has come, the answer after all of them.
    assert needed_fact_found(question, [first, first, third, second], town) == [True, False, False, True, False]
    assert needed_fact_found(question, [f"{first}\n{second.replace('1', '2')}", third], town) == [True, True, True]
    assert needed_fact_found(question, [first, second, third], founder) == [True, True, True, False]
    assert needed_fact_found(question, [], town) == [False]
    assert needed_fact_found(question, ["nothing found"], "") == [False, False]


@pytest.mark.parametrize("kind", [TWO_HOP, CHAINS], ids=lambda kind: kind.name)
def test_dumped_rollouts_become_tokens_again(kind: Kind, tmp_path: Path) -> None:
    tokenizer = build_tokenizer(vocabulary())
    toy = _toy(tmp_path, kind)
    world = held_out_world(0, kind)
    search = search_in(world_index(world, "x"))
    rng = random.Random(0)
    right = []
    for question in rng.sample(world.questions(), 20):
        for faults in (IMPERFECT, PERFECT):
            segments = trajectory(question, world, search, faults, rng)
            ids, own = encode_episode(question.text, segments, tokenizer.encode)
            prompt = tokenizer.encode(prompt_text(question.text))
            output = str(tokenizer.decode(ids[len(prompt) :]))
            row = {"input": tokenizer.decode(prompt), "output": output, "uid": "u_0_1_0"}
            rollout = turn_auc.rollout_of(row, toy, tokenizer)
            assert rollout.prompt_ids == prompt and rollout.response_ids == ids[len(prompt) :]
            assert rollout.response_mask == [int(x) for x in own[len(prompt) :]]
            assert rollout.uid == "u_0" and rollout.question == question.text and rollout.gold == [question.gold]
            labels = turn_auc.labels_of(rollout, toy, tokenizer)
            assert len(labels) == len(get_assistant_turn_ranges(rollout.response_mask))
            assert len(toy_results.turns_of(output)) == len(labels)
            if faults is PERFECT:
                right += labels
    # Passages about an entity of a similar name can take the place of the one that is needed.
    assert sum(right) / len(right) > 0.85


def test_the_scorer_is_asked_once() -> None:
    class Client:
        asked: ClassVar[list[Any]] = []

        async def cluster(self, question: str, answers: list[str]) -> list[int]:
            self.asked.append(answers)
            return list(range(len(answers)))

        async def entailment(self, pairs: list[tuple[str, str]]) -> list[float]:
            self.asked.append(pairs)
            return [float(len(premise)) for premise, _ in pairs]

        async def support(self, rollouts: list[SupportRequest]) -> list[list[list[float]]]:
            self.asked.append(rollouts)
            return [[[-float(boundary)] for boundary in rollout.boundaries] for rollout in rollouts]

    client: Any = Client()
    scorer = turn_auc.Memory("http://unused").scorer(client)
    one, two = (SupportRequest([1], [2, 3], [0, end], [Reference("a", [5], 0, 1)]) for end in (1, 2))
    for _ in range(2):
        assert asyncio.run(scorer.cluster("q", ["a", "b"])) == [0, 1]
        assert asyncio.run(scorer.entailment([("xx", "y"), ("x", "y"), ("xx", "y")])) == [2.0, 1.0, 2.0]
    assert client.asked == [["a", "b"], [("xx", "y"), ("x", "y")]]
    assert asyncio.run(scorer.support([one])) == [[[0.0], [-1.0]]]
    assert asyncio.run(scorer.support([two, one])) == [[[0.0], [-2.0]], [[0.0], [-1.0]]]
    assert client.asked[2:] == [[one], [two]]
    assert asyncio.run(scorer.cluster("other", ["a", "b"])) == [0, 1] and len(client.asked) == 5


def test_sampled_rollouts_are_the_agent_loops() -> None:
    tokenizer = build_tokenizer(vocabulary())
    world = held_out_world(0, CHAINS)
    search = search_in(world_index(world, "x"))
    question = world.questions()[0]
    segments = trajectory(question, world, search, PERFECT, random.Random(0))
    ids, _ = encode_episode(question.text, segments, tokenizer.encode)
    prompt = tokenizer.encode(prompt_text(question.text))

    class Scripted:
        """Says the scripted agent's next turn."""

        def generate(self, input_ids: torch.Tensor, max_new_tokens: int, **_: Any) -> torch.Tensor:
            said = input_ids[0].tolist()
            assert said == ids[: len(said)]
            end = ids.index(tokenizer.eos_token_id, len(said)) + 1
            return torch.tensor([ids[: min(end, len(said) + max_new_tokens)]])

    def played(turns: int, tokens: int) -> str:
        model: Any = Scripted()
        before, output = turn_auc.play(model, tokenizer, question.text, search, turns, tokens)
        assert before == tokenizer.decode(prompt)
        return output

    whole = str(tokenizer.decode(ids[len(prompt) :]))
    assert played(8, 384) == whole
    # The last turn that is allowed ends the rollout, also if it searches; so does an observation that does not fit.
    first = str(tokenizer.decode(tokenizer.encode(segments[0].text)))
    assert played(1, 384) == first and played(8, len(tokenizer.encode(first)) + 3) == first
    assert whole.startswith(played(2, 384)) and len(toy_results.turns_of(played(2, 384))) == 2
    assert len(tokenizer.encode(played(8, 5))) == 5


# --- run folders ------------------------------------------------------------------------------------------------------


def _toy(folder: Path, kind: Kind) -> Path:
    arguments = ["--out", str(folder / "toy"), "--data-only", "--world", kind.name]
    assert build.main([*arguments, "--train-questions", "16", "--eval-questions", "16"]) == 0
    return folder / "toy"


def _write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _validation(run: Path, rows: list[dict[str, Any]]) -> None:
    _write(run / "after" / "validation" / "0.jsonl", rows)
    metrics = {"val-aux/turns/mean": 2.5, "val-aux/response_tokens/mean": 40.0}
    (run / "after" / "validation" / "metrics.json").write_text(json.dumps(metrics))


def _fake_run(run: Path, kind: Kind, em: int) -> None:
    """Evaluated on eight questions, ``em`` of them answered, the others with each kind of wrong answer; one step."""
    questions = held_out_world(0, kind).questions()[:8]
    wrong = [questions[0].chain[-2], "", STALE_ANSWERS["town"], "nobody"] * 2
    rows = []
    for i, question in enumerate(questions):
        answer = question.gold if i < em else (question.bridge if wrong[i] == wrong[0] else wrong[i])
        output = f"<think> find x </think> \n <tool_response> [1] y </tool_response> \n <answer> {answer} </answer>"
        rows.append({"input": f"{question.text} \n", "output": output, "em": float(i < em)})
    _validation(run, rows)
    turn = (
        "<tool_call> q </tool_call> <|im_end|> \n <|im_start|>user\n <tool_response> [1] y </tool_response> <|im_end|>"
    )
    dumped: list[dict[str, Any]] = [
        {"output": turn + " <answer> a </answer>", "turn_rewards": [0.0, 1.0], "uid": "g_0_0", "em": 1.0, "score": 1.0},
        {
            "output": f"<answer> {STALE_ANSWERS['town']} </answer>",
            "turn_rewards": [0.5],
            "uid": "g_1_0",
            "em": 0.0,
            "score": 0.5,
        },
        {"output": turn + " <think>", "turn_rewards": [], "uid": "g_2_0", "em": 0.0, "score": 0.0},
        {"output": turn, "turn_rewards": None, "uid": "h_0_0", "em": 0.0, "score": 0.0},
    ]
    _write(run / "rollouts" / "1.jsonl", dumped)
    _write(run / "rollouts" / "11.jsonl", dumped[:1])
    _write(run / "rollouts" / "steps.jsonl", [{"step": 1}, {"step": 11}])


def test_evaluation_of_a_run(tmp_path: Path) -> None:
    toy = _toy(tmp_path, CHAINS)
    _fake_run(tmp_path / "run", CHAINS, em=5)
    found = toy_results.evaluation(tmp_path / "run" / "after" / "validation", toy)
    questions = held_out_world(0, CHAINS).questions()[:8]
    assert found["em"] == 5 / 8 and found["questions"] == 8 and found["turns"] == 2.5 and found["tokens"] == 40.0
    assert found["stale"] == found["no_answer"] == 1 / 8
    assert found["bridge"] == sum(i >= 5 and i % 4 == 0 for i in range(8)) / 8
    deep = [i < 5 for i, q in enumerate(questions) if len(q.chain) == 5]
    assert found["depths"] == {
        "3": pytest.approx((5 - sum(deep)) / (8 - len(deep))),
        "4": pytest.approx(sum(deep) / len(deep)),
    }
    assert set(found["templates"]) == {q.template for q in questions}
    with pytest.raises(KeyError, match="who is x"):
        toy_results.question_of("<|im_start|>user\n who is x ? <|im_end|>", toy)


def test_shares_are_rounded_once(tmp_path: Path) -> None:
    toy, question = _toy(tmp_path, TWO_HOP), held_out_world(0, TWO_HOP).questions()[0].text
    algorithm = toy_results.config_of(["ablation=siop"]).algorithm
    runs = []
    # .190476 and .359524: to four digits and then to three they would be .191 and .359.
    for method, right in (("siop", 80), ("grpo", 151)):
        _fake_run(tmp_path / method, TWO_HOP, em=0)
        answered = [{"input": question, "output": "<answer> x </answer>", "em": float(i < right)} for i in range(420)]
        _validation(tmp_path / method, answered)
        shown = toy_results.evaluation(tmp_path / method / "after" / "validation", toy)
        assert shown["em"] == right / 420
        course = toy_results.training(tmp_path / method / "rollouts", algorithm)
        runs.append({"method": method, "seed": 1, **shown, **course})
    table = toy_results.render({"worlds": {"two_hop": {"runs": runs}}})
    assert "| grpo | **0.360** ± 0.023 | 0.360 |" in table and "| siop | **0.190** ± 0.019 | 0.190 |" in table


def test_advantages_of_a_run_are_the_estimators(tmp_path: Path) -> None:
    _fake_run(tmp_path / "run", TWO_HOP, em=5)
    plain = ["algorithm.norm_adv_by_std_in_grpo=false"]
    algorithm = toy_results.config_of(["ablation=siop", *plain]).algorithm
    course = toy_results.training(tmp_path / "run" / "rollouts", algorithm)
    # Returns 1 1 | .5 | 0 0. Leave-one-out at turn 1: .75, 0, -.75; at turn 2: 1, -1.
    assert course["answer_advantage"] == pytest.approx((1.0 + 0.0) / 2)
    assert course["search_advantage"] == pytest.approx((0.75 - 0.75 - 1.0) / 3)
    assert course["right_advantage"] == pytest.approx(1.0) and course["stale_advantage"] == pytest.approx(0.0)
    assert course["steps"] == 11 and course["train_em"] == [pytest.approx(1 / 3), 1.0]
    # The whole reward at once, minus the mean .5: .5 .5 | 0 | -.5 -.5.
    outcome = toy_results.training(
        tmp_path / "run" / "rollouts", toy_results.config_of(["ablation=empo", *plain]).algorithm
    )
    assert outcome["answer_advantage"] == pytest.approx(0.25)
    assert outcome["search_advantage"] == pytest.approx((0.5 - 0.5 - 0.5) / 3)


def test_a_result_that_the_policy_made_up_starts_no_turn() -> None:
    made_up = " <think> a <tool_response> b </tool_response> <|im_end|>"
    searched = "<tool_call> q </tool_call> <tool_response> [1] y </tool_response>"
    assert len(toy_results.turns_of(searched + made_up)) == 2
    assert len(toy_results.turns_of(searched + " <answer> a </answer>")) == 2
    assert toy_results.turns_of("<answer> a </answer>") == ["<answer> a </answer>"]


def test_turns_are_counted_by_their_rewards(tmp_path: Path) -> None:
    made_up = "<think> a <tool_response> b </tool_response> <answer> c </answer>"
    rows = [
        {"output": made_up, "turn_rewards": [1.0], "uid": "g_0_0", "em": 1.0, "score": 1.0},
        {"output": "<answer> d </answer>", "turn_rewards": [0.5], "uid": "g_1_0", "em": 0.0, "score": 0.5},
    ]
    _write(tmp_path / "1.jsonl", rows)
    algorithm = toy_results.config_of(["algorithm.norm_adv_by_std_in_grpo=false"]).algorithm
    assert toy_results.training(tmp_path, algorithm)["right_advantage"] == pytest.approx(0.5)


@pytest.mark.parametrize("name", toy_table.WORLDS)
def test_the_world_of_every_row_can_be_built(name: str) -> None:
    args = build.parse_args(["--out", "x", *toy_table.WORLDS[name].options])
    assert args.train_questions >= 1200 and args.eval_questions >= 400


def test_standard_error_and_mean_over_seeds() -> None:
    assert toy_results.standard_error([0.5], 100) == pytest.approx(0.05, rel=0.01)
    # Seeds that agree still share the questions; seeds that differ say more than the questions do.
    assert toy_results.standard_error([0.5, 0.5, 0.5], 100) == toy_results.standard_error([0.5], 100)
    assert toy_results.standard_error([0.2, 0.8], 100) == pytest.approx(0.3)


@pytest.mark.parametrize(("em", "questions"), [(0.0, 420), (1.0, 420), (0.0, 1), (0.3, 10), (0.875, 8)])
def test_the_standard_error_is_half_of_wilsons_interval(em: float, questions: int) -> None:
    error = toy_results.standard_error([em, em], questions)
    assert error > 0
    # The interval's ends are one standard error, by their own share, away from the share that was found.
    middle = (em + 0.5 / questions) / (1 + 1 / questions)
    for end in (middle - error, middle + error):
        assert (em - end) ** 2 == pytest.approx(end * (1 - end) / questions, abs=1e-15)


# --- the command ------------------------------------------------------------------------------------------------------

_TRAIN = """\
echo "train $OUTPUT_DIR $SEED $*" >> {calls}
mkdir -p "$OUTPUT_DIR/checkpoints"
case $* in *pooled* | *release*) exit 3 ;; *ttrl*) sleep 300 & wait ;; esac
echo "step:2 - x" > "$LOG_DIR/siop_train-$EXPERIMENT_NAME.log"
mkdir -p "$OUTPUT_DIR/global_step_2/actor/huggingface"
"""
_EVAL = """\
echo "eval $OUTPUT_DIR $1" >> {calls}
mkdir -p "$OUTPUT_DIR/validation"
echo '{{}}' > "$OUTPUT_DIR/validation/metrics.json"
"""


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository whose launchers only write down how they were called; returns that file."""
    calls = tmp_path / "calls"
    calls.touch()
    (tmp_path / "launch_retriever.sh").write_text(f'echo "retriever $*" >> {calls}\n')
    (tmp_path / "launch_siop_scorer.sh").write_text(f'echo "scorer $*" >> {calls}\n')
    (tmp_path / "train_siop.sh").write_text(_TRAIN.format(calls=calls))
    (tmp_path / "eval_siop.sh").write_text(_EVAL.format(calls=calls))
    monkeypatch.setattr(toy_services, "ROOT", tmp_path)
    monkeypatch.setattr(toy_table, "ROOT", tmp_path)
    monkeypatch.setattr(toy_table, "RUNS", tmp_path / "runs")
    worlds = {"two_hop": toy_table.ToyWorld(tmp_path / "toy", 2)}
    monkeypatch.setattr(toy_table, "WORLDS", worlds)
    return calls


@pytest.mark.parametrize("launcher", ["launch_retriever.sh", "launch_siop_scorer.sh"])
def test_a_service_of_another_call_is_left_alone(table: Path, tmp_path: Path, launcher: str) -> None:
    (tmp_path / launcher).write_text(f'echo "{launcher} $*" >> {table}\n[[ -n ${{1:-}} ]] || exit 1\n')
    with pytest.raises(subprocess.CalledProcessError), toy_services.toy_services(tmp_path / "toy", tmp_path / "logs"):
        pass
    stopped = [line for line in table.read_text().splitlines() if line.endswith("stop")]
    assert stopped == (["retriever stop"] if launcher == "launch_siop_scorer.sh" else [])


class _Bar:
    """Stands in for the progress bar."""

    n = 0
    lines: list[str]

    def __init__(self) -> None:
        self.lines = []

    def write(self, text: str) -> None:
        self.lines.append(text)

    def set_postfix_str(self, text: str, refresh: bool) -> None:
        pass

    def refresh(self) -> None:
        pass


def test_a_run_trains_and_evaluates_once(table: Path) -> None:
    runs = toy_table.plan(["two_hop"], ["siop", "empo"], [1, 2])
    assert [run.name for run in runs] == [f"two_hop/{m}-seed{s}" for s in (1, 2) for m in ("siop", "empo")]
    assert {run.state for run in runs} == {"to do"}
    # The first was interrupted after training, the second before its first checkpoint.
    (runs[0].folder / "global_step_2" / "actor" / "huggingface").mkdir(parents=True)
    (runs[1].folder / "logs").mkdir(parents=True)
    assert runs[1].state == "interrupted"
    assert toy_table.run_world("two_hop", runs, 2, _Bar()) == []
    called = table.read_text().splitlines()
    assert {run.state for run in runs} == {"finished"}
    trained = sorted(line.split()[1] for line in called if line.startswith("train"))
    assert trained == sorted(str(run.folder) for run in runs[1:])
    assert sum(line.startswith("eval") for line in called) == 4
    assert all("ablation=empo" in line for line in called if line.startswith("train") and "empo-seed" in line)
    assert any(
        line.startswith("train") and " 2 " in line and "trainer.total_training_steps=2" in line for line in called
    )
    assert called[:2] == ["retriever ", "scorer "] and called[-2:] == ["retriever stop", "scorer stop"]


def test_a_failed_run_is_named_and_the_others_go_on(table: Path) -> None:
    bar = _Bar()
    runs = toy_table.plan(["two_hop"], ["release", "siop"], [1])
    assert toy_table.run_world("two_hop", runs, 1, bar) == ["two_hop/release-seed1"]
    assert [run.state for run in runs] == ["interrupted", "finished"]
    assert "two_hop/release-seed1" in bar.lines[0]


def test_interrupt_stops_what_was_started(table: Path) -> None:
    runs = toy_table.plan(["two_hop"], ["ttrl"], [1])

    class Interrupting(_Bar):
        def refresh(self) -> None:
            if "train" in table.read_text():
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        toy_table.run_world("two_hop", runs, 1, Interrupting())
    assert runs[0].process is not None and runs[0].process.poll() is not None
    with pytest.raises(ProcessLookupError):
        os.killpg(runs[0].process.pid, 0)
    assert table.read_text().splitlines()[-2:] == ["retriever stop", "scorer stop"]


def test_plan() -> None:
    runs = toy_table.plan(list(toy_table.WORLDS), None, None)
    names = [run.name for run in runs]
    assert len(set(names)) == len(names)
    for world in ("two_hop", "stale"):
        for method in ("siop", "informed", "release", "empo", "grpo"):
            assert {f"{world}/{method}-seed{seed}" for seed in (1, 2, 3)} <= set(names)
    tried = {name for name, overrides in toy_table.METHODS.items() if toy_table._VARIANTS in overrides}
    assert {run.method for run in runs} == set(toy_table.METHODS) - tried and len(tried) == 9
    assert [run.name for run in toy_table.plan(["stale"], ["aligned"], [1])] == ["stale/aligned-seed1"]
    for world in ("early", "mixed"):
        assert {run.name for run in runs if run.world == world} == {
            f"{world}/{method}-seed{seed}" for method in ("siop", "informed", "empo", "grpo") for seed in (1, 2, 3)
        }
    assert {run.method for run in runs if run.world == "long"} == {"siop", "siop-noise"}
    assert [run.name for run in toy_table.plan(["long"], ["empo"], [4])] == ["long/empo-seed4"]
    # Presets and keys that exist; every preset is composed in the tests of the overrides.
    keys = {field.name for field in dataclasses.fields(SiopConfig)}
    for preset, *overrides in toy_table.METHODS.values():
        assert (ROOT / "config" / "ablation" / f"{preset.removeprefix('ablation=')}.yaml").is_file()
        named = [override.partition("=")[0] for override in overrides]
        assert all(name.removeprefix("algorithm.") in keys or name.endswith("rollout.n") for name in named)


def _credit(mode: str, batch: list[Any], **keys: Any) -> Any:
    """Of a method of benchmarks/toy_variants.py."""
    from benchmarks import toy_variants  # noqa: F401  (registers them)

    return asyncio.run(
        compute_group_rewards(batch, byte_tokenizer(), SiopConfig(siop_reward_mode=mode, **keys), Scorer())
    )


def test_votes_by_pairs() -> None:
    from benchmarks.toy_variants import pairwise_votes

    # One witness takes half of the votes of all who never heard of its answer; two that contradict each other none.
    assert pairwise_votes([[{0}] * 7, [{0, 1}]]) == pytest.approx([7 / 16, 9 / 16])
    assert pairwise_votes([[{0}] * 2 + [{0, 1}], [{0, 1}]]) == pytest.approx([3 / 4, 1 / 4])
    # Along a chain: of 0 half goes to 1 and 2 alike, of 1 half to 2.
    assert pairwise_votes([[{0}], [{0, 1}], [{0, 1, 2}]]) == pytest.approx([1 / 6, 5 / 24, 5 / 8])
    batch = [search_rollout("a", "Peru", ["Lima is in Peru."]) for _ in range(3)]
    batch.append(search_rollout("a", "sol", ["Lima is in Peru.", "Peru pays in sol."]))
    assert _credit("vote_pairwise", batch, siop_eta=0.0).target_mass == pytest.approx([3 / 8] * 3 + [5 / 8])


def test_votes_by_path() -> None:
    # Agreement of question a (five rollouts, so of four others): "capital" is issued by all but Nice, "river" by three,
    # "mayor" by one.
    three, two = 3 / 4, 2 / 4
    first, second, third = [three, 0.0, two], [three, 0.0], [(three + two) / 2]
    lyon, paris = third, [*first, *second]
    for mode, of_paris, of_lyon in (
        ("vote_path", sum(paris), sum(lyon)),
        ("vote_path_mean", sum(first) / 3 + sum(second) / 2, sum(lyon)),
        ("vote_last_query", first[-1] + second[-1], lyon[-1]),
    ):
        found = _credit(mode, query_batch())
        assert found.answers == ["Paris", "paris", "Lyon", "", "blue", "Nice"]
        total = of_paris + of_lyon
        expected = [of_paris / total, of_paris / total, of_lyon / total, 0, 1, 0]
        assert found.target_mass == pytest.approx(expected), mode  # Nice was not searched for; b has one cluster
        # Gains and end are the default's.
        default = _credit("process", query_batch())
        for rewards, target, plain, mass in zip(
            found.turn_rewards, found.target_mass, default.turn_rewards, default.target_mass, strict=True
        ):
            assert rewards == pytest.approx([value * target / mass if mass else 0.0 for value in plain])


def test_a_vote_by_the_scorer() -> None:
    batch = mixed_batch()
    found, default = (_credit(mode, batch) for mode in ("vote_judge", "process"))
    # What the searches of every rollout of question a brought to each of its three answers.
    members = [index for index, rollout in enumerate(batch) if rollout.uid == "a"]
    brought = {}
    for answer in ("Paris", "Lyon", "Nice"):
        of_all = _supports(batch, {index: [answer] for index in members})
        brought[answer.lower()] = sum(max(0.0, values[-1] - values[0]) for values in of_all.values())
    total = sum(brought.values())
    assert total > 0 and len(set(brought.values())) > 1
    for index in members:
        assert found.target_mass[index] == pytest.approx(brought[found.answers[index].lower()] / total)
    assert found.support == default.support
    # One cluster: nothing to vote on.
    assert [found.target_mass[index] for index in (1, 4, 6)] == [1.0, 0.0, 1.0]


def _supports(batch: list[Any], references_of: dict[int, list[str]]) -> dict[int, list[float]]:
    return asyncio.run(CreditBatch(batch, byte_tokenizer(), SiopConfig(), Scorer()).supports(references_of))


def test_a_search_is_worth_nothing_by_itself() -> None:
    keys = {"siop_lambda": 0.25}
    found, plain = _credit("complete", mixed_batch(), **keys), _credit("process", mixed_batch(), **keys)
    assert found.target_mass == plain.target_mass
    assert {len(rewards) for rewards in found.turn_rewards} == {0, 1, 2, 3, 4}
    for rewards, before, target, values, measured in zip(
        found.turn_rewards, plain.turn_rewards, plain.target_mass, found.support, plain.support, strict=True
    ):
        assert values == measured or (len(before) == 1 and len(set(values)) == 1)
        if before:
            assert rewards[:-1] == before[:-1]
            assert sum(rewards) == pytest.approx(target * (1 - values[0] + 0.75))


def test_an_end_for_what_was_found() -> None:
    keys = {"siop_boundary": "observation", "siop_lambda": 0.25}
    plain = _credit("process", mixed_batch(), **keys)
    for mode, weight in (("aligned", 1), ("aligned_end2", 2), ("aligned_end4", 4)):
        found = _credit(mode, mixed_batch(), **keys)
        assert found.target_mass == plain.target_mass
        for rewards, before, target, values in zip(
            found.turn_rewards, plain.turn_rewards, plain.target_mass, plain.support, strict=True
        ):
            found_here = max(values) - values[0] if values else 0.0
            end = 0.75 * target * (weight * found_here - 1) if before else 0.0
            assert rewards == pytest.approx([*before[:-1], before[-1] + end] if before else [])


def test_noise_on_the_support() -> None:
    from benchmarks import noisy_support

    batch = mixed_batch()
    config = SiopConfig(siop_reward_mode="noisy")
    found = [
        asyncio.run(compute_group_rewards(batch, byte_tokenizer(), replace, Scorer()))
        for replace in (SiopConfig(), config, config)
    ]
    exact, noisy, again = ([value for values in rewards.support for value in values] for rewards in found)
    assert len(exact) > 10 and noisy == again
    changes = np.subtract(noisy, exact)
    assert 0.2 * noisy_support.NOISE < changes.std() < 2 * noisy_support.NOISE
    assert found[1].turn_rewards != found[0].turn_rewards and found[1].target_mass == found[0].target_mass


def test_report(table: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(toy_table, "RESULTS", tmp_path / "docs")
    with pytest.raises(SystemExit, match="no finished run"):
        toy_table.report()
    _toy(tmp_path, TWO_HOP)
    for method, seed, em in (("siop", 1, 4), ("siop", 2, 6), ("grpo", 1, 7)):
        _fake_run(tmp_path / "runs" / "two_hop" / f"{method}-seed{seed}", TWO_HOP, em)
    (tmp_path / "runs" / "two_hop" / "empo-seed1" / "logs").mkdir(parents=True)
    areas = {"all": 0.6, "search": 0.55, "same_index": 0.7, "same_question": math.nan}
    auc_entry = {"questions": 3, "rollouts": 9, "right_share": 0.5, "em": 0.2, "stale": 0.0, "methods": {"siop": areas}}
    (tmp_path / "runs" / "two_hop" / "turn_auc.json").write_text(json.dumps(auc_entry))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    toy_table.report()
    text = (tmp_path / "docs" / "table.md").read_text()
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in text.splitlines()
        if line.startswith("| ") and "---" not in line
    ]
    assert rows[1][:5] == ["grpo", "**0.875** ± 0.118", "0.875", "1", "11"]
    assert rows[2][:4] == ["siop", "**0.625** ± 0.162", "0.500 0.750", "2"]
    assert rows[2][-1] == "0.700" and "empo" not in text
    assert "60 training" not in text and "EM 0.200, stale answers 0.000, right turns 0.500" in text
    results = json.loads((tmp_path / "docs" / "results.json").read_text())
    assert [run["em"] for run in results["worlds"]["two_hop"]["runs"]] == [0.5, 0.75, 0.875]
    # What is known of runs that are gone stays; a run that is there counts.
    shutil.rmtree(tmp_path / "runs" / "two_hop" / "grpo-seed1")
    _fake_run(tmp_path / "runs" / "two_hop" / "siop-seed2", TWO_HOP, 8)
    (tmp_path / "runs" / "two_hop" / "turn_auc.json").unlink()
    toy_table.report()
    again = json.loads((tmp_path / "docs" / "results.json").read_text())["worlds"]["two_hop"]
    assert [run["em"] for run in again["runs"]] == [0.5, 1.0, 0.875]
    assert again["auc"] == results["worlds"]["two_hop"]["auc"]


def test_plots(tmp_path: Path) -> None:
    _toy(tmp_path, TWO_HOP)
    _fake_run(tmp_path / "run", TWO_HOP, 3)
    run = {
        "method": "siop",
        "seed": 1,
        **toy_results.evaluation(tmp_path / "run" / "after" / "validation", tmp_path / "toy"),
        **toy_results.training(tmp_path / "run" / "rollouts", toy_results.config_of(["ablation=siop"]).algorithm),
    }
    auc_entry = {"methods": {"siop": {"same_index": 0.7}}}
    written = toy_results.plot(
        {"worlds": {"two_hop": {"runs": [run]}, "stale": {"runs": [], "auc": auc_entry}}}, tmp_path
    )
    assert [path.name for path in written] == ["em.svg", "training.svg", "turn_auc.svg"]
    assert all("</svg>" in path.read_text() for path in written)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "sipo"], "choose from siop"),
        (["--worlds", "flat"], "choose from two_hop"),
        (["--seeds", "a"], "--seeds a"),
        (["--only", "two_hop"], "WORLD/METHOD-seedN"),
        (["--only", "two_hop/siopp-seed1"], "--only siopp: choose from siop"),
        (["--jobs", "0"], "--jobs must be at least 1"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(sys, "argv", ["toy_table.py", *arguments])
    with pytest.raises(SystemExit) as caught:
        toy_table.main()
    assert message in f"{caught.value} {capsys.readouterr().err}"


def test_the_course_of_a_training(tmp_path: Path) -> None:
    """Two steps of one question with three rollouts, of which one searches in vain."""
    toy = _toy(tmp_path, TWO_HOP)
    world = train_world(0, TWO_HOP)
    question = world.questions()[0]
    relations = TWO_HOP.templates[question.template].relations
    first, second = (f"{relation} {subject}" for relation, subject in zip(relations, question.chain, strict=False))
    search = search_in(world_index(world, "c"), topk=1)

    def rollout(queries: list[str], answer: str) -> str:
        turns = [
            f"<tool_call> {query} </tool_call><|im_end|>\n<tool_response>{search(query)}</tool_response>"
            for query in queries
        ]
        return "".join(turns) + f"<answer> {answer} </answer><|im_end|>"

    outputs = [rollout([first, second], question.gold), rollout([first, "zebra"], "x y"), rollout(["zebra"], "x y")]
    rewards = [[0.3, 0.5, 0.1], [0.3, 0.0, 0.1], [0.0, 0.1]]
    for step in (1, 2):
        rows = [
            {
                "input": prompt_text(question.text),
                "output": output,
                "uid": f"u_{session}_0",
                "em": float(session == 0),
                "cluster": min(session, 1),
                "target": 0.6 if session == 0 else 0.4,
                "score": sum(rewards[session]),
                "turn_rewards": rewards[session],
            }
            for session, output in enumerate(outputs)
        ]
        (tmp_path / f"{step}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    algorithm = toy_results.config_of(["ablation=siop"]).algorithm
    (whole,) = toy_course.course(tmp_path, toy, algorithm, window=10)
    assert whole == pytest.approx({"steps": 2, "em": 1 / 3, "turns": 8 / 3, "mass": 0.6, "heaviest": 1.0, "auc": 1.0})
    assert [row["steps"] for row in toy_course.course(tmp_path, toy, algorithm, window=1)] == [1, 2]
    assert toy_course.votes([{"cluster": None, "target": 0.0, "em": 0.0}]) == (0.0, 0.0)


def test_of_two_heaviest_clusters_the_first_counts() -> None:
    wrong, right = {"cluster": 0, "target": 0.5, "em": 0.0}, {"cluster": 1, "target": 0.5, "em": 1.0}
    assert toy_course.votes([wrong, right]) == (0.5, 0.0)
    assert toy_course.votes([right, wrong]) == (0.5, 1.0)


def test_the_course_of_runs_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    toy = _toy(tmp_path, TWO_HOP)
    monkeypatch.setattr(toy_course, "WORLDS", {"two_hop": toy_table.ToyWorld(toy, 2)})
    run = tmp_path / "two_hop" / "grpo-seed1"
    question = train_world(0, TWO_HOP).questions()[0]
    rows = [
        {
            "input": prompt_text(question.text),
            "output": f"<answer> {answer} </answer><|im_end|>",
            "uid": f"u_{session}_0",
            "em": em,
            "score": em,
        }
        for session, (answer, em) in enumerate([(question.gold, 1.0), ("x y", 0.0)])
    ]
    _write(run / "rollouts" / "1.jsonl", rows)
    # Without clusters there is no vote, and without a search no AUC.
    assert toy_course.main([str(run)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split() == ["1", "0.500", "1.00"]
    assert toy_course.main([str(tmp_path / "two_hop" / "siop-seed1")]) == 2
    assert capsys.readouterr().err.startswith(f"error: no rollouts in {tmp_path}")
    for name in ("two_hop/siopp-seed1", "flat/siop-seed1", "two_hop"):
        with pytest.raises(SystemExit) as caught:
            toy_course.main([str(tmp_path / name)])
        error = capsys.readouterr().err
        assert f"{tmp_path / name}: not WORLD/METHOD-seedN" in error and "--only" not in error
        assert caught.value.code == 2
