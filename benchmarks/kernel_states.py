"""Write what has been checked of the GPU kernels, tier by tier, into docs/kernels.md.

    PYTHONPATH=. python -m benchmarks.kernel_states

From `benchmarks/results/aot-sm_90a.json` (tier 2) and what `benchmarks.gpu` wrote (tier 3); a test says whether the
page is up to date.
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import aot

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "kernels.md"
BEGIN, END = "<!-- written by benchmarks.kernel_states -->\n", "<!-- until here -->\n"


def devices() -> list[dict]:
    """What was measured on devices, newest last."""
    found = [json.loads(p.read_text()) for p in sorted(RESULTS.glob("nvidia-*.json"))]
    return sorted((r for r in found if "checks" in r), key=lambda r: r["environment"]["date"])


def on_device(name: str, fmt: str, dtype: str, records: list[dict]) -> str:
    """What devices said of one kind of kernel."""
    if not records:
        return "unmeasured"
    last = records[-1]
    rows = [r for r in last["checks"] if (r["weights"], r["dtype"], "act" in r) == (fmt, dtype, "A8" in name)]
    right = sum(r["right"] for r in rows)
    where = f"{last['environment']['device']}, {last['environment']['date']}"
    return f"{right} of {len(rows)} right ({where})" if rows else "unmeasured"


def table() -> str:
    """The generated part of the page."""
    stored = json.loads(aot.RESULTS.read_text())
    records = devices()
    lines = [
        "| kernel | 0 lowered | 1 interpreted | 2 compiled for sm_90a | registers | shared memory, KiB | "
        "instructions (of tensor cores) | 3 on a device |",
        "|---|---|---|---|---:|---:|---:|---|",
    ]
    for name, found in stored["kernels"].items():
        kind, dtype = name.split(", ")[:2]
        faults = aot.faults(found)
        cells = [
            name,
            "by tests",
            "by tests",
            "; ".join(faults) or "no spills",
            found["registers"],
            f"{found['shared_bytes'] / 1024:.0f}",
            f"{found['instructions']} ({found[found['multiplies']]} {found['multiplies']})",
            on_device(name, kind.split(" ", 1)[1], dtype, records),
        ]
        lines.append("| " + " | ".join(str(c) for c in cells) + " |")
    made = ", ".join(f"{tool} {version}" for tool, version in stored["made_by"].items())
    lines.append(f"\nCompiled by {made}. Registers are the limit at launch, which warpgroups then trade.")
    return "\n".join(lines) + "\n"


def renewed(page: str) -> str:
    """The page with its generated part written anew."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


def main() -> None:
    PAGE.write_text(renewed(PAGE.read_text()))
    print(f"written to {PAGE}")


if __name__ == "__main__":
    main()
