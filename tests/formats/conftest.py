"""One compiled function for what most tests of formats do, shared over the folder."""

from __future__ import annotations

import functools

import jax
import pytest


@functools.partial(jax.jit, static_argnums=0)
def _roundtrip(fmt, x):
    aux = fmt.fit(x)
    codes = fmt.encode(x, aux)
    return aux, codes, fmt.decode(codes, aux)


@pytest.fixture(scope="session")
def roundtrip():
    """Call with (format, x) to get (aux, codes, decoded)."""
    return _roundtrip
