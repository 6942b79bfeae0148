"""The agent loop of games with a scripted model: scores and turns always agree, whatever becomes of a turn."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from agent_loops import agent_loop
from hydra import compose, initialize_config_module
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from method_helpers import byte_tokenizer
from omegaconf import OmegaConf
from verl.trainer.siop.checks.data import Use
from verl.trainer.siop.checks.policy import load_policy
from verl.trainer.siop.rollouts.game_loop import VerifiedGameLoop
from verl.trainer.siop.rollouts.rows import VALIDATES, group_of, outcomes_of, turn_scores_of
from verl.trainer.siop.rollouts.state_loop import VerifiedStateLoop, _opening
from verl.utils.siop.envs.build import row_of
from verl.utils.siop.envs.games import GAMES, make
from verl.utils.siop.errors import GameError, RolloutError, SiopConfigError
from verl.utils.siop.siop_process_reward import SiopConfig
from verl.utils.siop.turn_utils import get_assistant_turn_ranges
from verl.workers.rollout.replica import TokenOutput

from examples.games.tokenizer import END, game_tokenizer
from examples.toy_world.warm_start import new_model

ROOT = Path(__file__).parents[2]
SPEC = {"size": 4, "board": "1.3434122143432."}  # (1, 2) is 2, (4, 4) is 1
RIGHT, WRONG, LAST = (f"<action> {words} </action> {END}" for words in ("1 2 2", "1 2 3", "4 4 1"))
INVALID = f"no {END}"
LOOP = f"{ROOT}/config/game_loop.yaml"


class Model:
    """Plays the turns of a script, each cut at the number of tokens that it may have."""

    def __init__(self, tokenizer: Any, turns: Sequence[str]) -> None:
        self.tokenizer, self.turns, self.prompts = tokenizer, list(turns), []  # type: ignore[var-annotated]

    async def generate(self, *, prompt_ids: list[int], sampling_params: dict[str, Any], **kwargs: Any) -> TokenOutput:
        self.prompts.append(self.tokenizer.decode(prompt_ids))
        ids = self.tokenizer.encode(self.turns.pop(0), add_special_tokens=False)[: sampling_params["max_tokens"]]
        fields = {"global_steps": 7, "min_global_steps": 7, "max_global_steps": 7 + len(self.prompts)}
        return TokenOutput(token_ids=ids, log_probs=[-0.5] * len(ids), extra_fields=fields)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return game_tokenizer()


@pytest.fixture(scope="module")
def config() -> Any:
    with initialize_config_module("verl.trainer.siop.config", version_base=None):
        return compose(
            "siop_trainer",
            overrides=[
                "data.train_files=x",
                "data.val_files=x",
                "actor_rollout_ref.model.path=m",
                f"hydra.searchpath=[pkg://verl.trainer.config,file://{ROOT / 'config'}]",
                "experiment=games",
                f"actor_rollout_ref.rollout.agent.agent_loop_config_path={LOOP}",
            ],
        )


def _play(
    turns: Sequence[str], tokenizer: Any, config: Any, extra: Any = None, limits: Any = None, **options: Any
) -> tuple[Any, Model]:
    config = OmegaConf.create(OmegaConf.to_container(config, resolve=False))
    for key, value in (limits or {}).items():
        OmegaConf.update(config.actor_rollout_ref.rollout, key, value, force_add=True)
    model, row = Model(tokenizer, turns), row_of("sudoku", "s", SPEC, 0, "train", bare=True)

    async def play() -> Any:
        loop = agent_loop(VerifiedGameLoop, config, tokenizer, model, name="verified_game", **options)
        return await loop.run({}, raw_prompt=row["prompt"], extra_info={**row["extra_info"], **(extra or {})})

    return asyncio.run(play()), model


def _scores(output: Any) -> list[float]:
    """The scores, after a look at whether they are as many as the turns in the mask."""
    assert len(output.response_mask) == len(output.response_ids) == len(output.response_logprobs)
    scores: list[float] = output.extra_fields["turn_scores"]
    assert len(get_assistant_turn_ranges(output.response_mask)) == len(scores)
    return scores


def test_a_game_is_played_to_its_end(tokenizer: Any, config: Any) -> None:
    output, model = _play([RIGHT, LAST, RIGHT], tokenizer, config)
    assert _scores(output) == [1.0, 1.0] and output.reward_score == 1.0 and output.num_turns == 4
    assert outcomes_of(output.extra_fields) == {
        "success": 1.0,
        "completion": 1.0,
        "oracle_rate": 1.0,
        "oracle_error": 0.0,
        "invalid": 0.0,
        "truncated": 0.0,
        "ceiling_success": 1.0,
        "ceiling_completion": 1.0,
    }
    assert output.extra_fields["actions"] == ["<action> 1 2 2 </action>", "<action> 4 4 1 </action>"]
    # Of the engine: the first weights, and the newest.
    assert (output.extra_fields["min_global_steps"], output.extra_fields["max_global_steps"]) == (7, 9)
    text = tokenizer.decode(output.prompt_ids + output.response_ids)
    assert "right \n 1 2 3 4" in text and model.prompts[1] + " " + LAST == text


def test_the_text_is_what_the_warm_start_trains_on(tokenizer: Any, config: Any) -> None:
    from examples.games.tokenizer import observation_text, opening_text

    _, model = _play([WRONG, LAST], tokenizer, config)
    board = "1 . 3 4\n3 4 1 2\n2 1 4 3\n4 3 2 ."
    pieces = opening_text(board) + WRONG + observation_text(f"wrong\n{board}")
    assert model.prompts[1] == tokenizer.decode(tokenizer.encode(pieces, add_special_tokens=False))
    assert tokenizer.unk_token not in model.prompts[1]


def test_refused_and_invalid_turns_have_their_scores(tokenizer: Any, config: Any) -> None:
    output, model = _play([WRONG, INVALID], tokenizer, config, invalid_score=-1.0)
    assert _scores(output) == [0.0, -1.0]
    found = outcomes_of(output.extra_fields)
    assert (found["success"], found["completion"], found["oracle_rate"], found["invalid"]) == (0.0, 0.0, 0.0, 0.5)
    _, model = _play([INVALID, RIGHT], tokenizer, config)
    assert "invalid : no action ; write <action> ROW COLUMN DIGIT </action>" in model.prompts[1]
    assert tokenizer.unk_token not in model.prompts[1]


def test_a_cut_turn_has_the_invalid_score(tokenizer: Any, config: Any) -> None:
    output, _ = _play(["1 " * 400], tokenizer, config, limits={"response_length": 30}, invalid_score=-1.0)
    assert _scores(output) == [-1.0] and len(output.response_ids) == 30
    found = outcomes_of(output.extra_fields)
    assert (found["truncated"], found["invalid"], found["success"]) == (1.0, 1.0, 0.0)
    # The turn fits, the observation does not.
    output, _ = _play([RIGHT, LAST], tokenizer, config, limits={"response_length": 20})
    assert _scores(output) == [1.0]
    found = outcomes_of(output.extra_fields)
    assert (found["truncated"], found["invalid"], found["success"], found["completion"]) == (1.0, 0.0, 0.0, 0.5)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    turns=st.lists(st.sampled_from([RIGHT, WRONG, LAST, INVALID, "1 2 3 " * 30, f"{END}"]), min_size=2, max_size=2),
    length=st.integers(1, 90),
)
def test_scores_and_turns_agree(turns: list[str], length: int, tokenizer: Any, config: Any) -> None:
    output, _ = _play(turns, tokenizer, config, limits={"response_length": length})
    scores = _scores(output)
    assert len(output.response_ids) <= length and 1 <= len(scores) <= 2
    assert set(outcomes_of(output.extra_fields)) >= {"success", "completion", "oracle_rate", "invalid"}


@pytest.mark.parametrize(
    ("turn", "opens", "played"),
    [
        ("<think> <action> 1 2 2 </action>", "", None),  # never closed
        ("[THINK] <action> 1 2 3 </action> [/THINK] <action> 1 2 2 </action>", "", "1 2 2"),
        ("<action> 1 2 2 </action> <think> or <action> 1 2 3 </action> </think>", "", "1 2 2"),
        ("<action> 1 2 3 </action> </think> <action> 1 2 2 </action>", "<think>", "1 2 2"),
        ("<action> 1 2 2 </action>", "<think>", None),  # the template has opened it
    ],
)
def test_an_action_in_thinking_is_none(turn: str, opens: str, played: str | None, config: Any) -> None:
    loop = object.__new__(VerifiedGameLoop)
    loop.tokenizer = byte_tokenizer()
    text = loop._spoken(loop.tokenizer.encode(turn), bool(opens))
    env = make("sudoku")
    env.reset(SPEC)
    assert env.step(text).right == (played is not None)


def test_flipped_scores_are_measured(tokenizer: Any, config: Any) -> None:
    output, _ = _play([RIGHT, LAST], tokenizer, config, flip=1.0)
    assert _scores(output) == [0.0, 0.0]
    found = outcomes_of(output.extra_fields)
    assert (found["oracle_rate"], found["oracle_error"], found["success"]) == (1.0, 1.0, 1.0)


def test_what_cannot_be_played_is_refused(tokenizer: Any, config: Any) -> None:
    with pytest.raises(GameError, match="game='chess' is not allowed"):
        _play([RIGHT], tokenizer, config, extra={"game": "chess"})
    with pytest.raises(GameError, match="not JSON"):
        _play([RIGHT], tokenizer, config, extra={"spec": "{"})
    with pytest.raises(RolloutError, match="max_assistant_turns=1 is below the 2 turns"):
        _play([RIGHT], tokenizer, config, limits={"multi_turn.max_assistant_turns": 1})
    with pytest.raises(RolloutError, match="no tokens for turn 1"):
        _play([""], tokenizer, config)
    with pytest.raises(GameError, match="flip=2"):
        _play([RIGHT], tokenizer, config, flip=2.0)


def test_scores_of_turns_are_a_list() -> None:
    for scores, expected in (
        (None, None),
        ([], None),
        ([1.0, 0.0], [1.0, 0.0]),
        (np.array([0.0]), [0.0]),
        ((np.float32(0.5),), [0.5]),
    ):
        assert turn_scores_of({"turn_scores": scores}) == expected
    assert type(turn_scores_of({"turn_scores": [np.float32(0.5)]})[0]) is float  # type: ignore[index]
    for wrong in (1.0, "1", {0: 1.0}, np.array(1.0)):
        with pytest.raises(RolloutError, match="needs a list, one score a turn"):
            turn_scores_of({"turn_scores": wrong})


# ---------------------------------------------------------------------- a rollout for every turn
def _play_states(
    turns: Sequence[str], tokenizer: Any, config: Any, validates: bool | None = False, **options: Any
) -> Any:
    model, row = Model(tokenizer, turns), row_of("sudoku", "s", SPEC, 0, "train", bare=True)

    async def play() -> Any:
        VALIDATES.set(validates)
        loop = agent_loop(VerifiedStateLoop, config, tokenizer, model, name="verified_game", **options)
        return await loop.run({}, raw_prompt=row["prompt"], extra_info=row["extra_info"])

    return asyncio.run(play()), model


def test_at_each_state_actions_are_compared_and_a_right_one_is_played(tokenizer: Any, config: Any) -> None:
    outputs, model = _play_states([WRONG, RIGHT, INVALID, LAST, WRONG, LAST], tokenizer, config, candidates=3)
    assert [output.extra_fields["group"] for output in outputs] == [0, 0, 0, 1, 1, 1]
    # What was played comes last in its group.
    scores = [score for output in outputs for score in _scores(output)]
    assert scores[:3] == [0.0, 0.0, 1.0] and sum(scores[3:]) == 2 and scores[-1] == 1.0
    assert [output.extra_fields["game"]["played"] for output in outputs] == [[]] * 3 + [
        [RIGHT.removesuffix(f" {END}")]
    ] * 3
    # All of a state have its prompt, and the second state's is the board alone.
    assert len(set(model.prompts[:3])) == len(set(model.prompts[3:])) == 1
    assert "1 2 3 4" in model.prompts[3] and "right" not in model.prompts[3] and "action" not in model.prompts[3]
    found = outcomes_of(outputs[-1].extra_fields)
    assert outputs[-1].reward_score == found["success"] == found["completion"] == 1.0
    # In the second state the cell of the wrong action is filled.
    assert (found["oracle_rate"], found["invalid"]) == (pytest.approx(3 / 6), pytest.approx(2 / 6))


def test_an_evaluation_draws_one_action_at_a_state(tokenizer: Any, config: Any) -> None:
    outputs, _ = _play_states([RIGHT, LAST], tokenizer, config, validates=True)
    assert len(outputs) == 2 and outputs[-1].reward_score == 1.0
    assert outputs[-1].extra_fields["actions"] == ["<action> 1 2 2 </action>", "<action> 4 4 1 </action>"]


def test_a_state_whose_actions_are_all_cut_ends_the_game(tokenizer: Any, config: Any) -> None:
    config = OmegaConf.create(OmegaConf.to_container(config, resolve=False))
    config.actor_rollout_ref.rollout.response_length = 12
    long = "1 " * 40
    outputs, _ = _play_states([long, RIGHT, long, long], tokenizer, config, candidates=2, invalid_score=-1.0)
    assert [_scores(output) for output in outputs] == [[-1.0], [1.0], [-1.0], [-1.0]]
    found = outcomes_of(outputs[-1].extra_fields)
    assert (found["success"], found["completion"], found["truncated"], found["invalid"]) == (0.0, 0.5, 1.0, 0.75)


def test_actions_of_a_state_are_judged_apart(tokenizer: Any, config: Any) -> None:
    outputs, _ = _play_states([RIGHT] * 64 + [LAST] * 64, tokenizer, config, candidates=64, flip=0.5)
    scores = [_scores(output)[0] for output in outputs[:64]]
    assert 10 < sum(scores) < 54  # each has a chance of its own to be turned round
    with pytest.raises(GameError, match="candidates=1 is not allowed; choose a whole number from 2"):
        _play_states([RIGHT], tokenizer, config, candidates=1)
    with pytest.raises(RolloutError, match="must be SiopAgentLoopManager"):
        _play_states([RIGHT], tokenizer, config, validates=None)
    with pytest.raises(RolloutError, match="does not end with its board"):
        _opening([{"role": "user", "content": "Play."}], "1 . 3 4")


def test_groups_are_within_a_session() -> None:
    assert group_of("q_3_5", {}) == ("q", 3)
    assert group_of("q_3_5", {"group": 0}) == ("q_3_0", 5)


# ---------------------------------------------------------------------- before the start
@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    folder = tmp_path_factory.mktemp("model")
    new_model(tokenizer, 0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _policy(config: Any, model: Path, **keys: Any) -> tuple[Any, Any]:
    config = OmegaConf.create(OmegaConf.to_container(config, resolve=False))
    config.actor_rollout_ref.model.path = str(model)
    for key, value in keys.items():
        OmegaConf.update(config.actor_rollout_ref.rollout.agent, key, value)
    return config, load_policy(config)


def test_rows_of_games_need_no_label_and_a_board_that_can_be_played(config: Any, model: Path) -> None:
    made, policy = _policy(config, model)
    assert policy.scores_itself and set(policy.scoring_agents) == {"verified_game"}
    use = Use.of("data.train_files", made, SiopConfig(siop_reward_mode="verifiable"), policy)
    row = row_of("sudoku", "s", SPEC, 0, "train", bare=True)
    assert use.check(row) == ""

    def told(**extra: Any) -> str:
        return use.check({**row, "extra_info": {**row["extra_info"], **extra}})

    assert "game='chess' is not allowed; choose one of sudoku" in told(game="chess")
    assert "several solutions" in told(spec=json.dumps({"size": 4, "board": "." * 16}))
    assert "is not JSON" in told(spec=None)
    assert "is not JSON" in told(spec="[" * 100_000)
    assert "extra_info.ceiling_success is None" in told(ceiling_success=None)
    assert "extra_info.ceiling_success is nan" in told(ceiling_success=math.nan)
    assert told(ceiling_success=1) == ""
    assert "extra_info is None, needs a struct" in use.check({**row, "extra_info": None})
    told_of_agent = use.check({**row, "agent_name": "tool_agent"})
    assert "siop_reward_mode=verifiable needs an agent loop that scores turns" in told_of_agent
    assert "choose verified_game" in told_of_agent


def test_states_are_compared_by_verified_turns_alone(config: Any, model: Path) -> None:
    states = str(ROOT / "config" / "game_states.yaml")
    made, _ = _policy(config, model, agent_loop_config_path=LOOP)
    for name, value in (("adv_estimator", "grpo"), ("siop_reward_mode", "siop"), ("siop_outcome_weight", 0.5)):
        made.algorithm = {
            "adv_estimator": "siop",
            "siop_reward_mode": "verifiable",
            "siop_outcome_weight": 0,
            name: value,
        }
        with pytest.raises(SiopConfigError, match=rf"algorithm\.{name}={value} is not allowed with it"):
            _policy(made, model, agent_loop_config_path=states)
        made.trainer.val_only = True
        assert _policy(made, model, agent_loop_config_path=states)[1].scores_itself
        made.trainer.val_only = False


class Deeper(VerifiedGameLoop):
    """A loop of a user's."""

    def __init__(self, *args: Any, depth: int = 3, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.depth = depth


def test_a_subclass_has_options_of_its_own() -> None:
    assert Deeper.judge_of({"name": "mine", "depth": 4, "flip": 0.5}).flip == 0.5
    with pytest.raises(GameError, match=r"width=1 is no option; choose one of oracle, .*, module, depth"):
        Deeper.judge_of({"width": 1})
    with pytest.raises(GameError, match="depth=4 is no option"):
        VerifiedGameLoop.judge_of({"depth": 4})


def test_an_oracle_that_breaks_its_word_is_known_before_the_start(
    config: Any, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, policy = _policy(config, model)
    use = Use.of("data.train_files", made, SiopConfig(siop_reward_mode="verifiable"), policy)
    row = row_of("sudoku", "s", SPEC, 0, "train", bare=True)
    monkeypatch.setitem(GAMES, "sudoku", replace(GAMES["sudoku"], best=lambda game: frozenset()))
    assert "sudoku: its oracle must give a frozenset of actions" in use.check(row)


def test_a_search_is_refused_for_games_that_have_none(config: Any, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "loop.yaml"
    text = Path(LOOP).read_text()
    file.write_text(text.replace("oracle: exact", "oracle: search").replace("simulations: null", "simulations: 30"))
    made, policy = _policy(config, model, agent_loop_config_path=str(file))
    use = Use.of("data.train_files", made, SiopConfig(siop_reward_mode="verifiable"), policy)
    told = use.check(row_of("sudoku", "s", SPEC, 0, "train", bare=True))
    assert "oracle=search is not allowed with the game 'sudoku', which has no tree search; use exact" in told
    assert use.check(row_of("tictactoe", "t", {"board": "." * 9, "seed": 1}, 0, "train", bare=True)) == ""


def test_a_wrong_agent_loop_file_is_refused(config: Any, model: Path, tmp_path: Path) -> None:
    text = Path(LOOP).read_text()
    for old, new, message in (
        ("oracle: exact", "oracle: mcts", "oracle='mcts' is not allowed; choose one of exact, search"),
        ("flip: 0.0", "flip: -1", "flip=-1"),
        ('module: ""', "module: no.such.module", "No module named 'no'"),
        ("VerifiedGameLoop", "Nothing", "Nothing"),
        ("flip: 0.0", "flipp: 0.2", "flipp=0.2 is no option; choose one of oracle, simulations, flip, invalid_score"),
        ("flip: 0.0", "flip: true", "flip=True is not allowed"),
        (
            'module: ""',
            'module: ""\n- {name: verified_game, _target_: verl.trainer.siop.rollouts.game_loop.VerifiedGameLoop}',
            "two agent loops have the same name",
        ),
        ('module: ""', "module: 5", "module=5 is not allowed; needs the name of a Python module"),
    ):
        file = tmp_path / "loop.yaml"
        file.write_text(text.replace(old, new))
        with pytest.raises(SiopConfigError, match="agent_loop_config_path=") as error:
            _policy(config, model, agent_loop_config_path=str(file))
        assert message in str(error.value)
