"""Made-up question sets as they are published: a folder for each of the shapes in use, all with the same questions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from verl.utils.siop.data.presets import PRESETS

ROWS = 20
# What DeepResearcher calls them.
OTHER_NAMES = {"triviaqa": "tq", "2wikimultihopqa": "2wiki", "bamboogle": "Bamboogle"}
INSTRUCTIONS = "Answer the given question. You must reason first.\nGive it as <answer> Beijing </answer>. Question: "


def made_up(name: str, split: str, count: int = ROWS) -> list[dict[str, Any]]:
    """Questions of a set: most with one answer, some with two, some yes/no, one with a label of 5,000 words."""
    rows = []
    for number in range(count):
        answers = [f"person {number} of {name}"]
        if number % 5 == 1:
            answers.append(f"P. {number}")
        elif number % 5 == 2:
            answers = ["yes" if number % 2 else "no"]
        elif number == 5:
            answers = [" ".join(f"w{i}" for i in range(5000))]
        question = f"who is number {number} in the {split} part of {name}?"
        rows.append({"id": f"{split}_{number}", "question": question, "golden_answers": answers})
    return rows


def parts() -> dict[str, dict[tuple[str, str], list[dict[str, Any]]]]:
    """The questions of preset searchr1, by part and (set, split)."""
    preset = PRESETS["searchr1"]
    return {
        part: {
            (name, stem.partition("/")[2]): made_up(name, stem.partition("/")[2])
            for name, stem in preset.files(part).items()
        }
        for part in ("train", "eval")
    }


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def flashrag_tree(root: Path) -> Path:
    """``SET/SPLIT.jsonl``, with metadata of a type that differs from set to set."""
    for sets in parts().values():
        for number, ((name, split), rows) in enumerate(sets.items()):
            metadata: Any = {"level": number} if number % 2 else {"level": [str(number)], "more": {"x": None}}
            write_jsonl(root / name / f"{split}.jsonl", [{**row, "metadata": metadata} for row in rows])
    return root


def searchr1_row(name: str, split: str, row: dict[str, Any], index: int) -> dict[str, Any]:
    return {
        **row,
        "data_source": name,
        "prompt": [{"role": "user", "content": f"{INSTRUCTIONS}{row['question']}\n"}],
        "ability": "fact-reasoning",
        "reward_model": {"style": "rule", "ground_truth": {"target": row["golden_answers"]}},
        "extra_info": {"index": index, "split": split},
    }


def searchr1_tree(root: Path) -> Path:
    """``train.parquet`` and ``test.parquet`` with all sets in each."""
    for part, file in (("train", "train"), ("eval", "test")):
        rows = [
            searchr1_row(name, file, row, index)
            for (name, _), rows in parts()[part].items()
            for index, row in enumerate(rows)
        ]
        write_parquet(root / f"{file}.parquet", rows)
    return root


def skyrl_tree(root: Path) -> Path:
    """Rows of verl's former preprocessing of the same data: a prefix to the name, the question beside the prompt."""
    for part, file in (("train", "train"), ("eval", "test")):
        rows = []
        for (name, _), questions in parts()[part].items():
            for index, row in enumerate(questions):
                full = searchr1_row(f"searchR1_{name}", file, row, index)
                kwargs = {"create_kwargs": {"ground_truth": full["reward_model"]["ground_truth"]}}
                full["prompt"] = [{"role": "system", "content": "You are helpful."}, *full["prompt"]]
                full["extra_info"] |= {
                    "question": row["question"],
                    "need_tools_kwargs": True,
                    "tools_kwargs": {"search": kwargs},
                }
                rows.append({key: full[key] for key in full if key not in ("id", "question", "golden_answers")})
        write_parquet(root / f"{file}.parquet", rows)
    return root


def deepresearcher_row(name: str, split: str, row: dict[str, Any], index: int) -> dict[str, Any]:
    other = OTHER_NAMES.get(name, name)
    return {
        "data_source": other,
        "prompt": [{"role": "user", "content": row["question"]}],
        "reward_model": {"style": "rule", "ground_truth": "<|answer_split|>".join(row["golden_answers"])},
        "extra_info": {"index": f"{other}_{index}", "split": split},
    }


def deepresearcher_tree(root: Path) -> Path:
    """``data/train.parquet`` and ``data/test.parquet``: bare questions, aliases in one text, names of their own."""
    preset = PRESETS["deepresearcher"]
    for part, split in (("train", "train"), ("eval", "dev")):
        rows = [
            deepresearcher_row(name, split, row, index)
            for name in preset.files(part)
            for index, row in enumerate(made_up(name, "train" if part == "train" else "test"))
        ]
        write_parquet(root / f"{preset.files(part)['nq']}.parquet", rows)
    return root


TREES = {"flashrag": flashrag_tree, "searchr1": searchr1_tree, "verl": skyrl_tree}
