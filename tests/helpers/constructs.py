"""Every construct of jax that a model may be written with, as small functions of ``(params, x)``."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

MESH = jax.make_mesh((2, 2), ("d", "m"), axis_types=(AxisType.Auto,) * 2)


@jax.custom_vjp
def odd_vjp(x, w):
    """A product whose author gave it another derivative."""
    return jnp.tanh(x @ w)


odd_vjp.defvjp(lambda x, w: (odd_vjp(x, w), (x, w)), lambda r, g: (jnp.full_like(r[0], 7.0), jnp.full_like(r[1], 3.0)))


@jax.custom_jvp
def odd_jvp(x, w):
    """Five times the derivative it should have."""
    return x @ w


odd_jvp.defjvp(lambda p, t: (odd_jvp(*p), 5.0 * (t[0] @ p[1])))


@jax.jit
def shared(x, w):
    """A jitted body that is called more than once."""
    return jnp.tanh(x @ w)


def params(seed: int = 0):
    """``w`` [8, 8] and a stack ``s`` [3, 8, 8]."""
    rng = np.random.default_rng(seed)
    w = jnp.asarray(rng.standard_normal((8, 8)), jnp.float32) / 3
    return {"w": w, "s": jnp.stack([w, w * 0.5, w.T * 0.25])}


def batch(seed: int = 1):
    """x [4, 8]."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal((4, 8)), jnp.float32)


CASES = {
    "matmul": lambda p, x: x @ p["w"],
    "transposed": lambda p, x: x @ p["w"].T,
    "weight_on_the_left": lambda p, x: (p["w"].T @ x.T).T,
    "einsum": lambda p, x: jnp.einsum("bi,io->bo", x, p["w"]),
    "einsum_swapped": lambda p, x: jnp.einsum("io,bi->ob", p["w"], x),
    "tensordot": lambda p, x: jnp.tensordot(x, p["w"], axes=([1], [0])),
    "dot_general": lambda p, x: lax.dot_general(x, p["w"], (((1,), (0,)), ((), ()))),
    "batched_einsum": lambda p, x: jnp.einsum("bi,eio->ebo", x, p["s"]),
    "expert_einsum": lambda p, x: jnp.einsum("ebi,eio->ebo", jnp.stack([x, x, x]), p["s"]),
    "jit_shared": lambda p, x: shared(shared(x, p["w"]), p["w"]),
    "cond": lambda p, x: lax.cond(x.sum() > 0, lambda x: x @ p["w"], lambda x: x * 2, x),
    "switch": lambda p, x: lax.switch(
        1, [lambda x: x @ p["w"], lambda x: x @ p["s"][0] @ p["s"][1] @ p["s"][2], lambda x: x], x
    ),
    "while": lambda p, x: lax.while_loop(lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] @ p["w"])), (0, x))[1],
    "while_carries_params": lambda p, x: lax.while_loop(
        lambda c: c[0] < 3, lambda c: (c[0] + 1, jnp.tanh(c[1] @ c[2]), c[2]), (0, x, p["w"])
    )[1],
    "fori": lambda p, x: lax.fori_loop(0, 3, lambda i, c: jnp.tanh(c @ p["s"][i]), x),
    "fori_backwards": lambda p, x: lax.fori_loop(0, 3, lambda i, c: jnp.tanh(c @ p["s"][2 - i]), x),
    "python_loop": lambda p, x: jnp.tanh(jnp.tanh(x @ p["s"][0]) @ p["s"][1]) @ p["s"][2],
    "scan": lambda p, x: lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["s"])[0],
    "scan_reversed": lambda p, x: lax.scan(lambda c, w: (jnp.tanh(c @ w), c.sum()), x, p["s"], reverse=True),
    "scan_const": lambda p, x: lax.scan(lambda c, _: (jnp.tanh(c @ p["w"]), c.sum()), x, None, length=3),
    "scan_of_scan": lambda p, x: lax.scan(
        lambda c, w: lax.scan(lambda d, _: (jnp.tanh(d @ w), None), c, None, length=2), x, p["s"]
    )[0],
    "scan_by_index": lambda p, x: lax.scan(lambda c, i: (jnp.tanh(c @ p["s"][i]), None), x, jnp.arange(3))[0],
    "remat_policy": lambda p, x: jax.checkpoint(
        lambda x: jnp.sin(x @ p["w"]), policy=jax.checkpoint_policies.dots_saveable
    )(x),
    "scan_remat": lambda p, x: lax.scan(jax.checkpoint(lambda c, w: (jnp.tanh(c @ w), None)), x, p["s"])[0],
    "custom_vjp": lambda p, x: odd_vjp(x, p["w"]),
    "custom_jvp": lambda p, x: odd_jvp(x, p["w"]),
    "relu": lambda p, x: jax.nn.relu(x @ p["w"]),
    "vmap_rows": lambda p, x: jax.vmap(lambda r: r @ p["w"])(x),
    "vmap_weights": lambda p, x: jax.vmap(lambda w: x @ w)(p["s"]),
    "shard_map_rows": lambda p, x: jax.shard_map(
        lambda x, w: x @ w, mesh=MESH, in_specs=(PartitionSpec("d"), PartitionSpec()), out_specs=PartitionSpec("d")
    )(x, p["w"]),
    "shard_map_columns": lambda p, x: jax.shard_map(
        lambda x, w: x @ w,
        mesh=MESH,
        in_specs=(PartitionSpec("d"), PartitionSpec(None, "m")),
        out_specs=PartitionSpec("d", "m"),
    )(x, p["w"]),
    "shard_map_psum": lambda p, x: jax.shard_map(
        lambda x, w: lax.psum(x @ w, "m"),
        mesh=MESH,
        in_specs=(PartitionSpec("d", "m"), PartitionSpec("m", None)),
        out_specs=PartitionSpec("d", None),
    )(x, p["w"]),
    "sharding_constraint": lambda p, x: lax.with_sharding_constraint(
        x @ p["w"], NamedSharding(MESH, PartitionSpec("d", "m"))
    ),
    "debug_print": lambda p, x: (jax.debug.print("mean {m}", m=x.mean()), x @ p["w"])[1],
    "associative_scan": lambda p, x: lax.associative_scan(jnp.matmul, p["s"])[-1] + x[0, 0],
    "embedding_and_head": lambda p, x: jnp.take(p["w"], jnp.argmax(x, -1) % 8, axis=0) @ p["w"].T,
    "grad_inside": lambda p, x: jax.grad(lambda y: jnp.tanh(y @ p["w"]).sum())(x),
    "pure_callback": lambda p, x: (
        jax.pure_callback(lambda a: np.asarray(a) * 2, jax.ShapeDtypeStruct(x.shape, x.dtype), x) @ p["w"]
    ),
    "random": lambda p, x: (x * jax.random.bernoulli(jax.random.key(3), 0.5, x.shape)) @ p["w"],
    "sort": lambda p, x: jnp.sort(x @ p["w"], axis=-1),
    "linear_solve": lambda p, x: jnp.linalg.solve(p["w"] + 4 * jnp.eye(8), x.T).T @ p["w"],
    "bfloat16": lambda p, x: (x.astype(jnp.bfloat16) @ p["w"].astype(jnp.bfloat16)).astype(jnp.float32),
    "fused_split": lambda p, x: sum(x @ w for w in jnp.split(p["w"], 2, axis=1)),
    "optimization_barrier": lambda p, x: x @ lax.optimization_barrier(p["w"]),
    "named_scope": lambda p, x: _scoped(p, x),
    "reshaped_weight": lambda p, x: jnp.einsum("bi,ihd->bhd", x, p["w"].reshape(8, 2, 4)),
    "contract_two_axes": lambda p, x: jnp.einsum("bhd,hdo->bo", x.reshape(4, 2, 4), p["w"].reshape(2, 4, 8)),
}
"""Name -> function of ``(params, x)``."""


def _scoped(p, x):
    with jax.named_scope("outer"), jax.named_scope("inner"):
        return x @ p["w"]
