"""Costs of one site: the table of multiply-adds, monotone in what it should be, and any format."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from qjax.errors import DeviceError
from qjax.formats import MXFP4, MXFP8, NF4, NVFP4, Affine, Float8, Int, quantize_array
from qjax.hardware import Accelerator, Efficiency, cost, device, stored_bits
from qjax.hardware.objective import mac, memories, operations

TOKEN = Int(8, per="token")
EVERY = [
    None,
    Int(8),
    Int(4, group=128),
    Int(3, group=64),
    Int(4, symmetric=False),
    NF4(),
    MXFP4(),
    MXFP8(),
    NVFP4(),
    Float8(),
    Affine(4),
]


def test_the_table_of_single_operations():
    ops = operations()
    assert (ops["int8_add"]["pj"], ops["int32_multiply"]["um2"], ops["fp16_multiply"]["pj"]) == (0.03, 3495, 1.1)
    assert len(ops) == 9 and memories()["dram"]["pj"] == 1300


@pytest.mark.parametrize(
    ("weights", "act", "pj", "um2"),
    [
        (None, None, 2.0, 5824),
        (Int(8), TOKEN, 0.30, 419),
        (Int(4, group=128), TOKEN, 0.175, 244),
        (Int(4, group=128), None, 1.3, 4780),
    ],
)
def test_multiply_adds_of_the_paper_note(weights, act, pj, um2):
    made = mac(weights, act)
    assert made.pj == pytest.approx(pj, abs=1e-3) and made.um2 == pytest.approx(um2, abs=1)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_offsets_are_integers_to_the_models(bits):
    """Products of `Affine` are formed on codes: cycles of integers, and bytes with the offsets."""
    act = Affine(bits, per="tensor")
    assert mac(Affine(bits), act) == mac(Int(bits), Int(bits, per="tensor", symmetric=False))
    compute_bound = dict(rows=1 << 16, on=Accelerator(bandwidth=1e15))
    ours = cost((512, 512), weights=Affine(bits), act=act, **compute_bound)
    assert (
        ours["seconds"] == cost((512, 512), weights=Int(bits), act=Int(bits, per="tensor"), **compute_bound)["seconds"]
    )
    assert ours["bytes"] == stored_bits(Affine(bits), (512, 512)) * 512 * 512 / 8


def test_group_dequantization_is_small():
    made = mac(Int(4, group=128), TOKEN)
    assert made.scaled_pj == pytest.approx(4.6) and made.scaled_pj / 128 == pytest.approx(0.036, abs=1e-3)
    assert mac(NF4(), None).decoded_pj == pytest.approx(1.5)


@pytest.mark.parametrize("fmt", EVERY)
def test_bits_are_those_stored(fmt):
    w = jnp.asarray(np.random.default_rng(0).standard_normal((48, 256)), jnp.float32)
    want = 16 if fmt is None else quantize_array(w, fmt, in_axes=1).nbytes * 8 / w.size
    assert stored_bits(fmt, (48, 256)) == want


def test_a_short_row_has_one_group():
    assert stored_bits(Int(4, group=128), (8, 64)) == stored_bits(Int(4, group=64), (8, 64))


@pytest.mark.parametrize("fmt", EVERY)
@pytest.mark.parametrize("on", ["h200", "tpu-v5e", Accelerator()])
def test_any_format_anywhere(fmt, on):
    for act in (None, TOKEN, Float8(per="token")):
        made = cost((256, 512), 16, fmt, act, on=on)
        assert made["seconds"] > 0 and made["bytes"] > 0
        assert ("area" in made) == isinstance(on, Accelerator)
        if made["joules"] is not None:
            assert made["joules"] > 0


def test_a_device_by_hand():
    on = device("h200")
    made = cost((4096, 4096), 1, Int(8), on=on)
    moved = 4096 * 4096 + 4 * 4096 + 2 * (4096 + 4096)
    assert made["bytes"] == 4096 * 4096 + 4 * 4096 and made["seconds"] == pytest.approx(moved / 4.8e12)
    assert made["joules"] == pytest.approx(made["seconds"] * 700)
    many = cost((4096, 4096), 4096, Int(8), TOKEN, on=on)
    assert many["seconds"] == pytest.approx(2 * 4096**3 / 1979e12)
    assert cost((4096, 4096), 4096, Int(8), on=on)["seconds"] == pytest.approx(2 * 4096**3 / 989e12)
    half = cost((4096, 4096), 1, Int(8), on=on, efficiency=Efficiency(0.5, 0.5, 0, 0))
    assert half["seconds"] == pytest.approx(2 * made["seconds"])


def test_an_array_by_hand():
    on = Accelerator()
    made = cost((1024, 512), 64, Int(4, group=128), TOKEN, on=on)
    macs, bits = 64 * 1024 * 512, stored_bits(Int(4, group=128), (1024, 512))
    moved = 1024 * 512 * bits + 64 * 512 * 8 + 64 * 1024 * 32
    elements = on.area / (282 * 0.5 + 137 * 0.75)
    seconds = max(macs / elements / 500e6, moved / 8 / 64e9)
    pj = macs * 0.175 + 64 * 1024 * 4 * 4.6 + moved * 1300 / 64
    pj += (macs * (bits + 8) / 32 + 64 * 1024 * 32) * 20 / 64
    assert made["seconds"] == pytest.approx(seconds) and made["joules"] == pytest.approx(pj * 1e-12)


def test_energy_does_not_fall_with_bits():
    made = [cost((512, 512), 64, Int(b, group=128), TOKEN, on=Accelerator()) for b in (2, 3, 4, 6, 8)]
    for name in ("seconds", "joules", "bytes", "area"):
        values = [m[name] for m in made]
        assert values == sorted(values), name


def test_one_row_goes_with_the_bits():
    on = Accelerator(dram_pj=1e-9, sram_pj=1e-9)
    seconds = [cost((4096, 4096), 1, f, TOKEN, on=on)["seconds"] for f in (Int(8), Int(4))]
    assert seconds[1] / seconds[0] == pytest.approx(stored_bits(Int(4), (4096, 4096)) / 8, rel=0.01)


def test_repeats_multiply_all_but_area():
    one, three = (cost((64, 64), 4, Int(4), on=Accelerator(), repeats=r) for r in (1, 3))
    assert three["area"] == one["area"]
    assert all(three[n] == pytest.approx(3 * one[n]) for n in ("seconds", "joules", "bytes", "flops"))


@pytest.mark.parametrize("given", [{"rows": 0}, {"shape": (0, 4)}, {"repeats": 0}, {"on": "h300"}])
def test_what_cannot_be(given):
    with pytest.raises(DeviceError):
        cost(**{"shape": (8, 8), "rows": 1, "weights": Int(4), "on": "h200", **given})
    with pytest.raises(DeviceError, match="area is 0"):
        Accelerator(area=0)
