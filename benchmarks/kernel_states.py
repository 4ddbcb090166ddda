"""Write what has been checked of the GPU kernels, tier by tier, into docs/kernels.md.

    PYTHONPATH=. python -m benchmarks.kernel_states

From `benchmarks/results/aot-sm_90a` (tier 2) and what `benchmarks.gpu` wrote (tier 3); a test says whether the
page is up to date.
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks import aot
from benchmarks.kernel_cases import FAMILIES, written_in

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "kernels.md"
BEGIN, END = "<!-- written by benchmarks.kernel_states -->\n", "<!-- until here -->\n"


def devices() -> list[dict]:
    """What was measured on devices, newest last."""
    found = [json.loads(p.read_text()) for p in sorted(RESULTS.glob("nvidia-*.json"))]
    return sorted((r for r in found if "parts" in r), key=lambda r: r["environment"]["date"])


def on_device(name: str, family: str, records: list[dict]) -> str:
    """What devices said of one kind of kernel: the newest of them that ran it, and whether it has changed since."""
    for record in reversed(records):
        part = record["parts"].get(family, {"checks": []})
        rows = [r for r in part["checks"] if f"{name}, ".startswith(r["kernel"] + ", ")]
        if rows:
            where = f"{record['environment']['device']}, {record['environment']['date']}"
            said = f"{sum(r['right'] for r in rows)} of {len(rows)} right ({where})"
            return said if part.get("written_in") == written_in(family) else f"unmeasured; an earlier form: {said}"
    return "unmeasured"


def table() -> str:
    """The generated part of the page."""
    records = devices()
    lines = [
        "| kernel | 0 lowered | 1 interpreted | 2 compiled for sm_90a | registers | shared memory, KiB | "
        "instructions (of tensor cores) | 3 on a device |",
        "|---|---|---|---|---:|---:|---:|---|",
    ]
    tables = {family: aot.stored(family) for family in FAMILIES}
    every = ((family, *item) for family, table in tables.items() for item in table["kernels"].items())
    for family, name, found in every:
        used = found["multiplies"]
        cells = [
            name,
            "by tests",
            "by tests",
            "; ".join(aot.faults(found)) or "no spills",
            found["registers"],
            f"{found['shared_bytes'] / 1024:.0f}",
            f"{found['instructions']}" + (f" ({found[used]} {used})" if used else ""),
            on_device(name, family, records),
        ]
        lines.append("| " + " | ".join(str(c) for c in cells) + " |")
    makers = [tuple(table["made_by"].items()) for table in tables.values()]
    made = "; ".join(", ".join(f"{tool} {version}" for tool, version in maker) for maker in dict.fromkeys(makers))
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
