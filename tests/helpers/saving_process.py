"""One of two processes that save and load together: ``python saving_process.py INDEX PORT FOLDER``."""

from __future__ import annotations

import dataclasses
import sys

import jax
import numpy as np

import qjax

INDEX, PORT, FOLDER = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(f"localhost:{PORT}", num_processes=2, process_id=INDEX)


def apply(params, x):
    return x @ params["w"] + params["b"]


def placed(value, sharding):
    value = np.asarray(value)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


x = np.ones((2, 32), np.float32)
params = {"w": np.random.default_rng(0).normal(size=(32, 16)).astype(np.float32), "b": np.zeros(16, np.float32)}
mesh = jax.make_mesh((jax.device_count(),), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
specs = {"w": jax.sharding.PartitionSpec(None, "d"), "b": jax.sharding.PartitionSpec()}
named = {name: jax.sharding.NamedSharding(mesh, spec) for name, spec in specs.items()}

model = qjax.quantize(apply, params, x, recipe="W8A16")
shardings = qjax.plan(apply, params, x, recipe="W8A16").shardings(named)
model = dataclasses.replace(model, params=jax.tree.map(placed, model.params, shardings))
for _ in range(2):
    folder = qjax.save(FOLDER, model)
loaded = qjax.load(FOLDER, apply, params, shardings=named)
for a, b in zip(jax.tree.leaves(loaded.params), jax.tree.leaves(model.params), strict=True):
    assert a.sharding == b.sharding
    for one, other in zip(a.addressable_shards, b.addressable_shards, strict=True):
        assert np.array_equal(one.data, other.data)
assert not loaded.params["w"].codes.is_fully_addressable
try:
    qjax.save(__file__, model)
except qjax.errors.CheckpointError as error:
    print(f"{folder.name} {error}")
