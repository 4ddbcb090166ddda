"""Efficiencies from measurements of servers.

A measurement is a row of JSON, in a file with the key ``serving``::

    {"serving": [{"device": "H100", "format": "W4A16-INT", "devices": 1, "prompt": 256, "output": 128, "batch": 1,
                  "seconds": 4.0, "model": {"params": 70.6e9, "layers": 80, "kv_heads": 8, "head_dim": 128}}]}

``seconds`` is the time of one query while ``batch`` of them run at a time; ``qps``, queries a second of all of them,
may stand in its place. The benchmarks of this repository write such rows to ``benchmarks/results``.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from qjax.errors import DeviceError
from qjax.hardware.devices import Device, device
from qjax.hardware.roofline import Efficiency, Workload, query_seconds
from qjax.hardware.schemes import Scheme, scheme
from qjax.hardware.sizes import ModelSize

_FIELDS = ("bandwidth", "compute", "step", "link")
_BOUNDS = {"bandwidth": (0.02, 1.0), "compute": (0.02, 1.0), "step": (1e-5, 0.2), "link": (1e-6, 0.1)}


@dataclasses.dataclass(frozen=True)
class Measured:
    """One measurement of a server.

    Attributes:
        size, scheme, device, devices, work, batch: what ran.
        seconds: of one query.
    """

    size: ModelSize
    scheme: Scheme
    device: Device
    devices: int
    work: Workload
    batch: float
    seconds: float

    def predicted(self, efficiency: Efficiency) -> float:
        """Return the seconds that the model gives."""
        return query_seconds(self.size, self.scheme, self.device, self.devices, self.batch, self.work, efficiency)


def calibrate(rows: Sequence[Measured], start: Efficiency | None = None) -> Efficiency:
    """Fit an efficiency to measured query times, by `fit`.

    Raises:
        DeviceError: no rows.
    """
    if not rows:
        raise DeviceError("calibrate needs at least one measurement")
    return fit(lambda e: [row.predicted(e) for row in rows], [row.seconds for row in rows], start)


def fit(
    predict: Callable[[Efficiency], Sequence[float]], measured: Sequence[float], start: Efficiency | None = None
) -> Efficiency:
    """Fit an efficiency so that predictions come near measurements of any kind (times, rates, ratios).

    Least squares of log(predicted / measured) over the logarithms of the four numbers, by Levenberg-Marquardt, with a
    weak pull towards the start (a factor e off weighs as a misfit of 3 %): a few rows do not determine all four, and
    what they do not determine stays where it was.

    Args:
        predict: efficiency -> predictions, positive.
        measured: positive numbers.
        start: None takes the study's start values.

    Raises:
        DeviceError: a measurement that is not positive.
    """
    start = start or Efficiency()
    target = np.log([_positive(m) for m in measured])
    low, high = (np.log([_BOUNDS[f][i] for f in _FIELDS]) for i in (0, 1))
    x0 = np.clip(np.log([max(getattr(start, f), 1e-12) for f in _FIELDS]), low, high)

    def made(x: np.ndarray) -> Efficiency:
        return Efficiency(*(float(v) for v in np.minimum(np.exp(x), [_BOUNDS[f][1] for f in _FIELDS])))

    def residuals(x: np.ndarray) -> np.ndarray:
        return np.concatenate([np.log(np.asarray(predict(made(x)), float)) - target, 0.03 * (x - x0)])

    x, damping = x0, 1e-2
    here = residuals(x)
    for _ in range(200):
        jacobian = np.stack([(residuals(x + 1e-4 * e) - here) / 1e-4 for e in np.eye(len(x))], axis=1)
        normal = jacobian.T @ jacobian
        move = np.linalg.solve(normal + damping * np.diag(np.diag(normal) + 1e-9), -jacobian.T @ here)
        trial = np.clip(x + move, low, high)
        there = residuals(trial)
        if there @ there < here @ here:
            done = np.max(np.abs(trial - x)) < 1e-7
            x, here, damping = trial, there, max(damping / 3, 1e-9)
            if done:
                break
        else:
            damping *= 4
            if damping > 1e9:
                break
    return made(x)


def read_measured(places: Iterable[str | Path], on: Device) -> list[Measured]:
    """Return the measurements of a device that stand in JSON files, or in those of folders.

    Files without the key ``serving`` are passed over.

    Raises:
        DeviceError: a row that cannot be read; the message names file and row.
    """
    found = []
    for place in map(Path, places):
        for file in sorted(place.glob("*.json")) if place.is_dir() else [place]:
            try:
                data = json.loads(file.read_text())
            except (OSError, ValueError) as e:
                raise DeviceError(f"{file} cannot be read as measurements: {e}") from e
            rows = data.get("serving", []) if isinstance(data, dict) else []
            for number, row in enumerate(rows):
                try:
                    one = _row(row)
                except (DeviceError, KeyError, TypeError, ValueError) as e:
                    what = f"lacks {e}" if isinstance(e, KeyError) else str(e)
                    raise DeviceError(f"{file}, row {number}: {what}") from e
                if one.device.name == on.name:
                    found.append(one)
    return found


def results_folder() -> Path | None:
    """Where the benchmarks of this repository leave what they measured, if this is a checkout of it."""
    folder = Path(__file__).parents[2] / "benchmarks" / "results"
    return folder if folder.is_dir() else None


def _row(row: dict) -> Measured:
    batch = float(row.get("batch", 1))
    seconds = float(row["seconds"]) if "seconds" in row else batch / _positive(float(row["qps"]))
    work = Workload(f"{row['prompt']}/{row['output']}", row["prompt"], row["output"])
    size = ModelSize(**row["model"])
    return Measured(
        size, scheme(row["format"]), device(row["device"]), int(row["devices"]), work, batch, _positive(seconds)
    )


def _positive(value: float) -> float:
    if not 0 < value < math.inf:
        raise DeviceError(f"a measurement of {value!r}; a positive number is needed")
    return value
