"""Times of a decoder on a device, by the roofline of the format study (arXiv 2411.02355, guidance section).

With P parameters, n devices of memory bandwidth BW and peak F, and B sequences decoded at a time:

    prefill   = 2 P S_in / (n F eta_f)
    step(B)   = max(bytes of weights / (n BW eta_b), 2 P B / (n F eta_f))  +  bytes of cache B / (n BW eta_b)  +  t0(n)
    t0(n)     = fixed time of a step + time of a step's exchange between devices x log2(n)

Weights that are read are all that are stored, the table of embeddings included: it is a small part of a large model,
and calibration takes the rest. Bytes of cache are those of the average context, S_in + S_out / 2. The start values
eta_b 0.7, eta_f 0.5 and t0 2 ms are guesses to be replaced by `qjax.hardware.calibrate` on a few measurements.
"""

from __future__ import annotations

import dataclasses
import math

from qjax.errors import DeviceError, near
from qjax.hardware.devices import Device
from qjax.hardware.schemes import Scheme
from qjax.hardware.sizes import ModelSize


@dataclasses.dataclass(frozen=True)
class Workload:
    """Tokens of a typical query."""

    name: str
    prompt: int
    output: int

    def __post_init__(self) -> None:
        for field in ("prompt", "output"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise DeviceError(
                    f"workload {self.name!r}: {field} is {value!r}; a positive number of tokens is needed"
                )


WORKLOADS: dict[str, Workload] = {
    w.name: w
    for w in (
        Workload("code_completion", 256, 1024),
        Workload("docstring", 768, 128),
        Workload("code_fixing", 1024, 1024),
        Workload("rag", 1024, 128),
        Workload("instruction", 256, 128),
        Workload("chat", 512, 256),
        Workload("summarization", 4096, 512),
    )
}
"""The seven workloads of the study."""


def workload(which: str | Workload) -> Workload:
    """Return a workload by name, or from ``"PROMPT/OUTPUT"`` tokens.

    Raises:
        DeviceError: an unknown name; the message lists those that there are.
    """
    if isinstance(which, Workload):
        return which
    prompt, slash, output = which.partition("/")
    if slash and prompt.strip().isdigit() and output.strip().isdigit():
        return Workload(which, int(prompt), int(output))
    name = which.lower().replace("-", "_")
    if name not in WORKLOADS:
        raise DeviceError(
            f"unknown workload {which!r}{near(name, WORKLOADS)}; known are {', '.join(WORKLOADS)}, or give tokens as "
            "PROMPT/OUTPUT, such as 1024/256"
        )
    return WORKLOADS[name]


@dataclasses.dataclass(frozen=True)
class Efficiency:
    """What a real server reaches of the datasheet.

    Attributes:
        bandwidth: share of the memory bandwidth, eta_b.
        compute: share of the peak, eta_f.
        step: fixed seconds of a decoding step.
        link: seconds that a step takes more with every doubling of the devices.
    """

    bandwidth: float = 0.7
    compute: float = 0.5
    step: float = 2e-3
    link: float = 0.5e-3

    def __post_init__(self) -> None:
        for field in ("bandwidth", "compute"):
            if not 0 < getattr(self, field) <= 1:
                raise DeviceError(f"efficiency of {field} is {getattr(self, field)!r}; a share above 0, at most 1")
        for field in ("step", "link"):
            if not 0 <= getattr(self, field) < math.inf:
                raise DeviceError(f"{field} is {getattr(self, field)!r}; seconds, 0 or more")


def prefill_seconds(
    size: ModelSize, scheme: Scheme, device: Device, n: int, tokens: float, efficiency: Efficiency
) -> float:
    """Return the seconds until a prompt of so many tokens has been read."""
    return 2 * size.computing * tokens / (n * device.peak(scheme.compute) * efficiency.compute)


def step_seconds(
    size: ModelSize,
    scheme: Scheme,
    device: Device,
    n: int,
    batch: float,
    efficiency: Efficiency,
    context: float = 0.0,
) -> float:
    """Return the seconds of one decoding step of ``batch`` sequences of ``context`` tokens on n devices."""
    bandwidth = n * device.bandwidth * efficiency.bandwidth
    streaming = size.weight_bytes(scheme.weight_bits) * size.read_share(batch) / bandwidth
    computing = 2 * size.computing * batch / (n * device.peak(scheme.compute) * efficiency.compute)
    cache = size.kv_token_bytes * context * batch / bandwidth
    return max(streaming, computing) + cache + efficiency.step + efficiency.link * math.log2(n)


def query_seconds(
    size: ModelSize, scheme: Scheme, device: Device, n: int, batch: float, work: Workload, efficiency: Efficiency
) -> float:
    """Return the seconds of a query among ``batch`` at a time: all their prompts, and its own output tokens."""
    context = work.prompt + work.output / 2
    prompts = batch * prefill_seconds(size, scheme, device, n, work.prompt, efficiency)
    return prompts + work.output * step_seconds(size, scheme, device, n, batch, efficiency, context)


def memory_bytes(size: ModelSize, scheme: Scheme, batch: float, work: Workload) -> float:
    """Return bytes of weights and of the caches of full sequences, and a tenth more for everything else."""
    cache = size.kv_token_bytes * (work.prompt + work.output) * batch
    return 1.1 * (size.weight_bytes(scheme.weight_bits) + cache)


def room(device: Device, n: int) -> float:
    """Return bytes that n devices may be filled with: nine tenths."""
    return 0.9 * device.memory * n


def largest_batch(size: ModelSize, scheme: Scheme, device: Device, n: int, work: Workload) -> int:
    """Return how many sequences n devices hold, by the same rule; 0 where the weights alone are too much."""
    left = room(device, n) / 1.1 - size.weight_bytes(scheme.weight_bits)
    per = size.kv_token_bytes * (work.prompt + work.output)
    return max(0, math.floor(left / per * (1 + 1e-12)))


def devices_needed(
    size: ModelSize, scheme: Scheme, device: Device, work: Workload, batch: float = 1, most: int = 4096
) -> int:
    """Return the smallest power of two of devices that hold the weights and so many sequences.

    Raises:
        DeviceError: it is more than ``most``.
    """
    n = 1
    while memory_bytes(size, scheme, batch, work) > room(device, n):
        n *= 2
        if n > most:
            need = memory_bytes(size, scheme, batch, work) / 1e9
            raise DeviceError(
                f"{size.name} in {scheme.name} needs {need:,.0f} GB with {batch:g} sequences of the workload, more "
                f"than {most} x {device.name} hold ({room(device, most) / 1e9:,.0f} GB)"
            )
    return n
