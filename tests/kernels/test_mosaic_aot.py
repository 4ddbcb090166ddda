"""Tier 2 of the GPU kernels: compiled ahead of time for sm_90a, where the CUDA plugin of jax and a toolkit are."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest

from benchmarks import aot, kernel_cases, kernel_states


@pytest.mark.parametrize("family", kernel_cases.FAMILIES)
def test_the_table_has_every_kernel_and_no_fault(family):
    kernels = aot.stored(family)["kernels"]
    assert list(kernels) == [case.name for case in kernel_cases.cases(family)]
    assert not [name for name, found in kernels.items() if aot.faults(found)]


def test_what_is_a_fault():
    good = next(iter(aot.stored("weights16")["kernels"].values()))
    for key, value, why in [
        ("spilled_bytes", 16, "spilled_bytes is 16"),
        ("stack_bytes", 32, "stack_bytes is 32"),
        ("local", 1, "local is 1"),
        ("I2F", 4, "I2F is 4"),
        ("HGMMA", 0, "HGMMA is missing"),
        ("multiplies", "QGMMA", "QGMMA is missing"),
        ("warnings", ["C7512"], "warning C7512"),
        ("shared_bytes", 300000, "300000 bytes of shared memory"),
    ]:
        assert aot.faults({**copy.deepcopy(good), key: value}) == [why]
    assert aot.compared({**good, "registers": 1}, good) and not aot.compared(good, good) and aot.compared(good, None)


def test_what_a_device_said_counts_for_the_same_kernels(monkeypatch, tmp_path):
    family = kernel_cases.FAMILIES[0]
    now = kernel_cases.written_in(family)
    row = {"kernel": "K", "right": True}
    part = {"checks": [row], "written_in": now}
    record = {"environment": {"device": "G", "date": "D"}, "parts": {family: part}}
    assert kernel_states.on_device("K, 8 tokens", family, [record]) == "1 of 1 right (G, D)"
    for path in kernel_cases.SOURCES[family]:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("# said\n" + (kernel_cases.QJAX / path).read_text())
    monkeypatch.setattr(kernel_cases, "QJAX", tmp_path)
    assert kernel_cases.written_in(family) == now
    (tmp_path / path).write_text("x = 1")
    assert kernel_states.on_device("K, 8 tokens", family, [record]).startswith("unmeasured; an earlier form: 1 of 1")


@pytest.mark.slow
def test_the_page_is_up_to_date():
    page = kernel_states.PAGE.read_text()
    assert kernel_states.renewed(page) == page, "run python -m benchmarks.kernel_states"


@pytest.mark.parametrize("command", [["benchmarks.aot", "--check"], ["benchmarks.aot_sharded"]], ids=["one", "four"])
def test_compiled_for_hopper(root, command):
    tools = aot.toolkit()
    if isinstance(tools, str):
        pytest.skip(f"cannot compile for CUDA here: {tools}")
    command = [sys.executable, "-m", *command]
    done = subprocess.run(
        command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
