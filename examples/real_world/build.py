"""Writes the world for a training: corpus and questions.

    python -m examples.real_world.build --out runs/real_world [--train-questions 600] [--eval-questions 100]

Writes ``corpus.jsonl`` and, in verl's format, ``train.parquet`` and ``eval.parquet``; no question is in both. The
labels are for evaluation. SIOP does not read them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from examples.real_world.rollouts import messages_of
from examples.real_world.world import Question, corpus, sample_questions

DATA_SOURCE = "real_world"
TRAIN_QUESTIONS, EVAL_QUESTIONS = 600, 100


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
    """Writes corpus and questions; see the module.

    Raises:
        ValueError: more questions asked for than there are.
    """
    parts = dict(zip(("train", "eval"), split_questions(train, held_out), strict=True))
    out.mkdir(parents=True, exist_ok=True)
    with (out / "corpus.jsonl").open("w", encoding="utf-8") as file:
        for document in corpus():
            file.write(json.dumps(document, ensure_ascii=False) + "\n")
    for split, questions in parts.items():
        rows = [question_row(question, index, split, shots) for index, question in enumerate(questions)]
        pd.DataFrame(rows).to_parquet(out / f"{split}.parquet", index=False)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--train-questions", type=int, default=TRAIN_QUESTIONS, help=f"(default: {TRAIN_QUESTIONS})")
    parser.add_argument("--eval-questions", type=int, default=EVAL_QUESTIONS, help=f"(default: {EVAL_QUESTIONS})")
    args = parser.parse_args(argv)
    try:
        write_world(args.out, args.train_questions, args.eval_questions)
    except ValueError as error:
        parser.error(str(error))
    print(f"wrote {args.train_questions} training and {args.eval_questions} held-out questions to {args.out}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
