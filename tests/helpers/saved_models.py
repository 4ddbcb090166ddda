"""A tiny model to save, and the comparison of trees bit by bit."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

X = np.linspace(-1, 1, 32, dtype=np.float32).reshape(2, 16)


def apply(params: Any, x: Any) -> Any:
    for layer in params["layers"]:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return x


def make_params(seed: int = 0) -> Any:
    rng = np.random.default_rng(seed)
    return {"layers": [{"w": rng.normal(size=(16, 16)).astype(np.float32), "b": np.full(16, seed, np.float32)}] * 2}


def same(a: Any, b: Any) -> None:
    """Assert that two trees are bit-equal, kinds of quantized leaves included."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if jnp.issubdtype(getattr(x, "dtype", None), jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        if hasattr(x, "dtype"):
            assert x.dtype == y.dtype and x.shape == y.shape
            x, y = np.asarray(x).tobytes(), np.asarray(y).tobytes()
        assert x == y
