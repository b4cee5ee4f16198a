"""``python -m nybble`` is the ``nybble`` command."""

import sys

from nybble.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
