"""`python -m service --bundle BUNDLE` is `likewise serve`."""

import sys

from likewise import main

if __name__ == "__main__":
    sys.exit(main(["serve", *sys.argv[1:]]))
