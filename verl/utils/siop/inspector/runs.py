"""The runs that the page shows: their indexes, kept up to date, and their credit under other keys."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from verl.utils.siop.errors import SiopError
from verl.utils.siop.inspector.alarms import alarms
from verl.utils.siop.inspector.dump import Dump
from verl.utils.siop.inspector.index import RunIndex
from verl.utils.siop.inspector.recompute import Recipe, check_recipe, recompute
from verl.utils.siop.inspector.schema import DumpError, NotThere
from verl.utils.siop.inspector.summary import FLAGS
from verl.utils.siop.inspector.views import Other, question_view

logger = logging.getLogger("siop.inspector")

# Steps whose credit under other keys is kept.
KEPT_STEPS = 8
MAX_SAME = 60
# Of the curves that the page draws; the logs have more.
SHOWN = (
    "siop/outcome/", "siop/turns/mean", "siop/no_answer", "siop/clusters_per_group", "siop/cluster_entropy",
    "siop/support_", "siop/turn_reward/turn_", "siop/zero_variance_groups", "siop/seconds/", "siop/tokens/",
    "siop/heaviest_cluster_right", "siop/target_mass", "siop/evidence", "timing_s/",
)  # fmt: skip


SECONDS, TOKENS = "siop/seconds/", "siop/tokens/"
# Logged of every method; of one that asks no scorer they are about 0.
WAITING = {f"{SECONDS}busy", f"{SECONDS}exposed"}


def _of_the_method(values: dict[str, list[float | None]]) -> dict[str, list[float | None]]:
    """The curves without those of a scorer that is asked for nothing, or computes no tokens."""
    asked = any(name.startswith(SECONDS) and name not in WAITING for name in values)
    return {
        name: row
        for name, row in values.items()
        if (asked or name not in WAITING) and (any(row) or not name.startswith(TOKENS))
    }


class Runs:
    """One run or several.

    Args:
        folders: of the runs.
        recipe: other keys, for whose credit to show beside that of the training.

    Attributes:
        indexes: by the name of the run.

    Raises:
        DumpError: a folder is none of a run or given twice, or no run can be recomputed.
        SiopConfigError: the keys of the recipe are not allowed.
    """

    def __init__(self, folders: Sequence[Path], recipe: Recipe | None = None) -> None:
        self.indexes: dict[str, RunIndex] = {}
        for folder in folders:
            dump = Dump(folder)
            self.indexes[self._new_name(dump)] = RunIndex(dump)
        self.recipe = recipe
        if recipe:
            check_recipe([index.dump.all_settings() for index in self.indexes.values()], recipe)
        self._progress: dict[str, tuple[int, int]] = {}
        self._recomputed: OrderedDict[tuple[str, int, int], Other | str] = OrderedDict()
        self._lock = threading.Lock()
        self._stop = threading.Event()

    def _new_name(self, dump: Dump) -> str:
        """The run's name, with as many of the folders that it lies in as tell it from those before."""
        place = dump.rollouts.resolve()
        if any(index.dump.rollouts.resolve() == place for index in self.indexes.values()):
            raise DumpError(f"{dump.rollouts} is given twice")
        name, outer = dump.name, (place.parent if place.name == "rollouts" else place).parent
        while name in self.indexes:
            name, outer = f"{outer.name}/{name}", outer.parent
        return name

    # ------------------------------------------------------------------ following
    def refresh(self, show: Callable[[str, int, int], None] | None = None) -> None:
        """Take in what is new in all runs."""
        for name, index in self.indexes.items():

            def progress(done: int, total: int, name: str = name) -> None:
                self._progress[name] = (done, total)
                if show:
                    show(name, done, total)

            try:
                index.refresh(progress)
                index.trouble = ""
            except (SiopError, OSError) as error:
                if index.trouble != str(error):
                    logger.error("%s is not read any further: %s", name, error)
                index.trouble = str(error)
            self._progress.pop(name, None)

    def follow(self, every_s: float) -> None:
        """Refresh again and again, until :meth:`close`."""
        try:
            while not self._stop.is_set():
                self.refresh()
                self._stop.wait(every_s)
        finally:
            if not self._stop.is_set():  # by an error of this program, which the log has
                for index in self.indexes.values():
                    index.trouble = "nothing more is read: see the log of the service"

    def close(self) -> None:
        """End :meth:`follow`."""
        self._stop.set()

    # ------------------------------------------------------------------ answers
    def index(self, run: str) -> RunIndex:
        """The index of a run.

        Raises:
            NotThere: it is not one of these.
        """
        if run not in self.indexes:
            raise NotThere(f"no run {run}; there are {', '.join(self.indexes)}")
        return self.indexes[run]

    def overview(self) -> dict[str, Any]:
        """The runs and how far each is read."""
        states = []
        for name, index in self.indexes.items():
            done, total = self._progress.get(name, (0, 0))
            states.append({"name": name, **index.state(), "waiting": total - done})
        recipe = None
        if self.recipe:
            recipe = {"name": self.recipe.name, "keys": self.recipe.keys, "kept": self.recipe.kept}
        return {"runs": states, "recompute": recipe, "flags": FLAGS}

    def curves(self, run: str) -> dict[str, Any]:
        """The curves of a run: ``steps``, ``metrics`` by name with a value or None for each, and ``alarms``."""
        curves = self.index(run).curves()
        steps = sorted(curves)
        names = sorted({name for step in steps for name in curves[step] if name.startswith(SHOWN)})
        values = {name: [curves[step].get(name) for step in steps] for name in names}
        return {"steps": steps, "metrics": _of_the_method(values), "alarms": alarms(curves)}

    def question(self, run: str, step: int, group: str) -> dict[str, Any]:
        """A question with its rollouts, and where else it was asked.

        Raises:
            NotThere: there is no such run or question.
            DumpError, OSError: the dump cannot be read.
        """
        rollouts = self.index(run).rollouts(step, group)
        other = self._other(run, step) if self.recipe else None
        view = question_view(rollouts, None if isinstance(other, str) else other)
        view["recompute_problem"] = other if isinstance(other, str) else None
        view["asked"] = [
            {"run": name, **one}
            for name, index in self.indexes.items()
            for one in index.same_question(view["question"])[:MAX_SAME]
        ]
        return view

    def lines(self, run: str, step: int, group: str) -> dict[str, Any]:
        """The lines of a question as they are in the dump, and the settings, None where they are not there."""
        rollouts = self.index(run).rollouts(step, group)
        settings = None
        with contextlib.suppress(DumpError):
            settings = self.index(run).dump.settings(rollouts[0].settings).model_dump()
        return {"rollouts": [rollout.model_dump(exclude_none=True) for rollout in rollouts], "settings": settings}

    def _other(self, run: str, step: int) -> Other | str:
        """The credit of a step under the recipe, or why there is none."""
        index = self.index(run)
        key = (run, step, index.revision)
        with self._lock:
            if key in self._recomputed:
                self._recomputed.move_to_end(key)
                return self._recomputed[key]
        found: Other | str
        try:
            rollouts = [rollout for _, rollout in index.dump.read(step)]
            found = recompute(rollouts, index.dump.settings(rollouts[0].settings), self.recipe)
        except (SiopError, OSError) as error:
            found = str(error)
        with self._lock:
            self._recomputed[key] = found
            while len(self._recomputed) > KEPT_STEPS:
                self._recomputed.popitem(last=False)
        return found
