"""`python -m grinqh` is the command `grinqh`."""

import sys

from grinqh.cli import main

if __name__ == "__main__":
    sys.exit(main())
