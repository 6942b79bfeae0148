"""Whether the processes that generate and that hold rollouts are still there, for whoever waits for them."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError
from verl.trainer.siop.run.channel import Channel

_PERIOD_S = 1.0


class Liveness:
    """Notices Ray actors that have died.

    verl hands a step's questions to its agent-loop workers and waits until TransferQueue holds their rollouts; of a
    worker that is killed meanwhile (by the kernel, out of memory, or with its node) it waits for ever.

    Args:
        actors: handles.
    """

    def __init__(self, actors: Sequence[Any]) -> None:
        self._actors = list(actors)
        self._asked: dict[Any, int] = {}  # outstanding call -> which actor
        self._next = 0.0

    def died(self) -> str | None:
        """What Ray says of an actor that has died, None while there is none; returns at once.

        A worker that is busy answers late, which is no failure: only a call that Ray itself gives up is one.
        """
        if self._asked:
            done, _ = ray.wait(list(self._asked), num_returns=len(self._asked), timeout=0)
            for call in done:
                del self._asked[call]
                try:
                    ray.get(call)
                except RayActorError as error:
                    # Which process, and how it ended; not what that may come of in general.
                    return " ".join(str(error).split()).split(" Some common causes")[0]
        if time.monotonic() >= self._next:
            waiting = set(self._asked.values())
            for index, actor in enumerate(self._actors):
                if index not in waiting:
                    self._asked[actor.__ray_ready__.remote()] = index
            self._next = time.monotonic() + _PERIOD_S
        return None


class QueueWatch(threading.Thread):
    """Tells the driver when a process of TransferQueue has died, whatever the trainer is doing.

    Whoever reads or writes rollouts asks a storage unit that has died three times, for 200 seconds each, and its
    controller for ever.
    """

    def __init__(self, channel: Channel) -> None:
        super().__init__(name="queue watch", daemon=True)
        self._channel = channel
        self._over = threading.Event()
        controller = ray.get_actor("TransferQueueController", namespace="transfer_queue")
        names = [name for name in ray.util.list_named_actors() if name.startswith("TransferQueueStorageUnit")]
        self._liveness = Liveness([controller, *map(ray.get_actor, names)])

    def run(self) -> None:
        while not self._over.wait(_PERIOD_S):
            if said := self._liveness.died():
                self._channel.put(
                    "lost", what=f"a process of TransferQueue, which holds the rollouts, has died: {said}"
                )
                return

    def finish(self) -> None:
        self._over.set()
