"""Between the process that the user started (the driver) and the one in which the trainer runs.

Records go to the driver, the wish to stop goes to the trainer, both through the key-value store of Ray's control
service: it reaches whatever node the trainer runs on, needs no thread in the trainer and no process of its own.
"""

from __future__ import annotations

import json
import threading
from typing import Any

import ray
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_exists, _internal_kv_get, _internal_kv_put

_NAMESPACE = "siop"


class Channel:
    """One end of the channel of this Ray job: one process writes records, one reads them. Ray must be initialised."""

    def __init__(self) -> None:
        self._job = ray.get_runtime_context().get_job_id()
        self._next = 0
        self._lock = threading.Lock()

    def put(self, kind: str, **values: Any) -> None:
        """Send the record ``{"kind": kind, **values}``, from any thread; the values must be JSON."""
        text = json.dumps({"kind": kind, **values})
        with self._lock:
            _internal_kv_put(f"{self._job}/record/{self._next}", text, namespace=_NAMESPACE)
            self._next += 1

    def take(self) -> list[dict[str, Any]]:
        """The records since the last call, in their order; none when Ray has been shut down here."""
        records: list[dict[str, Any]] = []
        if not ray.is_initialized():
            return records
        while (text := _internal_kv_get(f"{self._job}/record/{self._next}", namespace=_NAMESPACE)) is not None:
            records.append(json.loads(text))
            _internal_kv_del(f"{self._job}/record/{self._next}", namespace=_NAMESPACE)
            self._next += 1
        return records

    def ask_to_stop(self) -> None:
        _internal_kv_put(f"{self._job}/stop", b"1", namespace=_NAMESPACE)

    def stop_asked(self) -> bool:
        return bool(_internal_kv_exists(f"{self._job}/stop", namespace=_NAMESPACE))
