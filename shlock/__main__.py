"""``python -m shlock`` is the ``shlock`` command."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
