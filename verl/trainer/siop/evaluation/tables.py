"""Tables for the terminal. Texts in them come from data and models, and are shown without control characters."""

from __future__ import annotations

from collections.abc import Sequence

from verl.trainer.siop.evaluation.compare import Comparison
from verl.trainer.siop.evaluation.manifest import Manifest
from verl.trainer.siop.evaluation.summary import SCORES, Estimate, Summary

AVERAGE = "average"
_LABELS = dict(zip(SCORES, ("EM", "F1", "F1 release"), strict=True))
_COUNTS = {
    "no_answer": "no answer",
    "truncated": "truncated",
    "turn_limit": "turn limit",
    "searches": "searches",
    "failed_searches": "failed",
    "turns": "turns",
    "response_tokens": "tokens",
}
# Outcomes of oracle play begin with it.
_CEILING = "ceiling_"
_PER_SAMPLE = ("searches", "failed_searches", "turns", "response_tokens")


def number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def interval(low: float | None, high: float | None) -> str:
    return "-" if low is None or high is None else f"[{low:.3f}, {high:.3f}]"


def estimate(value: Estimate | None) -> list[str]:
    """Two cells: the value, its interval."""
    return ["-", "-"] if value is None else [number(value.value), interval(value.low, value.high)]


def printable(text: str) -> str:
    """The text with what a terminal would obey, or cannot show, escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)


def table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """Columns padded to their width, the first to the left, the others to the right."""
    lines = [[printable(cell) for cell in line] for line in (header, *body)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )


def evaluation_table(manifest: Manifest) -> str:
    """The results of an evaluation: scores with their intervals, and below what the rollouts did."""
    n = manifest.decoding["n"]
    several = n > 1
    header = ["data source", "n", f"EM avg@{n}" if several else "EM", "95 %", "F1", "95 %", "F1 release", "95 %"]
    header += [f"pass@{n}", "95 %"] if several else []
    names = [*SCORES, *(["pass"] if several else [])]
    lines = [*manifest.sets.items(), (AVERAGE, manifest.average)]
    scores = [
        [
            source,
            str(summary.questions),
            *(cell for name in names for cell in estimate(summary.scores.get(name))),
            number(summary.unreachable),
        ]
        for source, summary in lines
    ]
    counts = [
        [source, *(number(summary.means[name], 2 if name in _PER_SAMPLE else 3) for name in _COUNTS)]
        for source, summary in lines
    ]
    parts = [table([*header, "unreachable"], scores), ""] if manifest.average.labelled else []
    if manifest.average.outcomes:
        parts += [outcome_table(lines), ""]
    return "\n".join(
        [
            *parts,
            table(["data source", *_COUNTS.values()], counts),
            *(
                f"{printable(url)} does not say what it serves: nothing proves what was searched"
                for url, health in manifest.retriever.items()
                if health is None
            ),
        ]
    )


def outcome_table(lines: Sequence[tuple[str, Summary]]) -> str:
    """The outcomes of games by their own names, each with its interval and, where there is one, the ceiling beside it:
    what oracle play gives on the same boards."""
    games = [(source, summary) for source, summary in lines if summary.outcomes]
    found = games[-1][1].outcomes
    names = [name for name in found if not name.startswith(_CEILING)]
    header, columns = ["data source", "n"], list[tuple[str, bool]]()
    for name in names:
        header += [name.replace("_", " "), "95 %"]
        columns.append((name, True))
        if _CEILING + name in found:
            header.append("ceiling")
            columns.append((_CEILING + name, False))
    body = []
    for source, summary in games:
        cells = [estimate(summary.outcomes.get(name))[: 2 if wide else 1] for name, wide in columns]
        body.append([source, str(summary.questions), *(cell for pair in cells for cell in pair)])
    return table(header, body)


def comparison_table(comparison: Comparison) -> str:
    """Paired differences B - A of each score, and the test for EM."""
    lines = [*comparison.sets.items(), (AVERAGE, comparison.average)]
    parts = []
    for name, label in _LABELS.items():
        header = ["data source", "n", f"{label} A", f"{label} B", "B - A", "95 %"]
        body = []
        for source, pairs in lines:
            found = pairs.scores[name]
            change = interval(found.change.low, found.change.high)
            body.append(
                [source, str(pairs.questions), number(found.a), number(found.b), f"{found.change.value:+.3f}", change]
            )
            if name == "em":
                tested = pairs is not comparison.average
                body[-1] += [str(pairs.only_a), str(pairs.only_b), number(pairs.p, 4)] if tested else ["-"] * 3
        parts += [table([*header, *(["only A", "only B", "p"] if name == "em" else [])], body), ""]
    everything, (only_a, only_b) = comparison.average, comparison.left_out
    parts.append(
        f"all {everything.questions} questions: EM higher in A {everything.only_a}, in B {everything.only_b}, "
        f"p {number(everything.p, 4)} ({comparison.test})"
    )
    if only_a or only_b:
        parts.append(f"left out: {only_a} questions of A alone, {only_b} of B alone")
    return "\n".join(parts)
