"""The cost models beside published figures: MixPE's released table, and the format study's cost ratios.

Nothing is timed: it is arithmetic, the same on every machine. Writes benchmarks/results/hardware.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

from benchmarks.measure import RESULTS, parser, table
from qjax.hardware import SCHEMES, WORKLOADS, Device, Efficiency, ModelSize, device, fit
from qjax.hardware.mixpe import NETWORKS, PUBLISHED_ENERGY, PUBLISHED_TIME, array, arrays, released
from qjax.hardware.roofline import largest_batch, query_seconds

LLAMA_70B = ModelSize(70.6e9, 80, 8, 128, kept=2.1e9, name="DeepSeek-R1-Distill-Llama-70B")
GRANITE_8B = ModelSize(8.17e9, 40, 8, 128, kept=0.2e9, name="Granite-3.1-8B")

ASYNC_BATCH = 64
"""Sequences at a time in the asynchronous rows: the published tables do not say; the best of their sweep was taken."""

# Cost of BF16 over cost of the format, mean over the seven workloads (model card, vLLM 0.7.2): devices of BF16, then
# (format, devices, published ratio).
Row = tuple[int, tuple[tuple[str, int, float], ...]]
COSTS: dict[str, dict[str, Row]] = {
    "A6000": {
        "sync": (4, (("W8A8-INT", 2, 1.93), ("W4A16-INT", 2, 2.83))),
        "async": (4, (("W8A8-INT", 4, 1.76), ("W4A16-INT", 4, 1.48))),
    },
    "A100-80G": {
        "sync": (2, (("W8A8-INT", 2, 1.48), ("W4A16-INT", 1, 2.69))),
        "async": (4, (("W8A8-INT", 4, 1.63), ("W4A16-INT", 4, 1.12))),
    },
    "H100": {
        "sync": (2, (("W8A8-FP", 2, 1.39), ("W4A16-INT", 1, 1.83))),
        "async": (4, (("W8A8-FP", 4, 1.78), ("W4A16-INT", 4, 1.45))),
    },
}
# Single-stream speed over BF16 (model card, vLLM 0.6.6), one device.
_GB, _TB = 1e9, 1e12
A5000 = Device("A5000", 24 * _GB, 0.768 * _TB, {"bf16": 111 * _TB, "int8": 222 * _TB}, capability=8.6)
L40 = Device("L40", 48 * _GB, 0.864 * _TB, {"bf16": 181 * _TB, "int8": 362 * _TB, "fp8": 362 * _TB}, capability=8.9)
SPEEDS: dict[str, tuple[Device, tuple[tuple[str, float], ...]]] = {
    "A6000": (device("A6000"), (("W8A8-INT", 1.50), ("W4A16-INT", 2.48))),
    "A5000": (A5000, (("W8A8-INT", 1.60), ("W4A16-INT", 2.61))),
    "A100-80G": (device("A100-80G"), (("W8A8-INT", 1.31), ("W4A16-INT", 1.80))),
    "L40": (L40, (("W8A8-FP", 1.47), ("W4A16-INT", 2.72))),
}


def query_cost(size: ModelSize, name: str, on: Device, n: int, mode: str, work, efficiency: Efficiency) -> float:
    """Device-seconds of a query."""
    one = SCHEMES[name]
    batch = 1 if mode == "sync" else min(ASYNC_BATCH, max(1, largest_batch(size, one, on, n, work)))
    return n * query_seconds(size, one, on, n, batch, work, efficiency) / batch


def cost_ratios(name: str, efficiency: Efficiency) -> list[float]:
    """Predicted ratios of a row of `COSTS`, in its order."""
    on, out = device(name), []
    for mode, (base, others) in COSTS[name].items():
        for scheme, n, _ in others:
            per_work = [
                query_cost(LLAMA_70B, "BF16", on, base, mode, w, efficiency)
                / query_cost(LLAMA_70B, scheme, on, n, mode, w, efficiency)
                for w in WORKLOADS.values()
            ]
            out.append(fmean(per_work))
    return out


def speed_ratios(name: str, efficiency: Efficiency) -> list[float]:
    """Predicted ratios of a row of `SPEEDS`."""
    on, rows = SPEEDS[name]
    return [
        fmean(
            query_cost(GRANITE_8B, "BF16", on, 1, "sync", w, efficiency)
            / query_cost(GRANITE_8B, scheme, on, 1, "sync", w, efficiency)
            for w in WORKLOADS.values()
        )
        for scheme, _ in rows
    ]


def published_costs(name: str) -> list[float]:
    return [value for _, rows in COSTS[name].values() for _, _, value in rows]


def study() -> list[tuple[str, float, float, bool]]:
    """Every published ratio: (what, published, predicted, whether it was calibrated on)."""
    cost = fit(lambda e: cost_ratios("A100-80G", e), published_costs("A100-80G"))
    out = []
    for name, modes in COSTS.items():
        labels = [
            f"70B cost, {name} {mode}, {scheme} on {n}" for mode, (_, rows) in modes.items() for scheme, n, _ in rows
        ]
        for label, want, got in zip(labels, published_costs(name), cost_ratios(name, cost), strict=True):
            out.append((label, want, got, name == "A100-80G"))
    speed = fit(lambda e: speed_ratios("A6000", e), [value for _, value in SPEEDS["A6000"][1]])
    for name, (_, rows) in SPEEDS.items():
        for (scheme, want), got in zip(rows, speed_ratios(name, speed), strict=True):
            out.append((f"Granite 8B speed, {name}, {scheme}", want, got, name == "A6000"))
    return out


def mixpe() -> dict[str, dict[str, tuple[float, float]]]:
    """(time, energy) of every array on every network, FP16 = 1, as released."""
    out: dict[str, dict[str, tuple[float, float]]] = {}
    for network in NETWORKS:
        runs = {name: released(name, network) for name in arrays()}
        base = sum(runs["FP16"].energy(array("FP16")).values())
        out[network] = {
            name: (run.cycles / runs["FP16"].cycles, sum(run.energy(array(name)).values()) / base)
            for name, run in runs.items()
        }
    return out


def text() -> str:
    """Both tables."""
    parts = ["# Cost models beside published figures", "", "Written by `python -m benchmarks.hardware`.", ""]
    parts += ["## MixPE, as released", "", "Time and energy, FP16 = 1: computed / published.", ""]
    rows = []
    for network, found in mixpe().items():
        for what, at, published in (("time", 0, PUBLISHED_TIME), ("energy", 1, PUBLISHED_ENERGY)):
            theirs: Mapping[str, float] = published.get(network, {})
            if theirs:
                rows.append([f"{network}, {what}", *(f"{found[a][at]:.2f} / {theirs[a]:.2f}" for a in arrays())])
    parts += [table(["network", *arrays()], rows), ""]
    parts += ["## Cost and speed over BF16, the format study's harness", ""]
    parts += [
        f"Efficiencies fitted to one row of each table (marked); {ASYNC_BATCH} sequences at a time where asynchronous, "
        "which the published tables do not tell.",
        "",
    ]
    rows = [
        [what + (" (fitted)" if fitted else ""), f"{want:.2f}", f"{got:.2f}", f"{100 * (got / want - 1):+.0f} %"]
        for what, want, got, fitted in study()
    ]
    parts += [table(["", "published", "predicted", "off by"], rows), ""]
    return "\n".join(parts)


def main() -> None:
    args = parser(__doc__ or "").parse_args()
    path = Path(args.out) / "hardware.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text())
    print(f"{text()}written to {path}")


__all__ = ["RESULTS", "main", "mixpe", "study", "text"]

if __name__ == "__main__":
    main()
