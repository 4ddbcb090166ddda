"""``qjax advise``."""

from __future__ import annotations

import argparse
import math
from typing import Any

from qjax.cli.output import print_json, print_rich
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
        if any(value is not None for value in given.values()):
            raise DeviceError("give the folder of a model or its sizes, not both")
        return size_of(args.folder)
    missing = [name for name, value in given.items() if value is None]
    if missing:
        raise DeviceError(f"give the folder of a model, or its sizes: {', '.join(missing)} missing")
    name = f"{args.parameters / 1e9:.3g}B"
    return ModelSize(args.parameters, args.layers, args.kv_heads, args.head_dim, kept=args.kept, name=name)


def _recovery(text: str) -> tuple[str, float]:
    from qjax.hardware.schemes import scheme

    name, sign, value = text.partition("=")
    try:
        return scheme(name.strip()).name, float(value) if sign else math.nan
    except ValueError as e:
        if isinstance(e, DeviceError):
            raise
        raise DeviceError(f"--measured-recovery {text}: {value!r} is not a number; say W4A16-INT=98.7") from e


def _show(advice: Advice) -> None:
    from rich.table import Table

    d, w = advice.device, advice.workload
    price = f", {d.price:g} an hour" if d.price else ""
    print(
        f"{advice.size.name}: {advice.size.params / 1e9:,.3g} B parameters on {d.name} ({d.memory / 1e9:g} GB, "
        f"{d.bandwidth / 1e12:g} TB/s{price}), {w.name} ({w.prompt} tokens in, {w.output} out), {advice.mode}\n"
    )
    unit = "queries per unit of price" if d.price else "queries per device-hour"
    table = Table(box=None, pad_edge=False)
    for name in ("format", "devices", "batch", "latency", "queries/s", unit, "recovery", ""):
        table.add_column(name, justify="left" if name in ("format", "") else "right")
    for c in advice.candidates:
        table.add_row(*_row(advice, c))
    print_rich(table)
    print()
    best, other = advice.choice, advice.runner_up
    how = f" (recipe {best.scheme.preset})" if best.scheme.preset else " (no quantization)"
    if other is None:
        print(f"Take {best.scheme.name}{how}: nothing else will do.")
    elif advice.measure:
        print(
            f"{best.scheme.name}{how} is {100 * advice.margin:.0f} % ahead of {other.scheme.name}: too close to tell, "
            "measure both."
        )
    else:
        print(
            f"Take {best.scheme.name}{how}: {100 * advice.margin:.0f} % more queries for the money than "
            f"{other.scheme.name}."
        )
    e = advice.efficiency
    source = (
        f"fitted to {advice.calibrated} measurements"
        if advice.calibrated
        else f"{d.name} is unmeasured: start values of the format study"
    )
    print(
        f"Efficiency: {e.bandwidth:.2f} of the bandwidth, {e.compute:.2f} of the peak, {1e3 * e.step:.1f} ms a step "
        f"({source}). Recovery: published figures by size, unless marked measured."
    )


def _row(advice: Advice, c: Candidate) -> list[str]:
    recovery = "unknown" if c.recovery is None else f"{c.recovery:.1f} %{' measured' if c.measured else ''}"
    if c.reason:
        return [c.scheme.name, "", "", "", "", "", recovery, c.reason]
    count = f"{c.devices}" if c.replicas == 1 else f"{c.replicas} x {c.devices}"
    note = {id(advice.choice): "choice", id(advice.runner_up): "runner-up"}.get(id(c), "")
    figures = [f"{c.batch:.3g}", f"{c.latency:.3g} s", f"{c.qps:.3g}", f"{c.per_cost:,.0f}"]
    return [c.scheme.name, count, *figures, recovery, note]


def _list(args: argparse.Namespace) -> None:
    from rich.table import Table

    if args.json:
        print_json({"devices": [_device(d) for d in devices().values()]})
        return
    table = Table(box=None, pad_edge=False)
    names = ("device", "GB", "TB/s", "measured", "bf16", "int8", "fp8", "capability", "B*")
    for name in names:
        table.add_column(name, justify="left" if name == "device" else "right")
    for d in devices().values():
        peaks = [f"{d.peaks[k] / 1e12:g}" if k in d.peaks else "" for k in ("bf16", "int8", "fp8")]
        measured = f"{d.measured_bandwidth / 1e12:g}" if d.measured_bandwidth else ""
        capability = f"{d.capability:g}" if d.capability else ""
        speed = f"{d.bandwidth / 1e12:g}"
        table.add_row(d.name, f"{d.memory / 1e9:g}", speed, measured, *peaks, capability, f"{d.crossover():.0f}")
    print_rich(table)
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
