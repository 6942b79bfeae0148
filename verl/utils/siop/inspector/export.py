"""The page with its data in one file that opens without a network, of a bounded size."""

from __future__ import annotations

import base64
import contextlib
import gzip
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from verl.utils.siop.errors import SiopError
from verl.utils.siop.files import write_whole
from verl.utils.siop.inspector.index import MAX_PAGE, RunIndex, Search
from verl.utils.siop.inspector.page import standalone
from verl.utils.siop.inspector.runs import Runs
from verl.utils.siop.inspector.schema import DumpedSettings, DumpError

EXPORT_MB = 20.0
# Of the room for data, the share that the list of questions may take; the rest is for their rollouts.
LIST_SHARE = 0.3


class ExportError(SiopError, ValueError):
    """There is nothing to export, or the file cannot hold even the curves within its size."""


def export(
    runs: Runs, path: Path, max_mb: float = EXPORT_MB, show: Callable[[str, int, int], None] | None = None
) -> str:
    """Write the page and as much of the runs as fits.

    The curves are whole. Of the questions those of evenly spread steps are listed, the last step and the first among
    them, and of these the rollouts, until the size is reached. The page says what was left out.

    Args:
        runs: read as far as they go.
        path: the file.
        max_mb: its largest size, in MB (10^6 bytes).
        show: called with the name of a run, the steps done and all of it.

    Returns:
        What was written and what was left out, as a sentence.

    Raises:
        ExportError: no step can be read, or ``max_mb`` is too small.
        DumpError, OSError: a dump cannot be read, or the file not written.
    """
    overview = runs.overview()
    if not any(state["steps"] for state in overview["runs"]):
        problems = [problem for state in overview["runs"] for problem in state["problems"]]
        why = problems[0] if problems else "none has been dumped"
        raise ExportError(f"no step of {', '.join(runs.indexes)} can be exported: {why}")
    data: dict[str, Any] = {"overview": overview, "runs": {}}
    for name in runs.indexes:
        data["runs"][name] = {
            "curves": runs.curves(name),
            "questions": [],
            "details": {},  # what the page shows of a question
            "lines": {},  # its lines of the dump, packed: they say the same at length
            "settings": {one.hash: one.model_dump() for one in _settings(runs.index(name))},
        }
    overview["exported"] = ""
    empty = len(standalone(_json(data)).encode())
    room = int(max_mb * 1e6) - empty - 1000
    if room < 0:
        raise ExportError(
            f"--export-mb {max_mb:g} is too small: without any question the file has {empty / 1e6:.1f} MB"
        )
    share = room // max(1, len(runs.indexes))
    parts = [_fill(runs, name, data["runs"][name], share, show) for name in runs.indexes]
    overview["exported"] = "; ".join(parts)
    content = standalone(_json(data)).encode()
    write_whole(path, content)
    return f"{path}: {len(content) / 1e6:.1f} MB; {overview['exported']}"


def _json(data: Any) -> str:
    try:
        return json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except ValueError:
        return json.dumps(_finite(data), ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _finite(data: Any) -> Any:
    """As the service sends it: None for NaN and the infinities, which JSON cannot hold."""
    if isinstance(data, dict):
        return {name: _finite(value) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return [_finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def _packed(data: Any) -> str:
    return base64.b64encode(gzip.compress(_json(data).encode(), mtime=0)).decode()


def _settings(index: RunIndex) -> list[DumpedSettings]:
    with contextlib.suppress(DumpError):
        return index.dump.all_settings()
    return []  # a copied test says that there are none


def _size(data: Any) -> int:
    text = _json(data)
    # As the page holds it, see ``standalone``.
    return len(text.encode()) + 5 * text.count("<") + 60


def _fill(
    runs: Runs, name: str, target: dict[str, Any], room: int, show: Callable[[str, int, int], None] | None
) -> str:
    index = runs.index(name)
    state = index.state()
    left, listed = int(room * LIST_SHARE), []
    for step in spread(list(target["curves"]["steps"])):
        questions = list(_questions(index, step))
        size = sum(map(_size, questions))
        if size > left:
            break
        left -= size
        listed.append(step)
        target["questions"] += questions
    left += room - int(room * LIST_SHARE)
    by_step: dict[int, list[dict[str, Any]]] = {}
    for question in target["questions"]:
        by_step.setdefault(question["step"], []).append(question)
    smallest = 0
    for done, step in enumerate(listed):
        if show:
            show(name, done, len(listed))
        for question in by_step[step]:
            if left < smallest:  # no other fits, very probably
                break
            detail = runs.question(name, step, question["group"])
            lines = _packed(runs.lines(name, step, question["group"])["rollouts"])
            size = _size(detail) + len(lines) + 60
            smallest = min(smallest or size, size)
            if size > left:
                continue
            left -= size
            key = f"{step}/{question['group']}"
            target["details"][key], target["lines"][key] = detail, lines
    whole, shown, open_ = state["questions"], len(target["questions"]), len(target["details"])
    if shown == open_ == whole:
        return f"{name}: all of its {whole} questions"
    steps = f"{len(listed)} of {state['steps']} steps"
    return f"{name}: rollouts of {open_} and the list of {shown} of its {whole} questions, {steps}"


def _questions(index: RunIndex, step: int) -> Iterator[dict[str, Any]]:
    offset = 0
    while True:
        page = index.search(Search(step_from=step, step_to=step, offset=offset, limit=MAX_PAGE))["questions"]
        for place, question in enumerate(page, start=offset):
            del question["answer_key"]
            yield {**question, "place": place}
        offset += len(page)
        if len(page) < MAX_PAGE:
            return


def spread(steps: list[int]) -> list[int]:
    """All steps, so ordered that the first n of them are spread evenly: the last, the first, then the middle of gaps.

    >>> spread([1, 2, 3, 4, 5])
    [5, 1, 3, 2, 4]
    """
    if len(steps) < 2:
        return list(steps)
    found, gaps = [steps[-1], steps[0]], [(0, len(steps) - 1)]
    while gaps:
        later = []
        for low, high in gaps:
            middle = (low + high) // 2
            if low < middle:
                found.append(steps[middle])
                later += [(low, middle), (middle, high)]
        gaps = later
    return found
