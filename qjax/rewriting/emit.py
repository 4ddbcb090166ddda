"""Emitting one quantized product: from an equation and its operands to the quantized op and back to its result.

A quantized weight is brought into canonical order ``[*batch, N, K]`` by a view, the activations into
``[*batch, M, K]`` by a transpose, and the result ``[*batch, M, N]`` into the dimension order of the equation.
Where the equation contracts other axes than the weight was stored for, the weight is dequantized there and it is
noted.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from qjax import ops
from qjax._compat import bind
from qjax.errors import LayoutError, LoweringError, RecipeError
from qjax.formats import SIGNS, SMOOTH, Layout, QArray, is_quantized
from qjax.formats.rotation import prepared, rotate
from qjax.kernels import Problem, select
from qjax.kernels.devices import cuda_capability, platform_here
from qjax.rewriting.endings import terms_of
from qjax.rewriting.log_attention import emit_log_attention
from qjax.rewriting.operands import Operand, Operands, round_fixed
from qjax.rewriting.selection import Layer, Selected, cut


@dataclasses.dataclass(frozen=True)
class Act:
    """How the activations of a product are quantized.

    Attributes:
        fmt: the format.
        prefix: of the constant scales among the arrays of the weight (`qjax.applying.storage.input_prefix`); None where
            the scale comes from the values themselves.
    """

    fmt: Any
    prefix: str | None = None


@dataclasses.dataclass(frozen=True)
class Placed:
    """Where the axes of a product are in its quantized form.

    Attributes:
        weight: canonical, without what is kept for activations.
        constants: that.
        x_axes: of the activations: batch, rows, contraction, in the order in which the weight is stored.
        shape: of the result: sizes of [*batch], [*rows], [*free axes of the weight].
        permutation: from that order to the equation's.
    """

    weight: QArray
    constants: dict[str, Any]
    x_axes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    shape: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    permutation: tuple[int, ...]


def placed(eqn: Any, weight: QArray, x: Any, side: int) -> Placed:
    """Bring a dot_general, whose operand ``side`` is a weight, into the form of the quantized op.

    Raises:
        LayoutError: if it has none.
    """
    (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
    wc, xc = (tuple(rc), tuple(lc)) if side else (tuple(lc), tuple(rc))
    wb, xb = (tuple(rb), tuple(lb)) if side else (tuple(lb), tuple(rb))
    wfree = [d for d in range(weight.ndim) if d not in wc and d not in wb]
    xfree = tuple(d for d in range(x.ndim) if d not in xc and d not in xb)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise LayoutError(f"a product with {x.dtype} numbers has no quantized form")
    canonical, order = product_view(weight, wc, wb)
    canonical, constants = _without_inputs(canonical)
    _check_prepared(constants, canonical.length)
    # x: [*batch, M, K], batch and contraction in the order in which the weight is stored
    batch = tuple(xb[wb.index(d)] for d in order.batch)
    contract = tuple(xc[wc.index(d)] for d in order.contract)
    # [*batch, M, N] -> [*batch, *rows, *free axes of the weight in stored order] -> the equation's order
    nb = len(batch)
    batch_at = {d: i for i, d in enumerate(order.batch)}
    free_at = {d: nb + len(xfree) + i for i, d in enumerate(order.free)}
    batch_perm = [batch_at[d] for d in wb]
    x_perm = list(range(nb, nb + len(xfree)))
    w_perm = [free_at[d] for d in wfree]
    sizes = lambda a, axes: tuple(a.shape[d] for d in axes)  # noqa: E731
    return Placed(
        canonical,
        constants,
        (batch, xfree, contract),
        (sizes(x, batch), sizes(x, xfree), sizes(weight, order.free)),
        tuple(batch_perm + (x_perm + w_perm if side else w_perm + x_perm)),
    )


def weight_side(values: list[Any]) -> int | None:
    """Which operand of a dot_general is the quantized weight."""
    return 1 if isinstance(values[1], QArray) else 0 if isinstance(values[0], QArray) else None


def taken_in(rewriter: Any, eqn: Any, values: list[Any], act: Act | None, found: Any) -> dict[str, Any]:
    """Return which of the additions that follow a product its lowering makes itself, by the name of the operand.

    Args:
        rewriter: the replay.
        eqn: a dot_general.
        values: its operands.
        act: how its activations are quantized.
        found: as `qjax.rewriting.endings.additions` finds them.
    """
    side = weight_side(values)
    if side is None or is_quantized(values[1 - side]) or isinstance(values[1 - side], Selected):
        return {}
    if eqn.params.get("out_sharding") is not None:
        return {}
    x, out = values[1 - side], eqn.outvars[0].aval
    try:
        there = placed(eqn, values[side], x, side)
        terms = terms_of(found, *there.shape)
        if list(there.permutation) != sorted(there.permutation) or not terms:
            return {}
        stack, rows, _ = there.shape
        w = there.weight
        problem = Problem(
            op="dot",
            platform=platform_here(),
            weight=w.fmt,
            act=act.fmt if act is not None else None,
            rows=math.prod(rows),
            n=w.codes.shape[-2],
            k=w.length,
            stack=tuple(stack),
            x_dtype=np.dtype(x.dtype),
            out_dtype=np.dtype(out.dtype),
            capability=cuda_capability(),
            terms=tuple(sorted(terms)),
        )
        return terms if select(problem, rewriter.implementation).adds_terms(problem) else {}
    except (LayoutError, LoweringError):  # which the product itself will tell
        return {}


def emit_dot(
    rewriter: Any, eqn: Any, values: list[Any], act: Act | None, where: str, terms: Mapping[str, Any] | None = None
) -> Any:
    """A dot_general of which one operand may be a QArray; with the terms of `taken_in`, arrays of any rank."""
    out = eqn.outvars[0].aval
    layer = next((v for v in values if isinstance(v, Layer)), None)
    values = [cut(v) for v in values]
    side = weight_side(values)
    if side is None:
        return _fake_quantized(rewriter, eqn, values, act, where, rewriter.input_side(eqn, where))
    weight, x = values[side], values[1 - side]
    if is_quantized(x) or isinstance(x, Selected):
        x = rewriter.dense(x, f"{where}: the other operand of the product is quantized too")
    try:
        there = placed(eqn, weight, x, side)
    except LayoutError as error:
        rewriter.note("dequantized", f"{where}: {error}")
        plain = [rewriter.dense(v, f"{where}: {error}") for v in values]
        return bind(eqn, plain)[0]
    canonical, constants = there.weight, there.constants
    batch_shape, rows, free_shape = there.shape
    if rewriter.choices is not None:
        sizes = (*batch_shape, math.prod(rows), canonical.codes.shape[-2], canonical.length)
        rewriter.choose("dot", canonical.fmt, act, sizes, x.dtype, where)
    streamed = rewriter.streamed(where)
    whole = None
    if layer is not None:
        (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
        axes = (rc, rb) if side else (lc, lb)
        whole = layer.whole(lambda q: _without_inputs(product_view(q, *map(tuple, axes))[0])[0])
    n = math.prod(free_shape)
    added = {}
    for name, a in (terms or {}).items():
        lead = (*batch_shape, math.prod(rows)) if name == "residual" else batch_shape if a.size > n else ()
        added[name] = _reshape(a, (*lead, n))

    def product(x: Any, weight: QArray, constants: dict[str, Any], *number: Any) -> Any:
        batch, xfree, contract = there.x_axes
        xt = lax.transpose(x, (*batch, *xfree, *contract))
        xt = _reshape(xt, (*batch_shape, math.prod(rows), math.prod(x.shape[d] for d in contract)))
        xt = _prepared(xt, constants, act)
        own = act is not None and act.prefix is None and act.fmt.per == "token"  # which a kernel may fit itself
        result = ops.q_dot(
            xt,
            weight,
            act=act.fmt if act and own else _for_stack(_act(act, xt, constants, where, streamed), batch_shape),
            out_dtype=out.dtype,
            precision=eqn.params["precision"],
            implementation=rewriter.implementation,
            streamed=streamed,
            layer=number[0] if number else None,
            site=where,
            **added,
        )
        return lax.transpose(_reshape(result, (*batch_shape, *rows, *free_shape)), there.permutation)

    sharding = eqn.params.get("out_sharding")
    if sharding is not None:  # asked for by the user under explicit sharding: the partitioner finds the way there
        anywhere: Any = jax.sharding.auto_axes(product, out_sharding=sharding)
        return anywhere(x, canonical, constants)
    if layer is not None and whole is not None:
        return product(x, whole, constants, layer.index)
    return product(x, canonical, constants)


def emit_conv(rewriter: Any, eqn: Any, values: list[Any], act: Act | None, where: str) -> Any:
    """A convolution whose kernel may be a QArray."""
    x, weight = values
    if not isinstance(weight, QArray):
        return _fake_quantized(rewriter, eqn, values, act, where)
    p, out = eqn.params, eqn.outvars[0].aval
    x = rewriter.dense(x, f"{where}: the image operand is quantized")
    weight, constants = _without_inputs(weight)
    unturned = x.dtype
    if SIGNS in constants:
        x = _rotated_image(x, constants[SIGNS], p["dimension_numbers"].lhs_spec[1], act)
    if SMOOTH in constants:
        x = _smoothed_image(x, constants[SMOOTH], p["dimension_numbers"].lhs_spec[1], act)
    if act is not None and act.prefix is None:
        quantized = (act.fmt, ops.conv_activation_aux(x, act.fmt, p["dimension_numbers"]))
    else:
        quantized = _act(act, x, constants, where)
    settings: dict[str, Any] = dict(
        act=quantized,
        window_strides=p["window_strides"],
        padding=p["padding"],
        lhs_dilation=p["lhs_dilation"],
        rhs_dilation=p["rhs_dilation"],
        dimension_numbers=p["dimension_numbers"],
        feature_group_count=p["feature_group_count"],
        batch_group_count=p["batch_group_count"],
        precision=p["precision"],
        out_dtype=out.dtype,
        implementation=rewriter.implementation,
        streamed=rewriter.streamed(where),
        site=where,
    )
    try:
        if rewriter.choices is not None:
            problem = ops.conv_problem(x, weight, platform_here(), **settings)
            rewriter.choices[where, weight.fmt.name] = ops.choice_for(problem, rewriter.implementation)
        return ops.q_conv(x, weight, **settings)
    except LayoutError as error:
        return bind(eqn, [x.astype(unturned), rewriter.dense(weight, f"{where}: {error}")])[0]


def _smoothed_image(x: Any, smooth: Any, axis: int, act: Act | None) -> Any:
    """An image whose channels are divided by the factors of the kernel's, [1, K], which all its places share."""
    channels = x.shape[axis]
    factors = smooth.reshape(-1)[:channels].reshape(channels, *(1,) * (x.ndim - 1 - axis))
    y = x.astype(jnp.float32) * (1.0 / factors)
    return y if act is not None else y.astype(x.dtype)


def _rotated_image(x: Any, signs: Any, axis: int, act: Act | None) -> Any:
    """An image whose channels are rotated as those of each place of the kernel were; groups of channels alike."""
    moved = jnp.moveaxis(x, axis, -1)
    turned = rotate(moved.astype(jnp.float32), signs.reshape(-1))
    return jnp.moveaxis(turned if act is not None else turned.astype(x.dtype), -1, axis)


def emit_ragged(rewriter: Any, eqn: Any, values: list[Any], act: Act | None, where: str) -> Any:
    """A ragged_dot whose stacked weights may be a QArray."""
    layer = next((v for v in values if isinstance(v, Layer)), None)
    values = [cut(v) for v in values]
    x, weight, sizes = values
    if not isinstance(weight, QArray):
        return _fake_quantized(rewriter, eqn, values, act, where)
    dn = eqn.params["ragged_dot_dimension_numbers"]
    standard = (
        tuple(map(tuple, dn.dot_dimension_numbers[0])) == ((1,), (1,))
        and not dn.dot_dimension_numbers[1][0]
        and tuple(dn.rhs_group_dimensions) == (0,)
        and x.ndim == 2
    )
    x = rewriter.dense(x, f"{where}: the row operand is quantized")
    weight, constants = _without_inputs(weight)
    own = _factors_of_rows(constants, sizes, x.shape[0]) if act is None or act.prefix is None else None
    constants = {name: a[0] for name, a in constants.items()}  # one scale for the rows of all groups
    if own is not None:
        constants[SMOOTH] = own
    x = _prepared(x, constants, act)
    if not standard:
        return bind(eqn, [x, rewriter.dense(weight, f"{where}: not the standard [M,K] x [G,K,N] form"), sizes])[0]
    if rewriter.choices is not None:
        sizes_of = (weight.shape[0], x.shape[0], weight.shape[2], weight.shape[1])
        rewriter.choose("ragged_dot", weight.fmt, act, sizes_of, x.dtype, where)
    whole = layer.whole(lambda q: _without_inputs(q)[0].canonical()) if layer is not None else None
    return ops.q_ragged_dot(
        x,
        weight if whole is None else whole,
        sizes,
        layer=None if whole is None or layer is None else layer.index,
        act=_act(act, x, constants, where),
        out_dtype=eqn.outvars[0].aval.dtype,
        precision=eqn.params["precision"],
        implementation=rewriter.implementation,
        site=where,
    )


def _factors_of_rows(constants: dict[str, Any], sizes: Any, rows: int) -> Any:
    """Factors [rows, K] with which the weight that a row meets was multiplied, where each group has factors of its own.

    Those found together with a constant scale of the inputs are the same for all groups, and need no gather.
    """
    factors = constants.get(SMOOTH)
    if factors is None or factors.shape[0] == 1:
        return None
    return jnp.repeat(factors[:, 0], sizes, axis=0, total_repeat_length=rows)


def _reshape(x: Any, shape: tuple[int, ...]) -> Any:
    return x if x.shape == shape else lax.reshape(x, shape)


def _for_stack(act: Any, stack: Sequence[int]) -> Any:
    """Scales for a stack of products: one scale for the whole tensor is the same for each."""
    if act is None or not stack:
        return act
    n = len(stack)
    return act[0], {k: jnp.broadcast_to(a, (*stack, *a.shape[n:])) for k, a in act[1].items()}


def has_constants(values: list[Any], act: Act | None) -> bool:
    """Whether an operand is stored with the constant scales that a decision wants, where it wants any."""
    if act is None or act.prefix is None:
        return True
    return any(name.startswith(f"{act.prefix}.") for v in values if isinstance(v, QArray) for name in v.aux)


def _without_inputs(weight: QArray) -> tuple[QArray, dict[str, Any]]:
    """A weight without the constant scales of activations that are kept with it, and those, by name."""
    constants = {name: a for name, a in weight.aux.items() if "." in name}  # input.scale; a format's own have no dot
    if not constants:
        return weight, {}
    own = {name: a for name, a in weight.aux.items() if name not in constants}
    return dataclasses.replace(weight, aux=own), constants


def _check_prepared(constants: dict[str, Any], length: int) -> None:
    """Refuse a product whose activations cannot be smoothed or rotated as its weight was."""
    for name, how in ((SMOOTH, "smoothed"), (SIGNS, "rotated")):
        if name in constants and constants[name].shape[-2] != 1:
            raise LayoutError(f"its {how} weights are stacked along an axis that this product keeps")
    if SIGNS in constants and length % constants[SIGNS].shape[-1]:
        raise LayoutError(f"it reads {length} of the {constants[SIGNS].shape[-1]} channels that its rotation mixes")


def _prepared(x: Any, constants: dict[str, Any], act: Act | None) -> Any:
    """Activations [*batch, rows, K] smoothed and rotated as their weight was.

    In float32 where they are rounded next, so that nothing is lost in between; else in their own dtype.
    """
    if SMOOTH not in constants and SIGNS not in constants:
        return x
    y = prepared(x, constants)
    return y if act is not None else y.astype(x.dtype)


def _act(act: Act | None, x: Any, constants: dict[str, Any], where: str, streamed: bool = False) -> Any:
    """Format and scales of activations [*batch, rows, K]: from the values, or the constants kept with the weight."""
    if act is None:
        return None
    if act.prefix is None:
        return act.fmt, scales_of(x, act.fmt, streamed)
    lead = f"{act.prefix}."
    aux = {name.removeprefix(lead): a for name, a in constants.items() if name.startswith(lead)}
    if not aux:
        raise RecipeError(
            f"{where}: its rule asks for static {act.fmt.name} inputs, but no scale was calibrated for this site; "
            "quantize with batches= that run it, or use dynamic(...)"
        )
    if act.fmt.shares_constant:  # the number that all blocks share is known, their own scales are those of the moment
        return act.fmt, _block_scales(x, act.fmt, aux)
    return act.fmt, aux


@functools.partial(jax.jit, static_argnums=1)
def _block_scales(x: Any, fmt: Any, shared: dict[str, Any]) -> Any:
    """Scales of the blocks of activations [*batch, rows, K] under a shared constant [*batch, 1, 1]."""
    return lax.stop_gradient(fmt.from_range(*fmt.range_of(x), shared))


@functools.partial(jax.jit, static_argnums=(1, 2))
def scales_of(x: Any, fmt: Any, streamed: bool = False) -> Any:
    """`ops.activation_aux`, traced once per shape: a model has hundreds of products of a few shapes."""
    return ops.activation_aux(x, fmt, streamed=streamed)


def _fake_quantized(rewriter: Any, eqn: Any, values: list[Any], act: Act | None, where: str, side: int = 0) -> Any:
    """A product of float weights whose activations are rounded to their format: there is no integer dot to form."""
    values = [rewriter.dense(v, f"{where}: this operand has no quantized product") for v in values]
    if isinstance(act, Operands):
        values = [_dynamic(eqn, x, act.sides[n], n) for n, x in enumerate(values)]
        whole = emit_log_attention(rewriter, eqn, values, act, where)
        if whole is not None:
            return whole
        fixed = [
            x if how is None or how.aux is None else round_fixed(x, how, where)
            for x, how in zip(values, act.sides, strict=True)
        ]
        return bind(eqn, fixed)[0]
    if act is not None and act.prefix is not None:
        raise RecipeError(
            f"{where}: its rule asks for static inputs, whose scales are kept with a quantized weight, but the weight "
            "stays in float here; use dynamic(...) for its inputs, or skip it"
        )
    if act is not None:
        values[side] = rounded(values[side], act, operand_axes(eqn, side)[0])
    return bind(eqn, values)[0]


def _dynamic(eqn: Any, x: Any, how: Operand | None, side: int) -> Any:
    """One operand of a product of activations, rounded to its format and back where its scale is that of the moment."""
    return x if how is None or how.aux is not None else rounded(x, Act(how.fmt), operand_axes(eqn, side)[0])


def operand_axes(eqn: Any, side: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Axes of an operand of a product that it sums over, and those that it runs over in parallel.

    Args:
        eqn: dot_general, conv_general_dilated or ragged_dot_general.
        side: which operand; the weight of the last two is operand 1.
    """
    name, p = eqn.primitive.name, eqn.params
    if name == "dot_general":
        contract, batch = p["dimension_numbers"]
        return tuple(contract[side]), tuple(batch[side])
    if name == "conv_general_dilated":
        numbers = p["dimension_numbers"]
        # Groups of a kernel run over (H, W, I); one example is one token.
        return ((*numbers.rhs_spec[2:], numbers.rhs_spec[1]) if side else tuple(sorted(numbers.lhs_spec[1:]))), ()
    return ((1,), (0,)) if side else ((eqn.invars[0].aval.ndim - 1,), ())


def rounded(x: Any, act: Act, axes: tuple[int, ...]) -> Any:
    """Round activations to a format and back; derivatives pass straight through.

    Args:
        x: any float array.
        act: the format.
        axes: the axes that the product sums over: one token is what varies along them.
    """
    kept = [d for d in range(x.ndim) if d not in axes]
    there = (*kept, *axes)
    moved = lax.transpose(x, there)
    flat = moved.astype(jnp.float32).reshape(math.prod(x.shape[d] for d in kept), -1)
    aux = scales_of(flat, act.fmt)
    near = act.fmt.decode(act.fmt.encode(flat, aux), aux).reshape(moved.shape).astype(x.dtype)
    near = lax.transpose(near, tuple(there.index(d) for d in range(x.ndim)))
    return x + lax.stop_gradient(near - x)


@dataclasses.dataclass(frozen=True)
class Order:
    """The user's axes of a weight in the order in which its canonical view flattens them."""

    batch: tuple[int, ...]
    free: tuple[int, ...]
    contract: tuple[int, ...]


def product_view(q: QArray, contract: tuple[int, ...], batch: tuple[int, ...]) -> tuple[QArray, Order]:
    """The canonical view ``[*batch, N, K]`` of a weight for a product over given axes.

    Stored stack axes that the product keeps become out axes and the other way round; the axes summed over must be the
    ones that the weight was quantized along.

    Args:
        q: the weight.
        contract: the user's axes that the product sums over. batch: those it runs over in parallel.

    Raises:
        LayoutError: the product sums over other axes.
    """
    labels = q.view.order
    units = {a for a, (kind, _) in enumerate(labels) if kind == "u"}
    if set(contract) - units != set(q.in_axes) or set(batch) & units:
        raise LayoutError(
            f"the product sums over axes {tuple(contract)} of a weight {q.shape} that was quantized along {q.in_axes}"
        )
    stored = (*q.stack_axes, *q.out_axes)
    batch_order = tuple(a for a in stored if a in batch)
    free = tuple(a for a in stored if a not in batch)
    order = Order(
        batch_order,
        (*free, *(a for a in sorted(units) if a not in contract)),
        (*q.in_axes, *(a for a in sorted(units) if a in contract)),
    )
    if batch_order == q.stack_axes:
        return q.canonical(), order
    if q.fmt.whole_matrix:
        raise LayoutError(
            f"the product runs in parallel over axes {tuple(batch)} of a weight {q.shape} whose stack axes are "
            f"{q.stack_axes}, and {q.fmt.name} keeps scales of whole matrices"
        )
    # move the children's axes: [*batch, *free, 1.., K]
    rank, n_in = q.codes.ndim, len(q.in_axes)
    permutation = [stored.index(a) for a in (*batch_order, *free)] + list(range(rank - n_in, rank))
    lead = len(stored)

    def move(child: Any) -> Any:
        child = lax.transpose(child, permutation)
        rows = math.prod(child.shape[len(batch_order) : lead])
        return child.reshape(*child.shape[: len(batch_order)], rows, child.shape[-1])

    layout = Layout((*(("s", k) for k in range(len(batch_order))), ("o", 0), ("i", 0)), (), q.layout.pad)
    aux = {}
    for name, child in q.aux.items():
        varied = [n != 1 for n in (child.shape[stored.index(a)] for a in free)]
        if any(varied) and not all(varied):
            child = jnp.broadcast_to(child, (*q.codes.shape[:lead], *child.shape[lead:]))
        aux[name] = move(child)
    return dataclasses.replace(q, codes=move(q.codes), aux=aux, layout=layout), order
