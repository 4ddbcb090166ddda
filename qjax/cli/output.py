"""Where things are printed: results on stdout, the rest on stderr."""

from __future__ import annotations

import io
import json
import math
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any


def print_json(data: Mapping[str, Any]) -> None:
    """Print one JSON object; figures that JSON cannot hold (NaN, infinity) become null."""
    print(json.dumps(_strict(data), ensure_ascii=False, allow_nan=False))


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _strict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(v) for v in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


LINE = 10_000
"""Columns of a line in a file or pipe: so many that no row of a table is wrapped or cut."""


def print_rich(thing: Any) -> None:
    """Print a rich renderable on stdout: as wide as a terminal and coloured there, plain text in a file or pipe.

    In a file or pipe a row of a table is a line, whatever COLUMNS, TERM or FORCE_COLOR say: what a script looks for is
    never cut, and a log does not depend on the machine that wrote it.
    """
    from rich.console import Console

    options: dict[str, Any] = {"highlight": False, "emoji": False, "markup": False}
    if sys.stdout.isatty():
        Console(**options).print(thing)
        return
    # Without a height, rich takes 80 columns where TERM is dumb.
    plain: dict[str, Any] = {"width": LINE, "height": 100, "color_system": None, "force_terminal": False}
    console = Console(file=io.StringIO(), legacy_windows=False, **plain, **options)
    with console.capture() as capture:
        console.print(thing)
    print("\n".join(line.rstrip() for line in capture.get().splitlines()))


def room() -> int:
    """Columns that `print_rich` has: those of a terminal, or as good as any number."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else LINE


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[int] = (0,)) -> Any:
    """A table for `print_rich`: columns of figures, right-aligned, but for those named in ``left``, which are words.

    On a narrow terminal cells become taller; none is cut.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0), header_style="dim")
    for n, head in enumerate(heads):
        made.add_column(head, justify="left" if n in left else "right", overflow="fold")
    for row in rows:
        made.add_row(*map(Text, row))
    return made


def say(text: str) -> None:
    """Tell on stderr what is going on."""
    print(text, file=sys.stderr)


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """Show that something is going on, on stderr where that is a terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(text):
        yield


@contextmanager
def counting(text: str) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar on stderr, moved by calling ``(done, total, what)``; on no terminal, a line at times."""
    if not sys.stderr.isatty():
        yield _lines(text)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[what]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(text, total=None, what="")
        yield lambda done, total, what: progress.update(task, completed=done, total=total, what=what)


def listed(given: Iterable[str]) -> list[str]:
    """The names in arguments such as ``["W4A16,W8A16", "mine.toml"]``."""
    return [part.strip() for text in given for part in text.split(",") if part.strip()]


SECONDS_PER_LINE = 10.0
"""Least time between two lines of progress in a file or pipe."""


def _lines(text: str) -> Callable[[int, int, str], None]:
    begun = last = time.monotonic()

    def line(done: int, total: int, what: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= SECONDS_PER_LINE:
            last = now
            print(f"{text}: {done} of {total} done after {now - begun:.0f} s ({what})", file=sys.stderr, flush=True)

    return line


def with_article(noun: str) -> str:
    """``an image classifier``, ``a text encoder``."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
