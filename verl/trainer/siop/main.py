"""Entry point: ``python -m verl.trainer.siop.main data.train_files=… [any verl or algorithm.siop_* override]``.

The main thread waits for the end of the run and for signals; :class:`Run` checks, starts Ray and trains in another, so
that a signal finds nobody who swallows it, whatever Ray is doing.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import ray
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm
from verl.trainer.main_ppo import TaskRunnerV1, run_ppo
from verl.trainer.siop.checks.machine import full_disk
from verl.trainer.siop.plugin import require_registered
from verl.trainer.siop.run.console import Console
from verl.trainer.siop.run.lock import output_lock
from verl.trainer.siop.run.progress import Progress
from verl.trainer.siop.run.stopping import StartedProcesses, StopSignals, grace_seconds
from verl.trainer.siop.run.watch import Watch
from verl.utils.device import auto_set_device
from verl.utils.siop.errors import SiopConfigError, SiopError

_PERIOD_S = 0.1


class SiopTaskRunner(TaskRunnerV1.__ray_metadata__.modified_class):  # type: ignore[name-defined,misc]
    """verl's task runner, in whose process the ``siop`` trainer is registered before it is looked up."""

    def run(self, config: DictConfig) -> None:
        require_registered()
        import verl.trainer.siop.trainer  # noqa: F401  (registers trainer_mode=siop)

        try:
            super().run(config)
        finally:
            # verl has finished the run of W&B, whose service process would else be ended at the exit of this process;
            # by then Ray has killed it, and W&B prints a traceback.
            if "wandb" in config.trainer.logger:
                import wandb

                wandb.teardown()


class _RunnerClass:
    """What ``run_ppo`` makes the task runner of; ``on_ray`` is called first, as soon as Ray is up."""

    def __init__(self, actor_class: Any, on_ray: Callable[[], None]) -> None:
        self._actor_class, self._on_ray = actor_class, on_ray

    def options(self, **options: Any) -> _RunnerClass:
        return _RunnerClass(self._actor_class.options(**options), self._on_ray)

    def remote(self) -> Any:
        self._on_ray()
        return self._actor_class.remote()


def record_config(config: DictConfig) -> None:
    """Write the resolved configuration beside the checkpoints, as ``config.yaml``; an evaluation writes none."""
    if not config.trainer.get("val_only", False):
        folder = Path(config.trainer.default_local_dir)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(config, folder / "config.yaml", resolve=True)


class Run(threading.Thread):
    """Checks, then trains or evaluates until the end. ``error`` is what it ended with once ``ended`` is set."""

    def __init__(self, config: DictConfig, console: Console, progress: Progress, on_ray: Callable[[], None]) -> None:
        super().__init__(name="run", daemon=True)
        self._config, self._console, self._progress, self._on_ray = config, console, progress, on_ray
        self.ended = threading.Event()
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self._run()
        except BaseException as error:  # noqa: BLE001  (raised again in the main thread)
            self.error = error
        self.ended.set()
        # The kernel ends the processes of a private Ray with the thread that started them.
        threading.Event().wait()

    def _run(self) -> None:
        from verl.trainer.siop.preflight import check_before_start

        config = self._config
        require_registered()
        auto_set_device(config)
        steps = check_before_start(config, self._console.line).steps
        if not config.trainer.val_before_train and self._progress.is_complete(steps):
            self._console.tell(self._progress.started())
            return
        record_config(config)
        OmegaConf.resolve(config)  # here, where the user's environment is; a cluster's workers have another
        self._console.line("the checks have passed; starting Ray and loading the models")
        # Of a private Ray: no workers that wait for tasks. All work is in actors, which cannot use them.
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
        run_ppo(config, task_runner_class=_RunnerClass(ray.remote(num_cpus=1)(SiopTaskRunner), self._on_ray))


def _introduce(config: DictConfig, console: Console, grace: float) -> None:
    """What runs, where, and how to stop it."""
    trainer, evaluation = config.trainer, config.trainer.get("val_only", False)
    nodes = f" on each of {trainer.nnodes} nodes" if trainer.nnodes > 1 else ""
    device = ("CPU" if trainer.device == "cpu" else f"{trainer.n_gpus_per_node} GPU(s)") + nodes
    saved = f"; a step that ends within {grace:g} s is saved" if not evaluation and trainer.save_freq > 0 else ""
    console.line(f"model    {config.actor_rollout_ref.model.path}")
    if evaluation:
        console.line(f"data     {config.data.val_files}")
    else:
        console.line(f"data     {config.data.train_files}; validation {config.data.val_files}")
        console.line(f"output   {trainer.default_local_dir}")
    console.line(f"device   {device}")
    console.line(f"log      {console.log}")
    console.line(f"stop     Ctrl-C{saved}")


def _supervise(config: DictConfig, console: Console) -> None:
    """Run with the lock on the output folder, until the end, an error, or a signal."""
    from verl.trainer.siop.preflight import check_values

    check_values(config)  # before anybody calculates with one
    start = time.monotonic()
    grace, progress = grace_seconds(), Progress.of(config)
    signals, processes = StopSignals(grace, progress), StartedProcesses()
    watch: Watch | None = None

    def on_ray() -> None:
        nonlocal watch
        processes.ray_is_up()
        watch = Watch(console, progress, signals)
        watch.start()

    signals.install()
    with contextlib.ExitStack() as stack:
        if not config.trainer.get("val_only", False):
            log = str(console.log.absolute()) if console.log else None
            stack.enter_context(output_lock(Path(config.trainer.default_local_dir), log))
        _introduce(config, console, grace)
        run = Run(config, console, progress, on_ray)
        run.start()
        while not (run.ended.wait(_PERIOD_S) or signals.run_is_over() or processes.dead_daemon() or _lost(watch)):
            signals.install()
        dead = processes.dead_daemon()
        # As after a signal to the whole process group, or to all processes of a job: it ends Ray's processes too.
        ray_failed = dead is not None or isinstance(run.error and _cause(run.error), ray.exceptions.RayError)
        if watch is not None and run.ended.is_set() and not ray_failed:
            watch.finish()
        if signals.signum is not None and (run.error is None or ray_failed):
            processes.end()
            console.end_bar()
            console.tell(progress.stopped(signals.signum.name))
            _exit(128 + signals.signum)
        lost = f"Ray's {dead} has ended, and with it the run" if dead else _lost(watch)
        if lost:
            processes.end()
            console.end_bar()
            console.error(f"{lost}; {progress.last_checkpoint()}")
            _exit(1)
        if run.error is not None:
            # What a library says of it may be no more than that a file is shorter than it should be.
            if full := full_disk(Path(config.trainer.default_local_dir)):
                console.error(f"{full}; {progress.last_checkpoint()}")
            raise run.error
    console.follow_log(to_its_end=True)
    took = tqdm.format_interval(time.monotonic() - start)
    console.line(f"done in {took}" + (f"; checkpoint {progress.checkpoint}" if progress.checkpoint else ""))


def _lost(watch: Watch | None) -> str | None:
    """What the trainer says that it has lost and cannot go on without."""
    return watch.lost if watch is not None else None


def _cause(error: BaseException) -> BaseException:
    """What failed: Ray's wrapper is also an instance of what it wraps, and its text is the whole remote traceback."""
    return error.cause if isinstance(error, ray.exceptions.RayTaskError) else error


def _exit(code: int) -> None:
    """Without Ray's own work at the exit of Python: it would wait for processes that are gone, and abort."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@hydra.main(config_path="config", config_name="siop_trainer", version_base=None)
def _run(config: DictConfig) -> None:
    with Console.from_environment() as console:
        try:
            _supervise(config, console)
        except Exception as error:
            cause = _cause(error)
            if isinstance(cause, SiopError):
                console.error(str(cause))
                sys.exit(1)
            if console.log is not None:
                console.error(f"{type(cause).__name__}: {cause}")
            raise


def main() -> None:
    try:
        with Console.from_environment().silence():
            # verl's engines, which it imports, print about each that is missing.
            from verl.trainer.siop.preflight import check_overrides, forget_empty_variables
        forget_empty_variables()
        check_overrides(sys.argv[1:])
    except SiopConfigError as error:
        sys.exit(f"error: {error}")
    _run()


if __name__ == "__main__":
    main()
