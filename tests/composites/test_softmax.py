"""Softmaxes outside attention."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jax import lax


def by_hand(x, axis=-1):
    e = jnp.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def half(x):
    e = jnp.exp((x - lax.stop_gradient(x.max(-1, keepdims=True))).astype(jnp.float32))
    return (e / jnp.sum(e, -1, keepdims=True)).astype(x.dtype)


def broadcast_sum(x):
    e = jnp.exp(x)
    return e / jnp.broadcast_to(e.sum(1)[:, None], e.shape)


def reciprocal(x):
    e = jnp.exp(x)
    return (e.sum(-1) ** -1)[..., None] * e


def zero_where_all_masked(x):
    m = x.max(-1, keepdims=True)
    e = jnp.exp(x - jnp.where(jnp.isfinite(m), m, 0.0))
    return e / e.sum(-1, keepdims=True)


FOUND = {
    "last": (jax.nn.softmax, (2,)),
    "middle": (lambda x: jax.nn.softmax(x, axis=1), (1,)),
    "two": (lambda x: jax.nn.softmax(x, axis=(1, 2)), (1, 2)),
    "jit": (jax.jit(jax.checkpoint(jax.nn.softmax)), (2,)),
    "by_hand": (by_hand, (2,)),
    "by_hand_first": (lambda x: by_hand(x, 0), (0,)),
    "half": (lambda x: half(x.astype(jnp.bfloat16)), (2,)),
    "broadcast_sum": (broadcast_sum, (1,)),
    "reciprocal": (reciprocal, (2,)),
    "where": (lambda x: jax.nn.softmax(x, where=x > -1), (2,)),
    "global_max": (lambda x: (lambda e: e / e.sum(-1, keepdims=True))(jnp.exp(x - x.max())), (2,)),
    "finite": (zero_where_all_masked, (2,)),
    "one_element": (lambda x: jax.nn.softmax(x[..., :1]), (2,)),
    "vector": (lambda x: jax.nn.softmax(x[0, 0]), (0,)),
    "vmap": (jax.vmap(jax.vmap(by_hand, 1, 1)), (2,)),
}


@pytest.mark.parametrize("name", FOUND)
def test_found(find, rand, name):
    fn, axes = FOUND[name]
    (match,) = find(fn, rand(2, 3, 5))
    assert match.op == match.kind == "softmax" and match.axes == axes


def test_where_belongs_to_the_match(find, rand):
    (match,) = find(lambda x: jax.nn.softmax(x, where=x > 0), rand(2, 8))
    assert match.output.users == [] and match.logits.node.name == "select_n"


DECLINED = {
    "log": jax.nn.log_softmax,
    "exp_log": lambda x: jnp.exp(jax.nn.log_softmax(x)),
    "plus_one": lambda x: (lambda e: e / (1 + e.sum(-1, keepdims=True)))(jnp.exp(x)),
    "eps": lambda x: (lambda e: e / (e.sum(-1, keepdims=True) + 1e-6))(jnp.exp(x)),
    "other_axis": lambda x: (lambda e: e / e.sum(1)[:, :, None])(jnp.exp(x[:, :3, :3])),
    "transposed_sum": lambda x: (lambda e: e / e.sum(0).T)(jnp.exp(x[:, :3, :3])),
    "other_sum": lambda x: jnp.exp(x) / jnp.exp(-x).sum(-1, keepdims=True),
    "squared": lambda x: (lambda e: e / (e * e).sum(-1, keepdims=True))(jnp.exp(x)),
    "mean": lambda x: (lambda e: e / e.mean(-1, keepdims=True))(jnp.exp(x)),
    "sigmoid": lambda x: jnp.exp(x) / (1 + jnp.exp(x)),
    "part": lambda x: (lambda e: e / e[..., :3].sum(-1, keepdims=True))(jnp.exp(x)),
    "inverse": lambda x: (lambda e: e.sum(-1, keepdims=True) / e)(jnp.exp(x)),
    "where_other": lambda x: (lambda e: e / jnp.where(x > 0, e, 0.0).sum(-1, keepdims=True))(jnp.exp(x)),
}


@pytest.mark.parametrize("name", DECLINED)
def test_declined(find, rand, name):
    assert find(DECLINED[name], rand(2, 3, 5), op="softmax") == []
