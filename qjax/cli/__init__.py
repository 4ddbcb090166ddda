"""The command ``qjax``: quantize, score and run models in folders, without writing Python.

Results go to stdout and everything else (progress, warnings, errors) to stderr; with ``--json`` stdout holds exactly
one JSON object. Exit code 0 is success, 2 a mistake that the message says how to mend, 1 anything unexpected, and 130
Ctrl-C. Nothing heavy is imported before a command is known, so ``qjax --help`` answers at once.
"""

from qjax.cli.main import main

__all__ = ["main"]
