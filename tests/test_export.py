"""A quantized model as StableHLO: written here, run by a process that never sees the function."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import qjax

SCRIPT = """
import jax, numpy as np, qjax.formats  # which tells jax.export what a QArray is
folder = FOLDER
exported = jax.export.deserialize(bytearray(open(folder + "/model.bin", "rb").read()))
params = qjax.load(folder + "/model", lambda p, x: x).params  # the function is in the file
rows = np.load(folder + "/rows.npy")
np.save(folder + "/out.npy", exported.call(params, rows))
"""


TOKEN = qjax.Int(8, per="token")
GRAINED = qjax.Recipe([qjax.Rule("**", weights=qjax.formats.DualGrained(32), inputs=TOKEN, clamp_group=True)])


@pytest.mark.every(2)
@pytest.mark.parametrize(
    "recipe", ["W4A16", "W8A8", "FP8_DYNAMIC", "PTQTP", GRAINED], ids=lambda r: r if isinstance(r, str) else "grained"
)
def test_a_new_process_runs_an_exported_model(root, tmp_path, recipe):
    def fn(p, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["layers"])[0] @ p["out"]

    rng = np.random.default_rng(0)
    p = {"layers": rng.standard_normal((3, 64, 64)) / 8, "out": rng.standard_normal((64, 5))}
    p, x = jax.tree.map(jnp.asarray, p), jnp.asarray(rng.standard_normal((7, 64)), jnp.float32)
    model = qjax.quantize(fn, p, x, recipe=recipe)
    (rows,) = jax.export.symbolic_shape("rows")
    spec = jax.ShapeDtypeStruct((rows, 64), jnp.float32)
    exported = jax.export.export(jax.jit(model))(jax.eval_shape(lambda p: p, model.params), spec)
    (tmp_path / "model.bin").write_bytes(exported.serialize())
    np.save(tmp_path / "rows.npy", x)
    qjax.save(tmp_path / "model", model)
    env = {**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    script = SCRIPT.replace("FOLDER", repr(str(tmp_path)))
    run = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), jax.jit(model)(model.params, x), rtol=1e-4, atol=1e-4)
