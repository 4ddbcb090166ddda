"""Low-rank adapters: a program whose adapted products also get ``scale · (x A) B``, the weight being left as it is.

An adapter belongs to a slice of a weight, and a product reads that slice along a chain of views. The provenance of the
read says which axes of the leaf stand behind each dimension of the operand, so the two small factors are laid out for
the product as it was written, and nothing has to follow the weight through its views: a QArray, a float array and a
layer picked from a stack are all the same to it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from qjax._compat import bind
from qjax.errors import RecipeError
from qjax.rewrite import Rewriter, is_special
from qjax.rewriting.emit import Act, operand_axes
from qjax.rewriting.given import Giver

Factors = Mapping[str, Any]
"""``a`` [*batch, K, r] and ``b`` [*batch, r, N]."""


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter as its products see it.

    Attributes:
        rank: r.
        scale: alpha / r.
        ins, outs, batch: axes of the leaf that are flattened into K, into N, and that count independent matrices.
        turned: whether the product sums over ``outs``, and so multiplies by the transposed adapter.
    """

    rank: int
    scale: float
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    batch: tuple[int, ...]
    turned: bool = False


@dataclasses.dataclass(frozen=True)
class Adapted:
    """The decision for one site: its adapter, and how the activations of the frozen product are quantized."""

    adapter: Adapter | None
    act: Act | None = None


class LowRankRewriter(Giver, Rewriter):
    """Replays a program with adapters at the products for which ``inputs`` holds an `Adapted`.

    Args:
        program: the trace.
        inputs: site -> `Adapted`.
        factors: site -> its `Factors`; sites that read one slice hold the same.
        implementation: as for `Rewriter`.
    """

    def __init__(
        self,
        program: Any,
        inputs: Mapping[str, Adapted],
        factors: Mapping[str, Factors],
        *,
        implementation: str | None = None,
    ):
        # Scans are always split where adapters differ: factors of several ranks do not stack.
        super().__init__(program, inputs, max_runs=1 << 30, implementation=implementation)
        self.hold(factors)

    # ------------------------------------------------------------------------------------------------------ products
    def product(
        self, emit: Callable[..., Any], number: int | None, acts: Any, eqn: Any, values: list[Any], context: Any
    ) -> list[Any]:
        """Emit the product as it is without an adapter, and add what the adapter gives."""
        own = [(step, d.act if d is not None else None) for step, d in acts]
        if any(is_special(v) for v in values) or any(act is not None for _, act in own):
            outs = super().product(emit, number, own, eqn, values, context)
        else:
            outs = bind(eqn, values)
        adapters = list(dict.fromkeys(d.adapter if d is not None else None for _, d in acts))
        if number is None or adapters in ([], [None]):
            return outs
        where = self.where(number)
        factors = self.given(number)
        if len(adapters) > 1 or factors is None:
            raise RecipeError(f"{where}: which of its slices is read is known at run time only; it cannot be adapted")
        adapter: Adapter = adapters[0]  # type: ignore[assignment]
        side = self.weight_side(number, eqn)
        x = self.dense(values[1 - side], f"{where}: the other operand of an adapted product is quantized")
        ref = self.program.analysis.reads[number].ref
        assert ref is not None  # or it would have no adapter
        more = low_rank_product(eqn, x, side, ref.dims, adapter, factors, values[2:])
        return [outs[0] + (adapter.scale * more).astype(outs[0].dtype)]


def low_rank_product(
    eqn: Any, x: Any, side: int, dims: Sequence[Any], adapter: Adapter, factors: Factors, rest: Sequence[Any] = ()
) -> Any:
    """``(x A) B`` in the place of a product ``x W``: float32 or wider, of the shape of the product.

    Products are taken in the dtype of x and accumulated in float32, whatever the dtype of the factors.

    Args:
        eqn: the product, a dot_general, or a ragged_dot of the standard form.
        x: its activations.
        side: which operand the weight is.
        dims: for each dimension of the weight as operand, the atoms ``(axis, stride, size)`` of the leaf behind it.
        adapter: how the factors are flattened.
        factors: of the slice that is read.
        rest: further operands (the group sizes of a ragged_dot).
    """
    x = x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(jnp.float32)
    wide = jnp.promote_types(x.dtype, jnp.float32)
    a, b = factors["a"].astype(x.dtype), factors["b"].astype(x.dtype)
    contract, batch = operand_axes(eqn, side)
    free = tuple(d for d in range(eqn.invars[side].aval.ndim) if d not in contract and d not in batch)
    ins, outs = adapter.ins, adapter.outs
    if adapter.turned:
        a, b, ins, outs = jnp.swapaxes(b, -1, -2), jnp.swapaxes(a, -1, -2), outs, ins
    shape = eqn.invars[side].aval.shape
    stacks = _unflatten(batch, adapter.batch, dims, shape)
    a = _spread(a, [stacks, _unflatten(contract, ins, dims, shape), None])
    b = _spread(b, [stacks, None, _unflatten(free, outs, dims, shape)])
    if eqn.primitive.name != "dot_general":
        hidden = lax.ragged_dot(x, a, rest[0], preferred_element_type=wide).astype(x.dtype)
        return lax.ragged_dot(hidden, b, rest[0], preferred_element_type=wide)
    settings: dict[str, Any] = dict(precision=eqn.params["precision"], preferred_element_type=wide)
    x_contract, x_batch = operand_axes(eqn, 1 - side)
    n = len(batch)
    stack = tuple(range(n))
    in_a = tuple(range(n, n + len(contract)))
    hidden = lax.dot_general(x, a, ((x_contract, in_a), (x_batch, stack)), **settings).astype(x.dtype)
    y = lax.dot_general(hidden, b, (((hidden.ndim - 1,), (n,)), (stack, stack)), **settings)
    if side:
        return y
    rows = hidden.ndim - 1
    return lax.transpose(y, (*stack, *range(rows, y.ndim), *range(n, rows)))


_Split = tuple[list[int], list[int], list[int]]
"""Sizes of the atoms in flattened order, where each dimension's atoms stand among them, sizes of the dimensions."""


def _unflatten(where: Sequence[int], axes: Sequence[int], dims: Sequence[Any], shape: Sequence[int]) -> _Split:
    """How the flattened leaf ``axes`` come apart into the dimensions ``where`` of an operand."""
    atoms = [atom for d in where for atom in dims[d]]
    flat = sorted(atoms, key=lambda atom: (axes.index(atom[0]), -atom[1]))
    return [size for _, _, size in flat], [flat.index(atom) for atom in atoms], [shape[d] for d in where]


def _spread(factor: Any, splits: Sequence[_Split | None]) -> Any:
    """Take a factor [*batch, K, r] (or [*batch, r, N]) apart into an operand's dimensions; None keeps an axis."""
    lead = math.prod(factor.shape[:-2])
    sizes: list[int] = []
    order: list[int] = []
    final: list[int] = []
    for size, split in zip((lead, *factor.shape[-2:]), splits, strict=True):
        atoms, places, shape = split if split is not None else ([size], [0], [size])
        order += [len(sizes) + p for p in places]
        sizes += atoms
        final += shape
    return factor.reshape(sizes).transpose(order).reshape(final)
