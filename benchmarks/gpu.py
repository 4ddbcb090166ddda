"""The GPU kernels on the GPU at hand: first whether they are right, then how fast they are.

    PYTHONPATH=. python -m benchmarks.gpu [--seconds 540] [--quick] [--skip-times | --skip-checks] [--parts NAME ...]

For one session with an H100 or H200. Every kind of kernel is compared with float64 NumPy, several times over; what is
wrong is named. Then layers of Llama and Mixtral, 1 to 4096 tokens, beside the bfloat16 `jnp.dot`, the bandwidth of a
copy and other software, which are measured in the same run: times are the device's own, over weights that rotate
through more memory than the L2 cache. What does not fit into the seconds is left out. Results:
`benchmarks/results/<device>-<date>.json` and `.md`, written after each part (parts that are not run keep what stands
there); then `python -m benchmarks.kernel_states` renews docs/kernels.md.
"""

from __future__ import annotations

import datetime
import json
import re
import time
from typing import Any

import jax

from benchmarks import measure
from benchmarks.gpu_parts import PARTS, part
from benchmarks.gpu_parts.peers import merged
from benchmarks.kernel_cases import FAMILIES, written_in
from qjax.kernels.devices import cuda_capability


def text(record: dict[str, Any]) -> str:
    """The Markdown page."""
    checked = [row for found in record["parts"].values() for row in found["checks"]]
    wrong = [row for row in checked if not row["right"]]
    lines = [f"{len(checked) - len(wrong)} of {len(checked)} comparisons with NumPy right."]
    lines += [f"- WRONG: {row}" for row in wrong]
    if rates := record.get("rates"):
        lines.append(f"\nCopy {rates['copy'] / 1e12:.2f} TB/s, bfloat16 product {rates['peak'] / 1e12:.0f} TFLOP/s.")
    for name, found in record["parts"].items():
        rows = [r for r in found.get("times", []) if "us" in r]
        others = list(dict.fromkeys(peer for r in rows for peer in r.get("peers", {})))
        head = ["kernel", "layer", "N", "K", "tokens", "us", "GB/s", "TFLOP/s", "of the ceiling"]
        head += [f"{peer}, us" for peer in others]
        if rows:
            order = {row["layer"]: i for i, row in reversed(list(enumerate(rows)))}
            rows = sorted(rows, key=lambda r: (r["kernel"], order[r["layer"]], r["tokens"]))
            lines += [f"\n## {name}\n", measure.table(head, [_cells(r, others) for r in rows])]
        failed = [r for r in found.get("times", []) if "us" not in r]
        lines += [f"- not measured: {r}" for r in failed]
    lines.append(
        "\nTimes are of the device, without launches. The ceiling is the larger of the weight's bytes at the bandwidth "
        "of the copy and the arithmetic at the rate of the bfloat16 product (twice that for 8-bit products)."
    )
    return "\n".join([*lines, *(f"\n{name}: left out, the time was up." for name in record["left_out"])])


def _cells(row: dict[str, Any], others: list[str]) -> list[str]:
    """One row of the table."""
    us = row["us"]
    share = f"{row['ceiling_us'] / us:.0%}" if row.get("ceiling_us") else ""
    peers = row.get("peers", {})
    theirs = [f"{peers[p]:.1f} ({peers[p] / us:.2f} x)" if isinstance(peers.get(p), float) else "" for p in others]
    rate = [f"{row.get('bytes', 0) / us / 1e3:.0f}", f"{row.get('flops', 0) / us / 1e6:.0f}"]
    return [row["kernel"], row["layer"], row["n"], row["k"], row["tokens"], f"{us:.1f}", *rate, share, *theirs]


def main() -> None:
    parser = measure.parser(__doc__ or "")
    parser.add_argument("--seconds", type=float, default=540, help="after which nothing further is begun")
    parser.add_argument("--quick", action="store_true", help="half of the comparisons")
    parser.add_argument("--skip-times", action="store_true", help="only whether results are right")
    parser.add_argument("--skip-checks", action="store_true", help="only times")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    given = parser.parse_args()
    capability = cuda_capability()
    if capability is None:
        print(f"the default device is {jax.devices()[0].device_kind}, no CUDA device: nothing was run")
        return
    end = time.perf_counter() + given.seconds
    environment = measure.environment()
    name = re.sub(r"[^a-z0-9]+", "-", environment["device"].lower()).strip("-")
    stem = f"{name}-{datetime.date.today().isoformat()}"
    earlier = given.out / f"{stem}.json"
    parts = json.loads(earlier.read_text())["parts"] if earlier.exists() else {}
    parts |= {p: {"checks": []} for p in given.parts}
    record: dict[str, Any] = {"environment": environment, "left_out": []}
    record["parts"] = {p: parts[p] for p in PARTS if p in parts}

    def save() -> None:
        given.out.mkdir(parents=True, exist_ok=True)
        (given.out / f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n")
        (given.out / f"{stem}.md").write_text(f"{text(record)}\n\n{measure.described(environment)}.\n")

    for p in given.parts if not given.skip_checks else ():
        begun = time.perf_counter()
        found = record["parts"][p]["checks"] = part(p).checks(given.quick)
        if p in FAMILIES:
            record["parts"][p]["written_in"] = written_in(p)
        right = sum(row["right"] for row in found)
        print(f"{p}: {right} of {len(found)} right, {time.perf_counter() - begun:.0f} s", flush=True)
        save()
    if not given.skip_times:
        from benchmarks.gpu_parts.clock import Clock

        clock = Clock()
        record["rates"] = {"copy": clock.copy, "peak": clock.peak}
        for i, p in enumerate(given.parts):
            # What is left is shared evenly, so that no part takes it all.
            clock.share((end - time.perf_counter()) / (len(given.parts) - i))
            if clock.left() <= 0:
                record["left_out"].append(p)
                continue
            begun = time.perf_counter()
            rows = record["parts"][p]["times"] = part(p).times(clock)
            print(f"{p}: {len(rows)} times, {time.perf_counter() - begun:.0f} s", flush=True)
            merged(record["parts"])
            save()
    save()
    print(f"\n{text(record)}\n\nwritten to {given.out / stem}.md and .json")


if __name__ == "__main__":
    main()
