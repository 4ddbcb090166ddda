"""Roundings of Qwix: to nearest, AWQ and GPTQ, on matrices as its providers call them, jitted."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from qwix._src.core import qarray
from qwix.contrib import awq_core, gptq_core

from benchmarks.matrices import Layer
from benchmarks.peers.matrix import GROUP, measured

HOW = qarray.HowToQuantize(qtype=jnp.int4, channelwise_axes=[0], tiled_axes={1: GROUP})


@jax.jit
def nearest(w: jax.Array) -> jax.Array:
    return qarray.dequantize(qarray.quantize(w, HOW))


@jax.jit
def awq(w: jax.Array, x: jax.Array) -> jax.Array:
    q, s = awq_core.quantize_weight(w, awq_core.compute_act_scale(x), HOW)
    return qarray.dequantize(q) / s


def gptq(w: jax.Array, h: jax.Array) -> jax.Array:
    return qarray.dequantize(gptq_core.quantize_weight(w, h, HOW, blocksize=128)[0])


def prepare(layer: Layer) -> dict[str, Callable[[], Any]]:
    w, x = jnp.asarray(layer.w), jnp.asarray(layer.calibration)
    cases = {"RTN": functools.partial(nearest, w), "AWQ": functools.partial(awq, w, x)}
    if w.shape == (1024, 1024):  # 39 s of compiling and running for the smallest
        cases["GPTQ"] = functools.partial(gptq, w, gptq_core.compute_hessian(x.T))
    return {name: lambda run=run: jax.block_until_ready(run()) for name, run in cases.items()}


if __name__ == "__main__":
    measured(("qwix", "jax"), prepare)
