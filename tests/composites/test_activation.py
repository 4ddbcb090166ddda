"""Activation functions, recognised by what they compute."""

from __future__ import annotations

import math

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

nn = jax.nn


def tanh_gelu_by_hand(x):
    return 0.5 * x * (1.0 + jnp.tanh(jnp.sqrt(2.0 / jnp.pi) * (x + 0.044715 * x**3)))


def tanh_gelu_factored(x):
    return x * nn.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))


@jax.custom_vjp
def memory_saving_silu(x):
    return x * nn.sigmoid(x)


memory_saving_silu.defvjp(lambda x: (memory_saving_silu(x), x), lambda x, g: (g * x,))

FOUND = {
    "gelu": (nn.gelu, "gelu", True),
    "gelu_exact": (lambda x: nn.gelu(x, approximate=False), "gelu", False),
    "gelu_erf": (lambda x: x * 0.5 * (1.0 + lax.erf(x / np.sqrt(2.0))), "gelu", False),
    "gelu_cdf": (lambda x: x * jax.scipy.stats.norm.cdf(x), "gelu", False),
    "gelu_by_hand": (tanh_gelu_by_hand, "gelu", True),
    "gelu_factored": (tanh_gelu_factored, "gelu", True),
    "silu": (nn.silu, "silu", False),
    "swish_linen": (flax.linen.swish, "silu", False),
    "silu_exp": (lambda x: x / (1.0 + jnp.exp(-x)), "silu", False),
    "silu_tanh": (lambda x: 0.5 * x * (1 + jnp.tanh(x / 2)), "silu", False),
    "silu_custom_vjp": (memory_saving_silu, "silu", False),
    "quick_gelu": (lambda x: x * nn.sigmoid(1.702 * x), "quick_gelu", False),
    "relu": (nn.relu, "relu", False),
    "relu_max": (lambda x: jnp.maximum(x, 0), "relu", False),
    "relu_where": (lambda x: jnp.where(x > 0, x, 0.0), "relu", False),
    "relu_clip": (lambda x: jnp.clip(x, 0), "relu", False),
    "relu_squared": (lambda x: jnp.square(nn.relu(x)), "relu", False),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", FOUND)
def test_found(find, rand, name, dtype):
    if name == "gelu_cdf" and dtype != jnp.float32:
        pytest.skip("jax.scipy.stats.norm.cdf has no half precision")
    fn, kind, approximate = FOUND[name]
    x = rand(3, 7).astype(dtype)
    (match,) = find(lambda x: fn(x + 1) * 2, x)
    assert (match.op, match.kind, match.approximate) == ("activation", kind, approximate)
    assert match.input.node.name == "add" and match.input.dtype == dtype


def test_upcast_inside_belongs_to_the_match(find, rand):
    def fn(x, w):
        h = x @ w
        return nn.silu(h.astype(jnp.float32)).astype(jnp.bfloat16) @ w

    (match,) = find(fn, *(rand(4, 4).astype(jnp.bfloat16) for _ in range(2)))
    assert match.input.node.name == "dot_general" and match.output.users[0].name == "dot_general"


def test_gated(find, rand):
    w = rand(8, 8)
    for fn in (nn.silu, nn.gelu, nn.relu):
        (match,) = find(lambda x, fn=fn: fn(x @ w) * (x @ w.T), rand(3, 8))
        assert match.input.node.name == "dot_general" and len(match.output.users) == 1


def test_the_operand_may_be_elementwise_too(find, rand):
    """The formula ends where one value carries everything, not where elementwise ops end."""
    (match,) = find(lambda x, b: nn.gelu(jnp.sin(x) + b), rand(3, 7), rand(7))
    assert match.input.node.name == "add"


def test_one_match_per_call_of_a_shared_body(find, rand):
    found = find(lambda x: nn.silu(nn.silu(x)), rand(3, 7))
    assert [c.output_path[0] for c in found] == [0, 1]
    assert found[1].input is found[0].output


DECLINED = {
    "leaky_relu": nn.leaky_relu,
    "relu6": nn.relu6,
    "hard_swish": nn.hard_swish,
    "elu": nn.elu,
    "celu": nn.celu,
    "celu_per_element": lambda x: nn.celu(x, jnp.abs(x) + 1.0),
    "selu": nn.selu,
    "mish": nn.mish,
    "softplus": nn.softplus,
    "log_sigmoid": nn.log_sigmoid,
    "sigmoid": nn.sigmoid,
    "tanh": jnp.tanh,
    "erf": lax.erf,
    "wrong_constant": lambda x: 0.5 * x * (1 + jnp.tanh(0.8 * (x + 0.044715 * x**3))),
    "shifted": lambda x: x * nn.sigmoid(x + 0.1),
    "swish_beta": lambda x: x * nn.sigmoid(1.5 * x),
    "scaled": lambda x: 2.0 * x * nn.sigmoid(x),
    "gate": lambda x: x * nn.sigmoid(x[:, ::-1]),
    "softmax": nn.softmax,
    "logsumexp": nn.logsumexp,
    "variance": lambda x: x / (jnp.maximum(0.0, (x * x).mean(-1) - x.mean(-1) ** 2) + 1.0)[..., None],
    "uniform": lambda x: x * jax.random.uniform(jax.random.key(0), x.shape),
    "integers": lambda x: jnp.maximum(x.astype(jnp.int32), 0),
    "scalar": lambda x: jnp.maximum(x.sum(), 0.0),
    "two_operands": lambda x: jnp.maximum(x, 0.1 * x),
}


@pytest.mark.parametrize("name", DECLINED)
def test_declined(find, rand, name):
    assert find(DECLINED[name], rand(3, 7), op="activation") == []


@pytest.mark.parametrize("norm", ["GroupNorm", "BatchNorm", "InstanceNorm", "LayerNorm"])
def test_clipped_variances_are_no_relu(find, rand, variables, norm):
    kwargs = {"GroupNorm": {"num_groups": 2}, "BatchNorm": {"use_running_average": False}}.get(norm, {})
    module = getattr(flax.linen, norm)(**kwargs)
    x = rand(2, 3, 4)
    tree = variables(module.init, x)
    assert find(lambda v, x: module.apply(v, x, mutable=True)[0], tree, x, op="activation") == []


def test_numbers_of_the_curves(find, rand):
    """Both GELU forms differ by at most 5e-4, yet neither is taken for the other."""
    x = rand(64)
    exact, tanh = (find(lambda x, a=a: nn.gelu(x, approximate=a), x)[0] for a in (False, True))
    assert (exact.approximate, tanh.approximate) == (False, True)
    assert math.isclose(float(nn.gelu(1.0, approximate=True) - nn.gelu(1.0, approximate=False)), 0.0, abs_tol=5e-4)
