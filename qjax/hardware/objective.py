"""What one site costs in one format: an objective for searches.

    cost((4096, 4096), rows=64, weights=Int(4, group=128), act=None, on="H200")       seconds, joules, bytes
    cost((4096, 4096), rows=64, weights=Int(4, group=128), act=Int(8, per="token"), on=Accelerator())    and area

On a device the time is that of the roofline, and the energy that of the board at full power for this time. An
`Accelerator` is a chip that does not exist: one array of the processing elements that the format needs, as many of
them as a given area holds, buffers and DRAM as in MixPE's simulator. Its multiply-adds are put together from single
operations at 45 nm (Horowitz, ISSCC 2014), so that formats are compared in one technology: a multiplier's energy and
area go with the product of the operands' widths, an adder's with its width.

    FP16, fp32 sums         1.1 + 0.9 pJ          INT8, 32-bit sums     0.2 + 0.1 pJ
    4 bits x FP16           1.1 x 4/11 + 0.9      4 x 8 bits            0.2 x 32/64 + 0.1 x 24/32
    after each group        3.7 + 0.9 pJ for an output (int to float, multiply, add)
    before the product      0.4 + 1.1 pJ for a weight, again for every tile of rows

Figures are for comparing formats. Scaled to 28 nm they would be about half in energy and 0.4 in area.
"""

from __future__ import annotations

import dataclasses
import math
import tomllib
from functools import cache
from importlib import resources
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qjax.errors import DeviceError
from qjax.formats import Format, quantize_array
from qjax.hardware.devices import Device, device
from qjax.hardware.roofline import Efficiency

SIGNIFICAND = 11
"""Bits of a half's significand, the hidden one included."""
GROUP_TERMS = 4096
"""Terms that an integer sum has room for before it is scaled."""


@cache
def operations() -> dict[str, dict[str, float]]:
    """Return energy (pj) and area (um2) of single operations at 45 nm."""
    return tomllib.loads((resources.files("qjax.hardware") / "operations.toml").read_text())["operations"]


@cache
def memories() -> dict[str, dict[str, float]]:
    """Return the energy (pj) of reading 64 bits from memories at 45 nm."""
    return tomllib.loads((resources.files("qjax.hardware") / "operations.toml").read_text())["memories"]


@dataclasses.dataclass(frozen=True)
class Mac:
    """One multiply-add.

    Attributes:
        pj: energy.
        um2: area.
        scaled_pj: energy of scaling one output, which is done after every group (or once for a row).
        decoded_pj: energy of turning one weight into a float before products, for formats that need it.
    """

    pj: float
    um2: float
    scaled_pj: float = 0.0
    decoded_pj: float = 0.0


def mac(weights: Format | None, act: Format | None) -> Mac:
    """Return the multiply-add for a weight format and an activation format; None is FP16.

    Integers times integers are summed as integers of a width that holds 4096 terms, in whole bytes; anything times FP16
    is summed in fp32. Floats below 16 bits multiply significands of their own width. Formats whose codes are no numbers
    (NF4) are decoded to FP16 first. `Affine` counts as integers: its offsets add terms for rows and columns, not for
    products (`qjax.kernels.dot.affine`).
    """
    ops = operations()
    scaled = ops["fp32_multiply"]["pj"] + ops["fp32_add"]["pj"]
    wide, narrow = ops["fp16_multiply"], ops["fp32_add"]
    wb, ab = _significand(weights), _significand(act)
    if weights is not None and act is not None and _on_codes(weights) and _on_codes(act):
        width = 8 * math.ceil((wb + ab + math.log2(GROUP_TERMS)) / 8)
        multiply, add = ops["int8_multiply"], ops["int32_add"]
        pj = multiply["pj"] * wb * ab / 64 + add["pj"] * width / 32
        return Mac(pj, multiply["um2"] * wb * ab / 64 + add["um2"] * width / 32, scaled)
    decoded = weights is not None and not (weights.affine or _is_float(weights) or _on_codes(weights))
    if decoded:
        wb = SIGNIFICAND
    share = 1.0 if wb == ab == SIGNIFICAND else wb * ab / SIGNIFICAND**2
    made = Mac(wide["pj"] * share + narrow["pj"], wide["um2"] * share + narrow["um2"])
    if weights is None:
        return made
    before = ops["fp16_add"]["pj"] + ops["fp16_multiply"]["pj"]
    return dataclasses.replace(made, decoded_pj=before) if decoded else dataclasses.replace(made, scaled_pj=scaled)


def _on_codes(fmt: Format) -> bool:
    """Whether products are formed on integer codes, corrected afterwards where they have offsets."""
    return fmt.is_integer or fmt.key == "affine"


def _is_float(fmt: Format) -> bool:
    return fmt.code_dtype.kind not in "iu" or fmt.key in ("mxfp4", "nvfp4")


def _significand(fmt: Format | None) -> int:
    """Bits of the significand, the hidden one included; of integers all bits."""
    if fmt is None:
        return SIGNIFICAND
    if _on_codes(fmt):
        return fmt.code_bits
    if fmt.code_dtype.kind not in "iu":
        return jnp.finfo(fmt.code_dtype).nmant + 1
    return 2 if _is_float(fmt) else SIGNIFICAND  # E2M1 has one mantissa bit


def stored_bits(fmt: Format | None, shape: tuple[int, int]) -> float:
    """Return bits per weight of a matrix [N, K] as stored, scales included; 16 for None."""
    if fmt is None:
        return 16.0
    fmt = fmt.clamped(shape[1])
    made = jax.eval_shape(
        lambda w: quantize_array(w, fmt, in_axes=1), jax.ShapeDtypeStruct(shape, np.dtype(np.float32))
    )
    return made.nbytes * 8 / math.prod(shape)


@dataclasses.dataclass(frozen=True)
class Accelerator:
    """A chip with one array of processing elements, after MixPE.

    Attributes:
        area: of the array, in square micrometres at 45 nm; the default holds 32 x 32 INT8 elements.
        frequency: cycles a second.
        bandwidth: bytes a second of DRAM.
        dram_pj, sram_pj: energy per bit of DRAM and of the buffers (a 32 KB SRAM).
        tile: rows of activations that the array takes at a time.
    """

    area: float = 32 * 32 * 419.0
    frequency: float = 500e6
    bandwidth: float = 64e9
    dram_pj: float = 1300 / 64
    sram_pj: float = 20 / 64
    tile: int = 32
    name: str = "accelerator"

    def __post_init__(self) -> None:
        for field in ("area", "frequency", "bandwidth", "dram_pj", "sram_pj", "tile"):
            if not 0 < getattr(self, field) < math.inf:
                raise DeviceError(f"{self.name}: {field} is {getattr(self, field)!r}; a positive number is needed")

    def elements(self, one: Mac) -> float:
        """Processing elements that the area holds."""
        return self.area / one.um2


def cost(
    shape: tuple[int, int],
    rows: float,
    weights: Format | None,
    act: Format | None = None,
    *,
    on: str | Device | Accelerator,
    efficiency: Efficiency | None = None,
    repeats: int = 1,
) -> dict[str, Any]:
    """Return what one product costs.

    Args:
        shape: (N, K) of the weight, outputs and contracted axis.
        rows: rows of activations, at a time.
        weights: format of the weight; None is 16-bit float.
        act: format of the activations; None is 16-bit float.
        on: a device, its name, its TOML file, or an accelerator.
        efficiency: what is reached of a device's peaks; None takes all of them.
        repeats: how often the site runs (steps of a scan), with a weight of its own each time.

    Returns:
        ``seconds``, ``joules`` (None where a device's power is unknown), ``bytes`` of the weight as stored,
        ``flops``, and on an accelerator ``area`` in square micrometres of a design with as many elements as the
        reference has of INT8.

    Raises:
        DeviceError: an unknown device, or a shape that cannot be.
    """
    n, k = shape
    if min(n, k) < 1 or rows <= 0 or repeats < 1:
        raise DeviceError(f"cost of a weight {shape} with {rows} rows, {repeats} times: all have to be positive")
    bits = stored_bits(weights, (n, k))
    out = (
        _on_accelerator(shape, rows, weights, act, bits, on)
        if isinstance(on, Accelerator)
        else _on_device(shape, rows, weights, act, bits, device(on), efficiency)
    )
    out |= {"bytes": n * k * bits / 8, "flops": 2.0 * rows * n * k}
    return {name: value if name == "area" or value is None else value * repeats for name, value in out.items()}


def _on_device(
    shape: tuple[int, int],
    rows: float,
    weights: Format | None,
    act: Format | None,
    bits: float,
    on: Device,
    efficiency: Efficiency | None,
) -> dict[str, Any]:
    n, k = shape
    reached = efficiency or Efficiency(bandwidth=1.0, compute=1.0, step=0.0, link=0.0)
    kind = "bf16"
    if weights is not None and act is not None:
        if _on_codes(weights) and _on_codes(act) and on.supports("int8") and "int8" in on.peaks:
            kind = "int8"
        elif _kind(weights) == _kind(act) == "fp8" and on.supports("fp8") and "fp8" in on.peaks:
            kind = "fp8"
    act_bits = 16.0 if act is None else act.code_bits
    moved = n * k * bits / 8 + rows * (k * act_bits + n * 16) / 8
    seconds = max(moved / (on.bandwidth * reached.bandwidth), 2 * rows * n * k / (on.peak(kind) * reached.compute))
    return {"seconds": seconds, "joules": None if on.tdp is None else seconds * on.tdp}


def _kind(fmt: Format) -> str:
    return "fp8" if fmt.code_dtype.kind not in "iu" and fmt.code_bits == 8 else fmt.key


def _on_accelerator(
    shape: tuple[int, int], rows: float, weights: Format | None, act: Format | None, bits: float, on: Accelerator
) -> dict[str, Any]:
    n, k = shape
    one = mac(weights, act)
    macs = rows * n * k
    groups = weights.groups(k) if weights is not None else 0
    act_bits = 16.0 if act is None else act.code_bits
    moved = n * k * bits + rows * k * act_bits + rows * n * 32
    cycles = max(macs / on.elements(one), moved / 8 / on.bandwidth * on.frequency)
    buffers = macs * (bits / on.tile + act_bits / on.tile) + rows * n * 32
    pj = (
        macs * one.pj
        + rows * n * groups * one.scaled_pj
        + n * k * math.ceil(rows / on.tile) * one.decoded_pj
        + moved * on.dram_pj
        + buffers * on.sram_pj
    )
    reference = on.area / mac_reference().um2
    return {"seconds": cycles / on.frequency, "joules": pj * 1e-12, "area": reference * one.um2}


@cache
def mac_reference() -> Mac:
    """The INT8 element that areas are counted in."""
    from qjax.formats import Int

    return mac(Int(8), Int(8, per="token"))
