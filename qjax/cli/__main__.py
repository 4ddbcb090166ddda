"""``python -m qjax.cli`` is ``qjax``."""

import sys

from qjax.cli.main import main

sys.exit(main())
