"""``qjax advise``."""

from __future__ import annotations

import argparse
import math
from typing import Any

from qjax.cli.output import print_json, print_rich, room, table
from qjax.errors import DeviceError
from qjax.hardware import (
    Advice,
    Candidate,
    Device,
    ModelSize,
    advise,
    calibrate,
    device,
    devices,
    read_measured,
    size_of,
)
from qjax.hardware.calibration import results_folder
from qjax.hardware.roofline import workload


def run(args: argparse.Namespace) -> None:
    """Advise on a model, or list the devices."""
    if args.device == "list":
        _list(args)
        return
    on = device(args.device)
    if args.price is not None:
        on = on.with_price(args.price)
    work = workload(args.workload)
    size = _size(args)
    places = args.measured or [p for p in [results_folder()] if p]
    measured = read_measured(places, on)
    advice = advise(
        size,
        on,
        work,
        mode=args.mode,
        floor=args.recovery,
        latency=math.inf if args.latency is None else args.latency,
        rate=args.rate,
        schemes=[f.strip() for f in args.formats.split(",")] if args.formats else None,
        recoveries=dict(map(_recovery, args.measured_recovery)),
        efficiency=calibrate(measured) if measured else None,
        devices=args.devices,
        concurrency=args.concurrency,
        max_batch=args.max_batch,
        calibrated=len(measured),
    )
    if args.json:
        print_json(advice.to_dict())
    else:
        _show(advice)


def _size(args: argparse.Namespace) -> ModelSize:
    given = {
        "--parameters": args.parameters,
        "--layers": args.layers,
        "--kv-heads": args.kv_heads,
        "--head-dim": args.head_dim,
    }
    if args.folder is not None:
        if any(value is not None for value in (*given.values(), args.context)):
            raise DeviceError("give the folder of a model or its sizes, not both")
        return size_of(args.folder)
    missing = [name for name, value in given.items() if value is None]
    if missing:
        raise DeviceError(f"give the folder of a model, or its sizes: {', '.join(missing)} missing")
    name = f"{args.parameters / 1e9:.3g}B"
    sizes = (args.parameters, args.layers, args.kv_heads, args.head_dim)
    return ModelSize(*sizes, kept=args.kept, name=name, context=args.context)


def _recovery(text: str) -> tuple[str, float]:
    from qjax.hardware.schemes import scheme

    name, sign, value = text.partition("=")
    try:
        return scheme(name.strip()).name, float(value) if sign else math.nan
    except ValueError as e:
        if isinstance(e, DeviceError):
            raise
        raise DeviceError(f"--measured-recovery {text}: {value!r} is not a number; say W4A16-INT=98.7") from e


NARROW = 92
"""Columns below which a terminal does not get the queries a second, which follow from those of an hour."""


def _show(advice: Advice) -> None:
    d, w = advice.device, advice.workload
    price = f", {d.price:g} an hour" if d.price else ""
    tokens = f"{w.prompt} tokens in, {w.output} out"
    print(
        f"{advice.size.name}: {_count(advice.size.params)} parameters on {d.name} ({d.memory / 1e9:g} GB, "
        f"{d.bandwidth / 1e12:g} TB/s{price}), {tokens if '/' in w.name else f'{w.name} ({tokens})'}, "
        f"{_MODES[advice.mode]}\n"
    )
    unit = "queries per\nunit of price" if d.price else "queries per\ndevice-hour"
    heads = ["format", "devices", "batch", "latency", "queries/s", unit, "recovery", "", ""]
    rows = [_row(advice, c) for c in advice.candidates]
    if room() < NARROW:
        heads, rows = [*heads[:4], *heads[5:]], [[*row[:4], *row[5:]] for row in rows]
    print_rich(table(heads, rows, left=(0, len(heads) - 2, len(heads) - 1)))
    print()
    for c in advice.candidates:
        if c.reason:
            print(f"{c.scheme.name} is out: {c.reason}.")
    print(_verdict(advice))
    for note in advice.notes:
        print(f"Note: {note}")
    e = advice.efficiency
    source = (
        f"fitted to {advice.calibrated} measurement{'s' if advice.calibrated > 1 else ''}"
        if advice.calibrated
        else f"{d.name} is unmeasured: start values of the format study"
    )
    print(
        f"Efficiency: {e.bandwidth:.2f} of the bandwidth, {e.compute:.2f} of the peak, {1e3 * e.step:.1f} ms a step "
        f"({source})."
    )
    said = [_SOURCES[s] for s in _SOURCES if any(c.source == s for c in advice.candidates)]
    if said:
        print(f"Recovery: {'; '.join(said)}.")


EQUAL = 0.005
"""Share of the cost below which two formats are said to come out equal."""

_MODES = {"sync": "one query at a time", "async": "as many queries as fit", "rate": "queries at a given rate"}
_SOURCES = {
    "measured": "measured is what you gave",
    "published": "published is that of Llama 3.1 of this size",
    "interpolated": "interpolated is between sizes of Llama 3.1",
    "extrapolated": "extrapolated is a guess from other sizes of Llama 3.1, so measure it (--measured-recovery)",
}


def _count(n: float) -> str:
    scale, unit = next(((s, u) for s, u in ((1e9, " B"), (1e6, " M"), (1e3, " K")) if n >= s), (1, ""))
    return f"{n / scale:,.3g}{unit}"


def _verdict(advice: Advice) -> str:
    best, other = advice.choice, advice.runner_up
    take = f"Take {best.scheme.name} ({_how(best)})"
    if other is None:
        return f"{take}: nothing else will do."
    if not advice.measure:
        return f"{take}: {100 * advice.margin:.0f} % more queries for the money than {other.scheme.name}."
    if not best.scheme.preset and advice.margin > -EQUAL:
        return f"{take}: no format is noticeably faster."
    first, second = (best, other) if advice.margin >= 0 else (other, best)
    ahead = first.per_cost / second.per_cost - 1
    close = (
        f"{first.scheme.name} is {100 * ahead:.0f} % ahead of {second.scheme.name}: too close to tell, measure both."
        if ahead >= EQUAL
        else f"{first.scheme.name} and {second.scheme.name} come out equal: too close to tell, measure both."
    )
    kept = [c.recovery for c in (best, other)]
    if None in kept or kept[0] == kept[1]:
        return f"{close} Until then take {best.scheme.name} ({_how(best)})."
    shown = f"{_percent(best)} against {_percent(other)}"
    return f"{close} Until then take {best.scheme.name} ({_how(best)}), which keeps more of the scores ({shown})."


def _how(c: Candidate) -> str:
    return f"recipe {c.scheme.preset}" if c.scheme.preset else "no quantization"


def _percent(c: Candidate) -> str:
    return "unknown" if c.recovery is None else f"{c.recovery:.1f} %"


def _row(advice: Advice, c: Candidate) -> list[str]:
    if c.reason:
        return [c.scheme.name, "", "", "", "", "", _percent(c), c.source, "out"]
    count = f"{c.devices}" if c.replicas == 1 else f"{c.replicas} x {c.devices}"
    note = {id(advice.choice): "choice", id(advice.runner_up): "second"}.get(id(c), "")
    figures = [_figure(c.batch), f"{_figure(c.latency)} s", _figure(c.qps), _figure(c.per_cost)]
    return [c.scheme.name, count, *figures, _percent(c), c.source, note]


def _figure(value: float) -> str:
    """Three figures, more only in front of the point: ``0.215``, ``4.66``, ``7,157,105``."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".") if value % 1 else f"{value:.0f}"


def _list(args: argparse.Namespace) -> None:
    if args.json:
        print_json({"devices": [_device(d) for d in devices().values()]})
        return
    rows = []
    for d in devices().values():
        peaks = [f"{d.peaks[k] / 1e12:g}" if k in d.peaks else "" for k in ("bf16", "int8", "fp8")]
        measured = f"{d.measured_bandwidth / 1e12:g}" if d.measured_bandwidth else ""
        capability = f"{d.capability:g}" if d.capability else ""
        speed = f"{d.bandwidth / 1e12:g}"
        rows.append([d.name, f"{d.memory / 1e9:g}", speed, measured, *peaks, capability, f"{d.crossover():.0f}"])
    print_rich(table(("device", "GB", "TB/s", "measured TB/s", "bf16", "int8", "fp8", "capability", "B*"), rows))
    print("\nPeaks in dense TFLOP/s. B* is the number of sequences up to which 4-bit weights decode fastest.")


def _device(d: Device) -> dict[str, Any]:
    return {
        "name": d.name,
        "memory": d.memory,
        "bandwidth": d.bandwidth,
        "measured_bandwidth": d.measured_bandwidth,
        "peaks": dict(d.peaks),
        "capability": d.capability,
        "tdp": d.tdp,
        "crossover": d.crossover(),
    }
