"""AWQ of experts, of convolutions, and as a pass whose factors are folded."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import qjax
from qjax.errors import FormatError
from qjax.formats import SMOOTH, is_quantized
from qjax.passes import AWQ

FMT = qjax.Int(4, group=16)
R = np.random.default_rng(0)


def draw(*shape: int) -> jax.Array:
    return jnp.asarray(R.standard_normal(shape), jnp.float32)


def floats(params):
    return jax.tree.map(lambda a: a.dequantize() if is_quantized(a) else a, params, is_leaf=is_quantized)


def experts(p, x):
    return lax.ragged_dot(x, p["w"], jnp.asarray([20, 10, 20], jnp.int32))


def conv(p, x):
    return lax.conv_general_dilated(x, p["w"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


CASES = {
    "experts": (experts, {"w": draw(3, 32, 16)}, draw(50, 32) * jnp.exp(draw(32))),
    "convolution": (conv, {"w": draw(3, 3, 4, 16)}, draw(2, 8, 8, 4)),
}


@pytest.mark.parametrize("case", CASES)
def test_each_row_is_divided_by_the_factors_of_the_weight_that_it_meets(case):
    fn, p, x = CASES[case]
    recipe = qjax.Recipe([qjax.Rule("**", weights=FMT, rounding=AWQ(n_grid=6), clamp_group=True)])
    model = qjax.quantize(fn, p, recipe=recipe, batches=[(x,)])
    np.testing.assert_allclose(model(model.params, x), fn(floats(model.params), x), rtol=1e-4, atol=1e-3)
    assert SMOOTH in model.params["w"].aux
    nearest = qjax.quantize(fn, p, x, recipe=qjax.Recipe([qjax.Rule("**", weights=FMT, clamp_group=True)]))
    error = [float(jnp.linalg.norm(m(m.params, x) - fn(p, x))) for m in (model, nearest)]
    assert error[0] < error[1]


def block(p, x):
    h = x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * p["norm"]
    return jax.nn.gelu(h @ p["a"]) @ p["down"] + h @ p["b"]


@pytest.mark.slow
def test_weights_that_read_the_same_activations_share_factors_that_go_into_the_norm():
    norm = jnp.exp(1.5 * draw(32)).at[3].set(30)
    p = {"norm": norm, "a": draw(32, 48), "b": draw(32, 16), "down": draw(48, 16) / 4}
    xs = [(draw(64, 32),), (draw(64, 32),)]
    test = draw(200, 32)
    nearest = qjax.Rule("**", weights=FMT)
    folded = qjax.quantize(block, p, recipe=qjax.Recipe([nearest], prepare=[AWQ()]), batches=xs)
    plain = qjax.quantize(block, p, xs[0][0], recipe=qjax.Recipe([nearest]))
    notes = [note for note in folded.report.notes if note.startswith("AWQ")]
    assert any(note.startswith("AWQ: a, b: factors") and note.endswith("norm") for note in notes), notes
    assert any(note.startswith("AWQ: down: factors") and "beside" in note and "gelu" in note for note in notes), notes
    assert SMOOTH in folded.params["down"].aux and SMOOTH not in folded.params["a"].aux
    assert "input.smooth" in folded.report.row("down").note and not folded.report.row("a").note
    # The same factors in both, and their reciprocals in the norm; a power of what was seen, so the outliers are larger.
    s = p["norm"] / folded.params["norm"]
    for name in ("a", "b"):
        near = folded.params[name].dequantize() / s[:, None]
        assert float(jnp.linalg.norm(near - p[name]) / jnp.linalg.norm(p[name])) < 0.3
    assert float(s[3] / jnp.median(s)) > 1.5
    errors = [float(jnp.linalg.norm(m(m.params, test) - block(p, test))) for m in (folded, plain)]
    assert errors[0] < 0.9 * errors[1], errors


def test_bad_settings():
    with pytest.raises(FormatError, match="unfolded"):
        AWQ(unfolded="besides")
    with pytest.raises(FormatError, match="scale"):
        AWQ(scale=1)
