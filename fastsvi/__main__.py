"""``python -m fastsvi``: the ``fastsvi`` command."""

import sys

from fastsvi.cli import main

if __name__ == "__main__":
    sys.exit(main())
