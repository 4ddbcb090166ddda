"""What a plugin tests: qjax's own property suites, and one oracle of its own."""

import jax.numpy as jnp
import numpy as np
import pytest
from qjax_ternary import THRESHOLD, Ternary

import qjax


@pytest.mark.parametrize("group", [None, 4, 32])
def test_the_format_keeps_its_promises(group):
    qjax.testing.check_format(Ternary(group), nearest=False, examples=5)  # the code -2 could be stored and is not used


def test_the_kernel_equals_the_oracle():
    qjax.testing.check_lowering("dot", "scale_after", weights=[Ternary()], examples=5)


def test_scales_are_those_of_the_paper():
    w = np.random.default_rng(0).standard_normal((5, 24)).astype(np.float32)
    size = np.abs(w)
    large = size > THRESHOLD * size.mean(-1, keepdims=True)
    want = (size * large).sum(-1, keepdims=True) / large.sum(-1, keepdims=True)
    np.testing.assert_allclose(Ternary().fit(jnp.asarray(w))["scale"], want, rtol=1e-6)
