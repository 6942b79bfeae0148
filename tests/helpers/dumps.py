"""Reading what a training has dumped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSONL file, whose texts may hold what ``splitlines`` takes for a line end."""
    return [json.loads(line) for line in path.read_text().split("\n") if line]
