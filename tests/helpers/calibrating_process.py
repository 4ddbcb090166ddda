"""One of two processes that calibrate and save together: ``python calibrating_process.py INDEX PORT FOLDER``.

The test imports the model and its batches from here, and does the same alone.
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import qjax

INT8 = qjax.Int(8, per="tensor")
RECIPE = qjax.Recipe(
    [
        qjax.Rule("w", weights=qjax.Int(4, group=8), inputs=qjax.static(INT8, qjax.Percentile(99.0))),
        qjax.Rule("v", weights=qjax.Int(8), inputs=qjax.static(qjax.Int(8, per="tensor", symmetric=False))),
    ]
)


def apply(params, x, out=None):
    """Two products; the sum over a split axis goes where ``out`` says."""
    y = jnp.tanh(jnp.einsum("btd,df->btf", x, params["w"])) + params["b"]
    return jnp.einsum("btf,fd->btd", y, params["v"], out_sharding=out)


def model():
    """Its parameters, on the host."""
    rng = np.random.default_rng(0)
    shapes = {"w": (32, 16), "v": (16, 8), "b": (16,)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def batches():
    """Of which each process has every second one, or half the rows of each; the widest is the last."""
    return [(1 + i) * np.random.default_rng(i).normal(size=(8, 3, 32)).astype(np.float32) for i in range(4)]


def each_its_own(index: int, folder: Path) -> None:
    """Every process calibrates by itself on whole batches, and their states are merged."""
    own, params = batches()[index::2], model()
    state = qjax.calibrate(apply, params, own, recipe=RECIPE)
    try:
        qjax.save(folder / "unmerged", qjax.quantize(apply, params, own[0], recipe=RECIPE, state=state))
    except qjax.errors.CheckpointError as error:
        print(error)
    state = qjax.observe(apply, RECIPE).merge_processes(state, params, own[0])
    qjax.save(folder / "own", qjax.quantize(apply, params, own[0], recipe=RECIPE, state=state))


def over_a_mesh(kind: AxisType, folder: Path) -> None:
    """Rows of every batch and columns of the weights are split over all devices of both processes."""
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(kind,) * 2)
    specs = {"w": P(None, "model"), "v": P("model", None), "b": P("model")}

    def put(value, spec):
        return jax.make_array_from_callback(value.shape, NamedSharding(mesh, spec), lambda index: value[index])

    params = {name: put(value, specs[name]) for name, value in model().items()}
    rows = [put(x, P("data")) for x in batches()]
    fn = apply if kind is AxisType.Auto else lambda p, x: apply(p, x, P("data"))
    with jax.set_mesh(mesh):
        state = qjax.calibrate(fn, params, rows, recipe=RECIPE)
        packed = qjax.quantize(fn, params, rows[0], recipe=RECIPE, state=state)
        assert not packed.params["w"].codes.is_fully_addressable
        assert packed(packed.params, rows[0]).shape == (8, 3, 8)
        qjax.save(folder / kind.name, packed)
        try:
            qjax.observe(fn, RECIPE).merge_processes(state, params, rows[0])
        except qjax.errors.DataError as error:
            print(error)


if __name__ == "__main__":
    jax.distributed.initialize(f"localhost:{sys.argv[2]}", num_processes=2, process_id=int(sys.argv[1]))
    each_its_own(int(sys.argv[1]), Path(sys.argv[3]))
    for kind in (AxisType.Auto, AxisType.Explicit):
        over_a_mesh(kind, Path(sys.argv[3]))
