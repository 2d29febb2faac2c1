"""`python -m offload`: the command line without an installed script."""

import sys

from offload.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
