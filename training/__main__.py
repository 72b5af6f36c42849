"""`python -m training PICTURES --out RUN` is `likewise train`."""

import sys

from likewise import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
