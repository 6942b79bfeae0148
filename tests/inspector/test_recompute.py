"""The credit of a dump: under its own keys what the estimator gave, under others what a training would have given."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from dumped_run import questions, write_step
from method_helpers import search_rollout
from verl.utils.siop.errors import SiopConfigError
from verl.utils.siop.inspector.dump import Dump
from verl.utils.siop.inspector.recompute import Recipe, check_recipe, read_recipe, recompute
from verl.utils.siop.inspector.schema import DumpedRollout, DumpedSettings, DumpError
from verl.utils.siop.turn_utils import get_assistant_turn_ranges

ABLATIONS = Path(__file__).parents[2] / "config" / "ablation"


def dumped(folder: Path, **keys: Any) -> tuple[list[DumpedRollout], DumpedSettings]:
    write_step(folder, 1, questions(1), **keys)
    rollouts = [rollout for _, rollout in Dump(folder).read(1)]
    return rollouts, Dump(folder).settings(rollouts[0].settings)


OTHERS: list[dict[str, Any]] = [
    {"siop_baseline": "pooled", "siop_gain": "log"},
    {"siop_lambda": 0.0, "siop_return": "min"},
    {"siop_eta": 0.0},
    {"siop_reward_mode": "majority_binary", "siop_advantage_mode": "broadcast"},
    {"siop_reward_mode": "cluster_frequency", "siop_advantage_mode": "broadcast", "norm_adv_by_std_in_grpo": False},
    {"siop_reward_mode": "query_consensus", "siop_consensus_terminal": "support"},
    {"siop_baseline": "turn_group", "siop_turn_weight": 0.5, "gamma": 0.5},
    {"siop_baseline": "turn_index", "siop_scorer_noise": 0.01},
    {"siop_enable_two_pass": False},
]


@pytest.mark.parametrize("keys", OTHERS)
def test_under_other_keys_it_is_what_a_training_with_them_dumps(tmp_path: Path, keys: dict[str, Any]) -> None:
    rollouts, settings = dumped(tmp_path / "one")
    there, own = dumped(tmp_path / "other", **keys)
    found = recompute(rollouts, settings, Recipe("other", keys))
    assert found == recompute(there, own)
    broadcast = keys.get("siop_advantage_mode") == "broadcast" or keys.get("siop_enable_two_pass") is False
    for rollout in there:
        credit = found[rollout.uid]
        assert credit["rewards"] == (rollout.turn_rewards or [0.0] * len(rollout.turns))
        # GRPO's outcome advantage is computed by verl in another order.
        tolerance = 1e-6 if broadcast else 0.0
        assert credit["advantages"] == pytest.approx(rollout.turn_advantages, abs=tolerance, rel=0)
        assert credit["returns"] == pytest.approx(rollout.turn_returns, abs=tolerance, rel=0)
    assert found != recompute(rollouts, settings)


def test_votes_are_passed_on_by_what_the_tools_said(tmp_path: Path) -> None:
    batch = [search_rollout("u-1-0", "Peru", ["Lima is in Peru."])]
    batch += [search_rollout("u-1-0", "sol", ["Lima is in Peru.", "Peru pays in sol."]) for _ in range(2)]
    informed = {"siop_vote": "informed"}
    dumps = {}
    for name, keys in (("counted", {}), ("informed", informed)):
        write_step(tmp_path / name, 1, batch, **keys)
        rollouts = [rollout for _, rollout in Dump(tmp_path / name).read(1)]
        dumps[name] = rollouts, Dump(tmp_path / name).settings(rollouts[0].settings)
    (counted, settings), (there, own) = dumps.values()
    assert [rollout.votes for rollout in counted] == [None] * 3
    assert [rollout.votes for rollout in there] == pytest.approx([1 / 8, 7 / 8, 7 / 8])
    found = recompute(counted, settings, Recipe("informed", informed))
    assert found == recompute(there, own) != recompute(counted, settings)
    assert [found[rollout.uid]["advantages"] for rollout in there] == [rollout.turn_advantages for rollout in there]
    # And back, without reading anything.
    assert recompute(there, own, Recipe("", {"siop_vote": "count"})) == recompute(counted, settings)
    # What a training passed on stays, whatever its text looks like.
    for rollout in there:
        rollout.output = " " * len(rollout.output)
    assert recompute(there, own) == found


@pytest.mark.parametrize("keys", [{}, {"siop_baseline": "turn_index", "gamma": 0.0}, {"siop_outcome_weight": 0.5}])
def test_a_game_is_recomputed_from_the_scores_of_its_turns(tmp_path: Path, keys: dict[str, Any]) -> None:
    scored = [
        replace(one, turn_scores=[((row + turn) % 3) / 2 for turn in range(len(turns))], outcome=float(row % 2))
        for row, one in enumerate(questions(1))
        for turns in [get_assistant_turn_ranges(one.response_mask)]
    ]
    for name, own in (("one", {}), ("other", keys)):
        write_step(tmp_path / name, 1, scored, siop_reward_mode="verifiable", **own)
    there = [rollout for _, rollout in Dump(tmp_path / "other").read(1)]
    rollouts = [rollout for _, rollout in Dump(tmp_path / "one").read(1)]
    settings = Dump(tmp_path / "one").settings(rollouts[0].settings)
    found = recompute(rollouts, settings, Recipe("other", keys))
    assert any(any(credit["rewards"]) for credit in found.values())
    for rollout in there:
        assert found[rollout.uid]["rewards"] == rollout.turn_rewards
        assert found[rollout.uid]["advantages"] == rollout.turn_advantages


def test_calls_that_are_none_are_told(tmp_path: Path) -> None:
    rollouts, settings = dumped(tmp_path)
    rollouts[0].siop_tools = {"executed_calls": "odd"}
    with pytest.raises(DumpError, match="executed_calls are no names and arguments"):
        recompute(rollouts, settings, Recipe("", {"siop_reward_mode": "query_consensus"}))


def test_a_question_that_was_left_out_counts_nowhere(tmp_path: Path) -> None:
    rollouts, settings = dumped(tmp_path)
    whole = recompute(rollouts, settings)
    for rollout in rollouts:
        rollout.dropped = rollout.group == "u-1-0"
    found = recompute(rollouts, settings)
    kept = [rollout for rollout in rollouts if not rollout.dropped]
    assert found.keys() == whole.keys()
    assert all(not any(found[r.uid]["advantages"]) for r in rollouts if r.dropped)
    assert {uid: found[uid] for uid in (r.uid for r in kept)} == recompute(kept, settings)


def test_a_preset_keeps_what_would_take_new_scores() -> None:
    recipe = read_recipe(["ablation=release", "algorithm.siop_lambda=0.25"], ABLATIONS)
    assert recipe.keys == {"siop_baseline": "pooled", "siop_gain": "log", "siop_lambda": 0.25}
    assert set(recipe.kept) == {"siop_boundary", "siop_probe_opening", "siop_reference_prefix", "siop_reference_suffix"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("siop_boundary=assistant", "siop_boundary takes new scores"),
        ("siop_scorer_url=http://x", "siop_scorer_url has no part in the credit"),
        ("siop_gian=log", "siop_gian=log is not allowed; choose ablation=NAME or KEY=VALUE"),
        ("ablation=relaese", "choose one of .*release"),
        ("ablation=../ablation/siop", "choose one of"),
        ("ablation=grpo", "adv_estimator=grpo"),
        ("ablation=igpo", "siop_use_gold_ref"),
        ("siop_gain", "is not allowed"),
    ],
)
def test_what_cannot_be_recomputed_is_refused(text: str, message: str) -> None:
    with pytest.raises(SiopConfigError, match=message):
        read_recipe([text], ABLATIONS)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"gamma": "abc"}, "gamma='abc' is not allowed; choose a number from 0 to 1"),
        ({"gamma": 2}, "gamma=2 is not allowed"),
        ({"norm_adv_by_std_in_grpo": "x"}, "norm_adv_by_std_in_grpo='x' is not allowed"),
        ({"siop_gain": "no"}, "siop_gain='no' is not allowed"),
        ({"siop_lambda": "x"}, "siop_lambda='x' is not allowed"),
    ],
)
def test_a_recipe_is_refused_before_anybody_waits_for_it(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    _, settings = dumped(tmp_path)
    with pytest.raises(SiopConfigError, match=message):
        check_recipe([[settings]], Recipe("", keys))
    check_recipe([[settings]], Recipe("", {"gamma": 0.5}))


def test_a_recipe_is_allowed_if_one_run_can_be_recomputed(tmp_path: Path) -> None:
    _, settings = dumped(tmp_path)
    grpo = settings.model_copy(update={"algorithm": {"adv_estimator": "grpo"}})
    check_recipe([[grpo], [settings]], Recipe("", {"gamma": 0.5}))
    check_recipe([[]], Recipe("", {"gamma": 0.5}))  # no step has been dumped
    with pytest.raises(DumpError, match="adv_estimator=grpo"):
        check_recipe([[grpo]], Recipe("", {"gamma": 0.5}))


def test_presets_that_are_not_there_are_told(tmp_path: Path) -> None:
    with pytest.raises(SiopConfigError, match=f"there is no folder {tmp_path / 'none'}"):
        read_recipe(["ablation=release"], tmp_path / "none")


def test_a_dump_without_what_is_needed_is_refused_by_name(tmp_path: Path) -> None:
    rollouts, settings = dumped(tmp_path, siop_reward_mode="cluster_frequency")
    with pytest.raises(DumpError, match="has no evidence"):
        recompute(rollouts, settings, Recipe("", {"siop_reward_mode": "process"}))
    with pytest.raises(DumpError, match="has no support"):
        recompute(rollouts, settings, Recipe("", {"siop_reward_mode": "process", "siop_eta": 0.0}))
    with pytest.raises(SiopConfigError, match="siop_gain='no' is not allowed"):
        recompute(rollouts, settings, Recipe("", {"siop_gain": "no"}))
    settings.algorithm["use_kl_in_reward"] = True
    with pytest.raises(DumpError, match="use_kl_in_reward"):
        recompute(rollouts, settings)
    settings.algorithm["adv_estimator"] = "grpo"
    with pytest.raises(DumpError, match="adv_estimator=grpo"):
        recompute(rollouts, settings)
    rollouts[0].dump_version = 1
    settings.algorithm.update(adv_estimator="siop", use_kl_in_reward=False)
    with pytest.raises(DumpError, match="dump version 1"):
        recompute(rollouts, settings)
