"""The oracle of attention with log-coded probabilities, in plain jnp, which is also what XLA compiles.

With scores s [*batch, M, N] and values v [*batch, N, D] (AdaLog, arXiv:2407.12951, section 3), all in float32:

    m_i  = max_j s_ij,   Z_i = sum_j exp(s_ij - m_i)          first pass over the keys
    c_ij = the number of bounds of the format above exp(s_ij - m_i) / Z_i          second pass
    p_ij = 2**-E[c_ij] * M[c_ij] / D                          what a code stands for; 0 for the code of zero
    u_jd = clip(round(v_jd / t) + z, 0, 2**b - 1)             codes of the values; t, z of their matrix
    y_id = sum_j p_ij (u_jd - z) t

Two passes, because m and Z have to be final before a code can be told: rounding does not commute with the rescaling of
a softmax in one pass. Rows of p do not sum to one, and are not normalised again. A row that is wholly hidden (-inf) is
NaN in a softmax; it has no code, counts as 0, and gives a row of zeros.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from qjax.formats import Aux
from qjax.formats.log import Log, decode_unit
from qjax.kernels.registry import Act, Problem, register_lowering


def probabilities(scores: Array) -> Array:
    """Return the softmax over the last axis, float32."""
    s = scores.astype(jnp.float32)
    e = jnp.exp(s - jnp.max(s, axis=-1, keepdims=True))
    return e / jnp.sum(e, axis=-1, keepdims=True)


def codes_of(scores: Array, fmt: Log) -> Array:
    """Return the codes of the softmax of scores [*batch, M, N]."""
    return fmt.encode(probabilities(scores), _unit(scores))


def _unit(x: Array) -> Aux:
    return {"scale": jnp.ones((1,) * x.ndim, jnp.float32)}


def product(p: Array, v: Array, precision: Any = None, dtype: Any = jnp.float32) -> Array:
    """Return p [*batch, M, N] times v [*batch, N, D], accumulated and returned in ``dtype``."""
    batch = tuple(range(p.ndim - 2))
    dims = (((p.ndim - 1,), (p.ndim - 2,)), (batch, batch))
    return lax.dot_general(p, v, dims, precision=precision, preferred_element_type=dtype)


@register_lowering("log_attention", name="xla", priority=0, about="plain jnp, float products; the oracle")
def log_attention_reference(problem: Problem, scores: Array, v: Array, act: Act | None) -> Array:
    """Return y of the module's equations, [*batch, M, D] in ``problem.out_dtype``."""
    fmt: Any = problem.weight
    p = decode_unit(codes_of(scores, fmt), fmt)
    near = v.astype(jnp.float32)
    if act is not None:
        near = act[0].decode(act[0].encode(near, act[1]), act[1])
    return product(p, near, problem.settings).astype(problem.out_dtype)
