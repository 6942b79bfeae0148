"""The small games of examples/games and the table that is made with them."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import pytest
from method_helpers import byte_tokenizer, rollout
from verl.utils.siop.envs.games import written
from verl.utils.siop.siop_process_reward import SiopConfig, compute_group_rewards

import benchmarks.game_controls  # noqa: F401  (registers the controls)
from benchmarks import vpr_table
from examples.games import build
from examples.games.agent import action_of, played
from examples.games.tokenizer import game_tokenizer


@pytest.mark.parametrize("game", build.GAMES)
def test_every_word_of_a_game_has_a_token(game: str, tmp_path: Path) -> None:
    tokenizer, rng = game_tokenizer(), random.Random(0)
    specs = build.specs_for_warm_start(game, 0, 16, tmp_path)
    for number in range(60):
        pieces, env = played(game, specs[number * 7 % len(specs)], rng, 1.0)
        text = "".join(piece for piece, _ in pieces)
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.unk_token_id not in ids
        # What config/experiment/games.yaml leaves room for.
        assert len(ids) <= 512
        assert env.done
    for told in ("three numbers", "one number", "numbers from 1 to 9", "reveal and two numbers", "no action"):
        note = f"invalid : {told} ; write {written(('ROW', 'COLUMN', 'DIGIT'))}"
        assert tokenizer.unk_token_id not in tokenizer.encode(note, add_special_tokens=False)


def test_the_faulty_sudoku_agent_is_as_good_as_it_is_meant_to_be(tmp_path: Path) -> None:
    words = build.data_arguments("sudoku", "8", 0, 200, 1, tmp_path)
    ((specs, _),) = build.boards.boards(build.boards.parse_args(words)).values()
    rng, right = random.Random(0), []
    for number in range(150):
        _, env = played("sudoku", specs[number], rng, 1.0)
        right.append(env.rules.completion)
    assert 0.42 < sum(right) / len(right) < 0.53
    _, env = played("sudoku", specs[0], rng, 0.0)
    assert env.rules.success and action_of("tictactoe", _tictactoe(), rng, 0.0) == (3,)


def _tictactoe() -> Any:
    from verl.utils.siop.envs.tictactoe import TicTacToe

    return TicTacToe({"board": "XX.OO....", "seed": 0})


def _interrupted(*_: Any) -> Any:
    raise KeyboardInterrupt


def test_a_build_is_kept_and_never_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--game", "tictactoe", "--train-boards", "8", "--eval-boards", "4", "--out", str(tmp_path / "a")]
    steps = ["--right-steps", "1", "--faulty-steps", "1"]
    assert build.main([*words, *steps]) == 0
    assert build.main([*words, *steps]) == 0 and "is up to date" in capsys.readouterr().out
    assert build.main(words) == 2 and "holds another build" in capsys.readouterr().err
    assert build.main([*words, "--keep"]) == 0 and "using" in capsys.readouterr().out
    copied = [*words[:-1], str(tmp_path / "b"), "--init", str(tmp_path / "a" / "model")]
    assert build.main(copied) == 0
    weights = "model/model.safetensors"
    assert (tmp_path / "a" / weights).read_bytes() == (tmp_path / "b" / weights).read_bytes()
    # Interrupted in the warm start: the same command makes it again, another one is refused.
    monkeypatch.setattr(build, "write_model", _interrupted)
    unfinished = [*words[:-1], str(tmp_path / "d"), *steps]
    with pytest.raises(KeyboardInterrupt):
        build.main(unfinished)
    monkeypatch.undo()
    assert build.main([*words[:-1], str(tmp_path / "d"), "--keep"]) == 2
    assert "an unfinished build" in capsys.readouterr().err
    assert build.main([*unfinished, "--keep"]) == 0
    assert (tmp_path / "a" / weights).read_bytes() == (tmp_path / "d" / weights).read_bytes()
    # One of an earlier version is not taken for this one.
    meta = tmp_path / "a" / "build.json"
    meta.write_text(meta.read_text().replace('"version": 3', '"version": 2'))
    assert build.main([*words, "--keep"]) == 2 and "holds another build ({'version': 2" in capsys.readouterr().err
    for broken in ("{", "[1]"):
        meta.write_text(broken)
        assert build.main(words) == 2 and "files that no build.json describes" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        build.main([*words[:-1], str(tmp_path / "e"), "--train-boards", "0"])
    assert not (tmp_path / "e").exists()
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "mine").touch()
    assert build.main([*words[:-1], str(tmp_path / "c")]) == 2
    with pytest.raises(SystemExit):
        build.main([*words, "--blanks", "4"])
    assert "--game tictactoe does not read --blanks" in capsys.readouterr().err


# ---------------------------------------------------------------------- controls and table
def _rewards(mode: str) -> list[list[float]]:
    rollouts = []
    for scores, outcome in (([1.0, 0.0, 1.0], 1.0), ([0.0, 0.5], 0.0)):
        made = rollout("q", ["a<|im_end|>"] * len(scores), ["\nb\n"] * (len(scores) - 1))
        made.turn_scores, made.outcome = list(scores), outcome
        rollouts.append(made)
    config = SiopConfig(siop_reward_mode=mode)
    scorer: Any = None
    return asyncio.run(compute_group_rewards(rollouts, byte_tokenizer(), config, scorer)).turn_rewards


def test_the_controls() -> None:
    assert _rewards("outcome") == [[0.0, 0.0, 1.0], [0.0, 0.0]]
    shuffled = _rewards("shuffled")
    assert [len(row) for row in shuffled] == [3, 2]
    assert sorted(value for row in shuffled for value in row) == [0.0, 0.0, 0.5, 1.0, 1.0]
    assert shuffled == _rewards("shuffled")


def test_the_plan_and_its_runs_have_names() -> None:
    runs = vpr_table.plan(["sudoku-8", "tictactoe"], None, [1, 2])
    assert len({run.name for run in runs}) == len(runs) == 2 * (8 + 8)
    assert [run.seed for run in runs[:7]] == [1] * 7
    run = vpr_table.named("sudoku-8/vpr_loo-seed3")
    assert (run.setting, run.method, run.seed) == ("sudoku-8", "vpr_loo", 3)
    for text in ("sudoku-8/vpr_loo", "sudoku-3/vpr-seed1", "sudoku-8/siop-seed1"):
        with pytest.raises(SystemExit, match="--only"):
            vpr_table.named(text)


def test_an_erring_oracle_is_written_beside_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vpr_table, "RUNS", tmp_path)
    run = vpr_table.Run("tictactoe", "vpr_loo-search30", 1)
    run.folder.mkdir(parents=True)
    (last,) = [word for word in run.overrides() if "agent_loop_config_path" in word]
    (loop,) = vpr_table.yaml.safe_load(Path(last.split("=")[1]).read_text())
    assert (loop["name"], loop["oracle"], loop["simulations"]) == ("verified_game", "search", 30)
    assert not any("agent_loop" in word for word in vpr_table.Run("sudoku-8", "vpr", 1).overrides())


def test_the_report_keeps_what_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers = {"success": 0.5, "completion": 0.75, "oracle_rate": 0.75, "invalid": 0.0, "oracle_error": 0.0}
    start = {**numbers, "ceiling_success": 1.0, "ceiling_completion": 1.0}
    runs = [
        {
            "method": "vpr",
            "seed": seed,
            "boards": 256,
            **numbers,
            "success": 0.4 + seed / 10,
            "tokens": 1000,
            "turns": 9,
        }
        for seed in (1, 2)
    ]
    known = {name: {"start": start, "runs": runs} for name in ("minesweeper", "sudoku-8")}
    (tmp_path / "vpr.json").write_text(json.dumps(known))
    monkeypatch.setattr(vpr_table, "RESULTS", tmp_path)
    monkeypatch.setattr(vpr_table, "ROOT", tmp_path)
    monkeypatch.setattr(vpr_table, "RUNS", tmp_path / "none")
    vpr_table.report()
    text = (tmp_path / "vpr.md").read_text()
    assert "| vpr | 1, 2 | 0.550 ± 0.050 | 0.750 ± 0.027 |" in text and "Oracle play: success 1.000" in text
    assert "no plot" not in capsys.readouterr().err and "<!-- vpr -->" in (tmp_path / "vpr.svg").read_text()
    written = json.loads((tmp_path / "vpr.json").read_text())
    assert written == known and list(written) == ["sudoku-8", "minesweeper"]
    # Of one seed, that of the boards; of seeds that agree, too.
    for alone in (runs[:1], runs[:1] * 3):
        assert vpr_table.estimate(alone, "success") == pytest.approx((0.5, 0.0312), abs=1e-4)


def test_a_difference_beyond_two_standard_errors_is_marked() -> None:
    def with_success(*values: float) -> list[dict[str, Any]]:
        return [{"success": value, "boards": 100} for value in values]

    assert vpr_table.against(with_success(0.5, 0.6), with_success(0.1, 0.3)) == "**+0.350 ± 0.112**"
    assert vpr_table.against(with_success(0.5), with_success(0.4)) == "+0.100 ± 0.070"
