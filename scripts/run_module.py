"""Runs a module as ``python -m MODULE ARGUMENT ...`` does; stopped while it imports, it ends with one line.

    python scripts/run_module.py MODULE ARGUMENT ...

That takes some seconds, in which Python would print where it was. The module's own handlers take over from these.
"""

from __future__ import annotations

import logging
import os
import runpy
import signal
import sys
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _stop(signum: int, _frame: FrameType | None) -> None:
    sys.stderr.write(f"stopped by {signal.Signals(signum).name} before it had started\n")
    sys.stderr.flush()
    os._exit(128 + signum)


if __name__ == "__main__":
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, _stop)
    # verl tells at each start that VERL_PLATFORM is set, which the launchers do.
    logging.getLogger("verl.plugin.platform.platform_manager").addFilter(lambda record: record.levelno > logging.INFO)
    del sys.argv[0]
    sys.path[0] = os.getcwd()
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
