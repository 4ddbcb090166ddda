"""Blocks of a model that lies on eight devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import qjax
from qjax.statistics import ChannelRange, Samples, SecondMoment

GPTQ = qjax.Recipe([qjax.Rule("**", weights=qjax.Int(4, group=8, scale="qmax"), rounding=qjax.GPTQ())])


@pytest.mark.every(6)
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("what", ["batches", "weights", "both"])
def test_equals_that_on_one_device(kind, what):
    axis = getattr(jax.sharding.AxisType, kind)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis,) * 2)
    spec, place = jax.sharding.PartitionSpec, jax.sharding.NamedSharding
    rng = np.random.default_rng(0)
    p = {"up": rng.standard_normal((2, 16, 32)) / 4, "down": rng.standard_normal((2, 32, 16)) / 6}
    p = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), p)
    xs = [jnp.asarray(rng.standard_normal((16, 16)), jnp.float32) for _ in range(2)]
    out = None

    def fn(p, x):
        def layer(h, w):
            up = jnp.einsum("bi,io->bo", h, w["up"])
            return jnp.einsum("bi,io->bo", jnp.tanh(up), w["down"], out_sharding=out), None

        return lax.scan(layer, x, p)[0]

    statistics = {"**": (SecondMoment(), ChannelRange(), Samples(count=4))}
    state = qjax.calibrate(fn, p, xs, statistics=statistics)
    model = qjax.quantize(fn, p, recipe=GPTQ, batches=xs)
    want = model(model.params, xs[0])
    sharded, rows = p, xs
    if what in ("weights", "both"):
        specs = {"up": spec(None, None, "model"), "down": spec(None, "model", None)}
        sharded = {name: jax.device_put(p[name], place(mesh, specs[name])) for name in p}
    if what in ("batches", "both"):
        rows = [jax.device_put(x, place(mesh, spec("data"))) for x in xs]
    if kind == "Explicit":
        sharded = jax.tree.map(lambda a: jax.device_put(a, place(mesh, spec())) if sharded is p else a, sharded)
        rows = [jax.device_put(x, place(mesh, spec())) if rows is xs else x for x in rows]
        out = spec("data" if what != "weights" else None, None)
    with jax.set_mesh(mesh):
        again = qjax.calibrate(fn, sharded, rows, statistics=statistics)
        for name, fields in state.items():
            for field, value in fields.items():
                if what == "batches" or not field.startswith("sample"):  # other last bits draw another sample
                    np.testing.assert_allclose(value, again[name][field], rtol=1e-4, atol=1e-4)
        spread = qjax.quantize(fn, sharded, recipe=GPTQ, batches=rows)
        for name in p:
            one, other = (np.asarray(m.params[name].dequantize()) for m in (model, spread))
            assert np.mean(np.abs(one - other) > 1e-3) < 0.02
        got = spread(spread.params, rows[0])
    np.testing.assert_allclose(got, want, atol=0.1)
