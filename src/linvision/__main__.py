"""``python -m linvision`` is the command line."""

import sys

from linvision.cli import main

sys.exit(main())
