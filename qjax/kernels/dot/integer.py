"""Products of integer codes, accumulated in int32 and scaled afterwards.

With codes q, zero points z and scales s of one group of k (a whole row where there are no groups):

    sum over k of (qx - zx) * sx * (qw - zw) * sw
        = sx * sw * (sum of qx*qw  -  zw * sum of qx  -  zx * sum of qw  +  |group| * zx * zw)

The first sum is an int8 x int8 -> int32 dot on [M, K] and [N, K]; it is exact for up to 131,071 terms. Sums over qx
are cheap. Sums over qw, needed only for activations with a zero point, come out of the same dot: a row of ones is
appended to qx. Unsigned 8-bit codes move to int8 by subtracting 128 from code and zero point alike.

XLA on CPU computes rank-2 int8 dots of two rows or more with a fast library and one row by converting the whole
weight to float first, so one row is padded to four. Groups are summed in a loop over groups, each a dot of its own:
one batched dot over all groups is three times slower, and holds [groups, M, N] int32. Codes of 2 and 4 bits are
unpacked phase by phase (`qjax.kernels.phases`).

Formats with ``int8_rows`` (`DualGrained`, `Progressive`) have integer scales in their groups: codes are first made the
int8 numbers that they stand for, and the whole row is one such dot with one scale, groups or not.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax import Array, lax

from qjax.formats import Aux, Format, QArray
from qjax.formats.numerics import AnyArray
from qjax.kernels.dot.reference import encoded
from qjax.kernels.dot.xla import both_quantized, fold_rows, on_one_cpu, once_there, over_stack, zeros_like_varying
from qjax.kernels.order import SMALL_ELEMENTS
from qjax.kernels.phases import code_phases, int8_phases, phase_count, split_phases
from qjax.kernels.registry import Act, Problem, register_lowering
from qjax.kernels.unpack import unpacked

LARGEST_SUM = 131_071
"""Terms up to which a sum of products of int8 codes cannot overflow int32."""

PADDED_ROWS = 4


def group_of(fmt: Format) -> int | None:
    """Return the length of the runs whose sums have a scale of their own, or None for whole rows."""
    return fmt.group if fmt.per == "group" and not fmt.int8_rows else None


def _integer_pair(problem: Problem) -> bool | str:
    act, weight = problem.act, problem.weight
    if act is None:
        return "the activations are not quantized"
    for fmt, able in ((act, act.is_integer), (weight, weight.is_integer or weight.int8_rows)):
        if not able:
            return f"{fmt.name} codes are no integers with one factor"
    gx, gw = group_of(act), group_of(weight)
    if gx and gx != gw:
        return f"groups of {gx} activations do not match {f'groups of {gw}' if gw else 'a scale per row'} of weights"
    if gw and problem.k % gw:
        return f"rows of {problem.k} elements end in a shorter group than {gw}"
    if not gw and problem.k > LARGEST_SUM:
        return f"a sum of {problem.k} products may overflow int32"
    return True


@register_lowering(
    "dot", when=_integer_pair, name="int_dot", priority=4, about="int8 x int8 -> int32 on codes, then scaled; per group"
)
def int_dot(problem: Problem, x: Array, w: QArray, act: Act | None) -> Array:
    """Return the product of integer codes times both scales."""
    if on_one_cpu(problem) and x.size:
        return over_stack(_cpu_matrix)(problem, x, w, act)
    return _whole(problem, x, w, both_quantized(act))


@dataclasses.dataclass
class _Side:
    """One operand: int8 codes, and per block its scale (float32) and zero point (int32, or None)."""

    codes: Array
    scale: Array
    zero: Array | None


def _signed(codes: Array, zero: Array | None, bits: int) -> tuple[Array, Array | None]:
    """Return int8 codes and int32 zero points."""
    wide_zero = None if zero is None else zero.astype(jnp.int32)
    if codes.dtype == jnp.uint8 and bits == 8:
        moved = lax.bitcast_convert_type(codes ^ jnp.uint8(128), jnp.int8)
        return moved, (jnp.int32(-128) if wide_zero is None else wide_zero - 128)
    return codes.astype(jnp.int8), wide_zero


def _activations(x: Array, act: Act, streamed: bool = False) -> _Side:
    fmt, aux = act
    of_elements = aux
    if streamed and fmt.per != "group" and isinstance(x.size, int) and x.size <= SMALL_ELEMENTS:
        of_elements = {name: _beside(x, a) if name == "scale" else a for name, a in aux.items()}
    codes, zero = _signed(encoded(x, (fmt, of_elements)), fmt.zero_of(aux), fmt.code_bits)
    if zero is not None:
        zero = jnp.broadcast_to(zero, (*x.shape[:-1], zero.shape[-1] if zero.ndim else 1))
    return _Side(codes, fmt.scale_of(aux), zero)


def _beside(x: Array, scale: AnyArray) -> Array:
    """Return the scales of rows for each element of x, such that XLA on CPU does not see that they are rows'.

    Their reciprocals would be a loop of their own to it, and loops are what a small program, such as a scan over
    layers, takes its time to compile. The code generator, later, sees that no number is below minus infinity and takes
    the division out of the loop over a row.
    """
    x = x.astype(jnp.float32)
    return lax.select(lax.lt(x, lax.full_like(x, -jnp.inf)), lax.full_like(x, 1), jnp.broadcast_to(scale, x.shape))


def _dot(x: Array, w: Array) -> Array:
    """Return int32 [M, N] from int8 [M, K] and [N, K]."""
    return lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32)


def _cpu_matrix(problem: Problem, x: Array, w: QArray, act: Act | None) -> Array:
    """Return the product of one matrix on one CPU device."""
    shape, x = x.shape[:-1], fold_rows(x)
    rows = x.shape[0]
    fmt, aux = both_quantized(act)
    folded: Aux = {k: jnp.broadcast_to(a, (*shape, a.shape[-1])).reshape(rows, -1) for k, a in aux.items()}
    side = _activations(x, (fmt, folded), bool(problem.settings and problem.settings.streamed))
    # Rows of qx, a row of ones where sums over qw are needed, and zeros up to the rows that make the dot fast.
    ones = [jnp.ones((1, problem.k), jnp.int8)] if side.zero is not None else []
    filled = rows + len(ones)
    fill = [jnp.zeros((PADDED_ROWS - filled, problem.k), jnp.int8)] if rows == 1 else []
    q = jnp.concatenate([side.codes, *ones, *fill]) if ones or fill else side.codes
    # Codes that are read as they are stay where they are; what has to be unpacked waits for qx.
    product = _scaled_sums if w.codes.dtype == jnp.int8 else once_there(problem, _scaled_sums)
    y = product((problem, rows), q, side.scale, side.zero, w)
    return y.astype(problem.out_dtype).reshape(*shape, problem.n)


def _scaled_sums(what: tuple[Problem, int], q: Array, scale_x: Array, zero_x: Array | None, w: QArray) -> Array:
    """Return the sums over all groups times both scales: float32 [rows, N].

    Args:
        what: the problem, and the rows of the result.
        q: int8 codes [rows, K], then a row of ones if zero_x is given, then padding.
        scale_x: float32 [rows, groups or 1].
        zero_x: int32 [rows, groups or 1] or None.
        w: canonical [N, K].
    """
    problem, rows = what
    if w.fmt.int8_rows:
        return _of_int8_rows(problem, rows, q, scale_x, zero_x, w)
    _, zero_w = _signed(jnp.zeros((), w.fmt.code_dtype), w.fmt.zero_of(w.aux), w.fmt.code_bits)
    count = phase_count(w.fmt, w.length)
    group = group_of(w.fmt) or problem.k
    if count > 1:
        stored, unpack = w.codes, lambda part: code_phases(part, w.fmt)
    else:
        stored, unpack = unpacked(w), lambda part: [part]
    x_phases = split_phases(q, count)
    width, bytes_width = group // count, group * stored.shape[1] // problem.k

    def sums(qs: list[Array], part: Array) -> Array:
        """Return the int32 sums over one group: [rows (+ ones and padding), N]."""
        terms = [_dot(qp, _signed(wp, None, w.fmt.code_bits)[0]) for qp, wp in zip(qs, unpack(part), strict=True)]
        return sum(terms[1:], terms[0])

    scale_w = w.fmt.scale_of(w.aux)
    if group == problem.k:
        acc = _centred(sums(x_phases, stored), x_phases, rows, zero_x, zero_w, group)
        return acc.astype(jnp.float32) * scale_x * scale_w[:, 0][None]

    def add(g: Array, y: Array) -> Array:
        column = lambda a: lax.dynamic_slice_in_dim(a, g, 1, axis=1) if a.shape[1] > 1 else a  # noqa: E731
        part = lax.dynamic_slice_in_dim(stored, g * bytes_width, bytes_width, axis=1)
        qs = [lax.dynamic_slice_in_dim(xp, g * width, width, axis=1) for xp in x_phases]
        zx = None if zero_x is None else column(zero_x)
        zw = column(zero_w) if zero_w is not None and zero_w.ndim else zero_w
        acc = _centred(sums(qs, part), qs, rows, zx, zw, group).astype(jnp.float32)
        return y + acc * column(scale_x) * column(scale_w)[:, 0][None]

    return lax.fori_loop(0, problem.k // group, add, zeros_like_varying((rows, problem.n), scale_x, w))


def _of_int8_rows(problem: Problem, rows: int, q: Array, scale_x: Array, zero_x: Array | None, w: QArray) -> Array:
    """`_scaled_sums` of a weight whose rows are int8 numbers under one scale."""
    count = phase_count(w.fmt, w.length)
    if count > 1:
        numbers, scale_w = int8_phases(w)
    else:
        whole, scale_w = w.fmt.as_int8(unpacked(w), w.aux)
        numbers, scale_w = [whole], scale_w[:, 0]
    terms = [_dot(qp, wp) for qp, wp in zip(split_phases(q, count), numbers, strict=True)]
    acc = _centred(sum(terms[1:], terms[0]), [], rows, zero_x, None, problem.k)
    return acc.astype(jnp.float32) * scale_x * scale_w[None]


def _centred(acc: Array, qs: list[Array], rows: int, zero_x: Array | None, zero_w: Array | None, group: int) -> Array:
    """Return the int32 sums with the zero points taken into account: [rows, N].

    Args:
        acc: sums of qx * qw, [at least rows, N]; row ``rows`` holds the sums of qw if zero_x is given.
        qs: phases of qx for this group.
        rows: rows of the result.
        zero_x: int32 [rows, 1] or None.
        zero_w: int32 [N, 1], a scalar, or None.
        group: terms in a sum.
    """
    y = acc[:rows]
    if zero_w is not None:
        zero_w = zero_w.reshape(1, -1)
        sum_x = sum(jnp.sum(q[:rows].astype(jnp.int32), axis=1, keepdims=True) for q in qs)
        y = y - sum_x * zero_w
    if zero_x is not None:
        y = y - zero_x * acc[rows][None]
        if zero_w is not None:
            y = y + group * zero_x * zero_w
    return y


def _whole(problem: Problem, x: Array, w: QArray, act: Act) -> Array:
    """Return the product as whole-array operations: stacks and groups are batch axes of one dot."""
    side = _activations(x, act)
    stacks, rows = len(problem.stack), x.ndim - 1 - len(problem.stack)
    if w.fmt.int8_rows:
        (codes, scale_w), zero_w = w.fmt.as_int8(w.unpacked(), w.aux), None
    else:
        codes, zero_w = _signed(w.unpacked(), w.fmt.zero_of(w.aux), w.fmt.code_bits)
        scale_w = w.fmt.scale_of(w.aux)
    group = group_of(w.fmt)
    sharding = problem.settings.out_sharding if problem.settings else None
    if group is None:
        batch = tuple(range(stacks))
        dims = (((x.ndim - 1,), (stacks + 1,)), (batch, batch))
        acc = lax.dot_general(side.codes, codes, dims, preferred_element_type=jnp.int32, out_sharding=sharding)
        blocks = ()
    else:
        blocks = (problem.k // group,)
        batch = tuple(range(stacks))
        dims = (((x.ndim,), (stacks + 2,)), ((*batch, x.ndim - 1), (*batch, stacks + 1)))
        split = lambda a: a.reshape(*a.shape[:-1], *blocks, group)  # noqa: E731
        acc = lax.dot_general(split(side.codes), split(codes), dims, preferred_element_type=jnp.int32)
    # acc: [*stack, (groups,) *rows, N]

    def of_x(a: Array) -> Array:
        """Place numbers per row and block, [*stack, *rows, blocks or 1], beside acc."""
        return jnp.moveaxis(a, -1, stacks)[..., None] if blocks else a

    def of_w(a: Array) -> Array:
        """Place numbers per output and block, [*stack, N or 1, blocks or 1], beside acc."""
        a = jnp.moveaxis(a, -1, stacks)  # [*stack, blocks or 1, N or 1]
        own = a.shape[stacks : stacks + 1] if blocks else ()
        return a.reshape(*a.shape[:stacks], *own, *(1,) * rows, a.shape[-1])

    length = group or problem.k
    if zero_w is not None:
        q = side.codes.astype(jnp.int32)
        sum_x = jnp.sum(q.reshape(*q.shape[:-1], *blocks, length) if blocks else q, axis=-1, keepdims=not blocks)
        zero_w = of_w(zero_w) if zero_w.ndim else zero_w
        acc = acc - of_x(sum_x) * zero_w
    if side.zero is not None:
        q = codes.astype(jnp.int32)
        sum_w = jnp.sum(q.reshape(*q.shape[:-1], *blocks, length) if blocks else q, axis=-1, keepdims=not blocks)
        zero_x = of_x(side.zero)
        acc = acc - zero_x * of_w(sum_w)
        if zero_w is not None:
            acc = acc + length * zero_x * zero_w
    y = acc.astype(jnp.float32) * of_x(side.scale) * of_w(scale_w)
    return (jnp.sum(y, axis=stacks) if blocks else y).astype(problem.out_dtype)
