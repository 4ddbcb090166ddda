"""The project around the code: public names, links, packaging, and the commands that the README promises."""

from __future__ import annotations

import ast
import fnmatch
import os
import re
import subprocess
import sys
import tomllib

import pytest

import qjax

LINKS = ("passes", "kernels", "models")


@pytest.fixture(scope="module")
def pyproject(root) -> dict:
    return tomllib.loads((root / "pyproject.toml").read_text())


def python(root, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)


def sources(root, *folders: str):
    """Every Python file below the folders with its syntax tree; links are not followed."""
    for folder in folders:
        for path in sorted((root / folder).rglob("*.py")):
            yield path, ast.parse(path.read_text(), str(path))


def imported(tree: ast.Module):
    """The module names that the absolute imports in a file name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module


# Public names


def test_importing_qjax_imports_no_jax(root):
    run = python(root, "import sys, qjax; print('jax' in sys.modules, 'numpy' in sys.modules)")
    assert run.stdout.split() == ["False", "False"], run.stderr


@pytest.mark.parametrize("name", qjax.__all__)
def test_every_public_name_is_there(name):
    assert getattr(qjax, name) is not None and name in dir(qjax)


def test_what_the_type_checker_sees_is_what_there_is(root):
    tree = ast.parse((root / "qjax/__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == qjax._HOME | dict.fromkeys(qjax._SUBMODULES, "qjax")
    assert sorted(qjax.__all__) == sorted(
        {*seen, *"Recipe Rule dynamic ema fixed learned recipe recipes static".split()}
    )


def test_a_public_function_has_no_module_of_its_name(root):
    """Importing a submodule binds its name in the package; ``recipe`` is imported early for that reason."""
    modules = {path.stem for path in (root / "qjax").iterdir()}
    assert modules & {*qjax.__all__} - {*qjax._SUBMODULES} == {"recipe"}
    assert callable(qjax.recipe)


def test_a_missing_name_is_an_attribute_error(monkeypatch):
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        _ = qjax.quantise
    monkeypatch.setitem(qjax._HOME, "absent", "qjax.not_there")
    with pytest.raises(AttributeError, match=r"qjax\.absent lives in the module qjax\.not_there"):
        _ = qjax.absent


# Links


@pytest.mark.parametrize("name", LINKS)
def test_a_link_is_for_reading_only(root, name):
    assert (root / name).is_symlink() and os.readlink(root / name) == f"qjax/{name}"
    run = python(root, f"import {name}")
    assert run.returncode == 1
    assert f"ImportError: the folder '{name}' at the top level is a link" in run.stderr


def test_nothing_imports_through_the_links(root):
    through = [
        f"{path.relative_to(root)}: {module}"
        for path, tree in sources(root, "qjax", "tests", "examples", "benchmarks")
        for module in imported(tree)
        if module.split(".")[0] in LINKS
    ]
    assert not through


# Packaging


def test_the_listed_packages_are_those_in_the_tree(root, pyproject):
    found = {".".join(path.parent.relative_to(root).parts) for path in (root / "qjax").rglob("__init__.py")}
    assert sorted(found) == sorted(pyproject["tool"]["setuptools"]["packages"])
    homeless = {path.parent for path in (root / "qjax").rglob("*.py") if not (path.parent / "__init__.py").exists()}
    assert not homeless, "folders with Python files and no __init__.py are not packaged"


def test_data_files_are_packaged(root, pyproject):
    data = pyproject["tool"]["setuptools"]["package-data"]
    made = (".py", ".pyc", ".so")  # setup.py packages the library that it compiles
    files = [p for p in (root / "qjax").rglob("*") if p.is_file() and p.suffix not in made]
    files = [p for p in files if not any(part.startswith(".") for part in p.relative_to(root).parts)]
    left = [p for p in files if not any(fnmatch.fnmatch(p.name, g) for g in data["*"])]
    listed = [
        p for name, globs in data.items() if name != "*" for g in globs for p in (root / name.replace(".", "/")).glob(g)
    ]
    assert not set(left) - set(listed)


def test_every_import_is_a_declared_dependency(root, pyproject):
    extras = pyproject["project"]["optional-dependencies"]
    wanted = pyproject["project"]["dependencies"] + [
        requirement for name in ("hf", "lm-eval", "optuna", "tensorboard") for requirement in extras[name]
    ]
    declared = {re.split(r"[^A-Za-z0-9_-]", requirement)[0].replace("-", "_") for requirement in wanted}
    declared = {{"pillow": "PIL", "orbax_checkpoint": "orbax"}.get(name, name) for name in declared}
    optional = {"equinox", "hypothesis", "pytest"}  # of the user's own environment: from_equinox, qjax.testing
    undeclared = {
        f"{path.relative_to(root)}: {module}"
        for path, tree in sources(root, "qjax")
        for module in imported(tree)
        if module.split(".")[0] not in {*sys.stdlib_module_names, "qjax", *declared, *optional}
    }
    assert not undeclared


# Commands


def test_the_commands_of_the_readme_exist(root):
    promised = set(re.findall(r"^make (\w+)", (root / "README.md").read_text(), re.MULTILINE))
    assert {"demo", "test"} <= promised
    for target in promised:
        run = subprocess.run(["make", "-n", target], cwd=root, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr


def test_ci_runs_the_readmes_test_command(root):
    script = root / ".ci/run"
    assert os.access(script, os.X_OK) and "make test" in script.read_text()
    assert subprocess.run(["bash", "-n", script]).returncode == 0


def test_no_paths_of_one_machine_in_the_tree(root):
    command = ["git", "grep", "-nIE", "(^|[^A-Za-z0-9._])/(work|root|home)/[A-Za-z.]"]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if run.returncode > 1:
        pytest.skip("not a git checkout")
    assert run.stdout == ""
