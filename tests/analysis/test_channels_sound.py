"""Whatever group is offered, on code of any kind: applying it leaves the function as it is."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gauges import Case, change, distance, written

from qjax.analysis.channels import ChannelGroup, channel_group
from qjax.analysis.turning import folded, keeping_ones, overlaid, rotated
from qjax.errors import QjaxError

RNG = np.random.default_rng(0)


def draw(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


X = draw(3, 5, 8)
FUNCTIONS = {
    "elem mul param": (lambda p, x: ((x @ p["a"]) * p["s"]) @ p["c"], dict(a=draw(8, 12), s=draw(12), c=draw(12, 6))),
    "div param": (lambda p, x: ((x @ p["a"]) / p["s"]) @ p["c"], dict(a=draw(8, 12), s=draw(12) + 3, c=draw(12, 6))),
    "square": (lambda p, x: ((x @ p["a"]) ** 2) @ p["c"], dict(a=draw(8, 12), c=draw(12, 6))),
    "recip": (lambda p, x: (1 / (jnp.abs(x @ p["a"]))) @ p["c"], dict(a=draw(8, 12), c=draw(12, 6))),
    "max two": (
        lambda p, x: jnp.maximum(x @ p["a"], x @ p["b"]) @ p["c"],
        dict(a=draw(8, 12), b=draw(8, 12), c=draw(12, 6)),
    ),
    "compare": (
        lambda p, x: jnp.where(x @ p["a"] > x @ p["b"], x @ p["a"], 0.0) @ p["c"],
        dict(a=draw(8, 12), b=draw(8, 12), c=draw(12, 6)),
    ),
    "sum heads": (lambda p, x: (x @ p["a"]).reshape(3, 5, 3, 4).sum(2) @ p["c"], dict(a=draw(8, 12), c=draw(4, 6))),
    "cumsum t": (lambda p, x: jnp.cumsum(x @ p["a"], 1) @ p["c"], dict(a=draw(8, 12), c=draw(12, 6))),
    "cumsum k": (lambda p, x: jnp.cumsum(x @ p["a"], 2) @ p["c"], dict(a=draw(8, 12), c=draw(12, 6))),
    "rnn": (
        lambda p, x: jax.lax.scan(
            lambda h, xt: (h * jax.nn.sigmoid(xt @ p["g"]) + xt @ p["a"], h @ p["c"]),
            jnp.zeros((3, 12)),
            x.transpose(1, 0, 2),
        )[1],
        dict(g=draw(8, 12), a=draw(8, 12), c=draw(12, 6)),
    ),
    "lru": (
        lambda p, x: (
            jax.lax.associative_scan(
                lambda a, b: (a[0] * b[0], a[1] * b[0] + b[1]),
                (jnp.broadcast_to(jax.nn.sigmoid(p["l"]), (3, 5, 12)), x @ p["a"]),
                axis=1,
            )[1]
            @ p["c"]
        ),
        dict(l=draw(12), a=draw(8, 12), c=draw(12, 6)),
    ),
    "conv1d": (
        lambda p, x: (
            jax.lax.conv_general_dilated(
                x @ p["a"], p["w"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=12
            )
            @ p["c"]
        ),
        dict(a=draw(8, 12), w=draw(3, 1, 12), c=draw(12, 6)),
    ),
    "roll": (lambda p, x: (jnp.roll(x @ p["a"], 2, -1) + x @ p["a"]) @ p["c"], dict(a=draw(8, 12), c=draw(12, 6))),
    "take": (lambda p, x: (x @ p["a"])[..., jnp.array([3, 1, 2, 0, 5, 4])] @ p["c"], dict(a=draw(8, 12), c=draw(6, 6))),
    "scatter": (
        lambda p, x: jnp.zeros((3, 7, 12)).at[:, jnp.array([0, 3, 2, 5, 6])].add(x @ p["a"]) @ p["c"],
        dict(a=draw(8, 12), c=draw(12, 6)),
    ),
    "sort": (lambda p, x: jnp.sort(x @ p["a"], -1) @ p["c"], dict(a=draw(8, 12), c=draw(12, 6))),
    "sort t": (lambda p, x: jnp.sort(x @ p["a"], 1) @ p["c"], dict(a=draw(8, 12), c=draw(12, 6))),
    "topk": (lambda p, x: jax.lax.top_k(x @ p["a"], 4)[0] @ p["c"], dict(a=draw(8, 12), c=draw(4, 6))),
    "bias const": (lambda p, x: (x @ p["a"] + 1.0) @ p["c"], dict(a=draw(8, 12), c=draw(12, 6))),
    "bilinear": (
        lambda p, x: jnp.einsum("btk,btl,klm->btm", x @ p["a"], x @ p["b"], p["w"]),
        dict(a=draw(8, 4), b=draw(8, 3), w=draw(4, 3, 5)),
    ),
    "kron outer": (
        lambda p, x: ((x @ p["a"])[..., :, None] * (x @ p["b"])[..., None, :]).reshape(3, 5, 12) @ p["c"],
        dict(a=draw(8, 4), b=draw(8, 3), c=draw(12, 6)),
    ),
    "same out": (lambda p, x: (x @ p["a"]) * (x @ p["a"]) @ p["c"], dict(a=draw(8, 12), c=draw(12, 6))),
    "selfdot": (lambda p, x: (lambda h: jnp.einsum("btk,bsk->bts", h, h))(x @ p["a"]), dict(a=draw(8, 12))),
    "residual": (
        lambda p, x: (x @ p["a"] + x @ p["a"] @ p["m"]) @ p["c"],
        dict(a=draw(8, 12), m=draw(12, 12), c=draw(12, 6)),
    ),
    "mean center": (
        lambda p, x: (lambda h: h - h.mean(-1, keepdims=True))(x @ p["a"]) @ p["c"],
        dict(a=draw(8, 12), c=draw(12, 6)),
    ),
    "mean scalar out": (
        lambda p, x: (lambda h: (h @ p["c"], h.mean(-1)))(x @ p["a"]),
        dict(a=draw(8, 12), c=draw(12, 6)),
    ),
    "prelu": (
        lambda p, x: (lambda h: jnp.where(h > 0, h, p["s"] * h))(x @ p["a"]) @ p["c"],
        dict(a=draw(8, 12), s=draw(12), c=draw(12, 6)),
    ),
    "pad": (lambda p, x: jnp.pad(x @ p["a"], ((0, 0), (1, 0), (2, 3))) @ p["c"], dict(a=draw(8, 12), c=draw(17, 6))),
    "dyn": (
        lambda p, x: jax.lax.dynamic_slice_in_dim(x @ p["a"], (x[0, 0, 0] > 0).astype(int), 4, 2) @ p["c"],
        dict(a=draw(8, 12), c=draw(4, 6)),
    ),
    "argmax": (
        lambda p, x: jax.nn.one_hot(jnp.argmax(x @ p["a"], -1), 12) @ p["c"] + (x @ p["a"]) @ p["e"],
        dict(a=draw(8, 12), c=draw(12, 6), e=draw(12, 6)),
    ),
    "vec": (lambda p, x: (x @ p["a"]) @ p["v"], dict(a=draw(8, 12), v=draw(12))),
    "weightnorm": (
        lambda p, x: x @ (p["a"] / jnp.linalg.norm(p["a"], axis=0)) @ p["c"],
        dict(a=draw(8, 12), c=draw(12, 6)),
    ),
    "mul then add": (
        lambda p, x: (x @ p["a"] * p["s"] + p["b"]) @ p["c"],
        dict(a=draw(8, 12), s=draw(12), b=draw(12), c=draw(12, 6)),
    ),
    "two scales": (
        lambda p, x: (
            (lambda h: (h * jax.lax.rsqrt((h * h).mean(-1, keepdims=True))) * p["s"] * p["t"])(x @ p["a"]) @ p["c"]
        ),
        dict(a=draw(8, 12), s=draw(12), t=draw(12), c=draw(12, 6)),
    ),
    "scale reused": (
        lambda p, x: (
            (
                lambda h: (
                    h * (jax.lax.rsqrt((h * h).mean(-1, keepdims=True)) * p["s"])
                    + jax.lax.rsqrt((h * h).mean(-1, keepdims=True)) * p["s"]
                )
            )(x @ p["a"])
            @ p["c"]
        ),
        dict(a=draw(8, 12), s=draw(12), c=draw(12, 6)),
    ),
    "partial norm": (
        lambda p, x: (lambda h: h * jax.lax.rsqrt((h[..., :6] ** 2).mean(-1, keepdims=True)))(x @ p["a"]) @ p["c"],
        dict(a=draw(8, 12), c=draw(12, 6)),
    ),
    "l4": (
        lambda p, x: (lambda h: h / ((h**4).sum(-1, keepdims=True)))(x @ p["a"]) @ p["c"],
        dict(a=draw(8, 12), c=draw(12, 6)),
    ),
    "weighted sq": (
        lambda p, x: (lambda h: h / ((h**2 * jnp.arange(1.0, 13)).sum(-1, keepdims=True)))(x @ p["a"]) @ p["c"],
        dict(a=draw(8, 12), c=draw(12, 6)),
    ),
    "sq bcast": (
        lambda p, x: (lambda h: ((h**2)[..., None, :] * jnp.ones((4, 1))).sum(-1) @ p["z"])(x @ p["a"]),
        dict(a=draw(8, 12), z=draw(4, 6)),
    ),
    "masked mul": (lambda p, x: ((x @ p["a"]) * (jnp.arange(12) < 5)) @ p["c"], dict(a=draw(8, 12), c=draw(12, 6))),
    "masked tok": (
        lambda p, x: jnp.where((x[..., :1] > 0), x @ p["a"], 0) @ p["c"],
        dict(a=draw(8, 12), c=draw(12, 6)),
    ),
    "tri": (lambda p, x: (x @ jnp.tril(p["a"])) @ p["c"], dict(a=draw(8, 12), c=draw(12, 6))),
    "stacked param": (
        lambda p, x: (x @ jnp.concatenate([p["a"], p["b"]], 1)) @ p["c"],
        dict(a=draw(8, 5), b=draw(8, 7), c=draw(12, 6)),
    ),
    "param T shared": (lambda p, x: jax.nn.relu(x @ p["a"]) @ p["a"].T @ p["a"], dict(a=draw(8, 12))),
    "sliced w": (
        lambda p, x: jax.nn.relu(x @ p["w"][:, :6]) @ p["c"] + (x @ p["w"][:, 6:]) @ p["e"],
        dict(w=draw(8, 12), c=draw(6, 6), e=draw(6, 6)),
    ),
    "overlap w": (
        lambda p, x: jax.nn.relu(x @ p["w"][:, :8]) @ p["c"] + (x @ p["w"][:, 4:]) @ p["e"],
        dict(w=draw(8, 12), c=draw(8, 6), e=draw(8, 6)),
    ),
}

# How many factors of the input of the last product are free.
SIZES = {
    "recip": 12,
    "max two": 12,
    "compare": 12,
    "sum heads": 4,
    "cumsum t": 12,
    "lru": 12,
    "conv1d": 12,
    "roll": 2,
    "pad": 12,
    "sort t": 12,
    "bilinear": 4,
    "kron outer": 3,
    "residual": 12,
    "mean center": 1,
    "prelu": 12,
    "masked mul": 12,
    "partial norm": 6,
    "sliced w": 6,
    "two scales": 12,
}


def orthogonal(size, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))[0] if size else np.zeros((0, 0))


def matrix(group):
    out = np.zeros((group.size, group.size))
    for block in np.unique(group.blocks):
        own = np.flatnonzero(group.blocks == block)
        out[np.ix_(own, own)] = keeping_ones(orthogonal(len(own) - 1)) if group.keeps_ones else orthogonal(len(own))
    return out


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_offered_is_sound(name):
    fn, params = FUNCTIONS[name]
    model = Case(fn, params, (X,))
    for kind in ("scale", "permute", "rotate"):
        for site in model.linear:
            for of in ("input", "output"):
                group = channel_group(model.program, site, kind, of)
                if not isinstance(group, ChannelGroup):
                    assert group.kind in ("equation", "shared", "argument", "result", "blocks", "free")
                    continue
                if kind == "rotate":
                    try:
                        new = folded(group, model.read)
                    except QjaxError:
                        continue
                    new |= rotated(group, matrix(group), overlaid(new, model.read))
                else:
                    new = change(group, model.read)
                assert distance(model(written(model.params, new)), model.want) < 1e-4, (kind, site, of)


@pytest.mark.parametrize("name", SIZES)
def test_what_is_free_is_offered(name):
    fn, params = FUNCTIONS[name]
    model = Case(fn, params, (X,))
    group = channel_group(model.program, model.linear[-1])
    assert isinstance(group, ChannelGroup) and group.size == SIZES[name]
