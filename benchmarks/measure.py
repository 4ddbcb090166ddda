"""How the benchmarks measure and record: interleaved rounds, paired ratios, results with device and versions.

Machines are shared, so nothing is timed alone. One round runs every case once, in an order that rotates from round to
round; a ratio of two cases is the median over rounds of their ratio within a round, because what else the machine does
at a moment slows both. Absolute times are minima: the run that was disturbed least.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "qwix")


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one case, round by round."""

    seconds: tuple[float, ...]

    @property
    def least(self) -> float:
        """The fastest round."""
        return min(self.seconds)

    @property
    def median(self) -> float:
        """The middle round."""
        return statistics.median(self.seconds)

    def over(self, other: Times) -> float:
        """Median over rounds of this case's time divided by the other's in the same round."""
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))

    def least_over(self, other: Times) -> float:
        """Ratio of the fastest rounds."""
        return self.least / other.least


def interleaved(
    cases: dict[str, Callable[[], Any]],
    *,
    rounds: int = 1000,
    budget: float = 5.0,
    least_rounds: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Times]:
    """Time every case once per round until the budget (seconds of wall time) or the number of rounds is used up.

    Args:
        cases: name -> what to run; its result is waited for.
        rounds: most rounds. budget: seconds of wall time. least_rounds: at least so many, whatever the budget.
        clock: which clock to read; `time.thread_time` for single-threaded Python work on a busy machine.
    """
    names, shuffle = list(cases), random.Random(0)
    taken: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + budget
    for done in range(rounds):
        if done >= least_rounds and time.perf_counter() > end:
            break
        shuffle.shuffle(names)  # what ran just before leaves its caches: no case may always follow the same one
        for name in names:
            gc.collect()
            start = clock()
            jax.block_until_ready(cases[name]())
            taken[name].append(clock() - start)
    return {name: Times(tuple(taken[name])) for name in cases}


def environment() -> dict[str, Any]:
    """Device, versions and date, for the record."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    import qjax

    device = jax.devices()[0]
    return {
        "date": datetime.date.today().isoformat(),
        "platform": device.platform,
        "device": _cpu_name() if device.platform == "cpu" else device.device_kind,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": [round(x, 1) for x in os.getloadavg()],
        "python": platform.python_version(),
        "qjax": qjax.__version__,
        **versions,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def described(env: dict[str, Any]) -> str:
    """One line on where the numbers come from."""
    packages = ", ".join(f"{name} {env[name]}" for name in ("qjax", *PACKAGES) if env.get(name))
    return (
        f"{env['date']}, {env['device']} ({env['cores']} cores, load average {env['load'][0]} at the end), "
        f"Python {env['python']}, {packages}"
    )


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; the first column is text, the others are numbers."""
    lines = ["| " + " | ".join(header) + " |", "|---" + "|---:" * (len(header) - 1) + "|"]
    lines += ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def milliseconds(seconds: float) -> str:
    """Three significant digits of milliseconds."""
    value = seconds * 1e3
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def save(name: str, record: dict[str, Any], text: str, folder: Path) -> None:
    """Write ``name-platform.json`` and ``.md``, and print the text."""
    env = environment()
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{name}-{env['platform']}"
    (folder / f"{stem}.json").write_text(json.dumps({"environment": env, **record}, indent=1) + "\n")
    (folder / f"{stem}.md").write_text(f"{text}\n\n{described(env)}.\n")
    print(f"{text}\n\n{described(env)}.\nwritten to {folder / stem}.md and .json")


def parser(doc: str) -> argparse.ArgumentParser:
    """The options that all benchmarks share."""
    out = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    out.add_argument("--out", type=Path, default=RESULTS, help="folder for the results (default: benchmarks/results)")
    return out
