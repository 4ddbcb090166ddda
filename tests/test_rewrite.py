"""The rewritten function against the original, on every construct."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from constructs import CASES, batch, params

import qjax
from qjax.formats import Int, QArray, is_quantized, quantize_array
from qjax.program import Signature, trace_flat
from qjax.recipe import Recipe, Rule
from qjax.rewrite import Rewriter
from qjax.sources import dynamic

NOTHING = Recipe([Rule("**", skip=True, optional=True)])
INT8 = Recipe([Rule("**", weights=Int(8), optional=True)])
INT4 = Recipe([Rule("**", weights=Int(4, group=4), optional=True)])
W8A8 = Recipe([Rule("**", weights=Int(8), inputs=dynamic(Int(8, per="token")), optional=True)])


def replayed(fn, *args):
    """Run ``fn`` through the rewriter although nothing is quantized."""
    signature, arrays = Signature.of(args[0], args[1:], {})
    program = trace_flat(fn, signature, arrays)
    return jax.tree.unflatten(program.out_tree, Rewriter(program)(arrays))


def dequantized(tree):
    return jax.tree.map(lambda q: q.dequantize() if is_quantized(q) else q, tree, is_leaf=is_quantized)


@pytest.mark.parametrize("name", CASES)
def test_an_empty_recipe_changes_nothing(name):
    fn, p, x = CASES[name], params(), batch()
    model = qjax.quantize(fn, p, x, recipe=NOTHING)
    want, got, again = jax.jit(fn)(p, x), jax.jit(model)(p, x), jax.jit(lambda p, x: replayed(fn, p, x))(p, x)
    jax.tree.map(np.testing.assert_array_equal, want, got)
    jax.tree.map(np.testing.assert_array_equal, want, again)
    assert str(jax.make_jaxpr(fn)(p, x)) == str(jax.make_jaxpr(lambda p, x: replayed(fn, p, x))(p, x))


@pytest.mark.every(6)
@pytest.mark.parametrize("name", [n for n in CASES if n not in ("while", "while_carries_params", "pure_callback")])
def test_an_empty_recipe_keeps_gradients(name):
    fn, p, x = CASES[name], params(), batch()

    def loss(f):
        return lambda p, x: sum(jnp.sum(leaf) for leaf in jax.tree.leaves(f(p, x)))

    want = jax.jit(jax.grad(loss(fn), argnums=(0, 1)))(p, x)
    got = jax.jit(jax.grad(loss(lambda p, x: replayed(fn, p, x)), argnums=(0, 1)))(p, x)
    jax.tree.map(np.testing.assert_array_equal, want, got)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("recipe", [INT8, INT4], ids=["int8", "int4"])
def test_quantized_equals_dequantized(name, recipe):
    fn, p, x = CASES[name], params(), batch()
    model = qjax.quantize(fn, p, x, recipe=recipe)
    want = fn(dequantized(model.params), x)
    got = model(model.params, x)
    tolerance = 2e-2 if name == "bfloat16" else 2e-5
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), want, got)


NOT_STORED = {"associative_scan", "sort", "linear_solve", "grad_inside", "embedding_and_head"}


@pytest.mark.parametrize("name", [n for n in CASES if n not in NOT_STORED])
def test_however_a_product_is_written_its_weight_is_stored_packed(name):
    fn, p, x = CASES[name], params(), batch()
    model = qjax.quantize(fn, p, x, recipe=INT4)
    read = {r.leaf for r in model.report.rows if r.leaf}
    for leaf in read:
        assert isinstance(model.params[leaf], QArray), model.report.text()
        elements = p[leaf].size
        assert model.params[leaf].nbytes == elements // 2 + elements  # 4-bit codes, a float32 scale for each 4
    assert not [n for n in model.report.notes if "dequantized" in n], model.report.notes


def test_whatever_is_quantized_may_be_fed_to_any_construct():
    for name, fn in CASES.items():
        x = batch()
        p = params()
        forced = {
            "w": quantize_array(p["w"], Int(8), in_axes=(0,)),
            "s": quantize_array(p["s"], Int(8), in_axes=(1,), stack_axes=(0,)),
        }
        rewritten = qjax.quantize(fn, p, x, recipe=INT8).bind(fn)
        want = fn(dequantized(forced), x)
        got = rewritten(forced, x)
        tolerance = 2e-2 if name == "bfloat16" else 2e-5
        jax.tree.map(
            lambda a, b, t=tolerance, name=name: np.testing.assert_allclose(a, b, rtol=t, atol=t, err_msg=name),
            want,
            got,
        )
