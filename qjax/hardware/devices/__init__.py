"""Devices: what they hold, read and compute, one TOML file each.

The files beside this module are the devices that come with qjax; a file of your own has the same keys::

    name = "Mine"
    memory_gb = 48.0                  # 10^9 bytes
    bandwidth_tb_s = 0.9              # of the datasheet, 10^12 bytes a second
    measured_bandwidth_tb_s = 0.8     # of a copy, if known
    capability = 8.9                  # CUDA compute capability; or supports = ["bf16", "int8", ...]
    price_per_hour = 1.5              # in any currency; no file of ours has one, because prices change
    tdp_w = 300.0                     # board power

    [tflops]                          # dense peaks, 10^12 operations a second
    bf16 = 180.0
    int8 = 360.0
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from types import MappingProxyType
from typing import Any

from qjax.errors import DeviceError, near

__all__ = ["Device", "device", "devices", "read_device"]

# Kind of arithmetic -> the compute capability from which kernels for it exist (llm-compressor's table of schemes).
GATES: Mapping[str, float] = MappingProxyType(
    {"bf16": 0.0, "int8": 7.5, "w4a16": 7.5, "fp8": 8.9, "w4afp8": 9.0, "nvfp4": 10.0}
)


@dataclasses.dataclass(frozen=True)
class Device:
    """One accelerator.

    Attributes:
        name: as in tables.
        memory: bytes.
        bandwidth: bytes a second, of the datasheet.
        peaks: operations a second by kind (bf16, int8, fp8, ...), dense; a multiply-add counts as two.
        capability: CUDA compute capability; None where there is no such thing.
        measured_bandwidth: bytes a second of a copy, or None where it was not measured.
        supported: kinds of arithmetic that there are kernels for; empty means those that the capability allows.
        price: per hour, in any currency; None where unknown.
        tdp: watts of the board; None where unknown.
        aliases: further names.
    """

    name: str
    memory: float
    bandwidth: float
    peaks: Mapping[str, float]
    capability: float | None = None
    measured_bandwidth: float | None = None
    supported: tuple[str, ...] = ()
    price: float | None = None
    tdp: float | None = None
    aliases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for field in ("memory", "bandwidth", "measured_bandwidth", "price", "tdp", "capability"):
            value = getattr(self, field)
            if value is None and field not in ("memory", "bandwidth"):
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise DeviceError(f"device {self.name!r}: {field} is {value!r}; a positive number is needed")
        if self.capability is None and not self.supported:
            raise DeviceError(
                f"device {self.name!r} has neither a compute capability nor a list of what it supports; give "
                f"capability = 9.0, or supports = [...] out of {', '.join(GATES)}"
            )
        for kind in self.supported:
            if kind not in GATES:
                raise DeviceError(
                    f"device {self.name!r} supports {kind!r}{near(kind, GATES)}; known are {', '.join(GATES)}"
                )
        for kind, value in self.peaks.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise DeviceError(f"device {self.name!r}: the peak of {kind} is {value!r}; a positive number is needed")
        if "bf16" not in self.peaks:
            raise DeviceError(f"device {self.name!r} has no peak for bf16; its TOML needs [tflops] with bf16 = ...")
        object.__setattr__(self, "peaks", MappingProxyType(dict(self.peaks)))

    def supports(self, kind: str) -> bool:
        """Whether there are kernels for a kind of arithmetic (a key of `GATES`) on this device."""
        if self.supported:
            return kind in self.supported
        return self.capability is not None and self.capability >= GATES[kind]

    def peak(self, kind: str) -> float:
        """Return operations a second of a kind, which the device must have.

        Raises:
            DeviceError: the device has no figure for it.
        """
        if kind not in self.peaks:
            raise DeviceError(f"{self.name} has no peak for {kind}; it has {', '.join(self.peaks)}")
        return self.peaks[kind]

    def with_price(self, price: float | None) -> Device:
        """Return the same device at a price per hour."""
        return self if price is None else dataclasses.replace(self, price=price)

    def crossover(self, *, measured: bool = False) -> float:
        """Return B* = F16 / (2 BW): tokens per step below which 4-bit weights are faster than 8-bit ones.

        Args:
            measured: by the measured bandwidth, where there is one.
        """
        bandwidth = self.measured_bandwidth if measured and self.measured_bandwidth else self.bandwidth
        return self.peak("bf16") / (2 * bandwidth)


_KEYS = {
    "name": "name",
    "aliases": "aliases",
    "memory_gb": "memory",
    "bandwidth_tb_s": "bandwidth",
    "measured_bandwidth_tb_s": "measured_bandwidth",
    "capability": "capability",
    "supports": "supported",
    "price_per_hour": "price",
    "tdp_w": "tdp",
    "tflops": "peaks",
}
_UNITS = {"memory_gb": 1e9, "bandwidth_tb_s": 1e12, "measured_bandwidth_tb_s": 1e12}


def read_device(path: str | Path) -> Device:
    """Read a device from a TOML file.

    Raises:
        DeviceError: no such file, no TOML, a key that is missing or unknown, or a number that cannot be.
    """
    path = Path(path)
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as e:
        raise DeviceError(f"{path} cannot be read as the description of a device: {e}") from e
    return _parse(text, str(path))


def _parse(text: str, where: str) -> Device:
    try:
        data: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise DeviceError(f"{where} is no TOML: {e}") from e
    for key in data:
        if key not in _KEYS:
            raise DeviceError(f"{where}: unknown key {key!r}{near(key, _KEYS)}; known are {', '.join(_KEYS)}")
    for key in ("name", "memory_gb", "bandwidth_tb_s", "tflops"):
        if key not in data:
            raise DeviceError(f"{where} lacks {key}; a device needs name, memory_gb, bandwidth_tb_s and [tflops]")
    peaks = data["tflops"]
    if not isinstance(peaks, dict) or not all(isinstance(v, int | float) for v in peaks.values()):
        raise DeviceError(f"{where}: tflops is a table of numbers, such as bf16 = 312.0")
    fields: dict[str, Any] = {}
    for key, value in data.items():
        scaled = isinstance(value, int | float) and not isinstance(value, bool)
        fields[_KEYS[key]] = value * _UNITS.get(key, 1) if scaled else value
    fields["peaks"] = {kind: value * 1e12 for kind, value in peaks.items()}
    for key in ("supported", "aliases"):
        given = fields.get(key, ())
        if not isinstance(given, list | tuple) or not all(isinstance(item, str) for item in given):
            raise DeviceError(f"{where}: {key} is a list of names, not {given!r}")
        fields[key] = tuple(given)
    if not isinstance(fields["name"], str):
        raise DeviceError(f"{where}: name is {fields['name']!r}; a text is needed")
    return Device(**fields)


@cache
def _known() -> dict[str, Device]:
    found = {}
    for file in sorted(resources.files(__name__).iterdir(), key=lambda f: f.name):
        if file.name.endswith(".toml"):
            one = _parse(file.read_text(), file.name)
            found[one.name] = one
    return found


def devices() -> dict[str, Device]:
    """Return the devices that come with qjax, by name."""
    return dict(_known())


def device(which: str | Path | Device) -> Device:
    """Return a device by name (in any case, with or without hyphens), or from a ``.toml`` file.

    Raises:
        DeviceError: an unknown name; the message lists those that there are.
    """
    if isinstance(which, Device):
        return which
    if isinstance(which, Path) or str(which).endswith(".toml"):
        return read_device(which)
    for one in _known().values():
        if _plain(which) in {_plain(name) for name in (one.name, *one.aliases)}:
            return one
    raise DeviceError(
        f"unknown device {which!r}{near(which, _known())}; known are {', '.join(_known())}, or give a .toml file"
    )


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
