"""One factory for every quantized op: a real primitive that is linear in x, given a packed weight.

Why a primitive. A quantized product has to mean one thing to every transformation: its derivative with respect to x
is that of the float product with the dequantized weight, its residuals are the packed codes, `vmap` folds into rows,
`shard_map` and explicit meshes see its type, and each platform compiles its own kernel. `jax.custom_vjp` gives up
forward mode, a Python-level choice of backend gives up export; a primitive gives up nothing.

What a rule costs. A bind is a flattening of (x, aux, weight), a hash of the static part and a cached abstract
evaluation: tens of microseconds, because a model of 32 layers has 224 of them. Everything static travels in one
parameter, a `Call`, whose hash is computed once.

    abstract value    shape and dtype by the op's own rule; where a mesh is in play (shard_map, explicit axes), the type
                      of the oracle, traced once per combination of input types: its sharding and varying axes are
                      then right by construction
    derivative        y' = op(x', W) with x' unquantized (straight-through) + the oracle's derivative in float aux,
                      kept whole as one `deferred` equation, + the slopes of terms; codes have none
    transpose         the op's own (dot <-> dot_transposed), or the oracle's as one deferred equation
    batching          the op's own (rows, or stack axes), else one example after the other
    compilation       `qjax.kernels.select` by platform, formats and shapes
    eager             jitted once per static part
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from qjax import _compat
from qjax.formats import Format
from qjax.kernels import Act, Lowering, Problem, select
from qjax.kernels.dot.reference import wide
from qjax.kernels.dot.terms import computed, with_terms
from qjax.kernels.registry import on_new_platform
from qjax.ops.deferred import Deferred, deferred
from qjax.ops.partition import Roles, partitioned

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


@dataclasses.dataclass(frozen=True)
class Spec:
    """The static part of a quantized op. Subclassed by each op; hashable.

    Attributes:
        out_dtype: dtype of the result.
        act: format of the activations, or None.
        precision: of float dots, as `jax.lax.Precision`.
        implementation: the name of a lowering, or None to choose one.
        out_sharding: sharding of the result on an explicit mesh, where the operands leave it open.
        streamed: whether the weight is what a running loop slices from a stack at its step: never unpacked early.
        fitted: whether the scales in aux are those of the rows of x, by the rule of ``act``, which has one a row: a
            lowering may fit them itself, and leave those that are given.
    """

    out_dtype: np.dtype
    act: Format | None = None
    precision: Any = None
    implementation: str | None = None
    out_sharding: Any = None
    streamed: bool = False
    fitted: bool = False


class Call:
    """The one parameter of a quantized primitive: a spec and the tree of its operands, hashed once."""

    __slots__ = ("_hash", "spec", "tree")

    def __init__(self, spec: Spec, tree: Any):
        self.spec, self.tree = spec, tree
        self._hash = hash((spec, tree))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return (
            isinstance(other, Call) and self._hash == other._hash and (self.spec, self.tree) == (other.spec, other.tree)
        )

    def __repr__(self) -> str:
        """Return a form short enough to read in a printed jaxpr."""
        operands = self.operands([None] * self.tree.num_leaves)
        parts = [operands.w.fmt.name, *([f"x {self.spec.act.name}"] if self.spec.act else [])]
        if self.spec.implementation:
            parts.append(f"by {self.spec.implementation}")
        parts += [f"+ {name}" for name in operands.terms]
        return " ".join(parts) + f" -> {np.dtype(self.spec.out_dtype).name}"

    def operands(self, leaves: Sequence[Any]) -> Operands:
        """Return the operands from the flat ones of the equation."""
        x, aux, w, extra, layer, terms = jax.tree.unflatten(self.tree, leaves)
        return Operands(x, aux, w, extra, terms, layer)


@dataclasses.dataclass(frozen=True)
class Operands:
    """The operands of a quantized op.

    Attributes:
        x: float activations.
        aux: aux of the activations' format; {} if they stay in float.
        w: the weight.
        extra: further arrays, without derivative (the group sizes of ragged_dot).
        terms: what is added to the product before it is rounded, by name (`qjax.kernels.dot.terms`).
        layer: ``(number,)``, an int32 scalar, where w has one more stack axis in front, of which that layer is meant;
            () where w is the weight. What an op says for itself is asked of the layer alone.
    """

    x: Any
    aux: Any
    w: Any
    extra: tuple = ()
    terms: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    layer: tuple = ()

    def act(self, spec: Spec) -> Act | None:
        """Return ``(format, aux)``, or None."""
        return None if spec.act is None else (spec.act, self.aux)

    def flatten(self) -> tuple[list[Any], Any]:
        """Return the flat operands and their tree."""
        return jax.tree.flatten((self.x, self.aux, self.w, self.extra, self.layer, dict(self.terms)))

    def without_terms(self) -> Operands:
        """Return the operands of the product alone."""
        return dataclasses.replace(self, terms={}) if self.terms else self

    def one_layer(self) -> Operands:
        """Return the operands with the layer that is meant cut out of w."""
        if not self.layer:
            return self
        number = jnp.clip(self.layer[0], 0, self.w.codes.shape[0] - 1)  # a slice would count negative ones from the end
        return dataclasses.replace(self, w=self.w.index_stack(0, number), layer=())

    def shapes(self) -> Operands:
        """Return the same without computing it: in place of w the shapes of the layer."""
        if not self.layer:
            return self
        w = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), self.w)
        return dataclasses.replace(self, w=w, layer=())


class QuantizedOp:
    """What an op has to say for itself; `quantized_linear` makes a primitive of it."""

    name: str

    def problem(self, spec: Any, operands: Operands, platform: str, devices: int) -> Problem:
        """Return what `select` is asked. The operands have shapes and dtypes at least."""
        raise NotImplementedError

    def roles(self, spec: Any, operands: Operands, avals: Sequence[Any]) -> Roles | None:
        """Return what dimensions of operands and result are, for `qjax.ops.partition`; None: it is not partitioned."""
        return None

    def on_device(self, op: LinearOp, spec: Any, operands: Operands, axes: Mapping[str, tuple[str, ...]]) -> Array:
        """Return what a device computes of the operands that it holds, before terms of sums are added.

        ``axes`` are the mesh axes, manual here, by the role that they cut.
        """
        return op.bind(spec, operands)

    def chosen(self, problem: Problem, lowering: Lowering) -> None:
        """Say, when the op is compiled, what the user should know of the choice."""

    def out_shape(self, spec: Any, operands: Operands) -> tuple[int, ...]:
        """Return the shape of the result."""
        raise NotImplementedError

    def reference(self, spec: Any, operands: Operands) -> Array:
        """Return the result in plain jnp, differentiable in float aux."""
        raise NotImplementedError

    def batch(self, op: LinearOp, spec: Any, operands: Operands, dims: Operands, size: int) -> tuple[Array, int] | None:
        """Return the result for a batch, computed by binding ``op`` once, and the axis of the batch in it.

        ``dims`` has the batch axis, or `NO_AXIS`, in the place of each operand. None means: one example after the
        other.
        """
        return None

    def transposed(self, spec: Spec, operands: Operands, x_aval: Any) -> tuple[LinearOp, Spec] | None:
        """Return op and spec that map the cotangent, in the place of x, to the cotangent of x; None: the oracle's."""
        return None


class LinearOp:
    """A quantized op as a primitive: `bind` it."""

    def __init__(self, definition: QuantizedOp):
        self.definition = definition
        self.primitive = Primitive(definition.name)
        _OPS[self.primitive] = self
        self._install()

    @property
    def name(self) -> str:
        """Name of the primitive."""
        return self.definition.name

    def bind(self, spec: Spec, operands: Operands) -> Array:
        """Apply the op."""
        leaves, tree = operands.flatten()
        return self.primitive.bind(*_compat.vary_together(leaves), call=_call(spec, tree))

    def _install(self) -> None:
        p = self.primitive
        p.def_impl(self._run_eagerly)
        p.def_abstract_eval(self._abstract_eval)
        ad.primitive_jvps[p] = self._jvp
        ad.primitive_transposes[p] = self._transpose
        batching.primitive_batchers[p] = self._batch
        mlir.register_lowering(p, functools.partial(self._lower, None))
        for platform in PLATFORMS:
            self.install_platform(platform)
        on_new_platform(self.install_platform)

    def install_platform(self, platform: str) -> None:
        """Let lowerings registered for a platform be found when compiling for it."""
        try:
            mlir.register_lowering(self.primitive, functools.partial(self._lower, platform), platform=platform)
        except NotImplementedError:
            pass  # jax has never heard of the platform, and will not compile for it either

    # Eager, abstract.

    def _run_eagerly(self, *leaves: Any, call: Call) -> Array:
        with jax.disable_jit(False):  # what runs a function step by step compiles each step, as JAX does with its own
            return _jitted(self.primitive, call)(*leaves)

    def _abstract_eval(self, *avals: Any, call: Call) -> Any:
        operands = call.operands(avals).shapes()
        if all(_compat.is_plain(a) for a in avals):
            return ShapedArray(self.definition.out_shape(call.spec, operands), call.spec.out_dtype)
        return _oracle_type(self.definition, call, avals, jax.sharding.get_abstract_mesh())

    # Derivatives.

    def _jvp(self, primals: Sequence[Any], tangents: Sequence[Any], *, call: Call) -> tuple[Any, Any]:
        y = self.primitive.bind(*primals, call=call)
        values, slopes = call.operands(primals), call.operands(tangents)
        leaves, tree = values.without_terms().flatten()
        terms = []
        if not isinstance(slopes.x, ad.Zero):
            terms.append(
                self.bind(_linear(call.spec), Operands(slopes.x, {}, values.w, values.extra, layer=values.layer))
            )
        moving = tuple(
            i
            for i, (p, t) in enumerate(zip(leaves, tangents, strict=False))  # what is added stands behind
            if i and not isinstance(t, ad.Zero) and _has_derivative(p) and i not in _fixed_leaves(call)
        )
        if moving:
            slope = AuxSlope(self.definition, _call(call.spec, tree), moving)
            terms += deferred(slope, [tangents[i] for i in moving], leaves)
        added = {name: t for name, t in slopes.terms.items() if not isinstance(t, ad.Zero)}
        if added:
            none, _ = _compat.vary_together([jnp.zeros_like(y, dtype=wide(y.dtype)), y])
            terms.append(with_terms(none, added, y.dtype))
        if not terms:
            return y, _compat.zero_tangent(y)
        return y, functools.reduce(ad.add_jaxvals, terms)

    def _transpose(self, ct: Any, *leaves: Any, call: Call) -> list[Any]:
        operands = call.operands(leaves)
        if not ad.is_undefined_primal(operands.x) or any(ad.is_undefined_primal(a) for a in leaves[1:]):
            raise NotImplementedError(
                f"{self.name} is linear in x only; its aux enter derivatives as a deferred equation"
            )
        if operands.terms:
            raise NotImplementedError(f"{self.name} with a bias or residual is not linear and cannot be transposed")
        if call.spec.act is not None:
            raise NotImplementedError(f"{self.name} with quantized activations is not linear and cannot be transposed")
        nothing = [None] * (len(leaves) - 1)
        if isinstance(ct, ad.Zero):
            return [ad.Zero(operands.x.aval), *nothing]
        other = self.definition.transposed(call.spec, operands, operands.x.aval)
        if other is not None:
            op, spec = other
            return [op.bind(spec, dataclasses.replace(operands, x=ct)), *nothing]
        (ct_x,) = deferred(XTranspose(self.definition, call, _compat.strip_type(operands.x.aval)), [ct], leaves[1:])
        return [ct_x, *nothing]

    # Batching.

    def _batch(self, leaves: Sequence[Any], dims: Sequence[Any], *, call: Call) -> tuple[Any, int]:
        operands, axes = call.operands(leaves), call.operands(_absent_as_leaf(dims))
        size = next(a.shape[d] for a, d in zip(leaves, dims, strict=True) if d is not None)
        if operands.layer and any(d is not NO_AXIS for d in jax.tree.leaves((axes.w, axes.layer))):
            own = jax.vmap(lambda *leaves: self.bind(call.spec, call.operands(leaves).one_layer()), tuple(dims))
            return own(*leaves), 0
        whole = self.definition.batch(self, call.spec, operands, axes, size)
        if whole is not None:
            return whole
        mapped = [jnp.moveaxis(a, d, 0) for a, d in zip(leaves, dims, strict=True) if d is not None]

        def one(parts: list[Any]) -> Array:
            rest = iter(parts)
            full = [a if d is None else next(rest) for a, d in zip(leaves, dims, strict=True)]
            return self.primitive.bind(*full, call=call)

        return lax.map(one, mapped), 0

    # Compilation.

    def _lower(self, platform: str | None, ctx: Any, *args: Any, call: Call) -> Any:
        where = platform or single_platform(ctx)
        devices = _compat.partitioned_devices(ctx)
        given = call.operands(ctx.avals_in)
        operands = given.shapes()
        problem = self.definition.problem(call.spec, operands, where, devices)
        problem = dataclasses.replace(problem, exported=_compat.for_export(ctx))
        if given.layer and (devices > 1 or not select(problem, call.spec.implementation).picks):
            cut = lambda *leaves: self.bind(call.spec, call.operands(leaves).one_layer())  # noqa: E731
            return mlir.lower_fun(cut, multiple_results=False)(ctx, *args)
        if devices > 1 and self.definition.roles(call.spec, operands, ctx.avals_in) is not None:
            alone = select(dataclasses.replace(problem, devices=1), call.spec.implementation)
            wider = _compat.with_mesh(ctx) if alone.refuses(problem) else None
            if wider is not None:  # a kernel, which the compiler cannot cut: each device runs it on what it holds
                function = partitioned(self, call, ctx.avals_in)
                return mlir.lower_fun(function, multiple_results=False)(wider, *args)
        lowering = select(problem, call.spec.implementation)
        self.definition.chosen(problem, lowering)

        def run(*leaves: Array) -> Array:
            o = call.operands(leaves)
            if o.layer:
                picking = functools.partial(lowering.function, layer=o.layer[0])
                chosen = dataclasses.replace(lowering, function=picking)
                return computed(chosen, problem, o.x, o.w, o.act(call.spec), *o.extra, terms=o.terms)
            return computed(lowering, problem, o.x, o.w, o.act(call.spec), *o.extra, terms=o.terms)

        return mlir.lower_fun(run, multiple_results=False)(ctx, *args)


_OPS: dict[Any, LinearOp] = {}


def op_of(primitive: Any) -> LinearOp | None:
    """Return the quantized op of an equation's primitive, or None if it is of another kind."""
    return _OPS.get(primitive)


def single_platform(ctx: Any) -> str:
    """Return the platform that is compiled for, or "any" where it is more than one."""
    platforms = ctx.platforms or ctx.module_context.platforms
    return platforms[0] if len(platforms) == 1 else "any"


@functools.lru_cache(maxsize=8192)
def _call(spec: Spec, tree: Any) -> Call:
    return Call(spec, tree)


@functools.lru_cache(maxsize=4096)
def _jitted(primitive: Primitive, call: Call) -> Callable[..., Any]:
    return jax.jit(functools.partial(primitive.bind, call=call))


@functools.lru_cache(maxsize=8192)
def _oracle_type(definition: QuantizedOp, call: Call, avals: tuple[Any, ...], mesh: Any) -> Any:
    """Return the oracle's abstract result: shape, dtype, sharding and varying axes."""
    jaxpr = jax.make_jaxpr(lambda *a: definition.reference(call.spec, call.operands(a).one_layer()))(*avals)
    return jaxpr.out_avals[0]


@functools.lru_cache(maxsize=4096)
def _fixed_leaves(call: Call) -> frozenset[int]:
    """Return the positions of codes and extra operands, which have no derivative even where they are floats."""
    tree = call.operands(list(range(call.tree.num_leaves)))
    return frozenset([tree.w.codes, *tree.extra, *tree.layer])


def _linear(spec: Spec) -> Spec:
    """Return the spec of the op that is linear in x: activations not quantized, any lowering."""
    return dataclasses.replace(spec, act=None, implementation=None, fitted=False)


def _has_derivative(a: Any) -> bool:
    dtype = jnp.result_type(a)
    return jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize > 1


def _absent_as_leaf(dims: Sequence[Any]) -> list[Any]:
    """Return batch axes with `NO_AXIS` for None, which a tree would take for a node without leaves."""
    return [NO_AXIS if d is None else d for d in dims]


class _NoAxis:
    def __repr__(self) -> str:
        return "no axis"


NO_AXIS = _NoAxis()
"""In ``dims`` of `QuantizedOp.batch`: this operand has no batch axis."""


@dataclasses.dataclass(frozen=True)
class AuxSlope(Deferred):
    """The derivative of an op in some of its aux: linear in their tangents, given all operands."""

    definition: QuantizedOp
    call: Call
    moving: tuple[int, ...]

    def __call__(self, linear: Sequence[Any], residuals: Sequence[Any]) -> list[Any]:
        """Return [tangent of the result]."""

        def value(*moved: Any) -> Array:
            leaves = list(residuals)
            for i, a in zip(self.moving, moved, strict=True):
                leaves[i] = a
            return self.definition.reference(self.call.spec, self.call.operands(leaves).one_layer())

        return [jax.jvp(value, tuple(residuals[i] for i in self.moving), tuple(linear))[1]]


@dataclasses.dataclass(frozen=True)
class XTranspose(Deferred):
    """The transpose of an op in x, for ops without one of their own."""

    definition: QuantizedOp
    call: Call
    x: Hashable

    def __call__(self, linear: Sequence[Any], residuals: Sequence[Any]) -> list[Any]:
        """Return [cotangent of x]."""

        def forward(x: Any) -> Array:
            return self.definition.reference(self.call.spec, self.call.operands([x, *residuals]).one_layer())

        return list(jax.linear_transpose(forward, self.x)(linear[0]))


def quantized_linear(definition: QuantizedOp) -> LinearOp:
    """Make a primitive of an op that is linear in x given a packed weight.

    Args:
        definition: what is particular to the op: its oracle, shapes, batching and transpose.

    Returns:
        The op; ``op.bind(spec, operands)`` applies it under any transformation.
    """
    return LinearOp(definition)
