"""What the trainer dumps is what the estimator had, bit for bit; older dumps are read as far as they go."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from dumped_run import HOSTILE, algorithm, estimate, fields, questions, rewrite, write_run, write_step
from method_helpers import byte_tokenizer
from verl.trainer.siop.rollouts import dump as writer
from verl.utils.siop.inspector.dump import Dump, Unfinished
from verl.utils.siop.inspector.schema import DUMP_VERSION, DumpError, Span, parse_rollout
from verl.utils.siop.inspector.summary import question_summary
from verl.utils.siop.inspector.views import question_view
from verl.utils.siop.siop_process_reward import SiopConfig
from verl.utils.siop.turn_utils import get_assistant_turn_ranges

OLD = {
    "input": "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n",
    "output": "<tool_call>a</tool_call><|im_end|>\n<|im_start|>user\n<tool_response>b</tool_response><|im_end|>\n"
    "<|im_start|>assistant\n<answer>c</answer><|im_end|>",
    "step": 3,
    "uid": "x-y_2_0",
    "support": [0.1, 0.2, 0.3],
    "turn_rewards": [0.1, 0.6],
    "em": 1.0,
}


@pytest.mark.parametrize("keys", [{}, {"siop_baseline": "pooled", "siop_gain": "log"}, {"gamma": 0.5}])
def test_the_dump_is_what_the_estimator_had(tmp_path: Path, keys: dict[str, Any]) -> None:
    rollouts = questions(1)
    seen = write_step(tmp_path, 1, rollouts, **keys)
    read = [rollout for _, rollout in Dump(tmp_path).read(1)]
    tokenizer = byte_tokenizer()
    assert len(read) == len(rollouts)
    for row, (dumped, rollout) in enumerate(zip(read, rollouts, strict=True)):
        turns = get_assistant_turn_ranges(rollout.response_mask)
        assert [span.tokens for span in dumped.turns] == turns
        assert "".join(dumped.text(span) for span in dumped.spans or ()) == dumped.output
        for span in dumped.spans or ():
            assert span.tokens is not None
            assert dumped.text(span) == tokenizer.decode(rollout.response_ids[slice(*span.tokens)])
            mask = set(rollout.response_mask[slice(*span.tokens)])
            assert mask == {int(span.role == "assistant")}
        for turn, (start, end) in enumerate(turns):
            assert dumped.turn_advantages is not None and dumped.turn_returns is not None
            for values, tensor in ((dumped.turn_advantages, "advantages"), (dumped.turn_returns, "returns")):
                of_tokens = torch.tensor([values[turn]] * (end - start), dtype=torch.float32)
                assert torch.equal(of_tokens, seen[tensor][row, start:end])
            rewards = dumped.turn_rewards or [0.0] * len(turns)
            assert torch.tensor(rewards[turn]) == seen["rewards"][row, end - 1]
        if dumped.support:
            assert dumped.boundaries is not None and dumped.gains is not None
            assert len(dumped.boundaries) == len(dumped.support) == len(dumped.gains) + 1
            assert dumped.boundaries[0] == 0 and dumped.boundaries[-1] == turns[-1][0]
    assert any(rollout.support for rollout in read)
    settings = Dump(tmp_path).settings(read[0].settings)
    assert settings.seed == 1 and settings.rollouts == 4
    assert all(settings.algorithm[key] == value for key, value in keys.items())


def test_other_settings_have_another_hash_and_the_scorers_address_has_no_part_in_it(tmp_path: Path) -> None:
    def digest(**keys: Any) -> str:
        write_step(tmp_path, 1, questions(1), **keys)
        return Dump(tmp_path).read(1)[0][1].settings

    one = digest()
    assert digest(siop_scorer_url="http://elsewhere:1") == one
    assert digest(siop_lambda=0.25) != one
    assert len(list(tmp_path.glob("settings-*.json"))) == 2


def test_another_estimator_dumps_what_it_has(tmp_path: Path) -> None:
    rollouts = questions(1)
    seen = estimate(rollouts, [[1.0]] * len(rollouts), algorithm())
    turns = [get_assistant_turn_ranges(one.response_mask) for one in rollouts]
    keys = [f"{one.uid}_{row}_0" for row, one in enumerate(rollouts)]
    config = algorithm()
    config.algorithm.adv_estimator = "grpo"
    settings = writer.settings_of(config, SiopConfig())
    records = [{"em": 1.0}] * len(rollouts)
    found = writer.columns(keys, fields(rollouts, seen), turns, records, byte_tokenizer(), settings, None)
    lines = [{name: found[name][row] for name in found} for row in range(len(rollouts))]
    read = [parse_rollout(json.dumps({**line, "step": 1}), "here") for line in lines]
    assert {rollout.method for rollout in read} == {"grpo"}
    assert [rollout.question for rollout in read] == [one.question for one in rollouts]
    assert {rollout.answer for rollout in read} == {"Paris", "paris", "Lyon", "Nice", ""}
    assert all(len(rollout.turn_advantages or ()) == len(rollout.turns) for rollout in read)
    view = question_view(read[:4])
    assert view["clusters"] == [] and "reward" not in view["rollouts"][0]["turns"][0]
    assert "advantage" in view["rollouts"][0]["turns"][0]


def test_tokens_with_values_of_their_own_are_kept() -> None:
    values = torch.tensor([0.5, 0.5, 0.0, 0.1, 0.2])
    assert writer.by_turn(values, [(0, 2), (3, 5)]) == [0.5, pytest.approx([0.1, 0.2])]


def test_a_kl_penalty_is_summed_as_the_estimator_does() -> None:
    values = torch.tensor([0.5, -0.25, 0.125, 1.0, 0.0])
    assert writer._sums(values, [(0, 2), (3, 4)]) == [0.375, 1.0]


def test_version_1_is_read_as_far_as_it_goes() -> None:
    rollout = parse_rollout(json.dumps(OLD), "here")
    assert (rollout.group, rollout.session, rollout.dump_version) == ("x-y", 2, 1)
    assert [(span.role, rollout.text(span)) for span in rollout.spans or ()] == [
        ("assistant", "<tool_call>a</tool_call><|im_end|>"),
        ("tool", "\n<|im_start|>user\n<tool_response>b</tool_response><|im_end|>\n<|im_start|>assistant\n"),
        ("assistant", "<answer>c</answer><|im_end|>"),
    ]
    assert rollout.turn_advantages is None and rollout.outcomes() == {"em": 1.0}
    assert all(span.tokens is None for span in rollout.spans or ())


def test_a_method_that_does_not_pay_turns_has_its_score(tmp_path: Path) -> None:
    write_step(tmp_path, 1, questions(1, number=1))
    rollouts = [rollout for _, rollout in Dump(tmp_path).read(1)]
    for rollout, score in zip(rollouts, (1.0, None, 0.0, 0.5), strict=True):
        rollout.turn_rewards, rollout.score = None, score
    summary = question_summary(rollouts)
    assert (summary["reward_min"], summary["reward_max"]) == (0.0, 1.0)


def test_outcomes_of_any_name_are_read() -> None:
    line = {**OLD, "em": None, "success": True, "outcome": {"solved": 0.5, "why": "text"}, "turn_scores": [0.0, 1.0]}
    assert parse_rollout(json.dumps(line), "here").outcomes() == {"success": 1.0, "solved": 0.5}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (json.dumps({**OLD, "dump_version": DUMP_VERSION + 1}), f"dump_version is {DUMP_VERSION + 1}"),
        (json.dumps({**OLD, "support": "much"}), "support"),
        (json.dumps({key: value for key, value in OLD.items() if key != "output"}), "output"),
        ("{", "JSON"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(line: str, message: str) -> None:
    with pytest.raises(DumpError, match=f"^file, line 3: .*{message}"):
        parse_rollout(line, "file, line 3")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"group": ""}, "group: it is missing"),
        ({"spans": None}, "spans: it is missing"),
        ({"turn_rewards": [0.5] * 9}, "turn_rewards: 9 values for [1-4] turns"),
        ({"turn_advantages": [0.5] * 9}, "turn_advantages: 9 values for"),
        ({"turn_returns": [[]] * 9}, "turn_returns: 9 values for"),
        ({"support": [0.5] * 9, "boundaries": [0]}, "support: 9 values at 1 boundaries"),
        ({"spans": [{"role": "tool", "tokens": [0, 1], "chars": [-3, -1]}]}, "spans: -3 to -1 of a text of"),
        ({"spans": [{"role": "tool", "tokens": [0, 1], "chars": [0, 10**9]}]}, "spans: 0 to 1000000000 of a text of"),
        ({"spans": [{"role": "assistant", "tokens": [0, 1], "chars": [0, 1]}], "gains": None, "turn_rewards": [],
          "turn_returns": None, "turn_advantages": [[]]}, "turn_advantages: a turn without values"),
    ],
)  # fmt: skip
def test_values_that_are_not_those_of_the_turns_are_refused(
    tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    write_step(tmp_path, 1, questions(1))
    rewrite(tmp_path / "1.jsonl", **fields)
    with pytest.raises(DumpError, match=f"line 1: {message}"):
        Dump(tmp_path).read(1)


HALF = "\ud83d"


@pytest.mark.parametrize("text", [HALF, f"a{HALF}b", f"{HALF}{HALF}c", "\udfff", "\U0001f600", "\u2028"])
def test_half_a_character_is_no_reason_to_lose_a_step(tmp_path: Path, text: str) -> None:
    write_step(tmp_path, 1, questions(1))
    before = rewrite(tmp_path / "1.jsonl", question=text, answer=text)
    read = [rollout for _, rollout in Dump(tmp_path).read(1)]
    assert {len(rollout.question or "") for rollout in read} == {len(text)}
    assert [rollout.output for rollout in read] == [line["output"] for line in before]
    # A call's arguments are JSON in JSON.
    call = json.dumps({"name": "search", "arguments": {"query": text}})
    read[0].output = f"<tool_call>{call}</tool_call>"
    read[0].spans = [Span(role="assistant", tokens=(0, 1), chars=(0, len(read[0].output)))]
    json.dumps(question_view(read[:1]), ensure_ascii=False).encode()


def test_what_is_no_number_is_named(tmp_path: Path) -> None:
    write_step(tmp_path, 1, questions(1))
    rewrite(tmp_path / "1.jsonl", score=float("nan"), evidence=float("inf"))
    read = [rollout for _, rollout in Dump(tmp_path).read(1)]
    assert question_view(read[:4])["not_finite"] == ["evidence", "score"]


@pytest.mark.parametrize("digest", ["../settings", "a/b", "none there"])
def test_settings_lie_beside_the_dump(tmp_path: Path, digest: str) -> None:
    write_step(tmp_path, 1, questions(1))
    with pytest.raises(DumpError, match="which is no name of a file"):
        Dump(tmp_path).settings(digest)
    assert [one.seed for one in Dump(tmp_path).all_settings()] == [1]


def test_a_file_that_is_being_written_is_not_read_yet(tmp_path: Path) -> None:
    write_step(tmp_path, 1, questions(1))
    path = tmp_path / "1.jsonl"
    whole = path.read_bytes()
    for size in (0, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(Unfinished):
            Dump(tmp_path).read(1)
    path.write_bytes(whole.replace(b'"step": 1', b'"step": 2', 1))
    with pytest.raises(DumpError, match="line 1: step is 2"):
        Dump(tmp_path).read(1)


def test_a_folder_without_a_dump_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DumpError, match="does not exist"):
        Dump(tmp_path / "none")
    with pytest.raises(DumpError, match="holds no dump"):
        Dump(tmp_path)
    run = write_run(tmp_path / "run", steps=1)
    assert Dump(run).name == Dump(run / "rollouts").name == "run"
    assert HOSTILE in Dump(run).read(1)[1][1].output
    with pytest.raises(DumpError, match="it is a file"):
        Dump(run / "rollouts" / "1.jsonl")
