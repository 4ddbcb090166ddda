"""Number formats as a server runs them: bits that are stored, arithmetic that is used, kernels that are needed."""

from __future__ import annotations

import dataclasses

from qjax.errors import DeviceError, near
from qjax.hardware.devices import Device

CHANNEL = 4096
"""Length of a row over which a scale per channel is spread when its bits are counted."""


@dataclasses.dataclass(frozen=True)
class Scheme:
    """One way to serve a model.

    Attributes:
        name: as the study calls it.
        weight_bits: stored bits of a weight in a quantized layer, scales included.
        compute: kind of products, a key of a device's peaks.
        gate: kind of kernels that it needs, a key of `qjax.hardware.devices.GATES`.
        preset: the recipe of qjax that makes it; "" for the float model.
        calibrated: whether making it takes calibration data.
    """

    name: str
    weight_bits: float
    compute: str
    gate: str
    preset: str = ""
    calibrated: bool = False

    def runs_on(self, device: Device) -> bool:
        """Whether the device has kernels and a peak for it."""
        return device.supports(self.gate) and self.compute in device.peaks


SCHEMES: dict[str, Scheme] = {
    scheme.name: scheme
    for scheme in (
        Scheme("BF16", 16.0, "bf16", "bf16"),
        Scheme("W8A8-FP", 8 + 32 / CHANNEL, "fp8", "fp8", "W8A8_FP"),
        Scheme("W8A8-INT", 8 + 32 / CHANNEL, "int8", "int8", "W8A8_INT", calibrated=True),
        Scheme("W4A16-INT", 4 + 16 / 128, "bf16", "w4a16", "W4A16_INT", calibrated=True),
    )
}
"""The formats of the study."""


def scheme(name: str | Scheme) -> Scheme:
    """Return a scheme by name, in any case.

    Raises:
        DeviceError: an unknown name; the message lists those that there are.
    """
    if isinstance(name, Scheme):
        return name
    for known in SCHEMES.values():
        if known.name.lower() == str(name).lower():
            return known
    raise DeviceError(f"unknown format {name!r}{near(str(name), SCHEMES)}; the study knows {', '.join(SCHEMES)}")
