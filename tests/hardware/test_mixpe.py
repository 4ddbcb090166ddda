"""MixPE: the cost model in both forms, and the numerics behind it."""

from __future__ import annotations

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qjax import ops
from qjax.errors import DeviceError
from qjax.formats import Int, quantize_array
from qjax.hardware.mixpe import (
    NETWORKS,
    PUBLISHED_ENERGY,
    PUBLISHED_TIME,
    array,
    arrays,
    compute_cycles,
    dequantizations,
    physical,
    released,
    run,
)
from qjax.hardware.shift_add import times_half, times_int

# Checks 1 and 2: dequantization after each group


@given(
    rows=st.sampled_from([1, 8]),
    symmetric=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=12)
def test_after_each_group_equals_before_the_product(rows, symmetric, seed):
    """Y = t sum_j s_j (P_j - z_j A_j): P and A bit-exact, the whole to 1e-12 in float64 and 1e-6 in our float32."""
    rng = np.random.default_rng(seed)
    group, k, n = 32, 128, 24
    fmt, act = Int(4, group=group, symmetric=symmetric), Int(8, per="token")
    w = jnp.asarray(rng.standard_normal((k, n)), jnp.float32)
    x = jnp.asarray(rng.standard_normal((rows, k)) + 0.2, jnp.float32)
    q = quantize_array(w, fmt, in_axes=0)
    aux = ops.activation_aux(x, act)
    codes = np.asarray(q.canonical().unpacked(), np.int64)  # [N, K]
    a = np.asarray(act.encode(x, aux), np.int64)
    scale = np.asarray(q.canonical().aux["scale"], np.float64)  # [N, J]
    zero = np.asarray(q.canonical().aux.get("zero", np.zeros_like(scale)), np.int64)
    t = np.asarray(aux["scale"], np.float64)
    p = np.einsum("mjg,njg->mnj", a.reshape(rows, 4, group), codes.reshape(n, 4, group))
    p32 = np.einsum(
        "mjg,njg->mnj", a.reshape(rows, 4, group).astype(np.int32), codes.reshape(n, 4, group).astype(np.int32)
    )
    assert p32.dtype == np.int32 and (p32 == p).all()
    sums = a.reshape(rows, 4, group).sum(-1)
    after = t * np.einsum("mnj,nj->mn", p - zero[None] * sums[:, None], scale)
    before = (a * t) @ ((codes - np.repeat(zero, group, 1)) * np.repeat(scale, group, 1)).T
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-12 * np.abs(before).max())
    ours = ops.q_dot(x, q, act=(act, aux), implementation="int_dot")
    np.testing.assert_allclose(ours, before, rtol=0, atol=1e-6 * np.abs(before).max() * 4)
    if not symmetric:
        without = t * np.einsum("mnj,nj->mn", p, scale)
        assert np.abs(without - before).max() > 1e-2 * np.abs(before).max(), "the term with A is needed"


def test_width_of_the_sums():
    """128 terms of 4 x 8 bits: at most 2^17 signed, below 2^18 unsigned; float32 holds them, float16 does not."""
    signed, unsigned = 128 * 8 * 128, 128 * 15 * 128
    assert signed == 2**17 and unsigned < 2**18
    assert np.float32(unsigned) == unsigned and unsigned > float(np.finfo(np.float16).max)


# Check 3: shifts and adds


@pytest.mark.parametrize("signed", [True, False])
def test_all_products_of_integers(signed):
    codes = np.arange(-8, 8) if signed else np.arange(16)
    q, a = np.meshgrid(codes, np.arange(-128, 128), indexing="ij")
    assert (np.asarray(times_int(q.astype(np.int8), a.astype(np.int8), signed=signed)) == q * a).all()


@pytest.mark.parametrize("signed", [True, False])
def test_all_products_of_halves(signed):
    halves = np.arange(65536, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)]
    for code in range(-8, 8) if signed else range(16):
        got = np.asarray(times_half(np.full(halves.shape, code), halves, signed=signed), np.float64)
        assert (got == halves.astype(np.float64) * code).all()


# Check 4: cycles to the digit


@pytest.mark.parametrize(
    ("name", "lanes", "cycles"),
    [
        ("FP16", (1, 1), 1_204_224),
        ("INT8", (1, 1), 1_048_576),
        ("BitFusion", (1, 1), 843_776),
        ("MixPE-W4A16", (2, 2), 262_144),
        ("MixPE-W4A16", (1, 2), 524_288),
        ("MixPE-W4A16", (1, 1), 1_048_576),
        ("MixPE-W4A8", (2, 2), 131_072),
        ("MixPE-W4A8", (1, 1), 262_144),
    ],
)
def test_cycles_of_a_layer(name, lanes, cycles):
    assert compute_cycles(array(name), 64, 4096, 4096, lanes) == cycles


def test_lanes_of_both_forms():
    """As released W4A8 has two lanes each way beside a four times larger array; physically it has one."""
    w4a8, w4a16 = array("MixPE-W4A8"), array("MixPE-W4A16")
    assert w4a8.lanes_of(w4a8.bits) == 2 and w4a8.lanes == (1, 1)
    assert w4a16.lanes_of(w4a16.bits) == 2 and w4a16.lanes == (1, 2)
    assert [array(n).lanes_of(16) for n in arrays()] == [1] * 6


def test_cycles_against_an_array_that_is_stepped():
    """Outputs are dealt to elements, one at a time, and every element takes K cycles for each."""
    on = array("INT8")
    for rows, k, n, lanes in itertools.product((1, 33, 70), (8, 100), (5, 64, 65), ((1, 1), (2, 2))):
        steps = 0
        for _ in range(0, rows, on.rows * lanes[0]):
            for _ in range(0, n, on.columns * lanes[1]):
                steps += k
        assert compute_cycles(on, rows, k, n, lanes) == steps
        stationary = sum(rows for _ in range(0, n, on.columns * lanes[1]) for _ in range(0, k, on.rows * lanes[0]))
        assert compute_cycles(on, rows, k, n, lanes, weight_stationary=True) == stationary


@pytest.mark.parametrize("network", sorted(NETWORKS))
def test_published_times(network):
    base = released("FP16", network).cycles
    got = {name: released(name, network).cycles / base for name in arrays()}
    if network in ("OPT-6.7B", "Llama2-13B"):
        assert {name: round(value, 2) for name, value in got.items()} == PUBLISHED_TIME[network]
    for name, value in got.items():
        assert value == pytest.approx(PUBLISHED_TIME[network][name], abs=0.03)


@pytest.mark.parametrize("network", sorted(PUBLISHED_ENERGY))
def test_published_energies(network):
    base = sum(released("FP16", network).energy(array("FP16")).values())
    for name, want in PUBLISHED_ENERGY[network].items():
        assert sum(released(name, network).energy(array(name)).values()) / base == pytest.approx(want, abs=0.06)


# Check 5: monotone


@given(rows=st.integers(1, 200), k=st.integers(1, 500), n=st.integers(1, 500), more=st.integers(1, 40))
@settings(max_examples=50)
def test_a_larger_array_is_never_slower(rows, k, n, more):
    import dataclasses

    on = array("INT8")
    larger = dataclasses.replace(on, rows=on.rows + more, columns=on.columns + more)
    for stationary in (False, True):
        cycles = [compute_cycles(a, rows, k, n, (1, 1), weight_stationary=stationary) for a in (on, larger)]
        assert cycles[1] <= cycles[0]


def test_energy_does_not_fall_with_bits():
    made = [
        sum(run("INT8", 64, 1024, 1024, weight_bits=b, act_bits=8, lanes=(1, 1)).energy(array("INT8")).values())
        for b in (2, 3, 4, 6, 8)
    ]
    assert made == sorted(made)


@pytest.mark.parametrize(("rows", "ratio"), [(1, 0.0078125), (64, 0.5), (128, 1.0), (2048, 16.0)])
def test_dequantizations_after_over_before(rows, ratio):
    count = dequantizations(rows, 4096, 4096)
    assert count["after"] / count["before"] == ratio


# Check 6: one row


def test_one_row_waits_for_memory():
    """Time goes with the bits of the weights: 16 : 8 : 4.125."""
    for name in arrays():
        runs = [physical(name, 1, 4096, 4096, weight_bits=b, act_bits=16) for b in (16, 8, 4.125)]
        np.testing.assert_allclose([r.cycles / runs[1].cycles for r in runs], [2, 1, 4.125 / 8], rtol=0.03)


def test_outputs_stay_where_there_are_many_rows():
    """With weights in place every row takes cycles of its own; with outputs in place 32 rows share them."""
    args = {"weight_bits": 8, "act_bits": 8}
    outputs, weights = (run("INT8", 64, 1024, 1024, weight_stationary=w, **args).cycles for w in (False, True))
    assert physical("INT8", 64, 1024, 1024, **args).cycles == min(outputs, weights)
    one = [run("INT8", 1, 1024, 1024, weight_stationary=w, **args).cycles for w in (False, True)]
    assert physical("INT8", 1, 1024, 1024, **args).cycles == one[1] < one[0]


def test_what_is_not_known():
    with pytest.raises(DeviceError, match="unknown array 'INT9' .did you mean 'INT8'"):
        array("INT9")
    with pytest.raises(DeviceError, match="unknown network 'OPT'.*Llama2-13B"):
        released("INT8", "OPT")
