"""16-bit activations and integer weights in tiles, and whole programs around that kernel."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

import qjax
from qjax import ops
from qjax.formats import Int, IntTiles, Layout, QArray
from qjax.formats.tiles import rounded_up
from qjax.kernels.dot.hopper import TOKENS, Schedule
from qjax.kernels.dot.mosaic import STAGES
from qjax.kernels.dot.tiles16 import tiles16
from qjax.models import LanguageModel, LlamaConfig

G128 = Int(4, group=128)


@dataclasses.dataclass(frozen=True)
class Case:
    """One compiled kernel: what is fixed when it is compiled, on a matrix large enough to fill its ring."""

    fmt: Int
    dtype: str
    schedule: Schedule
    n: int = 1024
    k: int = 4096
    multiplies = "HGMMA"

    @property
    def name(self) -> str:
        """As the table calls it."""
        return f"W{self.fmt.code_bits}A16 {self.fmt.name}, {self.dtype}, {described(self.schedule)}"

    def function(self) -> Any:
        """The kernel, and the shapes of its arguments."""
        fmt = IntTiles(self.fmt, self.k)
        codes = jnp.uint8 if self.fmt.bits == 4 else jnp.int8
        numbers = fmt.blocks * rounded_up(self.n)
        shape = jax.ShapeDtypeStruct
        zero = None if self.fmt.symmetric else shape((1, numbers), jnp.bfloat16)
        arguments = (
            shape((1, rounded_up(self.n) * fmt.padded_length * self.fmt.bits // 8), codes),
            shape((1, numbers), jnp.float32),
            zero,
            shape((1, self.schedule.tokens, self.k), self.dtype),
        )
        how = {"fmt": fmt, "n": self.n, "out_dtype": jnp.dtype(self.dtype), "schedule": self.schedule}
        return functools.partial(tiles16, **how), arguments


def described(schedule: Schedule) -> str:
    """A schedule in words."""
    return f"{schedule.tokens} tokens" + (f" in {schedule.splits} parts" if schedule.splits > 1 else "")


def programs() -> dict[str, tuple[Any, Any, int]]:
    """Whole programs around the kernel: function, shapes of its arguments, bytes of one layer's codes."""
    n = k = 1024
    fmt = IntTiles(G128, k)

    def stack(layers: int) -> QArray:
        shape = jax.ShapeDtypeStruct
        aux = {
            "tiles": shape((layers, 1, n * k // 2), jnp.uint8),
            "scale": shape((layers, 1, fmt.blocks * n), jnp.float32),
        }
        order = (("s", 0), ("o", 0), ("i", 0))
        return QArray(shape((layers, n, 0), jnp.int8), aux, fmt, Layout(order), jnp.dtype(jnp.bfloat16))

    def scanned(x: Any, w: QArray) -> Any:
        return jax.lax.scan(lambda x, w: (ops.q_dot(x, w, streamed=True), None), x, w)[0]

    def sliced(x: Any, w: QArray) -> Any:
        return functools.reduce(lambda x, i: ops.q_dot(x, w.index_stack(0, i)), range(4), x)

    x = jax.ShapeDtypeStruct((4, k), jnp.bfloat16)
    return {
        "a scan over layers": (scanned, (x, stack(4)), n * k // 2),
        "layers of one stack, unrolled": (sliced, (x, stack(4)), n * k // 2),
        "a decode step of a Llama, weights and cache": decode_step(),
    }


def decode_step() -> tuple[Any, Any, int]:
    """A rewritten step of two layers; bytes of its smallest matrix, of which the keys of a layer are four times."""
    sizes = {"vocab_size": 1024, "hidden_size": 1024, "intermediate_size": 2048, "head_dim": 128}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 8}
    fn = LanguageModel(LlamaConfig(**sizes, **heads))
    recipe = qjax.Recipe([qjax.Rule("layers/**", weights=G128), qjax.Rule("lm_head/**", weights=Int(8))])
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), fn.abstract_params(jnp.bfloat16))
    model = qjax.quantize(fn, zeros, jnp.zeros((1, 4), jnp.int32), recipe=recipe)
    there = (ops.pack_tree(model.params), jnp.zeros(4, jnp.int32), fn.init_cache(4, 256, jnp.bfloat16))
    return model.bind(fn.decode_step), jax.eval_shape(lambda: there), 1024 * 1024 // 2


def cases() -> list[Case]:
    """Every tile of tokens, every kind of scale and zero point, both dtypes, whole and cut."""
    out = [Case(G128, "bfloat16", Schedule(t, STAGES[t])) for t in TOKENS]
    out += [Case(G128, "bfloat16", Schedule(t, STAGES[t], 4)) for t in (8, 128)]
    out += [
        Case(fmt, dtype, Schedule(t, STAGES[t]))
        for t in (16, 128)
        for fmt, dtype in (
            (G128, "float16"),
            (Int(4, group=32), "bfloat16"),
            (Int(4, group=64), "bfloat16"),
            (Int(4), "bfloat16"),
            (Int(4, group=128, symmetric=False), "bfloat16"),
            (Int(4, group=32, symmetric=False), "float16"),
            (Int(4, symmetric=False), "float16"),
            (Int(8), "bfloat16"),
            (Int(8), "float16"),
            (Int(8, group=128), "bfloat16"),
            (Int(8, group=64, symmetric=False), "float16"),
        )
    ]
    return out
