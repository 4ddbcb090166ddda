"""MixPE's cost model of systolic arrays (arXiv 2411.16158), in two forms.

A product of activations [B, K] with weights [K, N] runs on R rows and C columns of processing elements, each of which
keeps one output while K streams by:

    cycles = ceil(B / (R f_a)) ceil(N / (C f_w)) K          outputs stay
    cycles = B ceil(N / (C f_w)) ceil(K / (R f_a))          weights stay

f_a and f_w are the lanes that a PE has for activations and weights. They are where the two forms differ:

**released**: as the simulator counts, f = int(high / max(bits, low)) with one precision for both sides. Its W4A8
array has 64 x 64 PEs for the area of 32 x 32 *and* two lanes each way, because the benchmark says 4 bits for
activations that have 8. It also takes dequantization of 1/8 of each product's size at the wide precision, and after
each group as K N / g products, without the factor B. This form is for comparing with the published table, and for
nothing else.

**physical**: activations of 8 or 16 bits take one lane; what 4-bit weights save is in the larger array of the same
area, or in a second lane for weights. Use this form to decide anything.

Energy = cycles R C (leakage + dynamic while not stalled) + SRAM bits + DRAM bits + static of DRAM per cycle. DRAM
moves the weights once, activations once for each tile of outputs, outputs once. Buffers are read for every
multiply-add, as in the simulator: there is no reuse inside the array in this model.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import tomllib
from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import Any, Literal

from qjax.errors import DeviceError, near

Form = Literal["released", "physical"]
GROUP = 128


@dataclasses.dataclass(frozen=True)
class Array:
    """An array of processing elements.

    Attributes:
        name: as in the published table.
        rows, columns: PEs for activations and weights.
        high, low: most and fewest bits that a PE computes on.
        dynamic_pj, leakage_pj: energy of a PE per cycle.
        bits: of both sides, as the released benchmarks set them.
        dequant: bits of the products that stand for dequantization in the released benchmarks.
        lanes: (activations, weights) of a PE in the physical form.
    """

    name: str
    rows: int
    columns: int
    high: int
    low: int
    dynamic_pj: float
    leakage_pj: float
    bits: int
    dequant: int
    lanes: tuple[int, int]

    def lanes_of(self, bits: int) -> int:
        """Lanes for numbers of so many bits, as the simulator counts them."""
        return max(1, int(self.high / max(bits, self.low)))


@cache
def _data() -> dict[str, Any]:
    return tomllib.loads((resources.files("qjax.hardware") / "arrays.toml").read_text())


@cache
def arrays() -> dict[str, Array]:
    """Return the arrays of the release, by name."""
    return {
        name: Array(name, **{**settings, "lanes": tuple(settings["lanes"])})
        for name, settings in _data()["arrays"].items()
    }


def array(name: str | Array) -> Array:
    """Return an array by name.

    Raises:
        DeviceError: an unknown name; the message lists those that there are.
    """
    if isinstance(name, Array):
        return name
    if name not in arrays():
        raise DeviceError(f"unknown array {name!r}{near(name, arrays())}; known are {', '.join(arrays())}")
    return arrays()[name]


def compute_cycles(
    on: Array, rows: int, k: int, n: int, lanes: tuple[int, int], *, weight_stationary: bool = False
) -> int:
    """Return the cycles of one product without waiting for memory.

    Args:
        on: the array.
        rows, k, n: activations [rows, k] times weights [k, n].
        lanes: (activations, weights) of a PE.
        weight_stationary: weights stay in the array, not outputs.
    """
    f_a, f_w = lanes
    if weight_stationary:
        return rows * math.ceil(n / (on.columns * f_w)) * math.ceil(k / (on.rows * f_a))
    return math.ceil(rows / (on.rows * f_a)) * math.ceil(n / (on.columns * f_w)) * k


def dequantizations(rows: int, k: int, n: int, group: int = GROUP) -> dict[str, int]:
    """Return the multiply-adds of dequantization: of each weight before the product, or of each sum after its group.

    Weights are dequantized once for a tile of rows; with all rows in one tile, the ratio after / before is rows /
    group.
    """
    return {"before": k * n, "after": rows * n * math.ceil(k / group)}


@dataclasses.dataclass(frozen=True)
class Run:
    """What a product takes on an array.

    Attributes:
        cycles: with stalls.
        stalls: cycles that wait for memory.
        dram_read, dram_write, sram_read, sram_write: bits.
        macs: multiply-adds.
    """

    cycles: float = 0.0
    stalls: float = 0.0
    dram_read: float = 0.0
    dram_write: float = 0.0
    sram_read: float = 0.0
    sram_write: float = 0.0
    macs: float = 0.0

    def __add__(self, other: Run) -> Run:
        return Run(*(getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(self)))

    def __mul__(self, times: int) -> Run:
        return Run(*(getattr(self, f.name) * times for f in dataclasses.fields(self)))

    def energy(self, on: Array) -> dict[str, float]:
        """Return joules by part: static, dram, buffer, core."""
        data = _data()
        pes = on.rows * on.columns
        parts = {
            "static": self.cycles * data["static_pj"],
            "dram": self.dram_read * data["dram_read_pj"] + self.dram_write * data["dram_write_pj"],
            "buffer": self.sram_read * data["sram_read_pj"] + self.sram_write * data["sram_write_pj"],
            "core": pes * (self.cycles * on.leakage_pj + (self.cycles - self.stalls) * on.dynamic_pj),
        }
        return {name: value * 1e-12 for name, value in parts.items()}

    @property
    def seconds(self) -> float:
        """At the frequency of the release."""
        return self.cycles / _data()["frequency"]


@cache
def run(
    on: str | Array,
    rows: int,
    k: int,
    n: int,
    *,
    weight_bits: float,
    act_bits: float,
    lanes: tuple[int, int] | None = None,
    weight_stationary: bool = False,
) -> Run:
    """Return what a product takes, with the tiling of the fewest cycles.

    Tiles of rows, k and n are powers of two, or the whole length. Those of weights and activations fit into half of
    their buffers, because the next ones are loaded meanwhile; those of outputs may fill theirs: with half of it, the
    published times of the 28 columns of FP16 are not met. Every tile of outputs reads its weights and activations;
    weights are read once in all when all rows are in one tile, and activations once when they fit as a whole. Sums
    stay in the array while k streams by. The first tiles are waited for, and so is the last result.

    Args:
        on: the array.
        rows, k, n: activations [rows, k] times weights [k, n].
        weight_bits, act_bits: bits as stored and moved.
        lanes: (activations, weights) of a PE; None takes the physical ones of the array.
        weight_stationary: weights stay in the array, not outputs.
    """
    on = array(on)
    lanes = lanes or on.lanes
    data = _data()
    half_w, half_a = data["weight_sram"] * 8 / 2, data["activation_sram"] * 8 / 2
    wide = data["output_bits"]
    best: Run | None = None
    for b, c, o in itertools.product(_tiles(rows), _tiles(k), _tiles(n)):
        if c * o * weight_bits > half_w or b * c * act_bits > half_a or b * o * wide > data["output_sram"] * 8:
            continue
        tiles_b, tiles_c, tiles_o = math.ceil(rows / b), math.ceil(k / c), math.ceil(n / o)
        cycles = tiles_b * tiles_c * tiles_o * compute_cycles(on, b, c, o, lanes, weight_stationary=weight_stationary)
        weights = k * n * weight_bits * (1 if tiles_c * tiles_o == 1 else tiles_b)
        # Either all activations stay in the buffer, or they are read again for every tile of outputs.
        resident = tiles_b * tiles_c == 1 or rows * k * act_bits <= half_a
        activations = rows * k * act_bits * (1 if resident else tiles_o)
        outputs = rows * n * wide
        first = c * o * weight_bits + b * c * act_bits
        last = b * o * wide
        bits = data["interface_bits"]
        latency = math.ceil(first / bits) + math.ceil(last / bits)
        moving = math.ceil(max(0.0, weights + activations + outputs - first - last) / bits)
        stalls = max(0, moving - cycles) + latency
        macs = float(rows) * k * n
        made = Run(
            cycles=cycles + stalls,
            stalls=stalls,
            dram_read=weights + activations,
            dram_write=outputs,
            sram_read=macs * (weight_bits + act_bits) + outputs,
            sram_write=weights + activations + outputs,
            macs=macs,
        )
        moved = made.dram_read + made.dram_write
        if best is None or (made.cycles, moved) < (best.cycles, best.dram_read + best.dram_write):
            best = made
    if best is None:
        raise DeviceError(f"no tile of a product [{rows}, {k}] x [{k}, {n}] fits into the buffers")
    return best


def physical(on: str | Array, rows: int, k: int, n: int, *, weight_bits: float, act_bits: float) -> Run:
    """Return what a product takes in the physical form, with outputs or weights in place, whichever is faster.

    With outputs in place a single row leaves all but one row of elements idle; with weights in place it does not, and
    waits for memory.
    """
    made = [run(on, rows, k, n, weight_bits=weight_bits, act_bits=act_bits, weight_stationary=w) for w in (False, True)]
    return min(made, key=lambda r: r.cycles)


@cache
def _tiles(length: int) -> tuple[int, ...]:
    return tuple(sorted({min(length, 1 << i) for i in range(length.bit_length() + 1)}))


# The networks of the release: products (K, N) of a layer and how many layers, and a convolution first as
# (rows per image, K, N), or None.
NETWORKS: dict[str, tuple[int, Sequence[tuple[int, int]], tuple[int, int, int] | None]] = {
    name: (layers, ((d, 3 * d), (d, d), (d, 4 * d), (4 * d, d)), (196, 768, d) if image else None)
    for name, layers, d, image in (
        ("ViT-B", 12, 768, True),
        ("ViT-Huge", 32, 1280, True),
        ("OPT-6.7B", 32, 4096, False),
        ("Llama2-13B", 40, 5120, False),
    )
}


def released(on: str | Array, network: str, batch: int = 64) -> Run:
    """Return what a network takes on an array as the released benchmarks have it.

    Every product has a companion that stands for dequantization, at the wide precision: [B, K] x [K, N/8] where
    weights are dequantized before it, [B, K/8] x [K/8, N/128] after each group in MixPE. Of BitFusion's output
    projections every second one has 4 bits, of ANT's layers four in five.
    """
    on = array(on)
    if network not in NETWORKS:
        raise DeviceError(f"unknown network {network!r}{near(network, NETWORKS)}; known are {', '.join(NETWORKS)}")
    layers, products, first = NETWORKS[network]

    def at(rows: int, k: int, n: int, bits: int) -> Run:
        lanes = on.lanes_of(bits)
        return run(on, rows, k, n, weight_bits=bits, act_bits=bits, lanes=(lanes, lanes))

    total = Run()
    if first is not None:
        total = total + at(batch * first[0], first[1], first[2], on.dequant)
    mixed = on.name.startswith("MixPE")
    for number, (k, n) in enumerate(products):
        extra = at(batch, k // 8, n // GROUP, on.dequant) if mixed else at(batch, k, n // 8, on.dequant)
        narrow = layers
        if on.name == "BitFusion":
            narrow = layers // 2 if number == 1 else 0
            wide = at(batch, k, n, 8) * (layers - narrow)
            total = total + at(batch, k, n, 4) * narrow + wide
        elif on.name == "ANT":
            narrow = layers - layers // 5
            total = total + at(batch, k, n, 4) * narrow + at(batch, k, n, 8) * (layers - narrow)
        else:
            total = total + at(batch, k, n, on.bits) * layers
        total = total + extra * layers
    return total


# Published: results/mixpe_res.csv of the release, normalised to FP16 = 1; time, and energy by part.
PUBLISHED_TIME: dict[str, dict[str, float]] = {
    network: dict(zip(("MixPE-W4A8", "ANT", "BitFusion", "INT8", "MixPE-W4A16", "FP16"), row, strict=True))
    for network, row in {
        "ViT-B": (0.15, 0.61, 0.70, 0.82, 0.53, 1.0),
        "ViT-Huge": (0.12, 0.47, 0.67, 0.82, 0.32, 1.0),
        "OPT-6.7B": (0.10, 0.40, 0.68, 0.86, 0.19, 1.0),
        "Llama2-13B": (0.10, 0.40, 0.68, 0.86, 0.19, 1.0),
    }.items()
}
PUBLISHED_ENERGY: dict[str, dict[str, float]] = {
    network: dict(zip(("MixPE-W4A8", "ANT", "BitFusion", "INT8", "MixPE-W4A16", "FP16"), row, strict=True))
    for network, row in {
        "ViT-B": (0.26, 0.39, 0.48, 0.51, 0.53, 1.0),
        "ViT-Huge": (0.18, 0.30, 0.43, 0.50, 0.32, 1.0),
        "OPT-6.7B": (0.14, 0.25, 0.43, 0.49, 0.22, 1.0),
    }.items()
}
