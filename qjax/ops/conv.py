"""q_conv: convolution with a packed kernel."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import DTypeLike

from qjax.errors import FormatError, LayoutError
from qjax.formats import Aux, Format, QArray
from qjax.kernels import Act, Problem, select
from qjax.kernels.conv.reference import conv_reference, convolve
from qjax.kernels.devices import platform_here
from qjax.ops.base import NO_AXIS, LinearOp, Operands, QuantizedOp, Spec, quantized_linear
from qjax.ops.dot import activation_aux
from qjax.ops.partition import Roles, arrays_of, largest


@dataclasses.dataclass(frozen=True)
class ConvSpec(Spec):
    """The static part of a convolution: the settings of `jax.lax.conv_general_dilated`, and two facts about x.

    ``dimension_numbers`` are a `jax.lax.ConvDimensionNumbers`, ``padding`` explicit pairs.
    """

    window_strides: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    lhs_dilation: tuple[int, ...] = ()
    rhs_dilation: tuple[int, ...] = ()
    dimension_numbers: Any = None
    feature_group_count: int = 1
    batch_group_count: int = 1
    channels: int = 0
    """Channels of x."""
    one_scale: bool = True
    """Whether an example has one scale, so that a sum over a window can be scaled afterwards."""


@dataclasses.dataclass(frozen=True)
class _Conv(QuantizedOp):
    name = "q_conv"

    def problem(self, spec: ConvSpec, operands: Operands, platform: str, devices: int) -> Problem:
        x, w = operands.x, operands.w
        return Problem(
            op="conv",
            platform=platform,
            weight=w.fmt,
            act=spec.act,
            rows=None,
            n=w.shape[spec.dimension_numbers.rhs_spec[0]],
            k=w.length,
            x_dtype=np.dtype(x.dtype),
            out_dtype=spec.out_dtype,
            devices=devices,
            settings=spec,
        )

    def roles(self, spec: ConvSpec, operands: Operands, avals: Sequence[Any]) -> Roles | None:
        """Examples and channels of the result can be cut, and the latter where no groups tie them to channels of x."""
        examples, outputs = spec.dimension_numbers.lhs_spec[0], operands.w.codes.shape[0]
        of_x, own = arrays_of(operands, avals)
        if spec.batch_group_count != 1 or math.prod(operands.w.shape) == 0:
            return None
        sizes = {"m": operands.x.shape[examples], "n": outputs if spec.feature_group_count == 1 else 1}

        def role(name: str, axis: int, shape: Sequence[int]) -> tuple[str, ...]:
            return tuple(name if i == axis and d == sizes[name] > 1 else "" for i, d in enumerate(shape))

        out, result = spec.dimension_numbers.out_spec, ["" for _ in operands.x.shape]
        for name, axis in zip(("m", "n"), out[:2], strict=True):
            result[axis] = name if sizes[name] > 1 else ""
        operand_roles = (*(role("m", examples, a.shape) for a in of_x), *(role("n", 0, a.shape) for a in own))
        weight = len(of_x) + largest(own)
        return Roles(operand_roles, tuple(result), sizes, weight, summed=(), of_weight=("n",))

    def out_shape(self, spec: ConvSpec, operands: Operands) -> tuple[int, ...]:
        return _out_shape(spec, tuple(operands.x.shape), operands.w.shape)

    def reference(self, spec: ConvSpec, operands: Operands) -> Array:
        problem = self.problem(spec, operands, "any", 1)
        return conv_reference(problem, operands.x, operands.w, operands.act(spec))

    def batch(
        self, op: LinearOp, spec: ConvSpec, operands: Operands, dims: Operands, size: int
    ) -> tuple[Array, int] | None:
        """Fold a batch of inputs into the examples; a batch of kernels goes one by one (faster on CPU than grouped)."""
        if any(d is not NO_AXIS for d in jax.tree.leaves(dims.w)) or spec.batch_group_count != 1:
            return None
        n = spec.dimension_numbers.lhs_spec[0]
        count = operands.x.shape[n + (dims.x is not NO_AXIS and dims.x <= n)]

        def fold(a: Array, d: Any, examples: int) -> Array:
            a = jnp.expand_dims(a, n) if d is NO_AXIS else jnp.moveaxis(a, d, n)
            shape = (*a.shape[:n], size, examples, *a.shape[n + 2 :])
            return jnp.broadcast_to(a, shape).reshape(*shape[:n], size * examples, *shape[n + 2 :])

        x = fold(operands.x, dims.x, count)
        aux = jax.tree.map(lambda a, d: fold(a, d, count), operands.aux, dims.aux)
        y = op.bind(spec, dataclasses.replace(operands, x=x, aux=aux))
        out = spec.dimension_numbers.out_spec[0]
        return y.reshape(*y.shape[:out], size, count, *y.shape[out + 1 :]), out


@functools.lru_cache(maxsize=1024)
def _out_shape(spec: ConvSpec, x: tuple[int, ...], w: tuple[int, ...]) -> tuple[int, ...]:
    plain = dataclasses.replace(spec, act=None, implementation=None, out_sharding=None)
    structs = [jax.ShapeDtypeStruct(s, np.float32) for s in (x, w)]
    return jax.eval_shape(lambda a, b: convolve(a, b, plain, None), *structs).shape


q_conv_op = quantized_linear(_Conv())


def q_conv(
    x: Array,
    w: QArray,
    *,
    act: Act | None = None,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    out_dtype: DTypeLike | None = None,
    precision: Any = None,
    implementation: str | None = None,
    streamed: bool = False,
    site: str = "",
) -> Array:
    """Convolve with a quantized kernel: `jax.lax.conv_general_dilated` with a packed right-hand side.

    Weight-only, or with activations quantized as ``act`` says: symmetric integers on both sides become an int8 x int8
    -> int32 convolution where that is faster, everything else is dequantized. Derivatives as in `qjax.ops.q_dot`.

    Args:
        x: float, in the layout of ``dimension_numbers``.
        w: the kernel in the user's layout; in axes are its spatial axes and input channels, out axis its output
            channels.
        act: ``(format, aux)``; aux has the rank of x, one block per tensor or per example (`conv_activation_aux`).
            A scale per position is possible, and computed in float.
        window_strides: as in `jax.lax.conv_general_dilated`; so are padding, lhs_dilation, rhs_dilation,
            dimension_numbers, feature_group_count, batch_group_count and precision.
        out_dtype: dtype of the result, by default that of x.
        implementation: name of a lowering, or None to choose.
        streamed: whether w is what a running loop slices from a stack of kernels at its step.
        site: name for messages.

    Raises:
        LayoutError: if the kernel's axes are not the convolution's.
        FormatError: for activations quantized in groups.
        LoweringError: if the named implementation cannot run.
    """
    spec, operands = _prepared(
        x,
        w,
        act=act,
        window_strides=window_strides,
        padding=padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        dimension_numbers=dimension_numbers,
        feature_group_count=feature_group_count,
        batch_group_count=batch_group_count,
        out_dtype=out_dtype,
        precision=precision,
        implementation=implementation,
        streamed=streamed,
        site=site,
    )
    if implementation is not None:
        select(q_conv_op.definition.problem(spec, operands, platform_here(), 1), implementation)
    return q_conv_op.bind(spec, operands)


def conv_problem(x: Array, w: QArray, platform: str, **settings: Any) -> Problem:
    """Return what `qjax.kernels.select` would be asked for this convolution on one device of a platform.

    Args:
        x, w: as in `q_conv`.
        platform: "cpu", "cuda", ...
        settings: the keyword arguments of `q_conv`.
    """
    return q_conv_op.definition.problem(*_prepared(x, w, **settings), platform, 1)


def _prepared(
    x: Array,
    w: QArray,
    *,
    act: Act | None = None,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    out_dtype: DTypeLike | None = None,
    precision: Any = None,
    implementation: str | None = None,
    streamed: bool = False,
    site: str = "",
) -> tuple[ConvSpec, Operands]:
    at = f"{site}: " if site else ""
    numbers = lax.conv_dimension_numbers(x.shape, w.shape, dimension_numbers)
    rhs = numbers.rhs_spec
    if w.stack_ndim or w.out_axes != (rhs[0],) or set(w.in_axes) != set(rhs[1:]):
        raise LayoutError(
            f"{at}q_conv: the kernel {w.shape} has stack axes {w.stack_axes}, out axes {w.out_axes} and in axes "
            f"{w.in_axes}; this convolution needs out axis {rhs[0]} and in axes {tuple(sorted(rhs[1:]))}"
        )
    ndim = len(rhs) - 2
    lhs_dilation = tuple(lhs_dilation or (1,) * ndim)
    rhs_dilation = tuple(rhs_dilation or (1,) * ndim)
    strides = tuple(window_strides)
    if isinstance(padding, str):
        window = [(w.shape[a] - 1) * d + 1 if w.shape[a] else 0 for a, d in zip(rhs[2:], rhs_dilation, strict=True)]
        sizes = [(x.shape[a] - 1) * d + 1 for a, d in zip(numbers.lhs_spec[2:], lhs_dilation, strict=True)]
        padding = lax.padtype_to_pads(sizes, window, strides, padding)
    spec = ConvSpec(
        out_dtype=np.dtype(x.dtype if out_dtype is None else out_dtype),
        act=act[0] if act else None,
        precision=precision,
        implementation=implementation,
        streamed=streamed,
        window_strides=strides,
        padding=tuple((int(a), int(b)) for a, b in padding),
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        dimension_numbers=numbers,
        feature_group_count=feature_group_count,
        batch_group_count=batch_group_count,
        channels=x.shape[numbers.lhs_spec[1]],
        one_scale=act is None or all(a.shape[d] == 1 for a in act[1].values() for d in numbers.lhs_spec[1:]),
    )
    if act is not None:
        _check_activations(act[0], at)
    return spec, Operands(x, dict(act[1]) if act else {}, w)


def _check_activations(fmt: Format, at: str = "") -> None:
    if fmt.per == "group":
        raise FormatError(
            f"{at}activations of a convolution cannot be quantized in groups ({fmt.name}): a window reads across "
            'them; use per="tensor" or per="token" (one scale per example)'
        )


def conv_activation_aux(x: Array, fmt: Format, dimension_numbers: Any = None) -> Aux:
    """Fit the scales of a convolution's input: one for all of it, or ("token", "channel") one per example.

    Args:
        x: float, any layout.
        fmt: the format.
        dimension_numbers: as in `jax.lax.conv_general_dilated`; tells the axis of the examples (None: axis 0).

    Returns:
        aux of the rank of x: [1, ..] or [.., examples, ..].
    """
    _check_activations(fmt)
    axis = 0
    if dimension_numbers is not None:
        lhs = dimension_numbers[0]
        axis = lhs.index("N") if isinstance(lhs, str) else lhs[0]
    return _conv_activation_aux(x, fmt, axis)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _conv_activation_aux(x: Array, fmt: Format, axis: int) -> Aux:
    flat = jnp.moveaxis(x, axis, 0).reshape(x.shape[axis], math.prod(n for a, n in enumerate(x.shape) if a != axis))
    aux = activation_aux(flat, fmt)
    place = lambda a: a.reshape([a.shape[0] if d == axis else 1 for d in range(x.ndim)])  # noqa: E731
    return {k: place(a) for k, a in aux.items()}
