"""Whether a training run would start, one line per check: ``python -m verl.trainer.siop.doctor [HYDRA_OVERRIDE …]``.

It takes the arguments of :mod:`verl.trainer.siop.main`, makes every check also after one has failed, and starts
nothing. Exit code 0 if a run would start, 1 if not, 2 for arguments that make no configuration.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import logging
import os
import queue
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hydra import compose, initialize_config_module
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from verl.trainer.siop.checks import machine as machine
from verl.trainer.siop.checks.policy import Policy
from verl.trainer.siop.checks.services import check_scorer
from verl.trainer.siop.preflight import (
    CHECKS,
    SEARCH,
    VALUES,
    Run,
    ask_tools,
    check_overrides,
    forget_empty_variables,
    needs_scorer,
)
from verl.trainer.siop.run.lock import check_free
from verl.utils.siop.data.chat import build_tools
from verl.utils.siop.errors import SiopError

SERVICE_WAIT_S = 10.0
CHECK_WAIT_S = 120.0
# Every row is rendered: a million rows take this long.
DATA_WAIT_S = 3600.0


@dataclass
class Finding:
    """What a check has found.

    Args:
        name: of the check.
        text: what was found, or what to do.
        failed: a run would not start.
        unexpected: the check itself failed, as it may on values of a wrong type.
        warnings: what is worth a look.
    """

    name: str
    text: str
    failed: bool = False
    unexpected: bool = False
    warnings: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """For a terminal, the outcome in front."""
        first = f"{'failed' if self.failed else 'ok':<8} {self.name}: {self.text}"
        return [first, *(f"{'warning':<8} {self.name}: {text}" for text in self.warnings)]


Check = Callable[[Run], str]


def _search(run: Run) -> str:
    tools = build_tools(run.config.actor_rollout_ref.rollout.multi_turn)  # (the model's may be wrong)
    return ask_tools(run, tools, run.sample, SERVICE_WAIT_S)


def _scorer(run: Run) -> str:
    if not needs_scorer(run):
        return "not needed"
    scored = run.siop.siop_scorer == "server" and run.siop.measures_support
    policy: Policy | None = None
    with contextlib.suppress(SiopError, OmegaConfBaseException):
        policy = run.policy
    check = check_scorer(run.siop, policy, run.warn, SERVICE_WAIT_S, run.sample if scored else None)
    limit = 3 * SERVICE_WAIT_S
    try:
        return asyncio.run(asyncio.wait_for(check, limit))
    except asyncio.TimeoutError as error:
        raise SiopError(f"the scorer at {run.siop.siop_scorer_url} does not answer within {limit:g} s") from error


def _output(run: Run) -> str:
    if not run.trains:
        return "not needed"
    return check_free(Path(run.config.trainer.default_local_dir))


def _quiet(check: Check) -> Check:
    """The check without what verl prints beside it."""

    def made(run: Run) -> str:
        with contextlib.redirect_stdout(io.StringIO()):
            return check(run)

    return made


_CHECKS = {name: check for name, check in CHECKS if name not in ("scorer", SEARCH)}
# The machine first, then what every run checks before it starts, with a look into the services in place of a wait.
ALL_CHECKS: tuple[tuple[str, Check], ...] = (
    ("Python and packages", lambda run: machine.check_packages(run.config)),
    ("verl plugin", lambda run: machine.check_plugin(run.config)),
    (VALUES, _CHECKS.pop(VALUES)),
    ("GPUs", lambda run: machine.check_gpus(run.config, run.warn)),
    ("attention", lambda run: machine.check_attention(run.config)),
    ("Ray", lambda run: machine.check_ray(run.config, run.warn)),
    ("disk", lambda run: machine.check_disk(run.config, run.warn)),
    ("output folder", _output),
    *((name, _quiet(check) if name == "verl" else check) for name, check in _CHECKS.items()),
    ("scorer", _scorer),
    (SEARCH, _search),
)


def examine(config: DictConfig, report: Callable[[Finding], None]) -> bool:
    """Make all checks, each in its own thread and time.

    Args:
        config: the configuration of the run.
        report: gets each finding as soon as it is there.

    Returns:
        Whether a run would start.
    """
    run, failures = Run(config), dict[str, str]()
    for name, check in ALL_CHECKS:
        finding = _made(name, check, run, DATA_WAIT_S if name == "data rows" else CHECK_WAIT_S)
        if finding.failed:
            if finding.unexpected and VALUES in failures.values():
                finding.text = f"not checked, for it needs what failed above ({VALUES})"
            # Several checks need the model, the data or the settings.
            if earlier := failures.get(finding.text):
                finding.text = f"not checked, for it needs what failed above ({earlier})"
            else:
                failures[finding.text] = name
        report(finding)
    return not failures


def _made(name: str, check: Check, run: Run, wait_s: float) -> Finding:
    said: list[str] = []
    run.warn = said.append
    answers: queue.Queue[Finding] = queue.Queue()

    def work() -> None:
        try:
            answers.put(Finding(name, check(run)))
        except (SiopError, OmegaConfBaseException) as error:
            answers.put(Finding(name, str(error), failed=True))
        except Exception as error:  # noqa: BLE001  (the other checks are to be made also then)
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
            answers.put(Finding(name, text, failed=True, unexpected=True))

    threading.Thread(target=work, daemon=True).start()
    try:
        finding = answers.get(timeout=wait_s)
    except queue.Empty:
        finding = Finding(name, f"no end after {wait_s:g} s", failed=True)
    finding.warnings = list(dict.fromkeys(said))
    return finding


def configuration(arguments: Sequence[str]) -> DictConfig:
    """The configuration that ``verl.trainer.siop.main`` makes of these arguments.

    Raises:
        HydraException, OmegaConfBaseException: it makes none.
        SiopConfigError: an unknown ``siop_*`` key.
    """
    parser = argparse.ArgumentParser(prog="python -m verl.trainer.siop.doctor", description=__doc__)
    parser.add_argument("--config-dir", help="folder with the presets (experiment=, ablation=)")
    parser.add_argument("overrides", nargs="*", help="Hydra overrides, as for verl.trainer.siop.main")
    options = parser.parse_args(list(arguments))
    check_overrides(options.overrides)
    overrides = list(options.overrides)
    if options.config_dir:
        folder = Path(options.config_dir).absolute()
        overrides.append(f"hydra.searchpath=[pkg://verl.trainer.config,file://{folder}]")
    with initialize_config_module("verl.trainer.siop.config", version_base=None):
        return compose("siop_trainer", overrides=overrides)


def main(arguments: Sequence[str] | None = None) -> int:
    # What the checks have to say, they say in their findings.
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")

    def report(finding: Finding) -> None:
        sys.stdout.write("\n".join(finding.lines()) + "\n")
        sys.stdout.flush()

    forget_empty_variables()
    try:
        config = configuration(sys.argv[1:] if arguments is None else arguments)
    except (HydraException, OmegaConfBaseException, SiopError) as error:
        report(Finding("configuration", " ".join(str(error).split()), failed=True))
        return 2
    starts = examine(config, report)
    sys.stdout.write("a training run would start\n" if starts else "a training run would not start\n")
    return 0 if starts else 1


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)  # a check that hangs has a thread that nothing else ends
