"""A lowering as a third party would write it, without touching qjax."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.kernels import registry
from qjax.testing import check_lowering

CALLS = []


@pytest.fixture
def fused():
    @qjax.register_lowering(
        "dot",
        qjax.Int,
        "cpu",
        when=lambda p: (
            (p.weight.per == "channel" and p.act is None) or "one scale per channel and float activations only"
        ),
        name="scale_after",
        about="sum codes in float, then scale each output once",
        adds=True,
    )
    def scale_after(problem, x, w, act, bias=None, residual=None):
        CALLS.append(problem)
        codes = w.unpacked().astype(jnp.float32)
        if "zero" in w.aux:
            codes = codes - w.aux["zero"]
        rows = x.astype(jnp.float32).reshape(*problem.stack, -1, problem.k)
        y = rows @ jnp.swapaxes(codes, -1, -2) * jnp.swapaxes(w.aux["scale"], -1, -2)
        y = y if bias is None else y + bias[..., None, :]
        y = y.reshape(*x.shape[:-1], problem.n)
        return (y if residual is None else y + residual).astype(problem.out_dtype)

    yield "scale_after"
    registry._TABLE["dot"] = [e for e in registry._TABLE["dot"] if e.name != "scale_after"]
    jax.clear_caches()


def test_it_passes_the_property_suite(fused):
    check_lowering("dot", fused, weights=[qjax.Int(8), qjax.Int(3), qjax.Int(8, symmetric=False)], examples=10)


def test_it_is_chosen_and_reported(fused):
    CALLS.clear()
    p = {"w": jnp.asarray(np.random.default_rng(0).standard_normal((16, 8)), jnp.float32)}
    x = jnp.ones((3, 16))
    model = qjax.quantize(lambda p, x: x @ p["w"], p, x, recipe="W8A16")
    assert model.report.rows[0].lowering == "scale_after" and "runs as: scale_after" in model.explain("w")
    np.testing.assert_allclose(model(model.params, x), x @ model.params["w"].dequantize(), rtol=1e-5, atol=1e-5)
    assert CALLS and CALLS[-1].weight == qjax.Int(8)
