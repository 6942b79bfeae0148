"""The trainer that only writes down how it was called."""

from __future__ import annotations

from pathlib import Path

import pytest
from launching import Environment, pretended_trainer


@pytest.fixture
def trainer(tmp_path: Path) -> Environment:
    return pretended_trainer(tmp_path)
