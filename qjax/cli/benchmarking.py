"""``qjax bench``: times of the quantized products on the device at hand, and the tuner of their kernels."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from qjax.cli.output import print_json, print_rich, say, table
from qjax.errors import DeviceError, LoweringError
from qjax.hardware import device
from qjax.kernels import lowering_table, tuning
from qjax.kernels.devices import platform_here
from qjax.kernels.samples import ROTATE, Product, arguments, format_named, function_of, problem_of, weights
from qjax.kernels.timing import device_seconds, timing_method

USUAL = {
    "cuda": {"shapes": ((4096, 4096), (28672, 4096)), "tokens": (1, 16, 256, 4096)},
    "cpu": {"shapes": ((1024, 1024),), "tokens": (1, 16)},
}
"""Shapes and tokens where none are given."""


@dataclasses.dataclass(frozen=True)
class Rates:
    """What the device reaches: bytes a second of a copy, and operations a second of a large bfloat16 product."""

    bandwidth: float
    peak: float
    source: str

    def ceiling(self, nbytes: float, flops: float) -> float:
        """Seconds that memory or arithmetic take at least."""
        return max(nbytes / self.bandwidth, flops / self.peak)


def run(args: argparse.Namespace) -> None:
    """Time the lowerings of some products, or tune."""
    try:
        shapes, tokens = (
            read(text) if text else None for read, text in ((tuning.shapes, args.shapes), (tuning.numbers, args.tokens))
        )
    except (argparse.ArgumentTypeError, ValueError) as e:
        raise DeviceError(f"{e}; --shapes 4096x4096,28672x4096 and --tokens 1,16 are how they are written") from e
    if args.what == "tune":
        _tune(args, shapes or tuning.SHAPES, tokens or tuning.TOKENS)
        return
    usual = USUAL["cuda" if platform_here() == "cuda" else "cpu"]
    products = _products(args.formats or "int4 g128,int8,int8 x int8 token", shapes, tokens, usual, args.dtype)
    rates = _rates(args.device)
    rows = []
    for product in products:
        rows += _timed(product, rates, args.trials)
    about = {"device": jax.devices()[0].device_kind, "clock": timing_method(), "jax": jax.__version__}
    if args.json:
        print_json({**about, **dataclasses.asdict(rates), "rows": rows})
        return
    heads = ["weights", "N", "K", "tokens", "kernel", "us", "GB/s", "TFLOP/s", "of the\nceiling", "x bfloat16"]
    print_rich(table(heads, [_cells(row) for row in rows], left=(0, 4)))
    print(
        f"\n{about['device']}, jax {about['jax']}, clock: {about['clock']}. {rates.bandwidth / 1e9:.3g} GB/s and "
        f"{rates.peak / 1e12:.3g} TFLOP/s {rates.source}; the ceiling is the larger of the bytes of weight, "
        "activations and result at the one, and the arithmetic at the other. * would be chosen."
    )


def _products(formats: str, shapes: Any, tokens: Any, usual: Any, dtype: str) -> list[Product]:
    out = []
    for name in formats.split(","):
        weight, _, act = name.partition(" x ")
        made = format_named(weight), format_named(act) if act else None
        for n, k in shapes or usual["shapes"]:
            out += [Product(made[0], n, k, t, made[1], dtype) for t in tokens or usual["tokens"]]
    return out


def _rates(name: str | None) -> Rates:
    """Of the datasheet of a device, or measured here."""
    if name is not None:
        on = device(name)
        return Rates(on.measured_bandwidth or on.bandwidth, on.peak("bf16"), f"of {on.name} as qjax describes it")
    cuda = platform_here() == "cuda"
    size = 8192 if cuda else 1024
    many = jnp.ones(ROTATE["cuda" if cuda else "cpu"], jnp.float32)
    bandwidth = 2 * many.nbytes / device_seconds(lambda a: a + 1, [(many,)], trials=5)
    square = jax.random.normal(jax.random.key(0), (size, size), jnp.bfloat16)
    seconds = device_seconds(jnp.dot, [(square, square + 1)], trials=5)
    return Rates(bandwidth, 2 * size**3 / seconds, "measured here by a copy and a bfloat16 product")


def _timed(product: Product, rates: Rates, trials: int) -> list[dict[str, Any]]:
    """Rows of one product: every lowering that can run, those of packed weights first."""
    plain = _bfloat16_seconds(product.n, product.k, product.tokens, trials)
    rows: list[dict[str, Any]] = []
    for packed in (True, False):
        many = weights(product.weight, product.n, product.k, packed, act=product.act)
        problem = problem_of(product, many[0])
        if not packed and problem.weight != product.weight:
            continue
        if packed and (problem.weight == product.weight or platform_here() != "cuda"):
            continue  # nothing to pack, or nothing that reads it
        entries = [e for e in lowering_table("dot", problem.platform).rows if e.refuses(problem) is None]
        chosen = next((e for e in entries if e.declines(problem) is None), None)
        for entry in [e for e in entries if e.priority >= 0 or len(entries) == 1]:
            row = _row(product, entry, problem, many, trials, rates, plain)
            rows.append({**row, "chosen": entry is chosen, "packed": packed})
    if not rows:
        raise LoweringError(f"no lowering can compute {product} on {platform_here()}")
    return rows


def _row(
    product: Product, entry: Any, problem: Any, many: Any, trials: int, rates: Rates, plain: float
) -> dict[str, Any]:
    sets = arguments(product, many)
    itemsize = jnp.dtype(product.dtype).itemsize
    nbytes = many[0].nbytes + product.tokens * (product.n + product.k) * itemsize
    row: dict[str, Any] = {
        "weights": product.weight.name + (f" x {product.act.name}" if product.act else ""),
        "n": product.n,
        "k": product.k,
        "tokens": product.tokens,
        "kernel": entry.name,
    }
    try:
        seconds = device_seconds(function_of(entry, problem), sets, trials=trials)
    except Exception as failure:  # the others are worth having
        say(f"{product} by {entry.name}: {type(failure).__name__}: {str(failure)[:200]}")
        return row
    return {
        **row,
        "us": seconds * 1e6,
        "gb_s": nbytes / seconds / 1e9,
        "tflop_s": product.flops / seconds / 1e12,
        "of_ceiling": rates.ceiling(nbytes, product.flops) / seconds,
        "speedup": plain / seconds,
    }


def _bfloat16_seconds(n: int, k: int, tokens: int, trials: int) -> float:
    size = ROTATE.get(platform_here(), ROTATE["cpu"])
    weight = jax.random.normal(jax.random.key(0), (k, n), jnp.bfloat16)
    many = [weight, *(jnp.copy(weight) for _ in range(max(1, -(-size // (2 * n * k)) - 1)))]
    x = jax.random.normal(jax.random.key(1), (tokens, k), jnp.bfloat16)
    return device_seconds(jnp.dot, [(x, w) for w in many], trials=trials)


def _cells(row: dict[str, Any]) -> list[str]:
    cells = [row["weights"], *(f"{row[name]}" for name in ("n", "k", "tokens"))]
    cells.append(row["kernel"] + (", packed" if row["packed"] else "") + (" *" if row["chosen"] else ""))
    if "us" not in row:
        return [*cells, "failed", "", "", "", ""]
    rates = [f"{row[name]:.3g}" for name in ("gb_s", "tflop_s")]
    return [*cells, f"{row['us']:.1f}", *rates, f"{row['of_ceiling']:.0%}", f"{row['speedup']:.2f}"]


def _tune(args: argparse.Namespace, shapes: Any, tokens: Any) -> None:
    formats = args.formats or ",".join(tuning.FORMATS)
    seconds = float("inf") if args.seconds is None else args.seconds
    given = argparse.Namespace(
        shapes=shapes,
        tokens=tokens,
        formats=formats,
        experts=args.experts,
        dtype=args.dtype,
        out=args.out,
        seconds=seconds,
        again=args.again,
    )
    found = tuning.run(given, say)
    if args.json:
        print_json({"results": [one.row.to_dict() for one in found]})
