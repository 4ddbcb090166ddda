"""A bias and a residual inside the kernels: interpreters against float64 NumPy, and lowering for CUDA here."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import mosaic
import numpy as np
import pytest

from benchmarks.gpu_parts import endings
from qjax import ops
from qjax._compat import JAX_VERSION
from qjax.formats import Int
from qjax.kernels.dot.codes4x8 import codes4x8
from qjax.kernels.dot.codes8 import codes8
from qjax.kernels.dot.hopper import Schedule
from qjax.kernels.dot.rows8 import rows8
from qjax.kernels.dot.rows16 import Cut, rows16
from qjax.kernels.dot.words16 import words16

BOTH = ("bias", "residual")
G128, TOKEN = Int(4, group=128), Int(8, per="token")
interpreted = pytest.mark.skipif(JAX_VERSION < (0, 11), reason="the Mosaic GPU interpreter is usable from jax 0.11 on")


def drawn(names, tokens, n, dtype, count=2):
    """Terms far larger than a unit in the last place of the product; a bias of another dtype."""
    rng = np.random.default_rng(2)
    every = {
        "bias": jnp.asarray(rng.normal(size=(count, n)) * 100, jnp.bfloat16),
        "residual": jnp.asarray(rng.normal(size=(count, tokens, n)) * 100, dtype),
    }
    return {name: every[name] for name in names}


def f64(a):
    return np.asarray(a.astype(jnp.float32), np.float64)


def with_terms(product, terms):
    product = product + f64(terms["bias"])[:, None]
    return product + f64(terms["residual"]) if "residual" in terms else product


def activations(tokens, k, dtype):
    return jnp.asarray(np.random.default_rng(1).normal(size=(2, tokens, k)), dtype)


def check(y, want, dtype):
    """One rounding, of a sum in float32."""
    assert y.dtype == dtype and y.shape == want.shape
    off = np.abs(f64(y) - want)
    eps = {2: float(jnp.finfo(dtype).eps) / 2, 4: 1e-6}[y.dtype.itemsize]
    assert np.all(off <= eps * np.abs(want) * 1.01 + 2e-4)


@interpreted
@pytest.mark.parametrize(
    ("fmt", "n", "k", "tokens", "schedule", "dtype", "out", "names"),
    [
        pytest.param(G128, 200, 256, 3, Schedule(8, 2), jnp.bfloat16, None, BOTH, id="odd rows"),
        pytest.param(Int(4), 512, 256, 13, Schedule(8, 2, tall=2), jnp.float16, None, BOTH, id="tall, two tiles"),
        pytest.param(Int(8), 128, 256, 17, Schedule(16, 2), jnp.bfloat16, jnp.float32, BOTH, id="float32"),
        pytest.param(Int(8), 130, 256, 5, Schedule(8, 2, 2), jnp.float16, None, BOTH, id="K in parts"),
        pytest.param(G128, 128, 128, 2, Schedule(8, 2), jnp.bfloat16, None, ("bias",), id="a bias alone"),
    ],
)
def test_float_activations(fmt, n, k, tokens, schedule, dtype, out, names):
    w, numbers = mosaic.weight(fmt, n, k, (2,))
    x, out = activations(tokens, k, dtype), jnp.dtype(out or dtype)
    terms, packed = drawn(names, tokens, n, out), ops.pack(w)
    aux = {name: a.reshape(2, -1) for name, a in packed.aux.items()}
    how = {"n": n, "out_dtype": out, "schedule": schedule, "terms": terms}
    with mosaic.interpreter() as interpret:
        y = words16(aux, x, planes=packed.fmt.planes, interpret=interpret, **how)
        y, races = jax.block_until_ready(y), mosaic.races_found()
    check(y, with_terms(np.einsum("emk,enk->emn", f64(x), numbers), terms), out)
    assert not races


@interpreted
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("bits", [4, 8])
def test_codes(bits, splits):
    n, k, tokens = 128, 512, 5
    w, numbers = mosaic.weight(Int(bits), n, k, (2,))
    x = jnp.asarray(np.random.default_rng(1).integers(-128, 128, (2, tokens, k)), jnp.int8)
    scale = jnp.asarray(np.random.default_rng(3).uniform(1e-4, 2e-4, (2, tokens)), jnp.float32)
    terms = drawn(BOTH, tokens, n, jnp.bfloat16)
    how = {"out_dtype": jnp.dtype(jnp.bfloat16), "schedule": Schedule(8, 2, splits), "terms": terms}
    with mosaic.interpreter() as interpret:
        if bits == 8:
            y = codes8(w.codes, w.aux["scale"][..., 0], x, scale, interpret=interpret, **how)
        else:
            p = ops.pack(w, "mosaic_int8")
            aux = [p.aux[name].reshape(2, -1) for name in ("tiles", "scale")]
            y = codes4x8(aux[0], None, aux[1], x, scale, fmt=p.fmt, n=n, interpret=interpret, **how)
        y, races = jax.block_until_ready(y), mosaic.races_found()
    check(y, with_terms(np.einsum("emk,enk,em->emn", f64(x), numbers, f64(scale)), terms), jnp.bfloat16)
    assert not races


@pytest.mark.parametrize("splits", [1, 2])
def test_triton(splits):
    n, k, tokens, cut = 40, 128, 19, Cut(32, 16, 64, splits)
    terms = drawn(BOTH, tokens, n, jnp.float16)
    how = {"out_dtype": jnp.dtype(jnp.float16), "cut": cut, "terms": terms, "interpret": True}
    w, numbers = mosaic.weight(Int(4), n, k, (2,))
    x = activations(tokens, k, jnp.float16)
    y = rows16(w.codes, w.aux["scale"], None, x, fmt=w.fmt, **how)
    check(y, with_terms(np.einsum("emk,enk->emn", f64(x), numbers), terms), jnp.float16)
    w, numbers = mosaic.weight(Int(8), n, k, (2,))
    codes = jnp.asarray(np.random.default_rng(1).integers(-128, 128, (2, tokens, k)), jnp.int8)
    scale = jnp.full((2, tokens), 1e-3, jnp.float32)
    y = rows8(w.codes, w.aux["scale"][..., 0], codes, scale, **how)
    check(y, with_terms(np.einsum("emk,enk->emn", f64(codes), numbers) * np.float64(np.float32(1e-3)), terms), y.dtype)


def test_what_a_device_will_be_asked():
    """The comparisons of `python -m benchmarks.gpu`, here with the lowering of this machine, right and then wrong."""

    def made(n, k):  # whole numbers, which this machine does not round
        w, _ = mosaic.weight(Int(4), n, k)
        return dataclasses.replace(w, aux={"scale": jnp.ones((n, 1))}), np.asarray(w.unpacked(), np.float64)

    found = endings.weight_only("K int4", "bfloat16", made, ops.q_dot, quick=True)
    assert {row["kernel"] for row in found} == {"K int4 + bias + residual, bfloat16", "K int4 + bias, bfloat16"}
    assert len(found) == 6 and all(row["right"] for row in found)
    late = lambda x, w, bias, residual, out_dtype: (  # noqa: E731 (rounded twice)
        (ops.q_dot(x, w, bias=bias) + (0 if residual is None else residual)).astype(out_dtype)
    )
    wrong = [row["right"] for row in endings.weight_only("K", "bfloat16", made, late, quick=True)]
    assert wrong == [False, False, True] * 2


# Tier 0.


def lowered(w, x, bias, residual, act=None, kind="NVIDIA H200", **how):
    """What XLA is given: the number of kernels, and of additions beside them."""

    def run(x, w, bias, residual):
        given = (act, ops.activation_aux(x, act)) if act else None
        return ops.q_dot(x, w, act=given, bias=bias, residual=residual, **how)

    with mosaic.described_gpu(kind):
        text = jax.jit(run).trace(x, w, bias, residual).lower(lowering_platforms=("cuda",)).as_text()
    return text.count("custom_call @mosaic_gpu") + text.count("__gpu$xla.gpu.triton"), text.count("stablehlo.add ")


@pytest.mark.parametrize(
    ("fmt", "n", "tokens", "dtype", "target", "how"),
    [
        (G128, 32768, 7, jnp.bfloat16, "mosaic", {}),
        (G128, 20000, 300, jnp.float16, "mosaic", {}),
        (Int(8, group=128), 32768, 64, jnp.bfloat16, "mosaic", {"out_dtype": jnp.float32}),
        (Int(4), 32768, 9, jnp.bfloat16, "mosaic_int8", {"act": TOKEN}),
        (G128, 32768, 20, jnp.bfloat16, None, {"kind": "NVIDIA A100-SXM4-80GB"}),
    ],
)
def test_one_kernel_and_no_addition_beside_it(fmt, n, tokens, dtype, target, how):
    def weight():
        w = mosaic.blank(fmt, n, 512)
        return ops.pack(w, target) if target else w

    shape = jax.ShapeDtypeStruct
    out = how.get("out_dtype", dtype)
    args = jax.eval_shape(weight), shape((tokens, 512), dtype), shape((n,), jnp.bfloat16)
    assert lowered(*args, shape((tokens, n), out), **how) == (1, 0)
    if how == {} and n == 32768:  # a residual that the kernel does not take
        assert lowered(*args, shape((tokens, n), jnp.float32)) == (1, 2)
        assert lowered(jax.eval_shape(lambda: ops.pack(mosaic.blank(fmt, n, 512), parts=(2, 1))), *args[1:], None) == (
            2,
            0,
        )
