"""Which format to deploy: model, device, workload and accuracy floor in, a format out.

The steps are those of the study's derivation. Formats that the device has no kernels for are out, and so is INT8
where there is FP8 (as fast, needs no calibration, recovers better), unless formats are named. For each format the
number of devices is the smallest power of two that holds it, or a doubling of that where it pays; the batch is the
one with the most queries within memory and the latency limit. What is left with enough recovery is ranked by queries
per unit of cost. Formats within `MEASURE_BELOW` of the first cannot be told from it by such a model, and the one of
them that keeps the most of the scores is the choice (decided here; the study ranks by cost alone).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from qjax.errors import DeviceError
from qjax.hardware.devices import Device, device
from qjax.hardware.recovery import Source, prior, source
from qjax.hardware.roofline import (
    Efficiency,
    Workload,
    devices_needed,
    largest_batch,
    memory_bytes,
    query_seconds,
    workload,
)
from qjax.hardware.schemes import SCHEMES, Scheme, scheme
from qjax.hardware.sizes import ModelSize

Mode = Literal["sync", "async", "rate"]
MODES: tuple[Mode, ...] = ("sync", "async", "rate")
MEASURE_BELOW = 0.10
"""Margin below which the model's errors are larger than what it tells apart."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A format and what it would do.

    Attributes:
        scheme: the format.
        reason: why it is out; "" where it is in.
        recovery: percent of the float model's scores, or None where unknown.
        source: of the recovery: measured on this model, published for its size, or taken from other sizes.
        devices: that one copy of the model runs on.
        replicas: copies of the model; above 1 only where a rate is asked for.
        batch: sequences at a time, of one copy.
        latency: seconds of a query.
        qps: queries a second, of all copies.
        memory: bytes of one copy.
        per_cost: queries per unit of price, or per hour of a device where the price is unknown.
    """

    scheme: Scheme
    reason: str = ""
    recovery: float | None = None
    source: Source = ""
    devices: int = 0
    replicas: int = 0
    batch: float = 0
    latency: float = math.nan
    qps: float = 0.0
    memory: float = math.nan
    per_cost: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        names = [f.name for f in dataclasses.fields(self) if f.name != "scheme"]
        data = {name: getattr(self, name) for name in names}
        return {"format": self.scheme.name, "preset": self.scheme.preset, **data}


@dataclasses.dataclass(frozen=True)
class Advice:
    """What `advise` found.

    Attributes:
        size, device, workload, mode, floor: what was asked.
        candidates: every format: the choice, then those that can be used by their cost, then those that are out, with
            the reason.
        efficiency: that the times were computed with.
        calibrated: how many measurements the efficiency was fitted to; 0: it is the study's start values.
    """

    size: ModelSize
    device: Device
    workload: Workload
    mode: Mode
    floor: float
    candidates: tuple[Candidate, ...]
    efficiency: Efficiency
    calibrated: int = 0

    @property
    def ranked(self) -> tuple[Candidate, ...]:
        """The formats that can be used, the best first."""
        return tuple(c for c in self.candidates if not c.reason)

    @property
    def choice(self) -> Candidate:
        """The format to take."""
        return self.ranked[0]

    @property
    def runner_up(self) -> Candidate | None:
        """The next one, or None."""
        return self.ranked[1] if len(self.ranked) > 1 else None

    @property
    def margin(self) -> float:
        """By how much the choice is cheaper than the runner-up, as a share; infinite where there is none.

        Below 0 where the runner-up is cheaper by less than can be told, and the choice keeps more of the scores.
        """
        return self.choice.per_cost / self.runner_up.per_cost - 1 if self.runner_up else math.inf

    @property
    def measure(self) -> bool:
        """Whether the margin is too small to be believed."""
        return self.margin < MEASURE_BELOW

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences on what was asked that the figures do not show."""
        asked, most = self.workload.prompt + self.workload.output, self.size.context
        if most is None or asked <= most:
            return ()
        return (
            f"{self.size.name} takes sequences of at most {most:,} tokens, and a query of this workload has {asked:,}. "
            "The figures are as if it took them; take a shorter workload or a model for longer sequences.",
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "model": self.size.name,
            "params": self.size.params,
            "device": self.device.name,
            "price_per_hour": self.device.price,
            "workload": dataclasses.asdict(self.workload),
            "mode": self.mode,
            "recovery_floor": self.floor,
            "choice": self.choice.scheme.name,
            "runner_up": self.runner_up.scheme.name if self.runner_up else None,
            "margin": self.margin,
            "measure": self.measure,
            "notes": list(self.notes),
            "efficiency": dataclasses.asdict(self.efficiency),
            "calibrated_on": self.calibrated,
            "candidates": [c.to_dict() for c in self.candidates],
        }


def advise(
    size: ModelSize,
    on: str | Device,
    work: str | Workload = "chat",
    *,
    mode: Mode = "sync",
    floor: float = 0.0,
    latency: float = math.inf,
    rate: float | None = None,
    schemes: Iterable[str | Scheme] | None = None,
    recoveries: Mapping[str, float] | None = None,
    efficiency: Efficiency | Mapping[str, Efficiency] | None = None,
    devices: int | None = None,
    concurrency: int = 1,
    max_devices: int = 8,
    max_batch: int = 256,
    calibrated: int = 0,
) -> Advice:
    """Choose a format.

    Args:
        size: the model.
        on: a device, its name, or its TOML file.
        work: a workload, its name, or "PROMPT/OUTPUT" tokens.
        mode: "sync", one query at a time; "async", as many as fit; "rate", a given number of queries a second.
        floor: least recovery, in percent. A format whose recovery is unknown is out where this is above 0.
        latency: most seconds of a query.
        rate: queries a second, for mode "rate".
        schemes: formats to choose among; None takes those of the study.
        recoveries: recovery in percent by format, measured on this model; they go before the published ones.
        efficiency: of the server, one or by format; None takes the study's start values.
        devices: run each copy on exactly so many; None looks for the best number.
        concurrency: sequences that have to fit in memory at a time.
        max_devices: most devices of one copy.
        max_batch: most sequences at a time (256, as vLLM's default).
        calibrated: how many measurements the efficiency comes from, for the record.

    Returns:
        The choice, the runner-up, and why the others are out.

    Raises:
        DeviceError: an unknown device, workload or format, numbers that cannot be, or no format that will do; the
            message then says for each why.
    """
    on, work = device(on), workload(work)
    if mode not in MODES:
        raise DeviceError(f"mode {mode!r} is not one of {', '.join(MODES)}")
    if mode == "rate" and (rate is None or not 0 < rate < math.inf):
        raise DeviceError(f"mode 'rate' needs the queries a second, a positive number; rate={rate!r} was given")
    if not 0 <= floor <= 100:
        raise DeviceError(f"a recovery floor of {floor!r} was given; percent, 0 to 100")
    if not latency > 0:
        raise DeviceError(f"a latency limit of {latency!r} s was given; a positive number is needed")
    for what, value in (("concurrency", concurrency), ("max_devices", max_devices), ("max_batch", max_batch)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise DeviceError(f"{what}={value!r}; a positive whole number is needed")
    if devices is not None and (devices < 1 or devices & (devices - 1)):
        raise DeviceError(f"devices={devices}; a power of two is needed")
    named = schemes is not None
    pool = [scheme(s) for s in schemes] if schemes is not None else list(SCHEMES.values())
    has_fp8 = any(s.compute == "fp8" and s.runs_on(on) for s in pool)
    found = []
    for one in pool:
        known = (recoveries or {}).get(one.name)
        share = prior(one.name, size.params) if known is None else known
        eta = efficiency.get(one.name, Efficiency()) if isinstance(efficiency, Mapping) else efficiency or Efficiency()
        ask = _Ask(size, one, on, work, eta, latency, devices, concurrency, max_devices, max_batch)
        if not one.runs_on(on):
            what = f"compute capability {on.capability}" if on.capability else "no kernels for it"
            best = Candidate(one, f"{on.name} has {what}: {one.gate} cannot run")
        elif one.name == "W8A8-INT" and has_fp8 and not named:
            best = Candidate(one, "FP8 is there: as fast, needs no calibration, recovers better")
        else:
            best = ask.best(mode, rate)
        reason = best.reason
        if not reason and floor > 0 and share is None:
            reason = "its recovery is not known; measure it and pass it in"
        elif not reason and share is not None and share < floor:
            reason = f"recovers {share:.1f} % of the float model's scores, less than {floor:g} %"
        known_from: Source = "measured" if known is not None else source(one.name, size.params)
        found.append(dataclasses.replace(best, reason=reason, recovery=share, source=known_from))
    found.sort(key=lambda c: (bool(c.reason), -c.per_cost))
    if found[0].reason:
        why = "; ".join(f"{c.scheme.name}: {c.reason}" for c in found)
        raise DeviceError(f"no format serves {size.name} on {on.name} as asked. {why}")
    level = [c for c in found if not c.reason and found[0].per_cost < c.per_cost * (1 + MEASURE_BELOW)]
    choice = max(level, key=lambda c: (-math.inf if c.recovery is None else c.recovery, c.per_cost))
    found = [choice, *(c for c in found if c is not choice)]
    return Advice(size, on, work, mode, floor, tuple(found), efficiency_of(efficiency), calibrated)


def efficiency_of(efficiency: Efficiency | Mapping[str, Efficiency] | None) -> Efficiency:
    """The one that stands for all formats, in reports."""
    if isinstance(efficiency, Mapping):
        return efficiency.get("BF16", Efficiency())
    return efficiency or Efficiency()


@dataclasses.dataclass(frozen=True)
class _Ask:
    size: ModelSize
    scheme: Scheme
    device: Device
    work: Workload
    efficiency: Efficiency
    latency: float
    devices: int | None
    concurrency: int
    max_devices: int
    max_batch: int

    def best(self, mode: Mode, rate: float | None) -> Candidate:
        """The cheapest number of devices and batch, or why there is none."""
        if self.devices is not None:
            counts = [self.devices]
            if largest_batch(self.size, self.scheme, self.device, self.devices, self.work) < self.concurrency:
                gb = memory_bytes(self.size, self.scheme, self.concurrency, self.work) / 1e9
                return Candidate(self.scheme, f"{gb:,.0f} GB do not fit on {self.devices} x {self.device.name}")
        else:
            try:
                n = devices_needed(
                    self.size, self.scheme, self.device, self.work, self.concurrency, most=self.max_devices
                )
            except DeviceError:
                gb = memory_bytes(self.size, self.scheme, self.concurrency, self.work) / 1e9
                return Candidate(self.scheme, f"{gb:,.0f} GB do not fit on {self.max_devices} x {self.device.name}")
            counts = []
            while n <= self.max_devices:
                counts.append(n)
                n *= 2
        tried = [self._on(n, mode, rate) for n in counts]
        fit = [c for c in tried if not c.reason]
        return max(fit, key=lambda c: (c.per_cost, -c.devices)) if fit else tried[-1]

    def _on(self, n: int, mode: Mode, rate: float | None) -> Candidate:
        fits = largest_batch(self.size, self.scheme, self.device, n, self.work)
        batch = 1 if mode == "sync" else self._largest_within_latency(n, min(fits, self.max_batch))
        if batch == 0 or self._seconds(n, batch) > self.latency:
            least = self._seconds(n, 1)
            return Candidate(self.scheme, f"a query takes {least:.3g} s at least, more than {self.latency:g} s")
        seconds, replicas = self._seconds(n, batch), 1
        qps = batch / seconds
        if mode == "rate":
            assert rate is not None
            replicas, qps = max(1, math.ceil(rate / qps * (1 - 1e-12))), rate
            batch = self._batch_at(n, rate / replicas, batch)
            seconds = self._seconds(n, batch)
        cost = n * replicas * (self.device.price or 1.0)
        return Candidate(
            self.scheme,
            devices=n,
            replicas=replicas,
            batch=batch,
            latency=seconds,
            qps=qps,
            memory=memory_bytes(self.size, self.scheme, batch, self.work),
            per_cost=3600 * qps / cost,
        )

    def _seconds(self, n: int, batch: float) -> float:
        return query_seconds(self.size, self.scheme, self.device, n, batch, self.work, self.efficiency)

    def _largest_within_latency(self, n: int, most: int) -> int:
        """The largest batch within the limit. Queries a second never fall with the batch, so it is the best one."""
        if most < 1 or self._seconds(n, most) <= self.latency:
            return most
        low, high = 0, most
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._seconds(n, middle) <= self.latency else (low, middle)
        return low

    def _batch_at(self, n: int, rate: float, most: float) -> float:
        """Sequences that are there at a time when queries come at a rate (Little's law): batch = rate x seconds."""
        low, high = 0.0, float(most)
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if rate * self._seconds(n, max(middle, 1e-9)) > middle else (low, middle)
        return max(high, min(1.0, rate * self._seconds(n, 1.0)))
