from __future__ import annotations

import subprocess
import sys

import psutil

_STARTS = """
import subprocess, sys
from verl.utils.siop.processes import adopt_orphans, end_started
adopt_orphans()
# A shell that ends at once, and leaves a process in a session of its own that takes no notice of SIGTERM.
subprocess.run(["bash", "-c", "trap '' TERM; setsid sleep 600 & echo $!"], check=True)
sys.stdout.flush()
end_started(patience=0.5)
"""


def test_orphans_that_ignore_the_signal_are_ended():
    done = subprocess.run([sys.executable, "-c", _STARTS], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not psutil.pid_exists(int(done.stdout))
