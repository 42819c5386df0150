"""`python -m vidl` runs the command `vidl`."""

import sys

from vidl.cli import main

if __name__ == "__main__":
    sys.exit(main())
