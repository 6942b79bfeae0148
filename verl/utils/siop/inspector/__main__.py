"""``python -m verl.utils.siop.inspector``: replaces itself by a process without verl's own package.

That imports torch and Ray, which a page does not need: 500 MB. See ``light.py``.
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, str(Path(__file__).with_name("light.py")), *sys.argv[1:]])
