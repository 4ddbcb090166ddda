"""How the benchmarks measure and record: interleaved rounds, paired ratios, results with device and versions.

Machines are shared, so nothing is timed alone. One round runs every case once, in an order that rotates from round to
round; a ratio of two cases is the median over rounds of their ratio within a round, because what else the machine does
at a moment slows both. Absolute times are minima: the run that was disturbed least.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks import rounds
from benchmarks.rounds import Times as Times

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "qwix")


def interleaved(cases: dict[str, Callable[[], Any]], **how: Any) -> dict[str, Times]:
    """`rounds.interleaved` (its options) of cases whose results jax computes asynchronously."""
    return rounds.interleaved(cases, wait=jax.block_until_ready, **how)


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
