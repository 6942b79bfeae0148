"""The page with its data in one file that opens without a network, of a bounded size."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from verl.utils.siop.errors import SiopError
from verl.utils.siop.files import write_whole
from verl.utils.siop.inspector.index import MAX_PAGE, RunIndex, Search
from verl.utils.siop.inspector.page import standalone
from verl.utils.siop.inspector.runs import Runs

EXPORT_MB = 20.0
# Of the room for data, the share that the list of questions may take; the rest is for their rollouts.
LIST_SHARE = 0.3


class ExportError(SiopError, ValueError):
    """The file cannot hold even the curves within its size."""


def export(runs: Runs, path: Path, max_mb: float = EXPORT_MB) -> str:
    """Write the page and as much of the runs as fits.

    The curves are whole. Of the questions those of evenly spread steps are listed, the last step and the first among
    them, and of these the rollouts, until the size is reached. The page says what was left out.

    Args:
        runs: read as far as they go.
        path: the file.
        max_mb: its largest size, in MB (10^6 bytes).

    Returns:
        What was written and what was left out, as a sentence.

    Raises:
        ExportError: ``max_mb`` is too small.
        DumpError, OSError: a dump cannot be read, or the file not written.
    """
    overview = runs.overview()
    data: dict[str, Any] = {"overview": overview, "runs": {}}
    for name in runs.indexes:
        data["runs"][name] = {"curves": runs.curves(name), "questions": [], "details": {}}
    overview["exported"] = ""
    empty = len(standalone(_json(data)).encode())
    room = int(max_mb * 1e6) - empty - 1000
    if room < 0:
        raise ExportError(
            f"--export-mb {max_mb:g} is too small: without any question the file has {empty / 1e6:.1f} MB"
        )
    share = room // max(1, len(runs.indexes))
    parts = [_fill(runs, name, data["runs"][name], share) for name in runs.indexes]
    overview["exported"] = "; ".join(parts)
    content = standalone(_json(data)).encode()
    write_whole(path, content)
    return f"{path}: {len(content) / 1e6:.1f} MB; {overview['exported']}"


def _json(data: Any) -> str:
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"))


def _size(data: Any) -> int:
    text = _json(data)
    # As the page holds it, see ``standalone``.
    return len(text.encode()) + 5 * text.count("<") + 60


def _fill(runs: Runs, name: str, target: dict[str, Any], room: int) -> str:
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
    for step in listed:
        for question in by_step[step]:
            detail = runs.question(name, step, question["group"])
            size = _size(detail)
            if size > left:
                continue
            left -= size
            target["details"][f"{step}/{question['group']}"] = detail
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
