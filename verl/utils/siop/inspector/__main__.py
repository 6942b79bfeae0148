"""``python -m verl.utils.siop.inspector``: becomes ``siop_inspector.py``, a process without verl's own package."""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.stdout.flush()
    script = Path(__file__).resolve().parents[4] / "siop_inspector.py"
    os.execv(sys.executable, [sys.executable, str(script), *sys.argv[1:]])
