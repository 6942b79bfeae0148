"""Evaluations of games: the outcome by its own names, with what oracle play gives beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from verl.trainer.siop.evaluation.manifest import read_evaluation
from verl.trainer.siop.evaluation.questions import Sample
from verl.trainer.siop.evaluation.summary import summarise
from verl.trainer.siop.evaluation.tables import evaluation_table
from verl.trainer.siop.report import core_metrics
from verl.trainer.siop.rollouts.rows import outcomes_of


def _played(made: Callable[..., Sample], board: str, success: float, sample: int = 0, source: str = "sudoku") -> Sample:
    outcomes = {"success": success, "completion": 0.5, "ceiling_success": 1.0, "ceiling_completion": 1.0}
    return made(source, board, None, sample, outcomes=outcomes, answer="", searches=None, failed_searches=None)


def test_a_board_counts_once_however_often_it_is_played(made: Callable[..., Sample]) -> None:
    samples = [_played(made, "a", 1.0), _played(made, "a", 0.0, 1), _played(made, "b", 0.0), _played(made, "b", 0.0, 1)]
    sets, average = summarise([*samples, *(_played(made, "c", 1.0, number, "mines") for number in (0, 1))])
    assert sets["sudoku"].outcomes["success"].value == pytest.approx(0.25)
    assert sets["sudoku"].outcomes["success"].low is not None
    assert sets["sudoku"].outcomes["ceiling_success"].low is None  # does not differ
    assert average.outcomes["success"].value == pytest.approx((0.25 + 1.0) / 2)
    assert sets["sudoku"].scores == {} and average.labelled == 0


def test_the_table_has_the_ceiling_and_no_columns_of_labels(
    made: Callable[..., Sample], write: Any, sections: dict[str, Any], tmp_path: Path
) -> None:
    write(tmp_path, [_played(made, "a", 1.0), _played(made, "b", 0.0)], sections)
    text = evaluation_table(read_evaluation(tmp_path)[0])
    header, first = (line.split() for line in text.splitlines()[:2])
    assert header == "data source n success 95 % ceiling completion 95 % ceiling".split()  # noqa: SIM905
    assert first[:3] == ["sudoku", "2", "0.500"] and first.count("1.000") >= 2
    assert "EM" not in text


def test_labels_and_games_stand_in_one_table(
    made: Callable[..., Sample], write: Any, sections: dict[str, Any], tmp_path: Path
) -> None:
    write(tmp_path, [made("nq", "a", 1.0), _played(made, "b", 0.0)], sections)
    manifest, samples = read_evaluation(tmp_path)
    assert manifest.sets["nq"].outcomes == {} and manifest.average.outcomes["success"].value == 0.0
    assert "EM" in (text := evaluation_table(manifest)) and "ceiling" in text
    assert {sample.data_source: bool(sample.outcomes) for sample in samples} == {"nq": False, "sudoku": True}


def test_validation_metrics_of_games_are_core() -> None:
    found = core_metrics({"val-aux/sudoku/success/mean@1": 0.25, "val-aux/sudoku/reward/mean@1": 0.25})
    assert found == {"val-core/sudoku/success/mean@1": 0.25, "val-core/average/success/mean@1": 0.25}


def test_only_finite_numbers_are_outcomes() -> None:
    info = {"score": 1.0, "em": None, "f1": 0.5, "why": "text", "bad": float("nan"), "success": True}
    assert outcomes_of({"reward_extra_info": info}) == {"f1": 0.5, "success": 1.0}
    assert outcomes_of({}) == {}
