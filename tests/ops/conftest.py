"""What the tests of the ops share: weights, activations, meshes and a measure of difference."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import ops
from qjax.formats import Float8, Int, quantize_array

M, K, N = 16, 128, 64

# (weights, activations): weight-only, integers per token, per tensor, in groups, 8-bit floats.
PAIRS = {
    "int4 g32": (Int(4, group=32), None),
    "int8 x token": (Int(8), Int(8, per="token")),
    "int8 x tensor": (Int(8), Int(8, per="tensor")),
    "int4 g32 x uint8": (Int(4, group=32), Int(8, per="token", symmetric=False)),
    "fp8 x fp8": (Float8(), Float8(per="token")),
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """A pair of formats with a weight [K, N] and activations [M, K]."""

    fmt: Int
    act: Int | None
    x: jax.Array
    w: object
    ct: jax.Array

    def q(self, x, w, **settings):
        """The product, activations dynamically quantized."""
        act = (self.act, ops.activation_aux(x, self.act)) if self.act else None
        return ops.q_dot(x, w, act=act, **settings)

    @property
    def dense(self):
        """The weight as floats [K, N]."""
        return self.w.dequantize()

    def oracle(self, x=None):
        """The product by the oracle."""
        return self.q(self.x if x is None else x, self.w, implementation="reference")


@pytest.fixture(scope="session", params=PAIRS)
def setting(request):
    fmt, act = PAIRS[request.param]
    rng = np.random.default_rng(0)
    w = quantize_array(jnp.asarray(rng.standard_normal((K, N)), jnp.float32), fmt, in_axes=0)
    x, ct = (jnp.asarray(rng.standard_normal((M, n)), jnp.float32) for n in (K, N))
    return Setting(fmt, act, x, w, ct)


@pytest.fixture(scope="session")
def same():
    """Assert that two arrays agree to a relative 3e-6 of the largest element."""

    def check(got, want, rtol=3e-6):
        got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
        assert got.shape == want.shape
        np.testing.assert_allclose(got, want, rtol=0, atol=rtol * max(np.abs(want).max(initial=0), 1e-30))

    return check


@pytest.fixture(scope="session")
def auto_mesh():
    return jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:4])


@pytest.fixture(scope="session")
def explicit_mesh():
    return jax.make_mesh((4,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,), devices=jax.devices()[:4])
