"""The lowering "native" of attention over a cache of 8- or 4-bit codes: few queries, on one CPU, by a kernel in C++.

The codes are read once, as they are stored, with nothing unpacked in memory. Work is cut over sequences, heads of keys
and, so that one long sequence is enough for all threads, over stretches of 256 positions, which are joined in their
order: the same bits come out with any number of threads. Of a stack of layers the one at hand is read where it lies.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qjax.formats import KV4, Format, Int, QArray
from qjax.kernels.attention.reference import attention_reference
from qjax.kernels.cpu.library import ATTENTION, ISAS, instruction_sets, library, say_once
from qjax.kernels.registry import Problem, register_lowering

SMALLEST = 1 << 17
"""Keys of fewer elements are left to XLA unless the kernel is named. This and the next two are guesses, to be measured
on an idle machine (``benchmarks/cpu_attention.py``)."""

MOST_ROWS = 64
"""Most rows of queries a head of keys (tokens times query heads) for which it is taken unless it is named."""

FAST = "avx2"
"""The plainest instruction set by which it is taken unless it is named; by that of ARM, not measured yet, it is not."""


def _unread(fmt: Format) -> str:
    """Return why keys or values of this format cannot be read, or an empty text."""
    if isinstance(fmt, KV4) or (isinstance(fmt, Int) and fmt.bits in (4, 8) and fmt.per in ("token", "channel")):
        return ""
    return f"{fmt.name} keys or values have no kernel; Int(8, per='token'), Int(4, per='token') and KV4() have"


def _can(problem: Problem) -> bool | str:
    if why := _unread(problem.weight) or _unread(problem.settings.values):
        return why
    if problem.x_dtype.itemsize > 4:
        return f"it computes in float32, and the queries are {problem.x_dtype}"
    if problem.devices > 1:
        return "it is for one device; inside shard_map it runs on each"
    if isinstance(lib := library(), str):
        if _large(problem) and not problem.exported:
            say_once()
        return lib
    return True


def _large(problem: Problem) -> bool:
    return problem.matrices * problem.k * problem.n >= SMALLEST and (problem.rows or 0) <= MOST_ROWS


def _worth(problem: Problem) -> bool | str:
    if problem.exported:
        return "a program that is exported has to run where these kernels are not, and jax.export refuses them"
    if not _large(problem):
        return f"the cache has fewer than {SMALLEST} keys, or there are more than {MOST_ROWS} rows of queries a head"
    if FAST not in instruction_sets():
        return f"this processor has no {FAST}"
    return True


@register_lowering(
    "attention",
    (Int, KV4),
    "cpu",
    when=_can,
    worth=_worth,
    name="native",
    priority=6,
    about="compiled kernel: codes read once as they are stored, by AVX-512, AVX2, NEON or portable",
)
def native(problem: Problem, q: Array, k: QArray, v: QArray, lengths: Array, windows: Array, layer: Array) -> Array:
    """Return attention over codes that are read as they are stored."""
    if not q.size or not problem.n or not problem.k:
        return attention_reference(problem, q, k, v, lengths, windows, layer)
    y = attend(q.astype(jnp.float32), k, v, lengths, windows, layer, scale=problem.settings.scale)
    return y.astype(problem.out_dtype)


def attend(
    q: Array,
    k: QArray,
    v: QArray,
    lengths: Array,
    windows: Array,
    layer: Array,
    *,
    scale: float,
    instructions: str | None = None,
) -> Array:
    """Call the kernel.

    Args:
        q: float32 [B, H, T, G, D].
        k: keys [B, H, S, D], or with an axis of layers in front.
        v: values likewise.
        lengths: int32 [B].
        windows: int32 [B].
        layer: int32 [].
        scale: factor on products of queries and keys.
        instructions: one of `qjax.kernels.cpu.library.ISAS`, or None for the best that the processor has.

    Returns:
        float32 [B, H, T, G, D of values].
    """
    out = jax.ShapeDtypeStruct((*q.shape[:-1], v.length), jnp.float32)
    return jax.ffi.ffi_call(ATTENTION, out)(
        q,
        lengths,
        windows,
        layer,
        *_arrays(k),
        *_arrays(v),
        scale=np.float32(scale),
        isa=np.int64(-1 if instructions is None else ISAS.index(instructions)),
        **{f"{name}_bits": np.int64(a.fmt.code_bits) for name, a in (("k", k), ("v", v))},
        **{f"{name}_signed": np.int64(a.fmt.signed) for name, a in (("k", k), ("v", v))},
    )


def _arrays(a: QArray) -> tuple[Array, Array, Array]:
    """Return codes, scales and zero points (or none) with an axis of layers in front."""
    front = lambda x: jnp.asarray(x) if a.stack_ndim == 3 else jnp.asarray(x)[None]  # noqa: E731
    zero = front(a.aux["zero"]) if "zero" in a.aux else jnp.zeros((0,), jnp.uint8)
    return front(a.codes), front(a.aux["scale"]), zero
