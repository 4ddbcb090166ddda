"""Saves that are killed: ``python killed_saves.py FOLDER ROUNDS``; `tests/checkpoint/test_kill.py` sees what is left.

Interpreter hooks (`sys.addaudithook`) see every file that Python opens to write, makes, renames or removes. A first
child writes these events down; then others are killed by SIGKILL right before one each (of events of one kind in one
folder, the first). Children are forks, so that jax is imported once; they save NumPy arrays, because no thread of the
parent's XLA lives in them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

import qjax

EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")


def apply(params, x):
    return x @ params["w"] + params["b"]


def make_model(seed: int) -> qjax.Model:
    """A model that differs by its seed; its arrays are NumPy's."""
    w = np.random.default_rng(seed).normal(size=(16, 8)).astype(np.float32)
    params = {"w": w, "b": np.full(8, seed, np.float32)}
    model = qjax.quantize(apply, params, np.ones((1, 16), np.float32), recipe="W8A16")
    return dataclasses.replace(model, params=jax.tree.map(np.asarray, model.params))


def in_child(job: Callable[[], object], kill_after: float | None = None) -> int:
    """Run a job in a fork; return its exit status, or minus the signal that ended it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jax warns of forks; the child calls no XLA
        pid = os.fork()
    if pid == 0:
        try:
            job()
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def watched_save(path: Path, model: qjax.Model, kill_at: int | None, log: Path | None = None) -> None:
    """Save; be killed right before file event ``kill_at``, or write down the events."""
    seen: list[str] = []
    lock = threading.Lock()

    def hook(event: str, args: tuple) -> None:
        reads = event == "open" and args[1] in ("r", "rb")
        if event in EVENTS and not reads and isinstance(args[0], str | os.PathLike) and str(path) in str(args[0]):
            with lock:
                if len(seen) == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                seen.append(f"{event} {os.path.dirname(args[0])}")

    sys.addaudithook(hook)
    qjax.save(path, model)
    if log is not None:
        log.write_text(json.dumps(seen))


def main(folder: Path, rounds: int) -> None:
    old, new = make_model(1), make_model(2)
    base = folder / "base"
    assert in_child(lambda: qjax.save(base, old)) == 0
    shutil.copytree(base, folder / "count")
    assert in_child(lambda: watched_save(folder / "count", new, None, folder / "events.json")) == 0
    events = json.loads((folder / "events.json").read_text())
    points = [k for k, event in enumerate(events) if event not in events[:k]]
    for k in points[:8:3]:  # of the first save to a path
        assert in_child(lambda k=k: watched_save(folder / f"first-{k:03d}", new, k)) == -signal.SIGKILL, k
    for k in points:
        at = folder / f"killed-{k:03d}"
        shutil.copytree(base, at)
        assert in_child(lambda at=at, k=k: watched_save(at, new, k)) == -signal.SIGKILL, k

    def forever() -> None:
        while True:
            qjax.save(folder / "anytime", new)
            qjax.save(folder / "anytime", old)

    rng = random.Random(0)
    assert in_child(lambda: qjax.save(folder / "anytime", old)) == 0
    for k in range(rounds):
        assert in_child(forever, kill_after=rng.uniform(0.02, 0.6)) == -signal.SIGKILL
        shutil.copytree(folder / "anytime", folder / f"anytime-{k:03d}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
