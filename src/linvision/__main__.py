"""``python -m linvision``: the command line."""

from linvision.cli import main

raise SystemExit(main())
