"""`python -m tq_store` is the command `tq-store`."""

import sys

from tq_store.cli import main

if __name__ == "__main__":
    sys.exit(main())
