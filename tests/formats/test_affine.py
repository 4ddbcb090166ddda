"""Affine: values, ends of ranges, products."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax
from qjax.errors import FormatError
from qjax.formats import Affine, quantize_array
from qjax.testing import check_format


@pytest.mark.parametrize("fmt", [Affine(4, group=8), Affine(3, per="tensor", signed=False)], ids=str)
def test_it_keeps_the_promises_of_formats(fmt):
    check_format(fmt, examples=6, exact_zero=False)


def test_values_are_codes_times_scale_plus_offset():
    x = np.random.default_rng(0).uniform(-0.3, 2.0, (3, 40)).astype(np.float32)
    for signed in (True, False):
        fmt = Affine(5, signed=signed)
        aux = {k: np.asarray(v, np.float64) for k, v in fmt.fit(x).items()}
        codes = np.asarray(fmt.encode(x, fmt.fit(x)))
        low, high = fmt.code_range
        assert codes.dtype == fmt.code_dtype and codes.min() == low and codes.max() == high
        want = np.clip(np.rint((x - aux["offset"]) / aux["scale"]), low, high) * aux["scale"] + aux["offset"]
        near = np.asarray(fmt.decode(codes, fmt.fit(x)))
        np.testing.assert_allclose(near, want, atol=2e-6)
        np.testing.assert_allclose(near.max(1), x.max(1), atol=2e-6)  # both ends are met, unlike an integer zero
        np.testing.assert_allclose(near.min(1), x.min(1), atol=2e-6)


def test_products_of_affine_weights_and_activations():
    rng = np.random.default_rng(1)
    w, x = rng.standard_normal((16, 8)).astype(np.float32) + 0.4, rng.standard_normal((5, 16)).astype(np.float32)
    recipe = qjax.Recipe([qjax.Rule("**", weights=Affine(8), inputs=qjax.static(Affine(8, per="tensor")))])
    model = qjax.quantize(lambda p, x: x @ p["w"], {"w": jnp.asarray(w)}, recipe=recipe, batches=[(x,)])
    np.testing.assert_allclose(model(model.params, x), x @ w, atol=0.1)
    assert set(model.params["w"].aux) == {"scale", "offset", "input.scale", "input.offset"}
    q = quantize_array(jnp.asarray(w), Affine(4), in_axes=0)
    assert q.nbytes == 16 * 8 // 2 + 8 * 8
    grad = jax.grad(lambda x: jnp.sum(model(model.params, x) ** 2))(x)
    assert bool(jnp.isfinite(grad).all())


def test_wrong_settings():
    for make in (lambda: Affine(1), lambda: Affine(4, signed=1), lambda: Affine(4, per="row")):
        with pytest.raises(FormatError, match="Affine"):
            make()


@pytest.mark.parametrize("signed", [True, False])
def test_a_row_of_zeros_has_no_offset(signed):
    x = jnp.zeros((2, 16)).at[1].set(3.0)
    q = quantize_array(x, Affine(8, signed=signed), in_axes=1)
    assert not np.asarray(q.canonical().aux["offset"])[0].any()
    np.testing.assert_allclose(q.dequantize(), x, atol=1e-6)
