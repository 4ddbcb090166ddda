"""Every handler of the compiled CPU kernels answers operands of a wrong dtype or shape with an error, and lives on."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import ops
from qjax.formats import DualGrained, Format, Int, MixedBits, TritPlanes, quantize_array
from qjax.kernels import Problem, select
from qjax.kernels.cpu import candidates, library
from qjax.kernels.cpu.attention import attend

TOKEN = Int(8, per="token")
ASYMMETRIC = Int(4, group=32, symmetric=False)
M, N, K = 3, 24, 128


def numbers(*shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)


def product(fmt: Format, act: Int | None = TOKEN):
    w = quantize_array(numbers(N, K), fmt, in_axes=1)
    run(Problem("dot", "cpu", fmt, act, M, N, K), w)


def experts():
    w = quantize_array(numbers(2, N, K), ASYMMETRIC, in_axes=2, stack_axes=0)
    run(Problem("ragged_dot", "cpu", ASYMMETRIC, TOKEN, M, N, K, (2,)), w, jnp.asarray([1, 2]))


def run(problem, w, *more):
    """The lowering, called with arrays."""
    x = numbers(M, K)
    act = problem.act and (problem.act, ops.activation_aux(x, problem.act))
    select(problem, "native").function(problem, x, w.canonical(), act, *more)


def attention():
    fmt = Int(8, per="token", symmetric=False)
    k, v = (quantize_array(numbers(2, 2, 7, 8) + i, fmt, in_axes=3, stack_axes=(0, 1)) for i in range(2))
    two = jnp.asarray([4, 7], jnp.int32)
    attend(numbers(2, 2, 1, 2, 8), k, v, two, two, jnp.zeros((), jnp.int32), scale=1.0)


def losses():
    if missing := candidates.available():
        pytest.skip(missing)
    x, scale = numbers(1, 9, 16), abs(numbers(1, 3))
    more = (numbers(1, 8, 16), numbers(1, 9, 8), numbers(3, 17))
    candidates.losses(x, scale, scale, form="product", matrix=more[0], rest=more[1], number=x, table=more[2])


CALLS = {
    library.DOT: lambda: product(ASYMMETRIC),
    library.FLOAT_DOT: lambda: product(ASYMMETRIC, None),
    library.TWO_LEVEL: lambda: product(DualGrained(32)),
    library.MIXED: lambda: product(MixedBits(outliers=0.01), None),
    library.TRITS: lambda: product(TritPlanes(group=32)),
    library.RAGGED: experts,
    library.ATTENTION: attention,
    library.CANDIDATES: losses,
}
"""A call of each handler that is right."""


@dataclasses.dataclass(frozen=True)
class Call:
    """Operands, the result and settings of a handler."""

    target: str
    out: jax.ShapeDtypeStruct
    operands: tuple
    settings: dict

    def __call__(self):
        return jax.block_until_ready(FFI_CALL(self.target, self.out)(*self.operands, **self.settings))

    def with_operand(self, i, a):
        return dataclasses.replace(self, operands=(*self.operands[:i], a, *self.operands[i + 1 :]))


FFI_CALL = jax.ffi.ffi_call


def wrong(call):
    """Each operand and the result of another dtype, of another rank, and longer by one along each axis that counts."""
    other = lambda dtype: jnp.int32 if dtype != jnp.int32 else jnp.float32  # noqa: E731
    for i, a in enumerate(call.operands):
        yield f"operand {i} of another dtype", call.with_operand(i, a.astype(other(a.dtype)))
        yield f"operand {i} of another rank", call.with_operand(i, a[None])
        for axis in range(a.ndim if a.size else 0):
            longer = jnp.concatenate([a, jnp.take(a, jnp.asarray([0]), axis)], axis)
            yield f"operand {i} longer along {axis}", call.with_operand(i, longer)
    shape, dtype = call.out.shape, call.out.dtype
    result = lambda shape, dtype: dataclasses.replace(call, out=jax.ShapeDtypeStruct(shape, dtype))  # noqa: E731
    yield "a result of another dtype", result(shape, other(dtype))
    yield "a result of another rank", result((1, *shape), dtype)
    for axis in range(len(shape)):
        yield f"a result longer along {axis}", result((*shape[:axis], shape[axis] + 1, *shape[axis + 1 :]), dtype)


RIGHT = {library.CANDIDATES: "operand 6 longer along 1"}
"""What is right all the same: tables may have any number of entries."""


@pytest.mark.parametrize("target", library.TARGETS)
def test_wrong_operands_are_errors(native, monkeypatch, target):
    seen = []

    def recorded(name, out):
        def call(*given, **settings):
            seen.append(Call(name, out, tuple(map(jnp.asarray, given)), settings))
            return FFI_CALL(name, out)(*given, **settings)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(jax.ffi, "ffi_call", recorded)
        CALLS[target]()
    (right,) = seen
    assert right.target == target
    right()
    for what, call in wrong(right):
        if what == RIGHT.get(target):
            call()
            continue
        with pytest.raises(jax.errors.JaxRuntimeError, match="qjax_"):
            call()
            pytest.fail(f"{target} takes {what}")
