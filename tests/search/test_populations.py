"""A population over devices is what one after the other is."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from qjax.errors import SearchError
from qjax.search import over_population


def one(genome, scale):
    return {"sum": (genome * scale).sum(), "most": genome.max()}


@pytest.mark.parametrize("size", [8, 11, 3])
@pytest.mark.parametrize("at_once", [1, 4])
def test_over_devices(size, at_once):
    genomes = jnp.asarray(np.random.default_rng(size).integers(0, 9, (size, 5)), jnp.int32)
    scale = jnp.arange(5)
    mesh = Mesh(np.array(jax.devices()), ("population",))
    made = jax.jit(over_population(one, at_once=at_once, mesh=mesh))(genomes, scale)
    np.testing.assert_array_equal(made["sum"], genomes @ scale)
    np.testing.assert_array_equal(made["most"], genomes.max(axis=1))


def test_what_cannot_be():
    mesh = Mesh(np.array(jax.devices()[:1]), ("x",))
    with pytest.raises(SearchError, match="the axes x and not 'population'"):
        over_population(one, mesh=mesh)
    with pytest.raises(SearchError, match="at_once=0"):
        over_population(one, at_once=0)
