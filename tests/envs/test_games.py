"""The games as a player meets them: actions, turns, outcomes, and what is refused."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from verl.utils.siop.envs.base import Action, InvalidAction, Rules, read_action
from verl.utils.siop.envs.games import (
    GAMES,
    Env,
    Game,
    Judge,
    find,
    make,
    oracle_play,
    prompt_of,
    register_game,
    written,
)
from verl.utils.siop.envs.tictactoe import TicTacToe
from verl.utils.siop.errors import GameError

SUDOKU = {"size": 4, "board": "1.3434122143432."}  # (1, 2) is 2, (4, 4) is 1
MINES = {"size": 3, "mines": [8], "start": 5, "flags": True}
TICTACTOE = {"board": "XX.OO....", "seed": 3}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("<action> 1 2 3 </action>", ["1", "2", "3"]),
        ("<action>1,2,3</action> and then <ACTION> 4 </Action>", ["4"]),
        ("<think> <action> 9 </action> </think> <action> 1 </action>", ["1"]),
        ("<action> <action> 7 </action>", ["7"]),
    ],
)
def test_the_last_complete_action_outside_of_thinking_counts(text: str, words: list[str]) -> None:
    assert read_action(text) == words


@pytest.mark.parametrize("text", ["", "1 2 3", "<action> 1 2 3", "</action> 1"])
def test_a_text_without_an_action(text: str) -> None:
    with pytest.raises(InvalidAction, match="no action"):
        read_action(text)


@pytest.mark.parametrize("words", ["1 2 2", "01 002 2", "1, 2, 2"])
def test_actions_are_compared_as_values(words: str) -> None:
    env = make("sudoku")
    env.reset(SUDOKU)
    step = env.step(f"so <action> {words} </action>")
    assert (step.score, step.right, step.valid, step.done, step.completion) == (1.0, True, True, False, 0.5)
    assert step.observation.startswith("right\n1 2 3 4\n")


@pytest.mark.parametrize(
    ("name", "spec", "action", "told"),
    [
        ("sudoku", SUDOKU, "<action> 1 1 1 </action>", "filled"),
        ("sudoku", SUDOKU, "<action> 1 2 </action>", "three numbers"),
        ("sudoku", SUDOKU, "<action> 1 2 5 </action>", "numbers from 1 to 4"),
        ("sudoku", SUDOKU, "<action> 1 two 2 </action>", "numbers from 1 to 4"),
        ("sudoku", SUDOKU, "<action> 1 2 ² </action>", "numbers from 1 to 4"),
        ("sudoku", SUDOKU, "1 2 2", "no action"),
        ("tictactoe", TICTACTOE, "<action> 1 </action>", "taken"),
        ("tictactoe", TICTACTOE, "<action> 0 </action>", "numbers from 1 to 9"),
        ("tictactoe", TICTACTOE, "<action> 1 3 </action>", "one number"),
        ("minesweeper", MINES, "<action> 1 1 </action>", "reveal or flag and two numbers"),
        ("minesweeper", MINES, "<action> reveal 2 3 </action>", "open"),
        ("minesweeper", {**MINES, "flags": False}, "<action> flag 1 1 </action>", "reveal and two numbers"),
    ],
)
def test_an_action_in_another_form_costs_its_turn_and_says_why(
    name: str, spec: Mapping[str, Any], action: str, told: str
) -> None:
    env = make(name, Judge(invalid_score=-1.0))
    before = env.reset(spec)
    step = env.step(action)
    assert step.observation == f"invalid : {told} ; write <action> {env.rules.form} </action>\n{before}"
    assert (step.score, step.valid, step.right, step.success, step.completion) == (-1.0, False, False, False, 0.0)
    assert env.turns == 1


def test_a_refused_digit_costs_the_success() -> None:
    env = make("sudoku")
    env.reset(SUDOKU)
    assert env.step("<action> 1 2 3 </action>").score == 0.0
    last = env.step("<action> 1 2 2 </action>")
    assert (last.score, last.done, last.success, last.completion) == (1.0, True, False, 0.5)
    with pytest.raises(GameError, match="over"):
        env.step("<action> 4 4 1 </action>")


def test_minesweeper_counts_what_the_free_reveal_left() -> None:
    env = make("minesweeper")
    # The free reveal opens itself alone and shows both mines to be among five cells.
    assert env.reset({"size": 3, "mines": [6, 8], "start": 7, "flags": True}) == ". . .\n. . .\n. 2 ."
    assert env.rules.turns == 6 + 2
    first = env.step("<action> reveal 2 2 </action>")
    assert (first.score, first.success) == (0.0, False)
    assert first.completion == pytest.approx(1 / 6)
    assert env.step("<action> flag 3 3 </action>").score == 0.0  # a mine, but not for certain
    assert env.step("<action> flag 3 3 </action>").valid is False
    mine = env.step("<action> reveal 3 3 </action>")
    assert mine.done and not mine.success and mine.observation.startswith("mine\n")
    assert mine.completion < 1


def test_tictactoe_meets_the_same_opponent_in_every_rollout() -> None:
    replies = set()
    for _ in range(3):
        env = make("tictactoe")
        env.reset({"board": "." * 9, "seed": 5})
        replies.add(env.step("<action> 5 </action>").observation)
    assert len(replies) == 1
    others = set()
    for seed in range(20):
        env = make("tictactoe")
        env.reset({"board": "." * 9, "seed": seed})
        others.add(env.step("<action> 5 </action>").observation)
    assert len(others) == 4  # any corner


def test_tictactoe_ends_with_a_win_a_draw_or_a_loss() -> None:
    env = make("tictactoe")
    env.reset(TICTACTOE)
    won = env.step("<action> 3 </action>")
    assert won.done and won.success and won.score == 1.0 and won.observation.startswith("end\n")
    env.reset(TICTACTOE)
    lost = env.step("<action> 9 </action>")
    assert lost.done and not lost.success and lost.score == 0.0


@settings(max_examples=80)
@given(st.integers(0, 10**6), st.sampled_from(["sudoku", "tictactoe", "minesweeper"]))
def test_whatever_is_played_the_numbers_keep_their_meaning(seed: int, name: str) -> None:
    rng = random.Random(seed)
    spec: dict[str, Any] = {"sudoku": SUDOKU, "tictactoe": {"board": "." * 9, "seed": seed}, "minesweeper": MINES}[name]
    env = make(name)
    env.reset(spec)
    turns, scores, completion = 0, [], 0.0
    while not env.done:
        words = [rng.choice(["reveal", "flag", "1", "2", "3", "9"]) for _ in range(rng.randint(1, 3))]
        step = env.step(f"<action> {' '.join(words)} </action>")
        assert step.score == float(step.right) and (step.valid or not step.right)
        assert completion <= step.completion <= 1 and (step.completion == 1) == step.success
        turns, completion = turns + 1, step.completion
        scores.append(step.score)
    assert 1 <= turns <= env.rules.turns


def test_flipped_scores_have_the_error_that_was_asked_for() -> None:
    wrong = []
    for seed in range(600):
        env = make("sudoku", Judge(flip=0.2), seed)
        env.reset(SUDOKU)
        while not env.done:
            step = env.step(f"<action> {env.rules.turns - env.turns} 2 2 </action>")
            if step.valid:
                wrong.append(step.score != float(step.right))
    assert 0.15 < sum(wrong) / len(wrong) < 0.25


def test_a_tree_search_can_give_the_scores() -> None:
    env = make("tictactoe", Judge(oracle="search", simulations=200))
    env.reset({"board": "X...O....", "seed": 1})
    paid = 0
    for cell in range(2, 10):
        env.reset({"board": "X...O....", "seed": 1})
        if cell != 5:
            paid += int(env.step(written((cell,))).score)
    assert paid <= 3  # one cell a search, though several are right
    with pytest.raises(GameError, match="no tree search"):
        make("sudoku", Judge(oracle="search", simulations=10))


@pytest.mark.parametrize(
    ("name", "spec", "message"),
    [
        ("sudoku", {"size": 5, "board": "." * 25}, "size=5 is not allowed; choose one of 4, 6, 9"),
        ("sudoku", {"size": 4, "board": "1234"}, "needs 16 characters"),
        ("sudoku", {"size": 4, "board": "5234341221434321"}, "needs 16 characters of .1234"),
        ("sudoku", {"size": 4, "board": "11.............."}, "row 1, column 1 holds 1"),
        ("sudoku", {"size": 4, "board": "123....4........"}, "no solution"),
        ("sudoku", {"size": 4, "board": "." * 16}, "16 blank cells, and so several solutions"),
        ("sudoku", {"size": 4, "board": "1" * 200_000}, "needs 16 characters"),
        ("sudoku", {"size": 9, "board": "123456789" + "." * 72}, "several solutions"),
        ("minesweeper", {**MINES, "mines": [[1]]}, "mines=[[1]]"),
        ("minesweeper", {**MINES, "mines": [1.0]}, "mines=[1.0]"),
        ("minesweeper", {**MINES, "mines": [True]}, "mines=[True]"),
        ("sudoku", {"size": 4, "board": "1234341221434321"}, "no blank cell"),
        ("sudoku", {"board": "." * 16}, "size=None"),
        ("tictactoe", {"board": "XXX......", "seed": 1}, "impossible"),
        ("tictactoe", {"board": "XXXOO....", "seed": 1}, "the game has ended"),
        ("tictactoe", {"board": "X" * 8, "seed": 1}, "9 characters"),
        ("tictactoe", {"board": "." * 9, "seed": "1"}, "seed='1'"),
        ("minesweeper", {**MINES, "mines": [9]}, "mines="),
        ("minesweeper", {**MINES, "mines": [1, 1]}, "mines="),
        ("minesweeper", {**MINES, "start": 8}, "start=8"),
        ("minesweeper", {**MINES, "start": 0}, "solved by the free reveal"),
        ("minesweeper", {**MINES, "size": 30}, "size=30"),
        ("minesweeper", {**MINES, "flags": 1}, "flags=1"),
        ("minesweeper", {**MINES, "mine": [1]}, "mine=[1] is not allowed; the spec has size, mines, start, flags"),
        ("sudoku", {"size": 4, "board": "1.3434122143432.", "blanks": 2}, "blanks=2"),
        ("tictactoe", {"board": "." * 9, "seed": 1, "size": 3}, "size=3"),
    ],
)
def test_an_impossible_board_is_one_clear_message(name: str, spec: Mapping[str, Any], message: str) -> None:
    with pytest.raises(GameError) as error:
        make(name).reset(spec)
    assert len(str(error.value)) < 400
    assert message in str(error.value) and name in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"oracle": "mcts"}, "oracle='mcts' is not allowed; choose one of exact, search"),
        ({"oracle": "search"}, "simulations=None"),
        ({"simulations": 10}, "simulations=10 is not allowed with oracle=exact"),
        ({"oracle": "search", "simulations": 0}, "simulations=0"),
        ({"flip": 1.5}, "flip=1.5"),
        ({"invalid_score": 1.0}, "invalid_score=1.0"),
        ({"oracle": "search", "simulations": 100.5}, "simulations=100.5 is not allowed; choose a whole number"),
        ({"oracle": "search", "simulations": True}, "simulations=True"),
        ({"flip": True}, "flip=True"),
        ({"flip": "0.2"}, "flip='0.2'"),
        ({"flip": float("nan")}, "flip=nan"),
        ({"invalid_score": None}, "invalid_score=None"),
    ],
)
def test_a_wrong_judge_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(GameError, match=message):
        Judge(**values)


def test_games_have_names() -> None:
    with pytest.raises(GameError, match="game='chess' is not allowed; choose one of sudoku, tictactoe, minesweeper"):
        find("chess")
    register_game("tictactoe", GAMES["tictactoe"])
    with pytest.raises(GameError, match="belongs to another game"):
        register_game("sudoku", Game(TicTacToe, lambda game: frozenset()))
    mine = type("Sudoku", (Counting,), {})  # the same name, of another module
    with pytest.raises(GameError, match=r"belongs to another game, verl\.utils\.siop\.envs\.sudoku\.Sudoku"):
        register_game("sudoku", Game(mine, lambda game: frozenset()))
    for name, game in ((5, GAMES["sudoku"]), ("", GAMES["sudoku"]), ("mine", TicTacToe)):
        with pytest.raises(GameError, match="needs a name and a Game"):
            register_game(name, game)  # type: ignore[arg-type]


class Counting(Rules):
    """A game of a user's: count to three. Its spec may have it over at the start."""

    name = "counting"

    def __init__(self, spec: Mapping[str, Any]) -> None:
        self.form, self.turns, self.count = "NUMBER", 3, 3 if spec.get("over") else 0

    def instructions(self) -> str:
        return "Count."

    def show(self) -> str:
        return str(self.count)

    def parse(self, words: list[str]) -> tuple[int]:
        return (int(words[0]),)

    def play(self, action: Action) -> str:
        self.count += 1
        return "on"

    @property
    def finished(self) -> bool:
        return self.count >= 3

    success = finished

    @property
    def completion(self) -> float:
        return self.count / 3


@pytest.mark.parametrize(
    ("best", "message"),
    [
        (lambda game: frozenset(), "must give a frozenset of actions"),
        (lambda game: frozenset({"1"}), "must give a frozenset of actions"),
        (lambda game: [(1,)], "must give a frozenset of actions"),
        (lambda game: frozenset({("1",)}), r"names \('1',\), and '<action> 1 </action>' is read as another action"),
        (lambda game: frozenset({("one",)}), "its parse, of .*, raises ValueError"),
    ],
)
def test_a_game_that_breaks_its_word_is_named(best: Any, message: str) -> None:
    with pytest.raises(GameError, match=f"counting: .*{message}"):
        oracle_play(Game(Counting, best), {}, random.Random(0))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"__init__": lambda self, spec: spec["missing"]}, "its constructor raises KeyError"),
        ({"form": property(lambda self: None, lambda self, value: None)}, "form=None is not allowed; needs str"),
        ({"turns": property(lambda self: 0, lambda self, value: None)}, r"over before the first turn \(turns=0\)"),
        ({"show": lambda self: None}, "show=None is not allowed; needs str"),
        ({"parse": lambda self, words: [1]}, r"action=\[1\] is not allowed; needs tuple"),
        ({"play": lambda self, action: 1 / 0}, r"its play, of \(1,\), raises ZeroDivisionError"),
        ({"play": lambda self, action: None}, "play=None is not allowed; needs str"),
        ({"success": property(lambda self: None)}, "success=None is not allowed; needs bool"),
        ({"completion": property(lambda self: 7.0)}, "completion=7.0 is not allowed; needs a number from 0 to 1"),
        ({"completion": property(lambda self: float("nan"))}, "completion=nan is not allowed"),
    ],
)
def test_rules_that_break_their_word_are_named(wrong: dict[str, Any], message: str) -> None:
    game = Game(type("Broken", (Counting,), wrong), lambda game: frozenset({(1,)}))
    with pytest.raises(GameError, match=f"counting: .*{message}"):
        row_of_game(game)


def row_of_game(game: Game) -> None:
    env = Env(game)
    env.reset({})
    env.step("<action> 1 </action>")


def test_a_game_of_ones_own_is_played() -> None:
    game = Game(Counting, lambda game: frozenset({(game.count + 1,)}))
    assert oracle_play(game, {}, random.Random(0)) == (True, 1.0)
    with pytest.raises(GameError, match="over before the first turn"):
        Env(game).reset({"over": True})
    env = Env(game)
    env.reset({})
    assert not env.step("<action> </action>").valid
    with pytest.raises(GameError, match=r"its parse, of .*, raises ValueError"):
        env.step("<action> one </action>")


def test_the_prompt_says_what_to_do_and_how() -> None:
    for name, spec in (("sudoku", SUDOKU), ("tictactoe", TICTACTOE), ("minesweeper", MINES)):
        env = Env(find(name))
        observation = env.reset(spec)
        prompt = prompt_of(env.rules)
        assert prompt.endswith(observation) and f"<action> {env.rules.form} </action>" in prompt
