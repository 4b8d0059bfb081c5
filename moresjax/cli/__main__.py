"""`python -m moresjax.cli` is the `moresjax` command."""

import sys

from moresjax.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
