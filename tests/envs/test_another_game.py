"""The game of docs/games.md, run as it stands there."""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from verl.utils.siop.envs.build import row_of, write
from verl.utils.siop.envs.games import GAMES, find, make, oracle_play, written
from verl.utils.siop.errors import GameError

DOCUMENT = Path(__file__).parents[2] / "docs" / "games.md"


@pytest.fixture
def nim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    (tmp_path / "my_games.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_games", raising=False)
    import my_games  # type: ignore[import-not-found]

    yield my_games
    GAMES.pop("nim")


def test_nim_is_played_judged_and_written(nim: ModuleType, tmp_path: Path) -> None:
    for sticks in range(1, 12):
        success, _ = oracle_play(find("nim"), {"sticks": sticks}, random.Random(sticks))
        # Brute force: whether any sequence of moves takes the last stick.
        assert success == _wins(sticks)
    env = make("nim")
    assert env.reset({"sticks": 3}) == "3 sticks"
    assert not env.step(written((2,))).right  # the opponent takes the last one
    assert env.reset({"sticks": 3}) and env.step(written((3,))).success
    row = row_of("nim", "nim", {"sticks": 5}, 0, "train")
    prompt = row["prompt"][0]["content"]
    assert prompt.endswith("5 sticks") and "<action> COUNT </action>" in prompt
    write(tmp_path / "data", {"train": [row], "eval": [row]}, {"game": "nim"})
    assert (tmp_path / "data" / "overrides.yaml").is_file()
    with pytest.raises(GameError, match="sticks=0"):
        env.reset({"sticks": 0})


def _wins(sticks: int) -> bool:
    """Whether some first and further moves take the last stick."""
    return any(
        count == sticks or (sticks - count > 1 and _wins(sticks - count - 1)) for count in (1, 2, 3) if count <= sticks
    )
