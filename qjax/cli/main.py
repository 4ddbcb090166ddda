"""From the command line to an exit code."""

from __future__ import annotations

import importlib
import io
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from qjax.cli.parser import build_parser
from qjax.errors import QjaxError, QjaxWarning

# Command -> the module whose run(args) does it.
_COMMANDS = {
    "inspect": "qjax.cli.inspecting",
    "quantize": "qjax.cli.quantizing",
    "eval": "qjax.cli.evaluating",
    "generate": "qjax.cli.generating",
    "study": "qjax.cli.studying",
    "recipes": "qjax.cli.recipes",
    "advise": "qjax.cli.advising",
    "search": "qjax.cli.searching",
    "bench": "qjax.cli.benchmarking",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: arguments without the program's name; None takes those of the process.
    """
    import qjax

    parser = build_parser(qjax.__version__)
    try:
        args = parser.parse_args(argv)
    except SystemExit as e:  # argparse has said what it had to say
        return e.code if isinstance(e.code, int) else 2
    if args.command is None:
        parser.print_help(sys.stderr)
        return 2
    for stream in (sys.stdout, sys.stderr):  # a terminal that knows no "×" gets a question mark, not a failure
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    debug = os.environ.get("QJAX_DEBUG", "") not in ("", "0")
    # The default backend's platform notice would be the first thing a user reads.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            importlib.import_module(_COMMANDS[args.command]).run(args)
            sys.stdout.flush()
            return 0
        except QjaxError as e:
            if debug:
                raise
            return _fail(str(e), 2)
        except KeyboardInterrupt:
            return _fail("interrupted", 130)
        except BrokenPipeError:  # the reader of a pipe has seen enough, as in `qjax recipes | head -1`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except OSError as e:
            if debug:
                raise
            where = f"{e.filename}: " if e.filename else ""
            return _fail(f"{where}{e.strerror or e}", 2)
        except Exception as e:
            if debug:
                raise
            text = " ".join(str(e).split())
            return _fail(f"unexpected {type(e).__name__}: {text[:400]} (QJAX_DEBUG=1 shows where; this is a bug)", 1)


def _fail(message: str, code: int) -> int:
    print(f"qjax: {' '.join(message.split())}", file=sys.stderr)
    return code


def _show_warning(message: Any, category: type[Warning], filename: str, lineno: int, *_: Any) -> None:
    # Ours are written for users; of others the place matters more than for ours.
    where = "" if issubclass(category, QjaxWarning) else f" ({os.path.basename(filename)}:{lineno})"
    print(f"qjax: warning: {' '.join(str(message).split())}{where}", file=sys.stderr)
