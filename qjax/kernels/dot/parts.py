"""Products with a weight in parts (`qjax.formats.parts`): each part by the kernel of its order."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from qjax.formats import QArray
from qjax.formats.parts import TiledParts
from qjax.kernels.dot.terms import computed
from qjax.kernels.registry import Act, Lowering, Problem, register_lowering, select


def problem_of_part(problem: Problem, rows: int, columns: int) -> Problem:
    """The product with one of so many parts; its result is float32 where parts along K are added."""
    assert isinstance(problem.weight, TiledParts)
    out = problem.out_dtype if columns == 1 else np.dtype(np.float32)
    terms = problem.terms if columns == 1 else ()
    sizes: dict[str, Any] = {"n": problem.n // rows, "k": problem.weight.length, "out_dtype": out, "terms": terms}
    return dataclasses.replace(problem, weight=problem.weight.part, **sizes)


def _of_part(problem: Problem) -> Lowering:
    part = problem_of_part(problem, 1, max(problem.k // problem.weight.length, 1))  # type: ignore[attr-defined]
    return select(part, "mosaic")


def _adds(problem: Problem) -> bool:
    """Whether each part has its share of the terms: those of all columns."""
    weight = problem.weight
    assert isinstance(weight, TiledParts)
    return problem.k == weight.length and _of_part(problem).adds_terms(problem_of_part(problem, 1, 1))


def _runs(problem: Problem) -> bool | str:
    from qjax.errors import LoweringError

    try:
        return bool(_of_part(problem))
    except LoweringError as e:
        return str(e).partition(": ")[2].removesuffix(". Leave implementation=None to choose one that can")


@register_lowering(
    "dot",
    TiledParts,
    "cuda",
    when=_runs,
    name="mosaic",
    priority=5,
    about="weights packed in parts for several devices: each part by its kernel",
    adds=_adds,
)
@register_lowering(
    "ragged_dot",
    TiledParts,
    "cuda",
    when=_runs,
    name="mosaic",
    priority=5,
    about="experts packed in parts for several devices: each part by its kernel",
)
def parts(problem: Problem, x: Array, w: QArray, act: Act | None, *extra: Array, **terms: Array) -> Array:
    """Return the product, part by part; on a mesh each device has one. A ragged one is given the sizes of groups."""
    assert isinstance(w.fmt, TiledParts)
    columns = problem.k // w.fmt.length
    rows = next(iter(w.aux.values())).shape[-2]
    own = problem_of_part(problem, rows, columns)
    kernel = select(own, "mosaic")
    pieces = w.fmt.pieces(w.aux, columns)
    layout = dataclasses.replace(w.layout, pad=0)
    codes = jnp.zeros((*problem.stack, own.n, 0), jnp.int8)
    out = []
    for r in range(rows):
        sums: list[Array] = []
        for c in range(columns):
            aux = {name: a[..., r, c, :, :] for name, a in pieces.items()}
            part = QArray(codes, aux, w.fmt.part, layout, w.dtype)
            at = slice(c * own.k, (c + 1) * own.k)
            of_part = act and (act[0], _columns(act, at, problem.k))
            mine = {name: a[..., r * own.n : (r + 1) * own.n] for name, a in terms.items()}
            sums.append(computed(kernel, own, x[..., at], part, of_part, *extra, terms=mine))
        total = sums[0]
        for more in sums[1:]:
            total = total + more
        out.append(total.astype(problem.out_dtype))
    return out[0] if rows == 1 else jnp.concatenate(out, axis=-1)


def _columns(act: Act, at: slice, k: int) -> Any:
    """Aux of the activations for some of their columns."""
    groups = act[0].groups(k)
    if groups == 1:
        return act[1]
    cut = slice(at.start * groups // k, at.stop * groups // k)
    return {name: a[..., cut] if a.shape[-1] == groups else a for name, a in act[1].items()}
