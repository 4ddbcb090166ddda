"""The plugin of examples/ as those have it who install it: found by its entry point, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import numpy as np
import qjax
fn = lambda p, x: x @ p["w"]
p = {"w": np.random.default_rng(0).standard_normal((64, 8)).astype(np.float32)}
x = np.ones((2, 64), np.float32)
recipe = qjax.Recipe.from_toml(FOLDER + "/recipe.toml")
model = qjax.quantize(fn, p, x, recipe=recipe)
print(model.params["w"].fmt.name, model.report.stored_bytes)
qjax.save(OUT, model)
again = qjax.load(OUT, fn)
np.testing.assert_array_equal(again(again.params, x), model(model.params, x))
"""


@pytest.fixture
def environment(root, tmp_path):
    """As after ``pip install ./examples/plugin``, which the network is not asked for here: module and metadata."""
    info = tmp_path / "site" / "qjax_ternary-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: qjax-ternary\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text("[qjax.plugins]\nternary = qjax_ternary\n")
    path = os.pathsep.join(map(str, (root, tmp_path / "site", root / "examples" / "plugin")))
    return {**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}


def test_a_recipe_and_a_checkpoint_find_the_plugin(root, tmp_path, environment):
    folder = root / "examples" / "plugin"
    text = SCRIPT.replace("FOLDER", repr(str(folder))).replace("OUT", repr(str(tmp_path / "model")))
    run = subprocess.run([sys.executable, "-c", text], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split()[:2] == ["ternary", "g32"]


@pytest.mark.slow
def test_its_own_tests_pass(root, environment):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", "."]
    run = subprocess.run(
        [*command, "tests"],
        cwd=root / "examples" / "plugin",
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
