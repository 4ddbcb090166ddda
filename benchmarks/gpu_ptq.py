"""Time of post-training quantization on a GPU: a model of the size of Llama-8B with random weights and activations.

    PYTHONPATH=. python -m benchmarks.gpu_ptq [--layers 32] [--methods gptq ptqtp] [--tokens 2048] [--batches 8]

Each layer's weights are drawn on the device when they are due, so the model need not fit beside what is packed; the
batches are random tokens. Checks first, on a layer of a 32nd of the width, that the method on this device gives the
codes of the CPU but for last bits; then times the whole job, compiling included. When each layer was begun is printed
and kept, so a job that is cut off still says what a layer takes. Bounds: GPTQ in ten minutes, PTQTP in three. Where no
GPU is found it says so and runs nothing, unless ``--any-device`` is given.
"""

from __future__ import annotations

import functools
import statistics
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


@functools.partial(jax.jit, static_argnums=0)
def _normal(shape: tuple[int, ...], seed: Any) -> Any:
    return jax.random.normal(jax.random.key(seed), shape)


def quantized(method: str, scale: int, layers: int, tokens: int, batches: int) -> tuple[list[float], Any]:
    """Seconds at which each layer was begun and, last, at which all were done; and the model."""
    wanted = recipe(method)
    rng = np.random.default_rng(0)
    rows = [jnp.asarray(rng.integers(0, 512, (1, tokens))) for _ in range(batches)]
    at: dict[int, float] = {}

    def draw(shape: tuple[int, ...], seed: int) -> Any:
        if started and seed not in at:
            at[seed] = time.perf_counter() - begun
            print(f"{method}: layer {seed} of {layers} begun after {at[seed]:.1f} s", flush=True)
        return _normal(shape, seed)

    started = False
    fn, params, _ = model(scale, layers, draw, scan=wanted.needs_batches)
    started, begun = True, time.perf_counter()
    if wanted.needs_batches:
        done = qjax.quantize(fn, params, recipe=wanted, batches=rows)
    else:
        done = qjax.quantize(fn, params, rows[0], recipe=wanted)
    jax.block_until_ready(jax.tree.leaves(done.params))
    return [*at.values(), time.perf_counter() - begun], done


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
    parser.add_argument("--skip-check", action="store_true", help="do not compare with the CPU's codes")
    parser.add_argument("--any-device", action="store_true")
    given = parser.parse_args()
    device = jax.devices()[0]
    if device.platform not in ("gpu", "cuda") and not given.any_device:
        print(f"the default device is {device.device_kind} ({device.platform}) and no GPU: nothing was measured")
        return
    rows = []
    for method in given.methods:
        agreement = None if given.skip_check else same_codes(method)
        times, done = quantized(method, given.scale, given.layers, given.tokens, given.batches)
        steps = [after - before for before, after in zip(times, times[1:], strict=False)]
        rows.append(
            {
                "method": method,
                "codes_equal_to_cpu": agreement,
                "seconds": times[-1],
                "seconds_of_a_layer": statistics.median(steps),
                "seconds_of_layers": steps,
                "bound_s": BOUNDS[method],
                "packed_bytes": done.report.stored_bytes,
                "device": device.device_kind,
            }
        )
        head = ["method", "codes equal to the CPU's", f"{given.layers} layers, s", "a layer (median), s", "bound, s"]
        body = [
            [
                r["method"],
                "not compared" if r["codes_equal_to_cpu"] is None else f"{r['codes_equal_to_cpu']:.2%}",
                f"{r['seconds']:.0f}",
                f"{r['seconds_of_a_layer']:.2f}",
                f"{r['bound_s']:.0f}",
            ]
            for r in rows
        ]
        text = (
            f"{device.device_kind}, widths of an 8B model / {given.scale}, {given.batches} batches of {given.tokens}."
        )
        name = "gpu_ptq" if len(given.methods) > 1 else f"gpu_ptq_{method}"
        measure.save(name, {"measured": rows}, f"{text}\n\n{measure.table(head, body)}", given.out)


if __name__ == "__main__":
    main()
