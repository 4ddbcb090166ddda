"""Roundings of qjax, jitted, in a process of its own as the peers are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import qjax
from benchmarks.matrices import Layer
from benchmarks.peers.matrix import GROUP, measured
from qjax.formats import SMOOTH
from qjax.statistics import MeanMagnitude, SecondMoment

INT = qjax.Int(4, group=GROUP)
UINT = qjax.Int(4, group=GROUP, symmetric=False)
BETWEEN = qjax.Int(4, group=GROUP, symmetric=False, zero="float")
STATIC = qjax.GPTQ(actorder="static")
CASES: dict[str, tuple[qjax.formats.Format, Any]] = {
    "RTN": (INT, qjax.RTN()),
    "RTN asymmetric": (UINT, qjax.RTN()),
    "MSE": (INT, qjax.RTN(qjax.MSE())),
    "MSE asymmetric": (UINT, qjax.RTN(qjax.MSE())),
    "HQQ": (BETWEEN, qjax.HQQ()),
    "HQQ: scales of the range": (BETWEEN, qjax.HQQ(scales=False)),
    "AWQ: scales alone": (INT, qjax.AWQ(clip=False)),
    "AWQ": (INT, qjax.AWQ()),
    "AWQ asymmetric": (UINT, qjax.AWQ()),
    "AWQ asymmetric: GPTQ inside": (UINT, qjax.AWQ(inner=STATIC)),
    "GPTQ": (INT, qjax.GPTQ()),
    "GPTQ asymmetric": (UINT, qjax.GPTQ()),
    "GPTQ asymmetric, MSE, static": (UINT, qjax.GPTQ(actorder="static", observer=qjax.MSE())),
}


def prepare(layer: Layer) -> dict[str, Callable[[], Any]]:
    w, x = jnp.asarray(layer.w), jnp.asarray(layer.calibration)
    seen = jax.block_until_ready(jax.jit(SecondMoment().see)(x))

    def case(fmt: Any, rounding: Any) -> Callable[[], Any]:
        if not rounding.needs_batches:
            run: Any = jax.jit(lambda w: rounding.round(w, fmt))
            return lambda: jax.block_until_ready(run(w))
        gathers = isinstance(rounding, qjax.AWQ)  # its peers gather in the time that is measured

        @jax.jit
        def with_data(w: Any, data: Any) -> Any:
            statistics = SecondMoment().see(data) | MeanMagnitude().see(data) if gathers else data
            return rounding.round(w, fmt, statistics=statistics)

        return lambda: jax.block_until_ready(with_data(w, x if gathers else seen))

    return {name: case(*how) for name, how in CASES.items()}


def stored(name: str, result: Any) -> Any:
    """What the rounded weight stands for, [N, K]."""
    codes, aux = result
    q = CASES[name][0].decode(codes, aux)
    return q / aux[SMOOTH] if SMOOTH in aux else q


if __name__ == "__main__":
    measured(("jax", "jaxlib"), prepare, stored)
