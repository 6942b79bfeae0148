"""What finished runs of the toy worlds show: reads their folders, averages over seeds, writes tables and plots.

A run's folder holds what the launchers leave there: ``rollouts/STEP.jsonl`` (training) and ``after/validation``
(evaluation on held-out questions).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_module
from omegaconf import DictConfig
from verl.trainer.ppo.core_algos import get_adv_estimator_fn
from verl.trainer.siop.report import METRICS_FILE, read_metrics
from verl.utils.reward_score.siop_reward import exact_match
from verl.utils.siop.turn_utils import parse_answer

from examples.toy_world.agent import read_observation
from examples.toy_world.world import KINDS, STALE_ANSWERS, TWO_HOP, Question, World, held_out_world, train_world

ROOT = Path(__file__).resolve().parent.parent
# Steps in which the policy is still near the warm start: there the advantages say what a method asks for.
EARLY_STEPS = 10
_OBSERVATION = re.compile(r"<tool_response>.*?</tool_response>", re.DOTALL)


# --- one run ----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=8)
def _questions(toy: Path) -> dict[str, Question]:
    built = json.loads((toy / "meta.json").read_text())["build"]
    kind = KINDS[built.get("world", TWO_HOP.name)]
    worlds: tuple[World, ...] = (train_world(built["seed"], kind), held_out_world(built["seed"], kind))
    return {question.text: question for world in worlds for question in world.questions()}


def question_of(prompt: str, toy: Path) -> Question:
    """The question of a rendered prompt, with or without the chat template's special tokens.

    Raises:
        KeyError: no question of this world.
    """
    text = re.sub(r"<\|im_\w+\|>(user|assistant)?", " ", prompt)
    return _questions(toy)[" ".join(text.split())]


def turns_of(output: str) -> list[str]:
    """Texts of the assistant turns of a dumped rollout: what stands between the tool's results.

    A result that nothing follows is none: the policy made it up inside its last turn, or the length ended there.
    """
    turns = _OBSERVATION.split(output)
    return turns[:-1] if len(turns) > 1 and not re.sub(r"<\|im_\w+\|>", "", turns[-1]).strip() else turns


def observations_of(output: str) -> list[str]:
    """Texts of the tool's results in a dumped rollout."""
    return [
        text.removeprefix("<tool_response>").removesuffix("</tool_response>") for text in _OBSERVATION.findall(output)
    ]


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The lines of a JSONL file; not by splitlines, which also ends one where a text has a line separator."""
    return [json.loads(line) for line in file.read_text().split("\n") if line]


def _share(values: Iterable[bool | float]) -> float:
    numbers = [float(value) for value in values]
    return sum(numbers) / len(numbers) if numbers else math.nan


def evaluation(folder: Path, toy: Path) -> dict[str, Any]:
    """Results of an evaluation on held-out questions.

    Args:
        folder: where eval_siop.sh left its rollouts and metrics.
        toy: the toy world evaluated on.

    Returns:
        ``em``, ``questions``, ``templates`` and ``depths`` (EM each), ``searches`` (by depth), ``turns``, ``tokens``
        (of the policy), and the
        shares of answers that are an entity between the company and the answer (``bridge``), that are the stale answer
        (``stale``), and of rollouts without an answer (``no_answer``).
    """
    metrics = read_metrics(folder)
    rows = [row for file in sorted(folder.glob("[0-9]*.jsonl")) for row in read_rows(file)]
    searched = [(question_of(row["input"], toy), turns_of(row["output"])) for row in rows]
    found = [
        (question, parse_answer(turns[-1]), row["em"]) for (question, turns), row in zip(searched, rows, strict=True)
    ]

    def by(key: Callable[[Question], Any]) -> dict[str, float]:
        names = sorted({str(key(question)) for question, _, _ in found})
        return {name: _share(em for question, _, em in found if str(key(question)) == name) for name in names}

    return {
        "em": _share(em for _, _, em in found),
        "questions": len(found),
        "templates": by(lambda question: question.template),
        "depths": by(lambda question: question.depth),
        "searches": {
            depth: _share(len(turns) - 1 for question, turns in searched if str(question.depth) == depth)
            for depth in sorted({str(question.depth) for question, _ in searched})
        },
        "turns": metrics["val-aux/turns/mean"],
        "tokens": metrics["val-aux/response_tokens/mean"],
        "bridge": _share(answer in question.chain[1:-1] for question, answer, _ in found),
        "stale": _share(answer in STALE_ANSWERS.values() for _, answer, _ in found),
        "no_answer": _share(not answer for _, answer, _ in found),
    }


@lru_cache(maxsize=64)
def _composed(overrides: tuple[str, ...]) -> DictConfig:
    path = f"hydra.searchpath=[pkg://verl.trainer.config,file://{ROOT / 'config'}]"
    with initialize_config_module("verl.trainer.siop.config", version_base=None):
        return compose("siop_trainer", overrides=[path, "experiment=toy", "hardware=cpu", *overrides])


def config_of(overrides: Sequence[str]) -> DictConfig:
    """The configuration that these Hydra overrides give a run of the toy world, presets included."""
    return _composed(tuple(overrides))


def turn_advantages(
    turn_rewards: Sequence[Sequence[float]], turns: Sequence[int], uids: Sequence[str], algorithm: DictConfig
) -> list[list[float]]:
    """The advantage of every turn, by the estimator that the run trained with.

    Args:
        turn_rewards: for each of B rollouts T rewards, or none.
        turns: B numbers of turns.
        uids: B questions.
        algorithm: the ``algorithm`` section.
    """
    # One policy token and one other token for each turn: the estimators read turns off the mask.
    rewards_BL = torch.zeros(len(turns), 2 * max(turns))
    mask_BL = torch.zeros_like(rewards_BL)
    for row, (rewards, count) in enumerate(zip(turn_rewards, turns, strict=True)):
        mask_BL[row, 0 : 2 * count : 2] = 1
        if rewards:
            rewards_BL[row, 0 : 2 * count : 2] = torch.tensor(rewards)
    advantages_BL, _ = get_adv_estimator_fn(algorithm.adv_estimator)(
        token_level_rewards=rewards_BL,
        response_mask=mask_BL,
        index=np.array(uids, dtype=object),
        config=algorithm,
        norm_adv_by_std_in_grpo=algorithm.get("norm_adv_by_std_in_grpo", True),
    )
    return [advantages_BL[row, 0 : 2 * count : 2].tolist() for row, count in enumerate(turns)]


@dataclass(frozen=True)
class Dumped:
    """The rollouts of one step, as the trainer dumped them.

    Args:
        rows: one for each of B rollouts; dropped questions are left out.
        texts: of their turns.
        counts: of their turns. A policy that makes up a result and goes on in the same turn has fewer than its text
            seems to have.
        rewards: turn rewards; of another estimator's runs the outcome on the last turn.
        uids: their questions.
    """

    rows: list[dict[str, Any]]
    texts: list[list[str]]
    counts: list[int]
    rewards: list[list[float]]
    uids: list[str]

    @classmethod
    def read(cls, file: Path) -> Dumped:
        # A dropped question has no turn rewards; one whose rollout has no answer has an empty list.
        rows = [row for row in read_rows(file) if row.get("turn_rewards", []) is not None]
        texts = [turns_of(row["output"]) for row in rows]
        counts = [len(row.get("turn_rewards") or turns) for row, turns in zip(rows, texts, strict=True)]
        rewards = [
            row.get("turn_rewards", [0.0] * (count - 1) + [row["score"]])
            for row, count in zip(rows, counts, strict=True)
        ]
        return cls(rows, texts, counts, rewards, [row["uid"].rsplit("_", 2)[0] for row in rows])

    def advantages(self, algorithm: DictConfig) -> list[list[float]]:
        """Of every turn, see :func:`turn_advantages`."""
        return turn_advantages(self.rewards, self.counts, self.uids, algorithm)


def training(folder: Path, algorithm: DictConfig) -> dict[str, Any]:
    """Course of a training run, from its dumped rollouts.

    Returns:
        ``train_em`` and ``train_turns`` by step; in the first :data:`EARLY_STEPS` steps ``answer_advantage`` and
        ``search_advantage``, the mean advantage of turns that answer and of the others; ``right_advantage`` and
        ``stale_advantage``, that of turns that answer rightly and with the stale answer, None if there are none.
    """
    files = sorted(folder.glob("[0-9]*.jsonl"), key=lambda file: int(file.stem))
    em, mean_turns = [], []
    answering: list[float] = []
    searching: list[float] = []
    right: list[float] = []
    stale: list[float] = []
    for file in files:
        step = Dumped.read(file)
        em.append(_share(row["em"] for row in step.rows))
        mean_turns.append(_share(len(turns) for turns in step.texts))
        if int(file.stem) > EARLY_STEPS:
            continue
        for row, turns, values in zip(step.rows, step.texts, step.advantages(algorithm), strict=True):
            answer = parse_answer(turns[-1])
            (answering if answer else searching).append(values[-1])
            searching.extend(values[:-1])
            if row["em"]:
                right.append(values[-1])
            elif answer in STALE_ANSWERS.values():
                stale.append(values[-1])
    return {
        "steps": int(files[-1].stem) if files else 0,
        "train_em": em,
        "train_turns": mean_turns,
        "answer_advantage": _share(answering),
        "search_advantage": _share(searching),
        "right_advantage": _share(right) if right else None,
        "stale_advantage": _share(stale) if stale else None,
    }


def is_finished(run: Path) -> bool:
    return (run / "after" / "validation" / METRICS_FILE).is_file()


# --- the turn AUC -----------------------------------------------------------------------------------------------------


def needed_fact_found(question: Question, observations: Sequence[str], answer: str) -> list[bool]:
    """For each turn, whether it is the right one: its search returns the next fact of the question's chain, or it gives
    the right answer when the whole chain was found.

    Args:
        question: with its chain.
        observations: the tool's results, one for each turn but the last.
        answer: the last turn's answer.
    """
    kind = next(kind for kind in KINDS.values() if question.template in kind.templates)
    template = kind.templates[question.template]
    relations = () if template.given else template.relations
    found, labels = 0, []
    for observation in observations:
        facts = set(read_observation(observation))
        facts |= {(o, r, s) for s, r, o in facts if r in kind.paired}
        before = found
        while found < len(relations) and (question.chain[found], relations[found], question.chain[found + 1]) in facts:
            found += 1
        labels.append(found > before)
    return [*labels, found == len(relations) and exact_match(answer, [question.gold]) == 1.0]


def auc(values: Sequence[float], labels: Sequence[bool]) -> tuple[float, int]:
    """Probability that a positive has a higher value than a negative, ties counting half (Mann-Whitney U / (P·N)).

    Returns:
        The area, nan without a pair, and the number of pairs P·N.
    """
    values_N, labels_N = np.asarray(values, dtype=float), np.asarray(labels, dtype=bool)
    positive, negative = values_N[labels_N], np.sort(values_N[~labels_N])
    pairs = len(positive) * len(negative)
    if not pairs:
        return math.nan, 0
    below = np.searchsorted(negative, positive, "left") + np.searchsorted(negative, positive, "right")
    return float(below.sum() / 2 / pairs), pairs


@dataclass(frozen=True)
class Turn:
    """A turn with its advantage and its label (:func:`needed_fact_found`)."""

    uid: str
    index: int
    searches: bool
    advantage: float
    right: bool


def _within(turns: Sequence[Turn], key: Callable[[Turn], Any]) -> float:
    """AUC of turns that are compared only with turns of the same key, weighted by pairs; nan without a pair."""
    groups: dict[Any, list[Turn]] = {}
    for turn in turns:
        groups.setdefault(key(turn), []).append(turn)
    areas = [auc([t.advantage for t in group], [t.right for t in group]) for group in groups.values()]
    total = sum(pairs for _, pairs in areas)
    return sum(area * pairs for area, pairs in areas if pairs) / total if total else math.nan


def turn_auc(turns: Sequence[Turn]) -> dict[str, float]:
    """AUC of the turn advantage.

    Returns:
        ``all`` turns; ``search``: without the last turns; ``same_index``: search turns compared only with search turns
        at the same turn index, ``same_question``: also of the same question, both weighted by their pairs.
    """
    searching = [turn for turn in turns if turn.searches]
    return {
        "all": _within(turns, lambda turn: None),
        "search": _within(searching, lambda turn: None),
        "same_index": _within(searching, lambda turn: turn.index),
        "same_question": _within(searching, lambda turn: (turn.uid, turn.index)),
    }


def resampled(turns: Sequence[Turn], draws: int = 100) -> np.ndarray:
    """``same_index`` AUC of resamples of the questions, with replacement; the same resamples for every method.

    The standard deviation over the draws is the standard error of the AUC; that of the differences of two methods is
    the standard error of their difference.
    """
    of: dict[str, list[Turn]] = {}
    for turn in turns:
        if turn.searches:
            of.setdefault(turn.uid, []).append(turn)
    groups = list(of.values())
    rng = np.random.default_rng(0)
    samples = (rng.integers(0, len(groups), len(groups)) for _ in range(draws))
    return np.array([_within([t for i in sample for t in groups[i]], lambda turn: turn.index) for sample in samples])


# --- several runs -----------------------------------------------------------------------------------------------------


def standard_error(ems: Sequence[float], questions: int) -> float:
    """Of the mean EM of runs that were evaluated on the same questions.

    The larger of two: that of one evaluation, which the seeds share because they share the n questions, and that of the
    runs' mean, their sample standard deviation / sqrt(runs).

    That of one evaluation is half the width of the one-sigma Wilson interval, sqrt(n·p·(1 − p) + 1/4) / (n + 1): about
    sqrt(p·(1 − p) / n), but not 0 where p is 0 or 1. Source: Wilson (1927), Journal of the American Statistical
    Association 22 (158), pages 209 to 212, with z = 1.
    """
    mean = sum(ems) / len(ems)
    sampling = math.sqrt(questions * mean * (1 - mean) + 0.25) / (questions + 1)
    return max(sampling, float(np.std(ems, ddof=1)) / math.sqrt(len(ems))) if len(ems) > 1 else sampling


def averaged(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One method in one world: means over its seeds."""
    first = runs[0]

    def mean(key: str) -> float:
        return float(np.mean([run[key] for run in runs]))

    return {
        "seeds": [run["seed"] for run in runs],
        "steps": sorted({run["steps"] for run in runs}),
        "ems": [run["em"] for run in runs],
        "em": mean("em"),
        "error": standard_error([run["em"] for run in runs], first["questions"]),
        **{
            group: {name: float(np.mean([run[group][name] for run in runs])) for name in first[group]}
            for group in ("templates", "depths", "searches")
            if group in first
        },
        **{
            key: mean(key)
            for key in ("turns", "tokens", "bridge", "stale", "no_answer", "answer_advantage", "search_advantage")
        },
        **{
            key: None if any(run[key] is None for run in runs) else mean(key)
            for key in ("right_advantage", "stale_advantage")
        },
    }


def by_method(entry: Mapping[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """The runs of a world by method, in the order of the file."""
    methods: dict[str, list[dict[str, Any]]] = {}
    for run in entry["runs"]:
        methods.setdefault(run["method"], []).append(run)
    return list(methods.items())


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _number(value: float | None, digits: int = 3, sign: str = "") -> str:
    return "" if value is None or math.isnan(value) else f"{value:{sign}.{digits}f}"


def render(results: Mapping[str, Any]) -> str:
    """``table.md``: per world the methods with their errors, their depths and templates, and the turn AUC."""
    parts = [
        "# Learning table of the toy worlds",
        "",
        "Written by `python benchmarks/toy_table.py --report-only` from the runs that finished. EM on held-out "
        "questions, one sampled rollout each; ± is the standard error (the larger of the evaluation's, half the width "
        "of a one-sigma Wilson interval, and of the seeds'). Turns, policy tokens, shares of answers: `bridge` an "
        "entity on the way, `stale` the stale answer, `none` no answer. Advantages: mean of the answering and of the "
        "searching turns in the first "
        f"{EARLY_STEPS} steps, and of the turns that give the right and the stale answer. Turn AUC: search turns at "
        "the same turn index.",
    ]
    for world, entry in results["worlds"].items():
        start = entry.get("start")
        methods = {name: averaged(runs) for name, runs in by_method(entry)}
        ordered = sorted(methods.items(), key=lambda item: -item[1]["em"])
        auc_of = entry.get("auc", {})
        rows = []
        if start:
            rows.append(
                ["*start*", f"{start['em']:.3f}", "", "", ""]
                + [_number(start[key], 2 if key == "turns" else 1) for key in ("turns", "tokens")]
                + [_number(start[key]) for key in ("bridge", "stale", "no_answer")]
                + ["", "", "", "", ""]
            )
        for name, m in ordered:
            rows.append(
                [
                    name,
                    f"**{m['em']:.3f}** ± {m['error']:.3f}",
                    " ".join(f"{em:.3f}" for em in m["ems"]),
                    str(len(m["seeds"])),
                    "/".join(map(str, m["steps"])),
                    _number(m["turns"], 2),
                    _number(m["tokens"], 1),
                    *(_number(m[key]) for key in ("bridge", "stale", "no_answer")),
                    *(_number(m[f"{of}_advantage"], 2, "+") for of in ("answer", "search", "right", "stale")),
                    _number(auc_of.get("methods", {}).get(name, {}).get("same_index")),
                ]
            )
        header = (
            "method, EM, per seed, seeds, steps, turns, tokens, bridge, stale, none, adv. answer, adv. search, "
            "adv. right, adv. stale, turn AUC"
        )
        parts += ["", f"## {world}"]
        if rows:
            parts += ["", _table(header.split(", "), rows)]
        if methods or start:
            shown = {"*start*": start} if start else {}
            shown.update(ordered)
            some = next(iter(shown.values()))
            depths = sorted(some["depths"]) if len(some["depths"]) > 1 else []
            templates = sorted(some["templates"])
            detail = [
                [
                    name,
                    *(_number(m["depths"][d]) for d in depths),
                    *(_number(m.get("searches", {}).get(d), 2) for d in depths),
                    *(_number(m["templates"][t]) for t in templates),
                ]
                for name, m in shown.items()
            ]
            titles = ["method", *(f"{d} hops" for d in depths), *(f"searches, {d} hops" for d in depths)]
            titles += [t.replace("_", " ") for t in templates]
            parts += ["", "EM by depth, searches by depth, EM by template:", "", _table(titles, detail)]
        if auc_of:
            keys = ("all", "search", "same_index", "error", "same_question", "gain", "gain_error")
            parts += [
                "",
                f"Turn AUC on {auc_of['rollouts']} rollouts of the start model "
                f"({auc_of['questions']} training questions; EM {_number(auc_of['em'])}, stale answers "
                f"{_number(auc_of['stale'])}, right turns {_number(auc_of['right_share'])}). ± standard error, by "
                "resampling questions; against siop: the difference at the same turn index, on the same resamples.",
                "",
                _table(
                    ["method", "all turns", "search turns", "same index", "±", "same question", "against siop", "±"],
                    [[name, *(_number(a.get(key)) for key in keys)] for name, a in auc_of["methods"].items()],
                ),
            ]
    return "\n".join(parts) + "\n"


def plot(results: Mapping[str, Any], folder: Path) -> list[Path]:
    """Bars of the final EM, curves of the training EM and bars of the turn AUC, one panel for each world, as SVG.

    Raises:
        ImportError: without matplotlib (the extra ``plots``).
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    def bars(axis: Any, entry: Mapping[str, Any]) -> None:
        methods = sorted(((name, averaged(runs)) for name, runs in by_method(entry)), key=lambda item: item[1]["em"])
        names = [name for name, _ in methods]
        axis.barh(names, [m["em"] for _, m in methods], xerr=[m["error"] for _, m in methods], color="#9ab")
        for name, m in methods:
            axis.plot(m["ems"], [name] * len(m["ems"]), "k.", markersize=4)
        if entry.get("start"):
            axis.axvline(entry["start"]["em"], color="grey", linestyle=":", label="start")
            axis.legend()
        axis.set_xlabel("EM, held-out questions")

    def curves(axis: Any, entry: Mapping[str, Any]) -> None:
        for name, runs in by_method(entry):
            length = min(len(run["train_em"]) for run in runs)
            curve = np.mean([run["train_em"][:length] for run in runs], axis=0)
            # Means over five steps: one step has only 8 questions.
            smooth = np.convolve(curve, np.ones(5) / 5, "valid") if length >= 5 else curve
            axis.plot(np.arange(len(smooth)) + 3, smooth, label=f"{name} ({len(runs)})")
        axis.set_xlabel("step")
        axis.set_ylabel("EM, training questions")
        axis.legend(fontsize=7)

    def areas(axis: Any, entry: Mapping[str, Any]) -> None:
        methods = sorted(entry["auc"]["methods"].items(), key=lambda item: item[1]["same_index"])
        axis.barh([name for name, _ in methods], [area["same_index"] for _, area in methods], color="#9ab")
        axis.axvline(0.5, color="grey", linestyle=":")
        axis.set_xlim(0.3, 1.0)
        axis.set_xlabel("AUC of the turn advantage, searches at the same turn index")

    written = []
    for name, draw, part in (("em", bars, "runs"), ("training", curves, "runs"), ("turn_auc", areas, "auc")):
        worlds = {world: entry for world, entry in results["worlds"].items() if entry.get(part)}
        if not worlds:
            continue
        figure, axes = pyplot.subplots(1, len(worlds), figsize=(5.2 * len(worlds), 4.2), squeeze=False)
        for axis, (world, entry) in zip(axes[0], worlds.items(), strict=True):
            axis.set_title(world)
            draw(axis, entry)
        figure.tight_layout()
        written.append(folder / f"{name}.svg")
        figure.savefig(written[-1], metadata={"Date": None})
        pyplot.close(figure)
    return written
