"""Time of post-training quantization on a GPU: a model of the size of Llama-8B with random weights and activations.

    PYTHONPATH=. python -m benchmarks.gpu_ptq [--layers 32] [--methods gptq ptqtp] [--tokens 2048] [--batches 8]

Each layer's weights are drawn on the device when they are due, so the model need not fit beside what is packed; the
batches are random tokens. Checks first, on a layer of a 32nd of the width, that the method on this device gives the
codes of the CPU but for last bits; then times the whole job, after one of two layers that compiles. Bounds: GPTQ in ten
minutes, PTQTP in three. Where no GPU is found it says so and runs nothing, unless ``--any-device`` is given.
"""

from __future__ import annotations

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import qjax
from benchmarks import measure
from benchmarks.memory import model

BOUNDS = {"gptq": 600.0, "ptqtp": 180.0}
"""Seconds."""


def recipe(method: str) -> qjax.Recipe:
    """The weights of all layers by one method."""
    if method == "gptq":
        weights: Any = qjax.Int(4, group=128)
        rounding: Any = qjax.GPTQ()
    else:
        weights, rounding = qjax.formats.TritPlanes(), None
    return qjax.Recipe([qjax.Rule("layers/**", weights=weights, rounding=rounding)])


def quantized(method: str, scale: int, layers: int, tokens: int, batches: int) -> tuple[float, Any]:
    """Seconds, and the model."""
    fn, params, _ = model(scale, layers)
    rng = np.random.default_rng(0)
    rows = [jnp.asarray(rng.integers(0, 512, (1, tokens))) for _ in range(batches)]
    wanted = recipe(method)
    begun = time.perf_counter()
    if wanted.needs_batches:
        done = qjax.quantize(fn, params, recipe=wanted, batches=rows)
    else:
        params = jax.tree.map(jnp.asarray, params, is_leaf=lambda leaf: isinstance(leaf, qjax.Lazy))
        done = qjax.quantize(fn, params, rows[0], recipe=wanted, donate=True)
    jax.block_until_ready(jax.tree.leaves(done.params))
    return time.perf_counter() - begun, done


def same_codes(method: str) -> float:
    """The part of the codes of a small layer that this device and the CPU agree in."""
    agree = []
    with jax.default_device(jax.devices("cpu")[0]):
        want = quantized(method, 32, 1, 64, 2)[1]
    got = quantized(method, 32, 1, 64, 2)[1]
    for a, b in zip(jax.tree.leaves(want.params["layers"]), jax.tree.leaves(got.params["layers"]), strict=True):
        if a.dtype == jnp.uint8:
            agree.append(float(np.mean(np.asarray(a) == np.asarray(b))))
    return min(agree)


def main() -> None:
    parser = measure.parser(__doc__ or "")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--batches", type=int, default=8)
    parser.add_argument("--scale", type=int, default=1, help="divide all widths by this, to try the command out")
    parser.add_argument("--methods", nargs="+", choices=sorted(BOUNDS), default=sorted(BOUNDS))
    parser.add_argument("--any-device", action="store_true")
    given = parser.parse_args()
    device = jax.devices()[0]
    if device.platform not in ("gpu", "cuda") and not given.any_device:
        print(f"the default device is {device.device_kind} ({device.platform}) and no GPU: nothing was measured")
        return
    rows = []
    for method in given.methods:
        agreement = same_codes(method)
        sizes = (given.tokens, given.batches)
        first, _ = quantized(method, given.scale, min(2, given.layers), *sizes)
        seconds, done = quantized(method, given.scale, given.layers, *sizes)
        rows.append(
            {
                "method": method,
                "codes_equal_to_cpu": agreement,
                "two_layers_with_compilation_s": first,
                "seconds": seconds,
                "bound_s": BOUNDS[method],
                "packed_bytes": done.report.stored_bytes,
                "device": device.device_kind,
            }
        )
    head = ["method", "codes equal to the CPU's", "2 layers, compiling, s", f"{given.layers} layers, s", "bound, s"]
    body = [
        [
            r["method"],
            f"{r['codes_equal_to_cpu']:.2%}",
            f"{r['two_layers_with_compilation_s']:.0f}",
            f"{r['seconds']:.0f}",
            f"{r['bound_s']:.0f}",
        ]
        for r in rows
    ]
    text = f"{device.device_kind}, widths of an 8B model / {given.scale}, {given.batches} batches of {given.tokens}."
    measure.save("gpu_ptq", {"measured": rows}, f"{text}\n\n{measure.table(head, body)}", given.out)


if __name__ == "__main__":
    main()
