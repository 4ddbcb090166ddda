"""One layer of a transformer and its parameters, with recipes of AdaLog for it, and uniform codes from the equation."""

from __future__ import annotations

import jax
import numpy as np

import qjax
from qjax.formats import Int, Log
from qjax.passes import AdaLog

F = np.float32
D, HEADS, TOKENS, HIDDEN = 8, 2, 5, 8
RNG = np.random.default_rng(0)
QUICK = AdaLog(rounds=1, steps=2, candidates=32)


def layer_norm(p, x):
    mean = x.mean(-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(((x - mean) ** 2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def dense(p, x):
    return x @ p["kernel"] + p["bias"]


def net(params, x):
    """One layer of a transformer [B, T, D], heads first, GELU of the tanh form, and a head on the first token."""
    h = layer_norm(params["norm"], x)
    q, k, v = (
        dense(params[n], h).reshape(*x.shape[:2], HEADS, -1).transpose(0, 2, 1, 3) for n in ("query", "key", "value")
    )
    p = jax.nn.softmax(q @ k.transpose(0, 1, 3, 2) / 2.0, axis=-1)
    x = x + dense(params["out"], (p @ v).transpose(0, 2, 1, 3).reshape(x.shape))
    x = x + dense(params["down"], jax.nn.gelu(dense(params["up"], layer_norm(params["norm2"], x))))
    return dense(params["head"], layer_norm(params["last"], x)[:, 0])


def make_params():
    def weight(n_in, n_out):
        kernel, bias = RNG.standard_normal((n_in, n_out)) / n_in**0.5, 0.1 * RNG.standard_normal(n_out)
        return {"kernel": kernel.astype(F), "bias": bias.astype(F)}

    def norm():
        scale, bias = 2.0 ** RNG.uniform(-3, 2, D), RNG.standard_normal(D)
        return {"scale": scale.astype(F), "bias": bias.astype(F)}

    sizes = {n: (D, D) for n in ("query", "key", "value", "out")} | {"up": (D, HIDDEN), "down": (HIDDEN, D)}
    return {n: weight(*s) for n, s in (sizes | {"head": (D, D)}).items()} | {
        n: norm() for n in ("norm", "norm2", "last")
    }


PARAMS = make_params()
X = RNG.standard_normal((8, TOKENS, D)).astype(F)


def recipe(bits=4, settle=QUICK, weights=None):
    inputs = qjax.static(Int(bits, per="tensor", symmetric=False))
    p = qjax.static(Log(bits, zero="mask"))
    rules = [
        qjax.Rule("**", op="attention", operands={"q": inputs, "k": inputs, "v": inputs, "p": p}),
        qjax.Rule("**", weights=weights or Int(bits, symmetric=False), inputs=inputs),
    ]
    return qjax.Recipe(rules, name="tiny", settle=settle)


def uniform(x, aux, bits=4):
    scale, zero = (np.asarray(aux[k], np.float64) for k in ("scale", "zero"))
    return (np.clip(np.rint(x / scale) + zero, 0, 2**bits - 1) - zero) * scale


def perceptron(params, x):
    return dense(params["down"], jax.nn.gelu(dense(params["up"], x)))
