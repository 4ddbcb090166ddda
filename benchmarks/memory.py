"""Memory of gathering second moments block by block, for a model whose weights are read one layer at a time.

    python -m benchmarks.memory [--scales 4 2 1] [--layers 3] [--tokens 512] [--batches 4] [--rounding gptq]

A Llama of the widths of an 8B model (4096 / 1024 / 14336), divided by each scale, with random weights that are made
when they are read and not kept. Its layers are scanned; the job is that of GPTQ up to the rounding, which is to nearest
unless ``--rounding gptq`` is given, so that the peak is that of gathering. Peak: the process's own memory (RssAnon),
sampled every 5 ms, above what it was when the job began. What is above one layer and what is packed does not depend on
the number of layers:

    statistics of a layer + values of one batch in a layer + batches x tokens x width x 4 bytes
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

import qjax
from benchmarks import measure
from qjax.models import LanguageModel, LlamaConfig
from qjax.statistics import SecondMoment, Statistic

BOUNDS = {"nearest": 2e9, "gptq": 6e9}
"""Bytes above one block's parameters that the job may take."""


@dataclasses.dataclass(frozen=True)
class Gathered(qjax.RTN):
    """Rounding to nearest that asks for what GPTQ asks for."""

    needs_batches: ClassVar[bool] = True
    sequential: ClassVar[bool] = True
    statistics: ClassVar[tuple[Statistic, ...]] = (SecondMoment(),)

    def round(self, w: Any, fmt: Any, *, observer: Any = None, weight: Any = None, statistics: Any = None) -> Any:
        assert statistics["second_moment"].shape[-1] == w.shape[-1]
        return super().round(w, fmt, observer=observer)


ROUNDINGS = {"nearest": Gathered(), "gptq": qjax.GPTQ()}


def recipe(rounding: str) -> qjax.Recipe:
    """int4 weights of all layers."""
    return qjax.Recipe([qjax.Rule("layers/**", weights=qjax.Int(4, group=128), rounding=ROUNDINGS[rounding])])


def on_host(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Random numbers of unit variance."""
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def model(
    scale: int, layers: int, draw: Callable[[tuple[int, ...], int], Any] = on_host, scan: bool = True
) -> tuple[Any, Any, int]:
    """The function, its lazy parameters, and the bytes of one layer.

    Args:
        scale: divides all widths.
        layers: how many.
        draw: numbers of a shape by a seed, which is the number of the layer.
        scan: scan over the layers, whose parameters are stacked.
    """
    config = LlamaConfig.from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": 512,
            "hidden_size": 4096 // scale,
            "intermediate_size": 14336 // scale,
            "num_hidden_layers": layers,
            "num_attention_heads": 32 // scale,
            "num_key_value_heads": max(8 // scale, 1),
            "max_position_embeddings": 8192,
        }
    )
    unrolled = LanguageModel(config)
    shapes = unrolled.abstract_params(jnp.float32)
    bytes_of_layer = sum(a.size * 4 for a in jax.tree.leaves(shapes["layers"][0]))

    def made(shape: tuple[int, ...], seed: int) -> Any:
        numbers = draw(shape, seed)
        return numbers if len(shape) == 1 else numbers / np.float32(np.sqrt(shape[0]))

    def stack(*leaves: Any) -> qjax.Lazy:
        shape = leaves[0].shape
        whole = lambda: np.stack([made(shape, i) for i in range(layers)])  # noqa: E731
        return qjax.Lazy((layers, *shape), np.float32, whole, lambda i: made(shape, i))

    rest = jax.tree.map(lambda a: jnp.asarray(made(a.shape, 0)), {k: v for k, v in shapes.items() if k != "layers"})
    if scan:
        fn = dataclasses.replace(unrolled, scan_layers=True)
        return fn, {**rest, "layers": jax.tree.map(stack, *shapes["layers"])}, bytes_of_layer

    def layer(i: int) -> Any:
        return jax.tree.map(lambda a: qjax.Lazy(a.shape, np.float32, lambda: made(a.shape, i)), shapes["layers"][i])

    return unrolled, {**rest, "layers": [layer(i) for i in range(layers)]}, bytes_of_layer


def private_bytes() -> int:
    """Anonymous memory of this process."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


class Peak(threading.Thread):
    """The largest `private_bytes` while it runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.start_bytes = self.highest = private_bytes()
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.005):
            self.highest = max(self.highest, private_bytes())


def measured(scale: int, layers: int, tokens: int, batches: int, rounding: str) -> dict[str, Any]:
    """One job in this process."""
    wanted = recipe(rounding)
    jax.config.update("jax_platforms", "cpu")
    fn, params, layer = model(scale, layers)
    rng = np.random.default_rng(0)
    rows = [jnp.asarray(rng.integers(0, 512, (1, tokens))) for _ in range(batches)]
    warm_fn, warm_params, _ = model(32, 2)  # what jax and the compiler take for themselves is there already
    qjax.quantize(warm_fn, warm_params, recipe=wanted, batches=[rows[0][:, :16]])
    cost = qjax.plan(fn, params, rows[0], recipe=wanted, batches=batches).cost
    peak = Peak()
    peak.start()
    begun = time.perf_counter()
    done = qjax.quantize(fn, params, recipe=wanted, batches=rows)
    seconds = time.perf_counter() - begun
    peak.done.set()
    peak.join()
    assert len(done.report.quantized) == 7 * layers
    planned = {name: n for name, n in cost.parts.items() if name != "parameters"}
    return {
        "scale": scale,
        "layer_bytes": layer,
        "packed_bytes": done.report.stored_bytes,
        "peak_bytes": peak.highest - peak.start_bytes,
        "planned_bytes": sum(planned.values()),
        "planned": planned,
        "seconds": seconds,
    }


def main() -> None:
    parser = measure.parser(__doc__ or "")
    parser.add_argument("--scales", type=int, nargs="+", default=[4, 2, 1])
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--rounding", choices=sorted(ROUNDINGS), default="nearest")
    parser.add_argument("--one", type=int, help="run one scale in this process and print JSON")
    given = parser.parse_args()
    sizes = (given.layers, given.tokens, given.batches, given.rounding)
    wanted, bound = recipe(given.rounding), BOUNDS[given.rounding]
    if given.one:
        print(json.dumps(measured(given.one, *sizes)))
        return
    rows = []
    for scale in given.scales:
        command = [sys.executable, "-m", "benchmarks.memory", "--one", str(scale)]
        command += [f"--layers={given.layers}", f"--tokens={given.tokens}", f"--batches={given.batches}"]
        command.append(f"--rounding={given.rounding}")
        found = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        rows.append(json.loads(found.splitlines()[-1]))
        print(f"1/{scale} of the width: done", file=sys.stderr)
    fn, params, layer = model(1, 32)
    example = jax.ShapeDtypeStruct((1, given.tokens), jnp.int32)
    whole = qjax.plan(fn, params, example, recipe=wanted, batches=given.batches).cost
    packed = whole.parts["packed"]
    mega = lambda n: f"{n / 1e6:,.0f}"  # noqa: E731
    for row in rows:
        row["above_bytes"] = row["peak_bytes"] - row["packed_bytes"] - row["layer_bytes"]
    text = f"{given.layers} layers, {given.batches} batches of {given.tokens} tokens, rounding: {given.rounding}. "
    text += "Megabytes.\n\n"
    names = {"layer_bytes": "one layer", "peak_bytes": "peak", "packed_bytes": "packed by then"}
    names |= {"above_bytes": "peak above both"}
    text += measure.table(
        ["width", *names.values(), "s"],
        [
            [
                f"1/{row['scale']}" if row["scale"] > 1 else "8B",
                *(mega(row[name]) for name in names),
                f"{row['seconds']:.0f}",
            ]
            for row in rows
        ],
    )
    text += f"\nBound: {mega(bound)} MB above one layer."
    full = next((row for row in rows if row["scale"] == 1), None)
    if full is not None:
        handed = 4 * 4096 * given.tokens * given.batches
        text += (
            "\n\n32 layers of the full width: above one layer and what is packed = statistics "
            f"{mega(whole.parts['statistics'])} + handed on {mega(handed)} + values of a batch and the rest "
            f"{mega(full['above_bytes'] - whole.parts['statistics'] - handed)} = {mega(full['above_bytes'])} MB, as "
            f"measured on {given.layers}; packed by the end {mega(packed)} MB."
        )
    record = {"measured": rows, "planned_32_layers": whole.parts, "bound": bound}
    measure.save("memory" if given.rounding == "nearest" else f"memory-{given.rounding}", record, text, given.out)


if __name__ == "__main__":
    main()
