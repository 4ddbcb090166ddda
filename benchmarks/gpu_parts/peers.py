"""Other software on the GPU at hand: `benchmarks.peers.gpu_products` in a process of its own, so that it needs no jax.

`merged` puts its times beside those of our kernels that compute the same. jax keeps three quarters of the memory; what
the process has is enough for the weights here, and one that finds too little says so in its row.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.gpu_parts.clock import SHAPES, Clock

TOKENS = (1, 16, 4096, 64, 256, 1024)
"""In the order in which they are measured."""

SPARE = 25
"""Seconds beyond its own that the process may take, to load torch and to compile what it has begun."""


def checks(quick: bool) -> list[dict[str, Any]]:
    """Nothing: what others compute is not ours to check."""
    return []


def times(clock: Clock) -> list[dict[str, Any]]:
    """A row for each peer, layer and number of tokens; "kernel" is the peer."""
    layers = list(dict.fromkeys((n, k) for n, k in SHAPES.values()))
    named = [(next(name for name, shape in SHAPES.items() if shape == (n, k)), n, k) for n, k in layers]
    return by_process(named, TOKENS, clock.left() - SPARE)


def by_process(layers: list[Any], tokens: Any, seconds: float, *options: str) -> list[dict[str, Any]]:
    """Run the process for so many seconds and keep what it has said until it ended, however it ended."""
    if seconds <= 0:
        return []
    command = [sys.executable, "-m", "benchmarks.peers.gpu_products", "--seconds", str(seconds)]
    command += ["--layers", json.dumps(layers), "--tokens", *map(str, tokens), *options]
    with tempfile.TemporaryFile("w+") as said, tempfile.TemporaryFile("w+") as errors:
        try:
            root = Path(__file__).parents[2]
            done = subprocess.run(command, cwd=root, stdout=said, stderr=errors, timeout=seconds + SPARE)
            ended = f"ended with {done.returncode}" if done.returncode else ""
        except subprocess.TimeoutExpired:
            ended = f"stopped after {seconds + SPARE:.0f} s"
        said.seek(0)
        out = [_row(line) for line in said.read().splitlines() if line.startswith("{")]
        if ended:
            errors.seek(0)
            out.append({"kernel": "peers", "layer": "", "failure": f"{ended}: {errors.read()[-300:]}"})
    for row in out:
        if "failure" in row:
            print(f"peer: {row}", flush=True)
    return out


def _row(line: str) -> dict[str, Any]:
    found = json.loads(line)
    row = {"kernel": found["peer"], **found}
    if found.get("us"):
        row["flops"] = 2 * found["tokens"] * found["n"] * found["k"]
    return row


def merged(parts: dict[str, Any]) -> None:
    """Put the times of peers into ``peers`` of rows of other parts with the same kind, N, K and tokens."""
    theirs = [r for r in parts.get("peers", {}).get("times", []) if "us" in r]
    for name, found in parts.items():
        for row in found.get("times", []) if name != "peers" else ():
            kernel = row.get("kernel", "").removeprefix("Triton ")
            for peer in theirs:
                same = all(peer[key] == row.get(key) for key in ("n", "k", "tokens"))
                if same and peer["beside"] and kernel.startswith(peer["beside"]):
                    row.setdefault("peers", {})[peer["peer"]] = peer["us"]
