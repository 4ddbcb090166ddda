"""qjax against Qwix in one process: time to quantize, and time of the quantized forward.

    python -m benchmarks.qwix [--widths 512,1024] [--tokens 1,16,256]

The model is a Linen transformer of 4 layers (`nn.MultiHeadDotProductAttention` with heads of 128, MLP of 4 times the
width, float32); attention's own products stay in float on both sides. Quantized by the same schemes on both sides:

    int8        int8 weights per channel
    int4 g128   int4 weights in groups (tiles) of 128
    W8A8        int8 weights per channel, int8 activations scaled per token as they pass

Quantizing, warm: from the float parameters to the quantized ones, tracing included; what the process has compiled
before (both compile a few small programs per shape of weight) is not. qjax: `qjax.quantize`, which also measures the
SQNR of every weight and writes the report. Qwix: `quantize_model`, `jax.eval_shape` of its `init`, `quantize_params`.
Quantizing, cold: the same in a new process, after imports and making the float parameters.
Forward: one jitted call, compiled before. First call: tracing and compiling it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import qwix

import qjax
from benchmarks import measure
from benchmarks.measure import interleaved, milliseconds

LAYERS, HEAD, VOCAB, GROUP = 4, 128, 512, 128


class Block(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.LayerNorm(name="norm1")(x)
        x = x + nn.MultiHeadDotProductAttention(self.width // HEAD, name="attn")(y, y)
        y = nn.Dense(4 * self.width, name="up")(nn.LayerNorm(name="norm2")(x))
        return x + nn.Dense(self.width, name="down")(nn.gelu(y))


class Transformer(nn.Module):
    width: int

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = nn.Embed(VOCAB, self.width, name="embed")(tokens)
        for i in range(LAYERS):
            x = Block(self.width, name=f"layer{i}")(x)
        return nn.Dense(VOCAB, use_bias=False, name="head")(nn.LayerNorm(name="norm")(x))


@dataclasses.dataclass(frozen=True)
class Scheme:
    qjax: qjax.Recipe
    qwix: qwix.QuantizationRule


def _scheme(bits: int, group: int | None = None, act: bool = False) -> Scheme:
    weights = qjax.Int(bits, group=group) if group else qjax.Int(bits)
    inputs = qjax.dynamic(qjax.Int(8, per="token")) if act else None
    rule = qwix.QuantizationRule(
        module_path=".*",
        op_names=("dot_general",),
        weight_qtype={8: jnp.int8, 4: jnp.int4}[bits],
        act_qtype=jnp.int8 if act else None,
        tile_size=group,
    )
    return Scheme(qjax.Recipe([qjax.Rule("**", weights=weights, inputs=inputs)]), rule)


SCHEMES = {"int8": _scheme(8), f"int4 g{GROUP}": _scheme(4, GROUP), "W8A8": _scheme(8, act=True)}


@functools.cache
def float_model(width: int) -> tuple[nn.Module, Any]:
    module = Transformer(width)
    return module, jax.block_until_ready(jax.jit(module.init)(jax.random.key(0), tokens(8)))


def tokens(count: int) -> jax.Array:
    return jax.random.randint(jax.random.key(1), (1, count), 0, VOCAB)


def quantize_by_qjax(width: int, scheme: Scheme, count: int = 16) -> qjax.Model:
    module, variables = float_model(width)
    fn, params = qjax.from_linen(module, variables)
    return qjax.quantize(fn, params, tokens(count), recipe=scheme.qjax)


def quantize_by_qwix(width: int, scheme: Scheme, count: int = 16) -> tuple[nn.Module, Any]:
    module, variables = float_model(width)
    model = qwix.quantize_model(module, qwix.PtqProvider([scheme.qwix]))
    abstract = jax.eval_shape(model.init, jax.random.key(0), tokens(count))["params"]
    return model, {"params": qwix.quantize_params(variables["params"], abstract)}


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    out = jax.block_until_ready(function())
    return time.perf_counter() - start, out


def cold(tool: str, width: int, scheme: str) -> float:
    """Seconds of the first quantization in a new process."""
    command = [sys.executable, "-m", "benchmarks.qwix", "--cold", tool, "--widths", str(width), "--scheme", scheme]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1])["seconds"])


def run_cold(tool: str, width: int, scheme: Scheme) -> None:
    float_model(width)
    quantize = quantize_by_qjax if tool == "qjax" else quantize_by_qwix
    seconds, _ = timed(lambda: _arrays(quantize(width, scheme)))
    print(json.dumps({"seconds": seconds}))


def _arrays(quantized: Any) -> Any:
    return quantized.params if isinstance(quantized, qjax.Model) else quantized[1]


def stored_bytes(variables: Any) -> int:
    """Bytes of a tree of Qwix's, int4 counted as half a byte."""
    leaves = jax.tree.leaves(variables)
    return sum(a.size * jnp.iinfo(a.dtype).bits // 8 if "int" in a.dtype.name else a.nbytes for a in leaves)


def quantizing(width: int, budget: float) -> list[dict[str, Any]]:
    rows = []
    for name, scheme in SCHEMES.items():
        both = {
            "qjax": lambda s=scheme: _arrays(quantize_by_qjax(width, s)),
            "qwix": lambda s=scheme: _arrays(quantize_by_qwix(width, s)),
        }
        for case in both.values():  # what is compiled once and for all
            jax.block_until_ready(case())
        times = interleaved(both, budget=budget)
        rows.append(
            {
                "width": width,
                "scheme": name,
                **{k: t.least for k, t in times.items()},
                "over_qwix": times["qjax"].over(times["qwix"]),
                "least_over_qwix": times["qjax"].least_over(times["qwix"]),
                "cold_qjax": cold("qjax", width, name),
                "cold_qwix": cold("qwix", width, name),
            }
        )
    return rows


def forwards(width: int, counts: list[int], budget: float) -> list[dict[str, Any]]:
    module, variables = float_model(width)
    floating = jax.jit(module.apply)
    quantized = {name: (quantize_by_qjax(width, s), *quantize_by_qwix(width, s)) for name, s in SCHEMES.items()}
    jitted = {name: jax.jit(theirs.apply) for name, (_, theirs, _) in quantized.items()}
    rows = []
    for count in counts:
        x = tokens(count)
        cases: dict[str, Callable[[], Any]] = {"float": lambda x=x: floating(variables, x)}
        for name, (model, _, params) in quantized.items():
            cases[f"{name} qjax"] = lambda m=model, x=x: m(m.params, x)
            cases[f"{name} qwix"] = lambda f=jitted[name], p=params, x=x: f(p, x)
        first = {name: timed(case)[0] for name, case in cases.items()}
        times = interleaved(cases, budget=budget)
        for name, (model, _, params) in quantized.items():
            ours, theirs = times[f"{name} qjax"], times[f"{name} qwix"]
            rows.append(
                {
                    "width": width,
                    "tokens": count,
                    "scheme": name,
                    "float": times["float"].least,
                    "qjax": ours.least,
                    "qwix": theirs.least,
                    "over_qwix": ours.over(theirs),
                    "over_float": ours.over(times["float"]),
                    "qwix_over_float": theirs.over(times["float"]),
                    "first_float": first["float"],
                    "first_qjax": first[f"{name} qjax"],
                    "first_qwix": first[f"{name} qwix"],
                    "rounds": len(ours.seconds),
                    "bytes_qjax": model.report.stored_bytes,
                    "bytes_qwix": stored_bytes(params),
                }
            )
    return rows


def render(quantize_rows: list[dict[str, Any]], forward_rows: list[dict[str, Any]]) -> str:
    ms = milliseconds
    quantize = measure.table(
        ("width, scheme", "qjax ms", "Qwix ms", "qjax / Qwix", "cold: qjax ms", "Qwix ms"),
        [
            (
                f"{r['width']}, {r['scheme']}",
                ms(r["qjax"]),
                ms(r["qwix"]),
                f"{r['over_qwix']:.2f}",
                ms(r["cold_qjax"]),
                ms(r["cold_qwix"]),
            )
            for r in quantize_rows
        ],
    )
    forward = measure.table(
        (
            "width, tokens, scheme",
            "float ms",
            "qjax ms",
            "Qwix ms",
            "qjax / Qwix",
            "qjax / float",
            "Qwix / float",
            "first call: qjax ms",
            "Qwix ms",
        ),
        [
            (
                f"{r['width']}, {r['tokens']}, {r['scheme']}",
                ms(r["float"]),
                ms(r["qjax"]),
                ms(r["qwix"]),
                f"{r['over_qwix']:.2f}",
                f"{r['over_float']:.2f}",
                f"{r['qwix_over_float']:.2f}",
                ms(r["first_qjax"]),
                ms(r["first_qwix"]),
            )
            for r in forward_rows
        ],
    )
    return (
        "# qjax against Qwix 0.1.8\n\nTimes are minima over interleaved rounds; ratios are medians of the ratio within "
        f"a round, below 1 qjax is faster.\n\n## Quantizing\n\n{quantize}\n\n## Forward\n\n{forward}"
    )


def main() -> None:
    parser = measure.parser(__doc__ or "")
    parser.add_argument("--widths", default="512,1024", help="widths of the model")
    parser.add_argument("--tokens", default="1,16,256", help="numbers of tokens of the forward")
    parser.add_argument("--budget", type=float, default=4.0, help="seconds of measuring per table row")
    parser.add_argument("--cold", choices=("qjax", "qwix"), help="quantize once by this tool and print the seconds")
    parser.add_argument("--scheme", choices=tuple(SCHEMES), help="with --cold: the scheme")
    args = parser.parse_args()
    warnings.simplefilter("ignore", DeprecationWarning)  # Qwix 0.1.8 calls what this Flax deprecates
    widths = [int(w) for w in args.widths.split(",")]
    if args.cold:
        run_cold(args.cold, widths[0], SCHEMES[args.scheme])
        return
    counts = [int(t) for t in args.tokens.split(",")]
    quantize_rows, forward_rows = [], []
    for width in widths:
        quantize_rows += quantizing(width, args.budget)
        forward_rows += forwards(width, counts, 2 * args.budget)
    record = {"quantizing": quantize_rows, "forward": forward_rows}
    measure.save("qwix", record, render(quantize_rows, forward_rows), args.out)


if __name__ == "__main__":
    main()
