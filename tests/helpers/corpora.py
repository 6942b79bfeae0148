"""Passages, and corpora of them."""

import json
from collections.abc import Sequence
from pathlib import Path

PASSAGES = [
    "The founder of Kovaco Tozex is Nila Bodson.",
    "The chief of Kovaco Tozex is Maro Tinson.",
    "Nila Bodson was born in Peruo Betville.",
    "Nila Bodson lives in Fevo Fudiville.",
    "The twin of Peruo Betville is Fevo Fudiville.",
]


def write_corpus(path: Path, passages: Sequence[str]) -> Path:
    lines = [json.dumps({"id": f"p{i}", "contents": text}) for i, text in enumerate(passages)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
