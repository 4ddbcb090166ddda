"""`check_lowering`: what a lowering has to do to be one.

    def test_my_kernel():
        check_lowering("dot", "my_kernel", weights=[Int(4, group=32), Int(4)], acts=[None, Int(8, per="token")])

The suite draws shapes (one row and many, none at all, odd sizes, stacks) and values (normal, zero, huge, one row of
NaN), runs the lowering by name wherever it says that it can run, and compares it with the oracle: eagerly and jitted,
under `vmap` over activations and over weights, inside `scan`, and for the shape and dtype of its result. One that says
that it adds a bias and a residual is given both in half of the problems. A lowering that refuses a problem is taken at
its word; one that refuses all of them fails.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from qjax import ops
from qjax.errors import LoweringError, QjaxError
from qjax.formats import Format, Int, QArray, quantize_array, stack
from qjax.ops.base import LinearOp, Operands
from qjax.ops.dot import q_dot_transposed_op

VALUES = ("normal", "normal", "zero", "huge", "nan row")
"""The kinds of activations that are drawn."""


@dataclasses.dataclass(frozen=True)
class _Case:
    """One problem: activations, weight, the arrays beside them, and how to run it."""

    x: Array
    w: QArray
    extra: tuple[Array, ...]
    run: Callable[..., Array]  # (x, w, *extra, implementation=...) -> result


def check_lowering(
    op: str,
    name: str,
    *,
    weights: Sequence[Format] = (Int(8), Int(4, group=32)),
    acts: Sequence[Format | None] = (None,),
    dtypes: Sequence[Any] = (np.float32,),
    tolerance: float = 1e-5,
    examples: int = 20,
) -> None:
    """Check a registered lowering on the platform at hand, raising AssertionError with the property that fails.

    Args:
        op: "dot", "dot_transposed", "conv" or "ragged_dot".
        name: the name under which it is registered.
        weights: formats of weights to draw from.
        acts: formats of activations to draw from; None leaves them in float.
        dtypes: dtypes of activations to draw from.
        tolerance: largest difference from the oracle, relative to the sum of magnitudes of the terms of a result;
            16-bit dtypes get their own rounding on top.
        examples: how many problems to draw.
    """
    try:
        import hypothesis
        from hypothesis import strategies
    except ImportError as error:
        raise QjaxError('qjax.testing draws its examples with hypothesis; pip install "qjax[test]"') from error

    rows = ops.lowering_table(op).rows
    known, adds = {e.name for e in rows}, any(e.name == name and e.adds for e in rows)
    assert name in known, f"no lowering {name!r} of {op}; there are {', '.join(sorted(known))}"
    outcomes: list[bool] = []
    refusals: set[str] = set()
    sizes = _SIZES[op]

    def run(weight: Format, act: Format | None, dtype: Any, size: tuple[int, ...], values: str, seed: int) -> None:
        case = _MAKERS[op](weight, act, np.dtype(dtype), size, values, seed)
        case = _with_terms(case, seed) if adds and seed % 2 else case
        try:
            results = jax.jit(functools.partial(_everything, case, name))(case.x, case.w, *case.extra)
        except LoweringError as error:
            refusals.add(str(error))
            return
        if not outcomes:
            results["eager"] = case.run(case.x, case.w, *case.extra, implementation=name)
        outcomes.append(True)
        _compare(op, name, case, results, act, tolerance)

    for i in range(max(len(weights), len(acts))):  # every format once, whatever the draw
        run(weights[i % len(weights)], acts[i % len(acts)], dtypes[0], sizes[0], "normal", i)

    @hypothesis.settings(deadline=None, max_examples=examples, database=None)
    @hypothesis.given(
        weight=strategies.sampled_from(list(weights)),
        act=strategies.sampled_from(list(acts)),
        dtype=strategies.sampled_from(list(dtypes)),
        size=strategies.sampled_from(sizes),
        values=strategies.sampled_from(VALUES),
        seed=strategies.integers(0, 2**16),
    )
    def drawn(weight: Format, act: Format | None, dtype: Any, size: tuple[int, ...], values: str, seed: int) -> None:
        run(weight, act, dtype, size, values, seed)

    drawn()
    assert outcomes, f"{op}, {name}: it refused every problem: {'; '.join(sorted(refusals)[:3])}"


# Sizes: of dot (stack, rows, N, K) with stack 0 for none; of conv (examples, side, channels, outputs, stride, groups);
# of ragged_dot (groups, rows, N, K).
_DOT_SIZES = [
    (0, 5, 24, 64),
    (0, 1, 33, 64),
    (0, 2, 7, 96),
    (0, 17, 64, 37),
    (2, 3, 16, 64),
    (0, 0, 8, 32),
    (0, 4, 1, 32),
]
_SIZES: dict[str, list[tuple[int, ...]]] = {
    "dot": _DOT_SIZES,
    "dot_transposed": _DOT_SIZES,
    "conv": [(2, 6, 16, 8, 1, 1), (1, 5, 3, 4, 2, 1), (3, 4, 16, 8, 1, 4)],
    "ragged_dot": [(3, 8, 16, 64), (4, 1, 8, 32), (2, 5, 24, 37)],
}


def _activations(shape: tuple[int, ...], values: str, dtype: np.dtype, rng: np.random.Generator) -> Array:
    x = rng.standard_normal(shape)
    if values == "zero":
        x = np.zeros(shape)
    elif values == "huge":
        x = x * (1e3 if dtype.itemsize == 2 else 1e20)
    elif values == "nan row" and x.size:
        x[..., -1, :] = np.nan
    return jnp.asarray(x, dtype)


def _fitting(fmt: Format, length: int) -> Format:
    """Return the format, or with one group over the row if rows are shorter than its group."""
    return fmt.clamped(length)


def _dot_case(
    weight: Format, act: Format | None, dtype: np.dtype, size: tuple[int, ...], values: str, seed: int, back: bool
) -> _Case:
    count, rows, n, k = size
    rng = np.random.default_rng(seed)
    lead = (count,) if count else ()
    w = jnp.asarray(rng.standard_normal((*lead, n, k)), jnp.float32)
    q = quantize_array(w, _fitting(weight, k), in_axes=len(lead) + 1, stack_axes=tuple(range(len(lead))))
    x = _activations((*lead, rows, n if back else k), values, dtype, rng)
    act = _fitting(act, k) if act else None

    def run(x: Array, w: QArray, *, implementation: str, **terms: Any) -> Array:
        if back:
            return _transposed(q_dot_transposed_op, x, w, implementation)
        aux = (act, ops.activation_aux(x, act, stack_ndim=w.codes.ndim - 2)) if act else None
        return ops.q_dot(x, w, act=aux, implementation=implementation, **terms)

    return _Case(x, q.canonical(), (), run)


def _with_terms(case: _Case, seed: int) -> _Case:
    """Return a dot with a bias and a residual."""
    rng = np.random.default_rng(seed)
    bias = jnp.asarray(rng.standard_normal((*case.w.codes.shape[:-1],)), jnp.float32)
    residual = jnp.asarray(rng.standard_normal((*case.x.shape[:-1], bias.shape[-1])), case.x.dtype)
    return dataclasses.replace(case, run=functools.partial(case.run, bias=bias, residual=residual))


def _transposed(op: LinearOp, x: Array, w: QArray, implementation: str) -> Array:
    return op.bind(ops.Spec(out_dtype=np.dtype(x.dtype), implementation=implementation), Operands(x, {}, w.canonical()))


def _conv_case(
    weight: Format, act: Format | None, dtype: np.dtype, size: tuple[int, ...], values: str, seed: int
) -> _Case:
    count, side, channels, outputs, stride, groups = size
    rng = np.random.default_rng(seed)
    shape = (3, 3, channels // groups, outputs)
    w = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    q = quantize_array(w, _fitting(weight, int(np.prod(shape[:3]))), in_axes=(0, 1, 2))
    # NaN spreads through a window; the row that is spoilt is one example.
    flat = _activations((count, side * side * channels), values, dtype, rng)
    x = flat.reshape(count, side, side, channels)
    numbers = ("NHWC", "HWIO", "NHWC")
    if act is not None and act.per == "group":
        act = None

    def run(x: Array, w: QArray, *, implementation: str) -> Array:
        aux = (act, ops.conv_activation_aux(x, act, numbers)) if act else None
        return ops.q_conv(
            x,
            w,
            act=aux,
            window_strides=(stride, stride),
            padding="SAME",
            dimension_numbers=numbers,
            feature_group_count=groups,
            implementation=implementation,
        )

    return _Case(x, q, (), run)


def _ragged_case(
    weight: Format, act: Format | None, dtype: np.dtype, size: tuple[int, ...], values: str, seed: int
) -> _Case:
    groups, rows, n, k = size
    rng = np.random.default_rng(seed)
    w = jnp.asarray(rng.standard_normal((groups, n, k)), jnp.float32)
    q = quantize_array(w, _fitting(weight, k), in_axes=2, stack_axes=0)
    x = _activations((rows, k), values, dtype, rng)
    ends = np.sort(rng.integers(0, rows + 1, groups))
    sizes = jnp.asarray(np.diff(ends, prepend=0), jnp.int32)  # some groups empty, rows left over behind the last
    act = _fitting(act, k) if act else None

    def run(x: Array, w: QArray, sizes: Array, *, implementation: str) -> Array:
        aux = (act, ops.activation_aux(x, act)) if act else None
        return ops.q_ragged_dot(x, w, sizes, act=aux, implementation=implementation)

    return _Case(x, q, (sizes,), run)


_MAKERS: dict[str, Callable[..., _Case]] = {
    "dot": lambda *args: _dot_case(*args, back=False),
    "dot_transposed": lambda *args: _dot_case(*args, back=True),
    "conv": _conv_case,
    "ragged_dot": _ragged_case,
}


def _everything(case: _Case, name: str, x: Array, w: QArray, *extra: Array) -> dict[str, Array]:
    """Return the result as each transformation computes it; one function, because compiling takes the time."""
    run = functools.partial(case.run, implementation=name)
    weights = stack([w, w])
    return {
        "jit": run(x, w, *extra),
        "vmap over activations": jax.vmap(lambda x: run(x, w, *extra))(jnp.stack([x, x]))[1],
        "vmap over weights": jax.vmap(lambda w: run(x, w, *extra))(weights)[1],
        "scan over weights": lax.scan(lambda c, w: (c, run(x, w, *extra)), 0, weights)[1][1],
    }


def _compare(op: str, name: str, case: _Case, results: dict[str, Array], act: Format | None, tolerance: float) -> None:
    say = f"{op}, {name}, weights {case.w.fmt.name}, x {case.x.dtype} {case.x.shape}, w {case.w.shape}"
    say += f", activations {act.name}" if act else ""
    x, w = case.x, case.w
    expected = case.run(x, w, *case.extra, implementation="reference")
    for what, got in results.items():
        assert got.shape == expected.shape, f"{say}, {what}: shape {got.shape}, the oracle's is {expected.shape}"
        assert got.dtype == expected.dtype, f"{say}, {what}: dtype {got.dtype}, the oracle's is {expected.dtype}"
    if not x.size:
        return
    size = _term_size(x, w)
    bound = tolerance + float(jnp.finfo(x.dtype).eps) * (2 if x.dtype.itemsize == 2 else 0)

    for what, got in results.items():
        finite = jnp.isfinite(expected)
        assert bool(jnp.all(finite == jnp.isfinite(got))), f"{say}, {what}: NaN or infinity where the oracle has none"
        off = jnp.where(finite, jnp.abs(got.astype(jnp.float32) - expected.astype(jnp.float32)), 0)
        worst = float(jnp.max(off) / size)
        assert worst <= bound, f"{say}, {what}: off by {worst:.1e} of the sum of terms, {bound:.1e} allowed"


def _term_size(x: Array, w: QArray) -> float:
    """Return an upper bound of the sum of magnitudes behind any result."""
    finite = jnp.where(jnp.isfinite(x), jnp.abs(x), 0).astype(jnp.float32)
    weight = jnp.abs(w.decode_canonical())
    sums = [jnp.max(jnp.sum(weight, axis=axis)) for axis in (-1, -2)]
    return max(float(jnp.max(finite)) * float(max(sums)), 1e-30)
