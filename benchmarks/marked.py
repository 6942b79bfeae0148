"""The processes of one benchmark or test, known by a mark in their environment."""

from __future__ import annotations

import psutil


def marked(variable: str, mark: str) -> list[psutil.Process]:
    """Those alive that have ``variable=mark`` in their environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(variable) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found
