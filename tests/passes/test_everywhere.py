"""Every rounding on every kind of weight: convolutions, layers of a scan that are read from disk, experts, products."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import qjax
from qjax import passes
from qjax.formats import DualGrained, MixedBits, Progressive, Sparse24, TritPlanes, is_quantized

D, HIDDEN, LAYERS, EXPERTS, CLASSES = 32, 64, 2, 3, 8
INT4 = qjax.Int(4, group=16)
UINT4 = qjax.Int(4, group=16, symmetric=False)


def fn(p: Any, images: jax.Array) -> jax.Array:
    """A convolution, a scan over layers with experts in each, and a head."""
    h = lax.conv_general_dilated(images, p["conv"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    h = jax.nn.relu(h).reshape(-1, D)
    rows = h.shape[0]
    sizes = jnp.asarray([rows // 2, rows // 4, rows - rows // 2 - rows // 4], jnp.int32)

    def layer(h: jax.Array, w: Any) -> tuple[jax.Array, None]:
        x = h / jnp.sqrt(jnp.mean(h * h, -1, keepdims=True) + 1e-6) * w["norm"]
        h = h + jnp.tanh(x @ w["up"]) @ w["down"]
        return h + jax.nn.relu(lax.ragged_dot(h, w["experts"], sizes)), None

    h, _ = lax.scan(layer, h, p["layers"])
    return h @ p["head"]


def arrays() -> dict[str, Any]:
    r = np.random.default_rng(0)

    def draw(*shape: int) -> np.ndarray:
        fan_in = int(np.prod(shape[:-1][-1:])) if len(shape) != 4 else int(np.prod(shape[:-1]))
        return (r.standard_t(5, shape) / np.sqrt(fan_in)).astype(np.float32)

    layers = {
        "norm": np.ones((LAYERS, D), np.float32),
        "up": draw(LAYERS, D, HIDDEN),
        "down": draw(LAYERS, HIDDEN, D),
        "experts": np.stack([draw(EXPERTS, D, D) for _ in range(LAYERS)]),
    }
    return {"conv": draw(3, 3, 4, D), "layers": layers, "head": draw(D, CLASSES)}


def lazy(params: dict[str, Any]) -> dict[str, Any]:
    """The layers are read slice by slice."""

    def one(a: np.ndarray) -> qjax.Lazy:
        return qjax.Lazy(a.shape, a.dtype, lambda: a, lambda i: a[i])

    return {**jax.tree.map(jnp.asarray, params), "layers": jax.tree.map(one, params["layers"])}


def images(seed: int) -> jax.Array:
    r = np.random.default_rng(seed)
    smooth = r.standard_normal((6, 2, 2, 4)).repeat(4, 1).repeat(4, 2)
    return jnp.asarray(smooth + 0.5 * r.standard_normal(smooth.shape), jnp.float32)


BATCHES = [(images(seed),) for seed in range(1, 5)]
TEST = images(99)

METHODS: dict[str, tuple[Any, Any, tuple[Any, ...]]] = {
    "nearest": (INT4, None, ()),
    "MSE": (INT4, qjax.RTN(qjax.MSE()), ()),
    "HQQ": (qjax.Int(4, group=16, symmetric=False), passes.HQQ(), ()),
    "GPTQ": (INT4, qjax.GPTQ(actorder="static", observer=qjax.MSE()), ()),
    "AutoRound": (INT4, qjax.AutoRound(iters=20), ()),
    "DGQ": (DualGrained(group=16), passes.DGQ(), ()),
    "QoQ": (Progressive(group=16), passes.QoQ(), ()),
    "two-bit": (MixedBits(), passes.TwoBit(), ()),
    "trit-planes": (TritPlanes(group=16), None, ()),
    "smoothing": (INT4, None, (passes.SmoothQuant(),)),
    "AWQ": (INT4, passes.AWQ(), ()),
    "AWQ, folded": (INT4, passes.AWQ(scale=False), (passes.AWQ(),)),
    "2:4": (Sparse24(group=16), passes.SparseGPT(), ()),
}
WORSE_THAN_NEAREST = {
    "2:4": 5.0,
    "two-bit": 6.0,
    "trit-planes": 2.5,
    "DGQ": 1.3,
    "QoQ": 1.5,
    "MSE": 1.2,
    "smoothing": 1.3,
}
"""How much larger the error of the outputs may be than that of int4 rounded to nearest; others have to be below it."""


def floats(params: Any) -> Any:
    return jax.tree.map(lambda a: a.dequantize() if is_quantized(a) else a, params, is_leaf=is_quantized)


def quantized(name: str) -> tuple[Any, float]:
    fmt, rounding, prepare = METHODS[name]
    recipe = qjax.Recipe([qjax.Rule("**", weights=fmt, rounding=rounding, clamp_group=True)], prepare=list(prepare))
    model = qjax.quantize(fn, lazy(arrays()), recipe=recipe, batches=BATCHES, blocks="layers/*")
    want = fn(arrays(), TEST)
    got = model(model.params, TEST)
    return model, float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))


@pytest.fixture(scope="module")
def nearest() -> float:
    with pytest.warns(qjax.errors.QjaxWarning, match="needs no calibration data"):
        return quantized("nearest")[1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::qjax.errors.QjaxWarning")
@pytest.mark.parametrize("name", [name for name in METHODS if name != "nearest"])
def test_a_method_serves_every_kind_of_weight(name: str, nearest: float) -> None:
    model, error = quantized(name)
    kinds = {row.name for row in model.report.quantized}
    assert {"conv", "head"} <= kinds, kinds
    assert sum("experts" in site for site in kinds) == LAYERS and sum("up" in site for site in kinds) == LAYERS
    # What runs is what is stored.
    plain = fn(floats(model.params), TEST)
    np.testing.assert_allclose(model(model.params, TEST), plain, rtol=1e-3, atol=1e-3 * float(jnp.abs(plain).max()))
    assert error < WORSE_THAN_NEAREST.get(name, 1.0) * nearest, (error, nearest)
