"""Descriptions of devices: what is known, and what a description may not say."""

from __future__ import annotations

import pytest

from qjax.errors import DeviceError
from qjax.hardware import Device, device, devices, read_device

MINE = 'name = "Mine"\nmemory_gb = 48\nbandwidth_tb_s = 0.9\ncapability = 8.9\n[tflops]\nbf16 = 180\n'


@pytest.mark.parametrize(
    ("name", "measured", "crossover"),
    [("A6000", False, 101), ("A100-80G", False, 76), ("H100", False, 148), ("H200", False, 103), ("H200", True, 115)],
)
def test_crossovers_of_the_study(name, measured, crossover):
    assert round(device(name).crossover(measured=measured)) == crossover


def test_the_devices_of_the_issue_are_there():
    assert set(devices()) == {"A100-80G", "H100", "H200", "L40S", "RTX4090", "A6000", "TPU-v5e"}
    assert all(d.price is None for d in devices().values()), "prices change; none is built in"


@pytest.mark.parametrize("spelled", ["h200", "H200", "h200-sxm", "A100", "a100-80g", "rtx-4090", "RTX 4090", "tpu_v5e"])
def test_names_in_any_spelling(spelled):
    assert device(spelled).name in devices()


def test_an_unknown_name_lists_all():
    with pytest.raises(DeviceError, match="unknown device 'h300' .did you mean 'H200' or 'H100'.*TPU-v5e"):
        device("h300")


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("A6000", {"bf16", "int8", "w4a16"}),
        ("A100-80G", {"bf16", "int8", "w4a16"}),
        ("L40S", {"bf16", "int8", "w4a16", "fp8"}),
        ("H100", {"bf16", "int8", "w4a16", "fp8", "w4afp8"}),
        ("TPU-v5e", {"bf16", "int8", "w4a16"}),
    ],
)
def test_gates(name, kinds):
    assert {k for k in ("bf16", "int8", "w4a16", "fp8", "w4afp8", "nvfp4") if device(name).supports(k)} == kinds


def test_blackwell_has_nvfp4():
    assert Device("B", 1e9, 1e12, {"bf16": 1e15}, capability=10.0).supports("nvfp4")


def test_a_file_of_ones_own(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(MINE.replace("capability", "price_per_hour = 1.5\ntdp_w = 300\ncapability"))
    mine = device(path)
    assert (mine.name, mine.memory, mine.bandwidth, mine.price, mine.tdp) == ("Mine", 48e9, 0.9e12, 1.5, 300)
    assert device(str(path)) == read_device(path) == mine and mine.peak("bf16") == 180e12
    with pytest.raises(DeviceError, match="Mine has no peak for fp8; it has bf16"):
        mine.peak("fp8")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (MINE.replace("memory_gb", "memory"), "unknown key 'memory'.*memory_gb"),
        (MINE.replace("memory_gb = 48", "memory_gb = 0"), "memory is 0"),
        (MINE.replace("memory_gb = 48", "memory_gb = nan"), "memory is nan"),
        (MINE.replace("memory_gb = 48", 'memory_gb = "48"'), "memory is '48'"),
        (MINE.replace("memory_gb = 48\n", ""), "lacks memory_gb"),
        (MINE.replace("capability = 8.9", ""), "neither a compute capability nor a list"),
        (MINE.replace("capability = 8.9", 'supports = ["int9"]'), "supports 'int9'"),
        (MINE.replace("capability = 8.9", "supports = 8"), "supported is a list"),
        (MINE.replace("bf16", "int8"), "no peak for bf16"),
        (MINE.replace("180", "-1"), "the peak of bf16 is -1"),
        (MINE.replace("[tflops]\nbf16 = 180", "tflops = 180"), "tflops is a table"),
        ("name = ", "no TOML"),
    ],
)
def test_bad_descriptions(tmp_path, text, says):
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(DeviceError, match=says):
        device(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(DeviceError, match="cannot be read"):
        device(tmp_path / "none.toml")
