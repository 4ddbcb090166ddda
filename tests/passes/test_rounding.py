"""Round to nearest."""

from __future__ import annotations

import os

import jax
import numpy as np
import pytest

from qjax.calibration import MSE
from qjax.errors import FormatError
from qjax.formats import Int, assemble, quantize_array
from qjax.passes import RTN, Rounding

W = np.random.default_rng(0).standard_t(3, (12, 40)).astype(np.float32)


def test_it_is_what_quantize_array_does():
    fmt = Int(4, group=16)
    codes, aux = jax.jit(lambda w: RTN().round(w, fmt))(W)
    q = assemble(codes, aux, fmt, shape=W.shape, in_axes=1)
    np.testing.assert_array_equal(q.codes, quantize_array(W, fmt, in_axes=1).codes)


def test_the_observer_given_goes_before_its_own():
    fmt = Int(4)

    def error(codes_aux):
        return float(np.square(fmt.decode(*codes_aux) - W).sum())

    plain, own, given = (
        error(RTN().round(W, fmt)),
        error(RTN(MSE()).round(W, fmt)),
        error(RTN().round(W, fmt, observer=MSE())),
    )
    assert own == given < plain


def test_protocol_and_settings():
    assert isinstance(RTN(), Rounding) and not RTN.needs_batches and RTN(MSE()) == RTN(MSE())
    if not os.environ.get("QJAX_BEARTYPE"):  # which refuses it first
        with pytest.raises(FormatError, match="an observer such as"):
            RTN("mse")
