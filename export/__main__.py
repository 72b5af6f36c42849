"""`python -m export RUN --out BUNDLE` is `likewise export`."""

import sys

from likewise import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
