"""The processes of one test, known by a mark in their environment."""

from __future__ import annotations

import psutil


def marked(mark: str) -> list[psutil.Process]:
    """Those alive that have ``SIOP_TEST_MARK=mark`` in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("SIOP_TEST_MARK") == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found
