"""Metrics as TensorBoard's event files (``pip install 'qjax[tensorboard]'``).

A job that goes on writes a further file, which begins by saying from which step on it counts: TensorBoard drops what
older files hold from there. Records are on the disk before the checkpoint of their step is, so none is missing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qjax.errors import QjaxError

FOLDER = "events"
"""Within the folder of a job."""


class EventFile:
    """Scalars by step, appended to a file of their own.

    Args:
        folder: of the event files; made where it is missing.
        done: steps that were done before; rows of later ones, from an earlier run, no longer count.
        rows: name -> a value for each of them; written where the folder has no event file yet.

    Raises:
        ImportError: tensorboardX is missing.
    """

    def __init__(self, folder: Path, done: int = 0, rows: Mapping[str, Sequence[float]] | None = None):
        require()
        from tensorboardX.event_file_writer import EventsWriter  # pyright: ignore
        from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore

        folder.mkdir(parents=True, exist_ok=True)
        fresh = not any(folder.glob("events.out.tfevents.*"))
        # Written here and now: the library's SummaryWriter has a queue, which a kill would lose after the checkpoint.
        self._writer: Any = EventsWriter(str(folder / "events"), f".{done}")
        if not fresh:
            restart = SessionLog(status=SessionLog.START)
            self._writer.write_event(Event(wall_time=time.time(), step=done + 1, session_log=restart))
        elif rows:
            for n, values in enumerate(zip(*rows.values(), strict=True)):
                self.write(n + 1, dict(zip(rows, values, strict=True)))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append the metrics of a step, counted from 1."""
        from tensorboardX.proto.event_pb2 import Event  # pyright: ignore
        from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore

        values = [Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._writer.write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def flush(self) -> None:
        """Return when everything is on the disk."""
        self._writer.flush()

    def close(self) -> None:
        """Flush and close the file."""
        self._writer.close()


def require(given_folder: Any = True) -> None:
    """Refuse before anything is done where event files cannot be written.

    Raises:
        ImportError: tensorboardX is missing.
        QjaxError: there is no folder to write to.
    """
    try:
        import tensorboardX  # noqa: F401  # pyright: ignore
    except ImportError as error:
        raise ImportError(f"event files need tensorboardX ({error}); pip install 'qjax[tensorboard]'") from error
    if given_folder is None:
        raise QjaxError("tensorboard=True writes event files into the folder of the job; give folder=")
