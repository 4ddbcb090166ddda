"""LayerNorm and RMSNorm."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax import lax

from qjax.composites import find_composites

B, T, D = 2, 3, 8


def two_pass(x, w, b):
    mean = x.mean(-1, keepdims=True)
    return (x - mean) / jnp.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + 1e-5) * w + b


def with_var(x, w, b):
    return w * (x - jnp.mean(x, -1, keepdims=True)) * lax.rsqrt(jnp.var(x, -1, keepdims=True) + 1e-5) + b


def one_pass(x, w, b):
    mean, square = x.mean(-1), jnp.square(x).mean(-1)
    inverse = lax.rsqrt(square - mean * mean + 1e-5)
    return (x - mean[..., None]) * inverse[..., None] * w + b


def haiku_like(x, w, b):
    mean, var = jnp.mean(x, -1, keepdims=True), jnp.var(x, -1, keepdims=True)
    inverse = w * lax.rsqrt(var + 1e-5)
    return inverse * (x - mean) + b


def sums(x, w, b):
    d = x.shape[-1]
    c = x - jnp.sum(x, -1, keepdims=True) * (1.0 / d)
    return c * (jnp.sum(c * c, -1, keepdims=True) / d + 1e-5) ** -0.5 * w + b


def reciprocal(x, w, b):
    c = x - x.mean(-1, keepdims=True)
    return c * (1.0 / jnp.sqrt(jnp.mean(lax.integer_pow(c, 2), -1, keepdims=True) + 1e-5)) * w + b


def upcast(x, w, b):
    y = x.astype(jnp.float32)
    y = (y - y.mean(-1, keepdims=True)) * lax.rsqrt(y.var(-1, keepdims=True) + 1e-5)
    return y.astype(x.dtype) * w + b


LAYER = {f.__name__: f for f in (two_pass, with_var, one_pass, haiku_like, sums, reciprocal, upcast)}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", LAYER)
def test_layer_norm(find, rand, name, dtype):
    x, w, b = rand(B, T, D).astype(dtype), rand(D).astype(dtype), rand(D).astype(dtype)
    fn = lambda x, w, b: LAYER[name](x * 2, w, b)  # noqa: E731
    (match,) = find(fn, x, w, b)
    assert (match.op, match.kind, match.axes) == ("norm", "layer_norm", (2,))
    assert np.isclose(match.eps, 1e-5, rtol=1e-2)
    assert match.input.node.name == "mul" and match.input.dtype == dtype
    assert match.scale.node is None and match.bias.node is None and match.output.users == []


def llama(x, w):
    y = x.astype(jnp.float32)
    return w * (y * lax.rsqrt(jnp.mean(y**2, -1, keepdims=True) + 1e-6)).astype(x.dtype)


def gemma(x, w):
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.mean(jnp.square(y), -1, keepdims=True) + 1e-6)
    return (y * (1.0 + w.astype(jnp.float32))).astype(x.dtype)


def quotient(x, w):
    return x / jnp.sqrt(jnp.mean(x * x, axis=-1)[..., None] + 1e-6) * w


def scale_first(x, w):
    return (w * x) * lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) / x.shape[-1] + 1e-6)


RMS = {f.__name__: f for f in (llama, gemma, quotient, scale_first)}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", RMS)
def test_rms_norm(find, rand, name, dtype):
    x, w = rand(B, T, D).astype(dtype), rand(D).astype(dtype)
    (match,) = find(lambda x, w: RMS[name](x + 1, w), x, w)
    assert (match.kind, match.axes, match.bias) == ("rms_norm", (2,), None)
    assert np.isclose(match.eps, 1e-6, rtol=1e-2) and match.input.node.name == "add"
    assert match.scale.shape == (D,) and match.output.users == []


@pytest.mark.parametrize("shape", [(B, T, D), (1, 1, D), (B, 1, D), (D,)])
def test_modules(find, rand, variables, shape):
    x = rand(*shape)
    modules = [
        (linen.LayerNorm(), "layer_norm", True, True),
        (linen.LayerNorm(use_fast_variance=False), "layer_norm", True, True),
        (linen.LayerNorm(use_bias=False, dtype=jnp.bfloat16), "layer_norm", True, False),
        (linen.LayerNorm(use_scale=False), "layer_norm", False, True),
        (linen.RMSNorm(), "rms_norm", True, False),
        (linen.RMSNorm(use_scale=False), "rms_norm", False, False),
    ]
    for module, kind, scale, bias in modules:
        (match,) = find(module.apply, variables(module.init, x), x)
        assert (match.kind, match.scale is not None) == (kind, scale)
        # A vector added to a single normalised vector may be a residual just as well, unless a scale came before.
        assert (match.bias is not None) == (bias and (scale or len(shape) > 1))
        assert match.axes == (len(shape) - 1,)
    for cls, kind in ((nnx.LayerNorm, "layer_norm"), (nnx.RMSNorm, "rms_norm")):
        graph, state = nnx.split(cls(D, rngs=nnx.Rngs(0)))
        (match,) = find(lambda state, x, graph=graph: nnx.merge(graph, state)(x), state, x)
        assert match.kind == kind and match.scale is not None


def test_equinox(find, rand):
    eqx = pytest.importorskip("equinox")
    for module, kind in ((eqx.nn.LayerNorm(D), "layer_norm"), (eqx.nn.RMSNorm(D), "rms_norm")):
        (match,) = find(jax.vmap(jax.vmap(module)), rand(B, T, D))
        assert (match.kind, match.axes) == (kind, (2,)) and match.scale.shape == match.bias.shape == (D,)
        (match,) = find(module, rand(D))
        assert match.scale is not None


def test_several_axes(find, rand):
    module = linen.LayerNorm(reduction_axes=(1, 2), feature_axes=(1, 2))
    x, scale, bias = rand(B, T, D), rand(T, D), rand(T, D)
    tree = {"params": {"scale": scale, "bias": bias}}
    (match,) = find(module.apply, tree, x)
    assert match.axes == (1, 2) and match.scale.shape == (T, D)


def test_residuals_and_gates_are_no_parameters(find, rand):
    w = rand(D)
    for shape in ((B, T, D), (1, 1, D), (D,)):
        x = rand(*shape)
        (match,) = find(lambda x: llama(x, w) + x, x)
        assert match.bias is None and match.scale is not None
        (match,) = find(lambda x, y: x + llama(y @ jnp.eye(D), w) + y, x, x)
        assert match.bias is None
        (match,) = find(lambda x, g: llama(x, jnp.ones(())) * (g @ jnp.eye(D)), x, x)
        assert match.scale is None
    (match,) = find(lambda x, c: llama(x, w) * (1 + c[:, None]) + c[:, None], rand(B, T, D), rand(B, D))
    assert match.bias is None and match.scale.shape == (D,)


def test_normalised_value_read_twice(find, rand):
    """Two scales for one normalisation: the normalised value itself is the result."""

    def fn(x, w, v):
        y = x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
        return y * w, y * v

    (match,) = find(fn, rand(B, T, D), rand(D), rand(D))
    assert match.scale is None and len(match.output.users) == 2


def test_inside_scan_and_custom_vjp(find, find_deep, rand):
    @jax.custom_vjp
    def rms(x, w):
        return llama(x, w)

    rms.defvjp(lambda x, w: (rms(x, w), (x, w)), lambda res, g: (g, res[1]))
    (match,) = find(rms, rand(B, T, D), rand(D))
    assert match.output_path[:2] == (0, ("call_jaxpr", 0)) and match.scale.node is None
    body = lambda x, w: (two_pass(x, w, w), None)  # noqa: E731
    found = find_deep(lambda x, ws: lax.scan(jax.checkpoint(body), x, ws)[0], rand(B, T, D), rand(4, D))
    assert [c.kind for c in found] == ["layer_norm"]


DECLINED = {
    "l2": lambda x, w: x * lax.rsqrt((x * x).sum(-1, keepdims=True) + 1e-6) * w,
    "eps_outside": lambda x, w: (x - x.mean(-1, keepdims=True)) / (x.std(-1, keepdims=True) + 1e-5) * w,
    "unbiased": lambda x, w: (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True, ddof=1) + 1e-5),
    "uncentred": lambda x, w: x * lax.rsqrt(x.var(-1, keepdims=True) + 1e-5) * w,
    "other_axis": lambda x, w: (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(1, keepdims=True) + 1e-5),
    "other_operand": lambda x, w: (x + 1) * lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6) * w,
    "misaligned": lambda x, w: x[:, :2] * lax.rsqrt((x * x)[:, :2].mean(-1) + 1e-6)[None, ..., None][0].swapaxes(0, 1),
    "sqrt_twice": lambda x, w: x * jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-6),
    "max": lambda x, w: x * lax.rsqrt(jnp.maximum((x * x).mean(-1, keepdims=True), 1e-6)),
    "masked": lambda x, w: x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True, where=x > 0) + 1e-6),
}


@pytest.mark.parametrize("name", DECLINED)
def test_declined(find, rand, name):
    assert find(DECLINED[name], rand(B, T, D), rand(D), op="norm") == []


def test_batch_and_group_norm_are_declined(find, rand, variables):
    x = rand(4, 3, D)
    for module in (linen.BatchNorm(use_running_average=False), linen.BatchNorm(True), linen.GroupNorm(2)):
        tree = variables(module.init, x)
        assert find(lambda v, x, m=module: m.apply(v, x, mutable=True)[0], tree, x, op="norm") == []


def test_symbolic_batch():
    from jax import export

    (batch,) = export.symbolic_shape("b")
    x, w = jax.ShapeDtypeStruct((batch, D), jnp.float32), jax.ShapeDtypeStruct((D,), jnp.float32)
    (match,) = find_composites(jax.make_jaxpr(lambda x, w: two_pass(x, w, w))(x, w))
    assert match.kind == "layer_norm" and match.scale is not None
