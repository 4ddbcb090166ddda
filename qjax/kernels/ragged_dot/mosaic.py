"""The lowering of ragged products on NVIDIA's Hopper, by the kernels of `experts`."""

from __future__ import annotations

from jax import Array

from qjax.formats import QArray
from qjax.formats.word_tiles import Planes
from qjax.kernels.dot.mosaic import on_hopper
from qjax.kernels.dot.schedules import chosen_ragged
from qjax.kernels.dot.words import NEUTRAL, ORDERS, footprint, refuses_words
from qjax.kernels.ragged_dot.experts import experts16
from qjax.kernels.ragged_dot.reference import ragged_dot_reference
from qjax.kernels.registry import Act, Problem, register_lowering


@register_lowering(
    "ragged_dot",
    (*ORDERS, *NEUTRAL),
    "cuda",
    when=on_hopper(refuses_words),
    name="mosaic",
    priority=5,
    about="wgmma on Hopper: 2 to 8 bits, float8, NF4, MXFP4, NVFP4, trits, packed for it, with 16-bit activations",
)
def mosaic(problem: Problem, x: Array, w: QArray, act: Act | None, group_sizes: Array) -> Array:
    """Return the ragged product by the kernel."""
    (groups,) = problem.stack
    if x.size == 0 or not problem.n or not groups:
        return ragged_dot_reference(problem, x, w, act, group_sizes)
    fmt = problem.weight
    assert isinstance(fmt, Planes)
    return experts16(
        {name: a.reshape(groups, -1) for name, a in w.aux.items()},
        x,
        group_sizes,
        fmt=fmt,
        n=problem.n,
        out_dtype=problem.out_dtype,
        schedule=chosen_ragged("words16", problem, x.shape[0], footprint(fmt)),
    )
