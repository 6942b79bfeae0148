"""Table and plot of what benchmarks/real_lm.py has measured."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.toy_results import Turn, auc, resampled, turn_auc
from examples.real_world.agent import RIGHT, WAYS
from examples.real_world.world import INSTALL

_CONTEXT_NAMES = (
    ("bare", 0, "prompt"),
    ("bare", 1, "end of turn 1, bare"),
    ("opened", 1, "end of turn 1, opened"),
    ("result", 1, "result 1"),
    ("bare", 2, "end of turn 2, bare"),
    ("opened", 2, "end of turn 2, opened"),
    ("result", 2, "result 2"),
)
_CANDIDATES = ("right", "intermediate", "stale", "wrong")
# How a page says of how much it is.
_COUNTS = "{} two-hop questions over countries and cities (`examples/real_world`) with {} scripted rollouts"
_WORDS = (
    "The scripted agent plays six ways: `right`: both hops; `lazy`: stops after the first and gives the intermediate "
    "entity; `wrong`: second search about another entity; `repeated`: one search twice; `unneeded`: one search too "
    "many; `stale`: the same wrong answer whatever it finds. A *needed* search returns the next fact of the chain. "
    "*Probe*: the text around a reference; *opened* and *bare*: with and without the opening of the next turn "
    "([how](../credit_assignment.md#where-support-is-measured))."
)


def turns_of(rows: Iterable[Sequence[Any]]) -> list[Turn]:
    """The turns of a variant, as the functions of the toy worlds take them."""
    return [Turn(uid, index, searches, value, right) for uid, index, searches, value, right, *_ in rows]


def within_rollouts(rows: Sequence[Sequence[Any]]) -> tuple[float, float]:
    """AUC of search turns that are compared with those of the same rollout alone, weighted by pairs, and its standard
    error over 100 resamples of the questions; nan where no rollout has both kinds.

    What is left when the rollout's answer, which all its turns share, can tell nothing.
    """
    of: dict[Any, list[Sequence[Any]]] = {}
    for row in rows:
        if row[2]:
            of.setdefault((row[0], row[6]), []).append(row)
    by_question: dict[Any, list[tuple[float, int]]] = {}
    for (uid, _), turns in of.items():
        area, pairs = auc([row[3] for row in turns], [row[4] for row in turns])
        if pairs:
            by_question.setdefault(uid, []).append((area, pairs))
    groups = list(by_question.values())
    if not groups:
        return math.nan, math.nan

    def mean(sample: Sequence[int]) -> float:
        found = [item for i in sample for item in groups[i]]
        return sum(area * pairs for area, pairs in found) / sum(pairs for _, pairs in found)

    rng = np.random.default_rng(0)
    draws = [mean(rng.integers(0, len(groups), len(groups)).tolist()) for _ in range(100)]
    return mean(range(len(groups))), float(np.std(draws, ddof=1))


def _mean(values: Iterable[float]) -> tuple[float, float]:
    """Mean and its standard error; nan where there is too little."""
    numbers = np.array(list(values), dtype=float)
    if not len(numbers):
        return math.nan, math.nan
    return float(numbers.mean()), float(numbers.std(ddof=1) / math.sqrt(len(numbers))) if len(numbers) > 1 else math.nan


def _cell(value: float, error: float | None = None, digits: int = 3) -> str:
    if math.isnan(value):
        return ""
    return f"{value:.{digits}f}" + ("" if error is None or math.isnan(error) else f" ± {error:.{digits}f}")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def known_before(question: Mapping[str, Any]) -> bool:
    """Whether the model has the answer before any search: asked alone it names it, or it is the likeliest candidate at
    the prompt."""
    first = question["support"]["of the template"]["bare"][0]
    return bool(question["greedy_right"]["before"]) or max(range(len(first)), key=lambda i: first[i]) == 0


def areas(rows: Sequence[Sequence[Any]], against: np.ndarray | None = None) -> tuple[dict[str, float], np.ndarray]:
    """Turn AUC of a variant with its standard error, and that of the difference to another on the same resamples."""
    turns = turns_of(rows)
    found, draws = turn_auc(turns), resampled(turns)
    found["error"] = float(np.nanstd(draws, ddof=1))
    if against is not None:
        found["gain_error"] = float(np.nanstd(draws - against, ddof=1))
    return found, draws


def support_table(questions: Sequence[Mapping[str, Any]], probe: str) -> str:
    """Mean support of the candidates along the right transcript, and how often the right one is the first."""
    rows = []
    for context, boundary, name in _CONTEXT_NAMES:
        values_QC = np.array([question["support"][probe][context][boundary] for question in questions])
        first = float(np.mean(values_QC.argmax(1) == 0))
        rows.append([name, *(f"{value:.4f}" for value in values_QC.mean(0)), f"{first:.2f}"])
    return _table(["context of the probe", *_CANDIDATES, "right is first"], rows)


def failures(summary: Mapping[str, Any]) -> list[str]:
    """Where the signal of the default method fails, each as a sentence with its numbers."""
    questions = summary["questions"]
    count = len(questions)
    of_template = [question["support"]["of the template"] for question in questions]
    last = np.array([support["result"][2] for support in of_template])
    reads = sum(question["greedy_right"]["after"] for question in questions)
    right_first, bridge_first = (int((last.argmax(1) == place).sum()) for place in (0, 1))
    lines = [
        f"With both facts in its context, and an answer begun, the model names the right answer in {reads} of {count} "
        f"questions. The right answer has the highest support of the four candidates in {right_first}, the "
        f"intermediate entity in {bridge_first}: an answer that stops early keeps its support when the second fact is "
        "found."
    ]
    # Boundaries of before_answer after the prompt: the ends of both searches, and the start of the answer.
    best = [max(support["opened"][1][0], support["opened"][2][0], support["result"][2][0]) for support in of_template]
    falls = sum(high <= support["opened"][0][0] for high, support in zip(best, of_template, strict=True))
    lines.append(
        f"The support of the right answer is at no boundary of the default higher than before any search in {falls} of "
        f"{count} questions: there its searches earn nothing."
    )
    seen = sum(
        abs(math.log(support["opened"][2][0] / support["result"][1][0])) < 0.7
        and support["result"][2][0] > 2 * support["opened"][2][0]
        for support in of_template
    )
    lines.append(
        f"The second fact shows only where its result is in the context: in {seen} of {count} questions the support of "
        "the right answer at least doubles from the end of turn 2 to result 2, and hardly moves before. At the ends of "
        "turns (`before_answer`, `assistant`) that gain goes to the turn after the search."
    )
    inside, error = within_rollouts(summary["turns"]["siop"])
    lines.append(
        f"Inside of a rollout the default hardly tells a needed search from a useless one: {_cell(inside, error)} of "
        "the pairs are in the right order, .5 being chance. Most of the turn AUC comes from the rollouts' answers, "
        "whose target all turns share."
        if inside - 2 * error < 0.6
        else f"Inside of a rollout {_cell(inside, error)} of the pairs of a needed and a useless search are in order."
    )
    split = []
    for right_majority in (True, False):
        uids = {question["uid"] for question in questions if question["heaviest"] == right_majority}
        if uids:
            area, _ = areas([row for row in summary["turns"]["siop"] if row[0] in uids])
            cell = _cell(area["same_index"], area["error"]) or "undefined"
            split.append(f"{cell} in the {len(uids)} questions whose most frequent answer is {right_majority}")
    if len(split) == 2:
        right_part, wrong_part = (text.replace("True", "right").replace("False", "wrong") for text in split)
        lines.append(f"The turn AUC is {right_part}, and {wrong_part}.")
    by_kind: dict[tuple[str, str], list[float]] = {}
    for _, _, searches, value, right, way, _ in summary["turns"]["siop"]:
        kind = "answer" if not searches else "needed search" if right else "useless search"
        by_kind.setdefault((way, kind), []).append(value)
    for way in WAYS:
        useless, error = _mean(by_kind.get((way, "useless search"), []))
        needed, _ = _mean(by_kind.get((way, "needed search"), []))
        if useless + error > needed:
            lines.append(
                f"Useless searches of the way `{way}` have a mean advantage of {useless:+.2f} ± {error:.2f}, its "
                f"needed ones {needed:+.2f}."
            )
    right, _ = _mean(by_kind.get((RIGHT, "answer"), []))
    for way in WAYS:
        mean, error = _mean(by_kind.get((way, "answer"), []))
        if way in ("lazy", "wrong", "stale") and mean + error > right:
            lines.append(
                f"Answers of the way `{way}`, all wrong, have a mean advantage of {mean:+.2f} ± {error:.2f}; those of "
                f"the way `right` have {right:+.2f}."
            )
    return lines


def ways_table(summary: Mapping[str, Any], variants: Sequence[str]) -> str:
    """Mean advantage by the agent's way and the kind of turn."""
    rows = []
    for way in WAYS:
        for kind, wanted in (
            ("needed search", lambda searches, right: searches and right),
            ("useless search", lambda searches, right: searches and not right),
            ("answer", lambda searches, right: not searches),
        ):
            cells = []
            for name in variants:
                of_way = [row for row in summary["turns"][name] if row[5] == way and wanted(row[2], row[4])]
                cells.append(_cell(*_mean(row[3] for row in of_way), digits=2))
            if any(cells):
                rows.append([f"{way}: {kind}", *cells])
    return _table(["way, kind of turn", *variants], rows)


def auc_table(summary: Mapping[str, Any]) -> tuple[str, dict[str, dict[str, float]]]:
    """Turn AUC of all variants, also by what the model knew before."""
    known = {question["uid"] for question in summary["questions"] if known_before(question)}
    majority = {question["uid"] for question in summary["questions"] if question["heaviest"]}
    parts: dict[str, Callable[[str], bool]] = {
        "known before": lambda uid: uid in known,
        "not known": lambda uid: uid not in known,
        "majority right": lambda uid: uid in majority,
        "majority wrong": lambda uid: uid not in majority,
    }
    found: dict[str, dict[str, float]] = {}
    base: np.ndarray | None = None
    rows = []
    for name, turns in summary["turns"].items():
        found[name], draws = areas(turns, base)
        found[name]["same_rollout"], inside_error = within_rollouts(turns)
        base = draws if base is None else base
        split = []
        for wanted in parts.values():
            some = [row for row in turns if wanted(row[0])]
            part, _ = areas(some) if some else ({"same_index": math.nan, "error": math.nan}, None)
            split.append(_cell(part["same_index"], part["error"]))
        first = next(iter(found.values()))
        gain = found[name]["same_index"] - first["same_index"]
        against = "" if found[name] is first else f"{gain:+.3f} ± {found[name]['gain_error']:.3f}"
        rows.append(
            [
                name,
                _cell(found[name]["same_index"], found[name]["error"]),
                against,
                _cell(found[name]["same_rollout"], inside_error),
                *(_cell(found[name][key]) for key in ("search", "same_question", "all")),
                *split,
            ]
        )
    header = [
        "variant",
        "same index",
        "against siop",
        "same rollout",
        "search turns",
        "same question",
        "all turns",
        *parts,
    ]
    return _table(header, rows), found


def render(summary: Mapping[str, Any]) -> str:
    """``real_lm.md``."""
    questions = summary["questions"]
    rollouts = len({row[6] for row in summary["turns"]["siop"]})
    known = sum(map(known_before, questions))
    table, _ = auc_table(summary)
    labels = [row[4] for row in summary["turns"]["siop"] if row[2]]
    parts = [
        "# Support and turn AUC with a real language model",
        "",
        f"Written by `{summary['command']}` from {_COUNTS.format(len(questions), rollouts)}; "
        f"{summary['asked']} questions were asked for. It needs `{INSTALL}`. Scorer {summary['model']}, float32 where "
        f"nothing else is said. {sum(labels)} of {len(labels)} searches are needed ones. No training.",
        "",
        _WORDS,
        "",
        f"The model knew the answers to {known} questions before any search: asked alone it names the right answer "
        f"({sum(q['greedy_right']['before'] for q in questions)} questions), or that has the highest support of the "
        f"candidates at the prompt. The most frequent answer is right in {sum(q['heaviest'] for q in questions)}. The "
        "agent's queries are worded alike, which flatters query_consensus and query_frequency.",
        "",
        "![Support along the right transcript, and turn AUC by variant](real_lm.svg)",
        "",
        "## Turn AUC",
        "",
        "Probability that a search that returns the next needed fact has a higher advantage than one that does not. "
        "`same index`: compared at the same turn index (± standard error, by resampling questions); `against siop`: "
        "the difference on the same resamples; `same rollout`: compared with searches of the same rollout alone, where "
        "its answer can tell nothing; then all search turns, those of the same question at the same index, and all "
        "turns with the answers. The last columns are `same index` of the questions that the model knew before or not, "
        "and of those whose most frequent answer is right or not.",
        "",
        table,
        "",
        "## Where the signal fails",
        "",
        *(f"- {line}" for line in failures(summary)),
        "",
        "Mean turn advantages by what the agent does:",
        "",
        ways_table(summary, [name for name in ("siop", "boundary observation", "release") if name in summary["turns"]]),
    ]
    for probe in questions[0]["support"]:
        parts += [
            "",
            f"## Support along the right transcript, probe: {probe}",
            "",
            support_table(questions, probe),
        ]
    return "\n".join(parts) + "\n"


def reported(folder: Path) -> tuple[int, int]:
    """How many questions and rollouts the page in a folder is about; 0 and 0 without one."""
    file, numbers = folder / "real_lm.md", re.escape(_COUNTS).replace(re.escape("{}"), r"(\d+)")
    found = re.search(numbers, file.read_text(encoding="utf-8")) if file.is_file() else None
    return (int(found[1]), int(found[2])) if found else (0, 0)


def plot(summary: Mapping[str, Any], file: Path) -> None:
    """Support by context, and turn AUC by variant, as SVG.

    Raises:
        ImportError: without matplotlib (the extra ``plots``).
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    _, found = auc_table(summary)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 5))
    names = [name for _, _, name in _CONTEXT_NAMES]
    for place, candidate in enumerate(_CANDIDATES):
        values = [
            np.mean([q["support"]["of the template"][context][boundary][place] for q in summary["questions"]])
            for context, boundary, _ in _CONTEXT_NAMES
        ]
        left.plot(names, values, marker="o", label=candidate)
    left.set_yscale("log")
    left.set_ylabel("mean support")
    left.tick_params(axis="x", rotation=40)
    left.legend()
    ordered = sorted(found.items(), key=lambda item: item[1]["same_index"])
    right.barh(
        [name for name, _ in ordered],
        [area["same_index"] for _, area in ordered],
        xerr=[area["error"] for _, area in ordered],
        color="#9ab",
        label="same turn index",
    )
    right.plot([area["same_rollout"] for _, area in ordered], range(len(ordered)), "k.", label="same rollout")
    right.axvline(0.5, color="grey", linestyle=":")
    right.set_xlabel("AUC of the turn advantage, search turns")
    right.set_xlim(0.1, 1.0)
    right.legend(loc="lower right")
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)


def write_report(summary: Mapping[str, Any], folder: Path) -> list[Path]:
    """Writes the table and, where matplotlib is there, the plot; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    table, drawing = folder / "real_lm.md", folder / "real_lm.svg"
    table.write_text(render(summary), encoding="utf-8")
    try:
        plot(summary, drawing)
    except ImportError:
        print("no plot: matplotlib is missing; pip install '.[plots]'")
        return [table]
    return [table, drawing]
