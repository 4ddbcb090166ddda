"""Integers in words times 16-bit activations, and whole programs around the kernel."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

import qjax
from qjax import ops
from qjax.formats import Format, Int, Layout, QArray, quantize_array
from qjax.kernels.dot.hopper import STEP, TOKENS, Schedule
from qjax.kernels.dot.words import footprint
from qjax.kernels.dot.words16 import words16
from qjax.models import LanguageModel, LlamaConfig

G128 = Int(4, group=128)


@dataclasses.dataclass(frozen=True)
class Case:
    """One compiled kernel: what is fixed when it is compiled, on a matrix large enough to fill its ring."""

    fmt: Format
    dtype: str
    schedule: Schedule
    n: int = 1024
    k: int = 4096
    terms: tuple[str, ...] = ()
    multiplies = "HGMMA"

    @property
    def name(self) -> str:
        """As the table calls it."""
        return f"W{self.fmt.code_bits}A16 {self.fmt.name}{plus(self.terms)}, {self.dtype}, {described(self.schedule)}"

    def function(self) -> Any:
        """The kernel, and the shapes of its arguments."""
        w = shapes(self.fmt, self.n, self.k)
        aux = {name: jax.ShapeDtypeStruct((1, a.size), a.dtype) for name, a in w.aux.items()}
        x = jax.ShapeDtypeStruct((1, self.schedule.tokens, self.k), self.dtype)
        how = {"n": self.n, "out_dtype": jnp.dtype(self.dtype), "schedule": filled(w.fmt, self.schedule, self.k)}
        run = functools.partial(words16, planes=w.fmt.planes, **how)  # pyright: ignore[reportAttributeAccessIssue]
        return given_terms(run, (aux, x), self.terms, self.n, self.schedule.tokens, self.dtype)


BOTH = ("bias", "residual")


def plus(terms: tuple[str, ...]) -> str:
    """What is added, behind the format of a kernel's name."""
    return "".join(f" + {name}" for name in terms)


def given_terms(run: Any, arguments: tuple[Any, ...], terms: tuple[str, ...], n: int, tokens: int, dtype: str) -> Any:
    """A kernel and the shapes of its arguments, among them what is added to a product of one matrix."""
    sizes = {"bias": (1, n), "residual": (1, tokens, n)}
    added = {name: jax.ShapeDtypeStruct(sizes[name], dtype) for name in terms}
    return (lambda *given: run(*given[:-1], terms=given[-1]), (*arguments, added)) if terms else (run, arguments)


def shapes(fmt: Format, n: int, k: int, stack: tuple[int, ...] = ()) -> QArray:
    """A packed weight [*stack, N, K], abstractly."""
    axes = {"in_axes": len(stack) + 1, "stack_axes": tuple(range(len(stack)))}
    return jax.eval_shape(lambda: ops.pack(quantize_array(jnp.zeros((*stack, n, k), jnp.bfloat16), fmt, **axes)))


def filled(fmt: Any, schedule: Schedule, k: int) -> Schedule:
    """A schedule with as many stages as there is room for, for results of 16 bits."""
    return footprint(fmt).filled(schedule, k // (STEP * schedule.splits * schedule.deep), 2)


def described(schedule: Schedule) -> str:
    """A schedule in words."""
    parts = [f"in {schedule.splits} parts"] if schedule.splits > 1 else []
    parts += [f"tall {schedule.tall}"] if schedule.tall > 1 else []
    parts += [f"deep {schedule.deep}"] if schedule.deep > 1 else []
    return " ".join([f"{schedule.tokens} tokens", *parts, *(["rolling"] if schedule.rolling else [])])


def programs() -> dict[str, tuple[Any, Any, int]]:
    """Whole programs around the kernel: function, shapes of its arguments, bytes of one layer's codes."""
    n = k = 1024

    def stack(layers: int) -> QArray:
        return dataclasses.replace(shapes(G128, n, k, (layers,)), layout=Layout((("s", 0), ("o", 0), ("i", 0))))

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
    """Every tile of tokens, every kind of scale and zero point, both dtypes, whole and cut, tall and deep."""
    few, many = Schedule(16, 0, tall=2, deep=2), Schedule(128, 0, tall=2, rolling=True)
    out = [Case(G128, "bfloat16", Schedule(t, 0)) for t in TOKENS]
    out += [Case(G128, "bfloat16", Schedule(t, 0, 4)) for t in (8, 128)]
    out += [Case(G128, "bfloat16", dataclasses.replace(few, tokens=t, deep=d)) for t, d in ((8, 2), (32, 1), (64, 1))]
    out += [
        Case(fmt, dtype, schedule)
        for fmt, dtype in (
            (G128, "bfloat16"),
            (G128, "float16"),
            (Int(4, group=32), "bfloat16"),
            (Int(4, group=64), "bfloat16"),
            (Int(4), "bfloat16"),
            (Int(4, group=128, symmetric=False), "bfloat16"),
            (Int(4, group=32, symmetric=False), "float16"),
            (Int(4, symmetric=False), "float16"),
        )
        for schedule in (few, many)
    ]
    out += [Case(G128, "bfloat16", schedule, terms=BOTH) for schedule in (few, Schedule(64, 0), many)]
    out += [Case(G128, "float16", few, terms=BOTH), Case(G128, "bfloat16", few, terms=("bias",))]
    out += [Case(Int(8), "bfloat16", Schedule(128, 0), terms=BOTH)]
    out += [
        Case(fmt, dtype, schedule)
        for fmt, dtype in (
            (Int(8), "bfloat16"),
            (Int(8), "float16"),
            (Int(8, group=128), "bfloat16"),
            (Int(8, group=64, symmetric=False), "float16"),
        )
        for schedule in (dataclasses.replace(few, deep=1), many)
    ]
    return [*out, Case(Int(8), "bfloat16", Schedule(128, 0))]
