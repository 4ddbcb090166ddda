"""Measures what a tool's roundings make of the matrices of `benchmarks.roundings_peers`, on one thread; no jax here.

A peer calls `measured` with its cases. It prints one line of JSON: versions, and "measured", a list of {"case",
"shape", "error", "seconds", "first"}, or {"case", "shape", "failed"}. Seconds are CPU time, the least of the
repetitions; first is the first call, with what it compiles or sets up.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.matrices import Layer

GROUP = 128


def layers(folder: Path) -> dict[str, Layer]:
    """Shape -> the layer that the parent has written."""
    out = {}
    for path in sorted(folder.glob("*.npz"), key=lambda p: json.loads(p.stem)):
        with np.load(path) as stored:
            out[path.stem] = Layer(stored["w"], stored["calibration"], stored["held_out"])
    return out


def timed(run: Callable[[], Any], repeats: int, budget: float = 60.0) -> tuple[Any, float, float]:
    """The result, CPU seconds of the first call, and the least of so many more, fewer where they take long."""
    begun = time.process_time()
    result = run()
    first = time.process_time() - begun
    seconds, end = [], time.perf_counter() + budget
    for _ in range(repeats):
        begun = time.process_time()
        result = run()
        seconds.append(time.process_time() - begun)
        if time.perf_counter() > end:
            break
    return result, first, min(seconds)


def measured(
    packages: tuple[str, ...],
    prepare: Callable[[Layer], dict[str, Callable[[], Any]]],
    decode: Callable[[str, Any], Any] = lambda name, result: result,
) -> None:
    """Measure every case on every layer and print the line.

    Args:
        packages: distributions whose versions are printed.
        prepare: of a layer, name -> function that rounds its weight. A name is a method, or "method: what is special".
        decode: of the name and what was returned, what is stored, decoded, [N, K].
    """
    given = json.loads(sys.argv[1])
    rows = []
    for shape, layer in layers(Path(given["folder"])).items():
        for name, run in prepare(layer).items():
            if given["only"] and not any(part in name for part in given["only"]):
                continue
            row: dict[str, Any] = {"case": name, "shape": shape}
            try:
                q, row["first"], row["seconds"] = timed(run, given["repeats"])
                row["error"] = layer.error(np.asarray(decode(name, q)))
            except Exception as error:  # what does not run is a result as well
                row["failed"] = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            rows.append(row)
            print(row, file=sys.stderr, flush=True)
    versions = {name: importlib.metadata.version(name) for name in packages}
    print(json.dumps({"versions": versions, "measured": rows}))
