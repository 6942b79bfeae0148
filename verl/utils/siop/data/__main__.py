"""``python -m verl.utils.siop.data``."""

import sys

from verl.utils.siop.data.cli import main

sys.exit(main())
