"""Attention put together from random choices of layout, order and form, recomputed from the match each time."""

from __future__ import annotations

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st
from jax import lax

LETTERS = {"B": 2, "T": 3, "S": 4, "H": 2, "D": 5, "E": 6}


def layouts(letters: str):
    return st.permutations(letters).map("".join)


def product(draw, first: str, second: str, out: str):
    """A product of two operands named by letters: einsum in either order, or dot_general and a transposition."""
    how = draw(st.sampled_from(["einsum", "flipped", "dot_general"]))
    if how == "einsum":
        return lambda a, b: jnp.einsum(f"{first},{second}->{out}", a, b)
    if how == "flipped":
        return lambda a, b: jnp.einsum(f"{second},{first}->{out}", b, a)
    batch = [c for c in out if c in first and c in second]
    summed = [c for c in first if c in second and c not in out]
    numbers = tuple(tuple(tuple(x.index(c) for c in group) for x in (first, second)) for group in (summed, batch))
    order = batch + [c for c in first if c not in batch + summed] + [c for c in second if c not in batch + summed]
    return lambda a, b: lax.dot_general(a, b, numbers).transpose([order.index(c) for c in out])


def aligned(array, letters: str, to: str):
    """Broadcast an array whose dimensions are ``letters`` (in the order of ``to``) against ``to``."""
    present = [c for c in to if c in letters]
    array = array.transpose([letters.index(c) for c in present])
    return array.reshape([LETTERS[c] if c in letters else 1 for c in to])


@st.composite
def programs(draw):
    q, k, v = draw(layouts("BTHD")), draw(layouts("BSHD")), draw(layouts("BSHE"))
    z, out = draw(layouts("BHTS")), draw(layouts("BTHE"))
    scores, values = product(draw, q, k, z), product(draw, draw(st.just(z)), v, out)
    scale = draw(st.sampled_from(["none", "mul", "div", "q", "k", "both"]))
    mask = draw(st.sampled_from(["none", "where", "where_not", "add", "data", "data_add", "and"]))
    cap, bias, merge = draw(st.booleans()), draw(st.booleans()), draw(st.booleans())
    softmax = draw(st.sampled_from(["nn", "hand", "no_shift", "reciprocal", "where"]))
    cast, wrap = draw(st.booleans()), draw(st.sampled_from(["none", "jit", "remat", "vmap"]))
    axis = z.index("S")

    def soften(x, seen):
        if softmax == "nn":
            return jax.nn.softmax(x, axis=axis)
        if softmax == "where" and seen is not None:
            return jax.nn.softmax(x, axis=axis, where=jnp.broadcast_to(seen, x.shape))
        e = jnp.exp(x if softmax == "no_shift" else x - lax.stop_gradient(x.max(axis, keepdims=True)))
        total = e.sum(axis, keepdims=True)
        return e * (1.0 / total) if softmax == "reciprocal" else e / total

    def fn(a, b, c, table, keep):
        a = a * 0.7 if scale in ("q", "both") else a
        b = b / 2.0 if scale in ("k", "both") else b
        x = scores(a, b)
        x = x * 0.5 if scale == "mul" else x / jnp.sqrt(5.0) if scale == "div" else x
        x = 3.0 * jnp.tanh(x / 3.0) if cap else x
        x = x + aligned(table, "HTS", z) if bias else x
        causal = aligned(jnp.tril(jnp.ones((3, 4), bool), 1), "TS", z)
        data = aligned(keep, "BS", z)
        if merge:  # a round trip through one long dimension
            x = x.reshape(-1, x.shape[-1]).reshape(x.shape)
        seen = causal if mask in ("where", "where_not", "add") else data if mask != "and" else causal & data
        if mask in ("where", "data", "and"):
            x = jnp.where(seen, x, -1e30)
        elif mask == "where_not":
            x = jnp.where(~seen, jnp.finfo(x.dtype).min, x)
        elif mask == "add":
            x = x + jnp.where(seen, 0.0, -1e9)
        elif mask == "data_add":
            x = x - 1e9 * (1.0 - seen)
        p = soften(x.astype(jnp.float32) if cast else x, None if mask == "none" else seen)
        return values(p.astype(c.dtype), c)

    rng = np.random.default_rng(0)
    args = [jnp.asarray(rng.normal(size=[LETTERS[c] for c in name]), jnp.float32) for name in (q, k, v, "HTS")]
    args.append(jnp.asarray([[True, False, True, True], [True, True, False, False]]))
    wrapped = {"none": fn, "jit": jax.jit(fn), "remat": jax.checkpoint(fn), "vmap": fn}[wrap]
    if wrap == "vmap":
        wrapped = lambda *a: jax.vmap(fn)(*(x[None] for x in a))[0]  # noqa: E731
    expect = {
        "causal": mask in ("where", "where_not", "add", "and"),
        "padded": mask in ("data", "data_add", "and"),
        "cap": 3.0 if cap else None,
        "biases": int(bias),
        "scale": {"none": 1.0, "mul": 0.5, "div": 5**-0.5, "q": 0.7, "k": 0.5, "both": 0.35}[scale],
    }
    return wrapped, args, expect


@hypothesis.settings(max_examples=60)
@hypothesis.given(programs())
def test_any_spelling_is_found(find, program):
    fn, args, expect = program
    (match,) = find(fn, *args, op="attention")
    sizes = dict(match.axes)
    assert (sizes["query"], sizes["key"], sizes["feature"], sizes["value"]) == (3, 4, 5, 6)
    assert (match.causal is not None and match.causal.offset == 1) == expect["causal"]
    assert match.padded == expect["padded"] and match.softcap == expect["cap"]
    assert len(match.biases) == expect["biases"]
    assert np.isclose(match.scale * match.prescale, expect["scale"])


@hypothesis.settings(max_examples=30)
@hypothesis.given(programs(), st.sampled_from(["square", "drop", "shift", "late"]))
def test_one_change_makes_it_something_else(find, program, change):
    """Break the probabilities of a right program: it must no longer be found."""
    fn, args, _ = program
    calls = {
        "square": lambda e: lax.integer_pow(e, 2),
        "drop": lambda e: e.at[..., 0].set(0.0),
        "shift": lambda e: e + 0.1,
        "late": lambda e: e[..., ::-1],
    }

    def broken(*a):
        closed = jax.make_jaxpr(fn)(*a)
        return _replay(closed, calls[change], a)

    assert find(broken, *args, op="attention") == []


def _replay(closed, change, args):
    """Run the flat program again, changing the value that enters the last product."""
    from qjax import _compat
    from qjax.composites import find_composites, inlined

    (match,) = [c for c in find_composites(closed) if c.op == "attention"]
    level = inlined(closed)
    product_ = level.node_at(match.output_path)
    side = [v.atom for v in product_.inputs].index(match.probabilities.value.atom)
    env = dict(zip(level.inputs, [*_compat.consts_of(closed), *args], strict=True))
    for node in level.nodes:
        values = [v.const if v.const is not None else env[v] for v in node.inputs]
        if node is product_:
            values[side] = change(values[side])
        env.update(zip(node.outputs, _compat.bind(node.eqn, values), strict=True))
    return env[level.outputs[0]]
