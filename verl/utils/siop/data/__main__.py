"""``python -m verl.utils.siop.data``."""

import sys

from verl.utils.siop.data.cli import main

if __name__ == "__main__":
    sys.exit(main())
