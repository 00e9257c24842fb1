"""python -m fault_a2a: the same as the command fault-a2a."""

import sys

from fault_a2a.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
