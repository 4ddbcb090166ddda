"""A program as a table of sites: what `print(program)` shows."""

from __future__ import annotations

from qjax.program import Program
from qjax.report.data import SiteRow
from qjax.report.groups import group_rows


def program_table(program: Program) -> str:
    """Render the sites as plain text: name, op, weight, repeats, floating-point operations and bytes.

    Equal sites of repeated layers share a line (``layers/{0..31}/mlp/up/kernel``).
    """
    rows = {
        site.name: SiteRow(
            name=site.name,
            op=site.op,
            leaf=site.leaf or "",
            shape=site.weight_shape or (),
            format=site.dtype,
            reason=site.reason,
            bytes_before=site.bytes,
            repeats=site.repeats or 0,
            flops=site.flops,
        )
        for site in program.sites
    }
    lines = [("site", "op", "weight", "runs", "FLOPs", "bytes", "")]
    for group in group_rows(rows.values()):
        first = group.rows[0]
        shape = "×".join(map(str, first.shape)) if first.leaf else "-"
        lines.append(
            (
                group.name,
                first.op,
                f"{first.format}[{shape}]" if first.leaf else "-",
                f"{first.repeats}" if first.repeats else "?",
                si(sum(r.flops for r in group.rows)),
                si(sum(r.bytes_before for r in group.rows)),
                first.reason and f"cannot be quantized: {first.reason}",
            )
        )
    widths = [max(len(line[i]) for line in lines) for i in range(6)]
    text = [
        "  ".join(
            cell.rjust(w) if i in (3, 4, 5) else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=False))
        )
        + (f"  {line[6]}" if line[6] else "")
        for line in lines
    ]
    text.append(f"{len(program.sites)} sites, {len(program.leaf_names)} parameter leaves")
    return "\n".join(t.rstrip() for t in text)


def si(number: float) -> str:
    """Three digits and a unit prefix: 12.6M."""
    if not number:
        return "-"
    for prefix in ("", "k", "M", "G", "T", "P"):
        if number < 999.5:
            return f"{number:.3g}{prefix}"
        number /= 1000
    return f"{number:.3g}E"
