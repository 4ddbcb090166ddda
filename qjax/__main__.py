"""``python -m qjax``: the command ``qjax``, where it is not on the PATH."""

import sys

from qjax.cli import main

if __name__ == "__main__":
    sys.exit(main())
