"""Logarithmic activations as digits of an integer; `test_lowerings.py` has the suite of the lowering."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from qjax import ops
from qjax.errors import LoweringError
from qjax.formats import Int, Log, quantize_array
from qjax.kernels.dot.log_digits import DIGIT, digits


def test_digits_are_those_of_the_numbers():
    for fmt in (Log(b, q, zero=z) for b in (2, 3, 4, 5) for q in (10, 21, 24, 37, 90) for z in ("mask", "reserve")):
        table, most = digits(fmt)
        assert table.min() >= 0 and table.max() < 2**DIGIT and table[-1].any()
        whole = sum(row.astype(object) * 2 ** (DIGIT * p) for p, row in enumerate(table))
        values = np.array([int(u) / (2**most * fmt.tables()[2]) for u in whole])
        np.testing.assert_allclose(values, fmt.values(), rtol=1e-14, atol=0)
    assert [len(digits(Log(b, q, zero="mask"))[0]) for b, q in ((3, 21), (3, 22), (4, 24), (4, 25), (4, 41))] == [
        1,
        2,
        2,
        3,
        3,
    ]


def test_its_product_and_what_it_refuses():
    rng = np.random.default_rng(0)
    x = np.abs(rng.standard_normal((5, 40))).astype(np.float32)
    w = quantize_array(rng.standard_normal((6, 40)).astype(np.float32), Int(4, symmetric=False), in_axes=1)
    fmt = Log(4, 24, zero="mask", shift=0.17, folded=True)
    aux = {"scale": np.full((1, 1), 2.5, np.float32)}
    run = jax.jit(lambda x, how, fmt: ops.q_dot(x, w, act=(fmt, aux), implementation=how), static_argnums=(1, 2))
    want = np.asarray(fmt.decode(fmt.encode(x, aux), aux), np.float64) @ np.asarray(w.dequantize(), np.float64).T
    np.testing.assert_allclose(run(x, "log_digits", fmt), want, rtol=2e-6, atol=2e-6)
    chosen = {q: ops.choose("dot", w.fmt, Log(3, q, shift=0.17, folded=True), (5, 6, 40), "cpu").name for q in (21, 58)}
    assert chosen == {21: "log_digits", 58: "dequantize"}
    for other, why in ((Log(6, 25), "7 digits"), (Log(4, 24, shift=0.17), "not folded"), (Int(8), "not logarithmic")):
        with pytest.raises(LoweringError, match=why):
            ops.q_dot(x, w, act=(other, aux), implementation="log_digits")
