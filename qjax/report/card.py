"""The README of a quantized folder: where it comes from, what it holds, and how to run it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qjax.report.data import Report
from qjax.report.text import size

MOST_LINES = 60
"""Lines of a recipe that a card shows; a longer one stands in the checkpoint only."""


def render_card(
    report: Report,
    *,
    version: str,
    recipe: str,
    runs: str,
    license: str = "",
    original: str = "",
    calibration: Mapping[str, Any] | None = None,
) -> str:
    """Return the card as Markdown, with the front matter that model hubs read.

    Args:
        report: of the quantization.
        version: of qjax.
        recipe: as TOML.
        runs: Python that calls the model, a line or two, after ``fn, abstract, config`` and ``model`` are there.
        license: lines of the original card's front matter that state its licence.
        original: name of the file that holds the original card; "" where there is none.
        calibration: what it was calibrated on: ``data``, ``rows``, ``seed``.
    """
    name = report.model or "model"
    front = ["library_name: qjax", f"base_model: {name}", *license.splitlines()]
    facts = [("recipe", report.recipe or "of its own, below"), *_sizes(report)]
    weights = sum(bool(r.leaf) for r in report.left)
    facts.append(("sites", f"{len(report.quantized):,} quantized, {weights:,} with weights left in float"))
    if calibration:
        data = str(calibration["data"]).replace("\\", "/").rsplit("/", 1)[-1]
        facts.append(
            ("calibrated on", f"{len(calibration['rows']):,} rows of {data}, drawn by seed {calibration['seed']}")
        )
    table = "\n".join(f"| {what} | {said} |" for what, said in facts)
    lines = recipe.strip().splitlines()
    shown = f"\n## Recipe\n\n```toml\n{recipe.strip()}\n```\n" if len(lines) <= MOST_LINES else ""
    card = f" The card of {name} is in [{original}]({original})." if original else ""
    return (
        "---\n" + "\n".join(front) + f"\n---\n\n# {name}, quantized\n\n"
        f"Written by qjax {version}. The weights are packed in `checkpoint`; the float weights are not needed to run "
        f"it.{card}\n\n| | |\n| --- | --- |\n{table}\n\n"
        "What each layer became, and how far it is from the float model: [report.html](report.html), "
        f'[report.txt](report.txt).\n\n## Run it\n\n```python\nimport qjax\n\nfolder = "."\n{runs.strip()}\n```\n\n'
        "From the command line: `qjax eval FOLDER --help`, `qjax inspect FOLDER`.\n" + shown
    )


def _sizes(report: Report) -> list[tuple[str, str]]:
    dtype = f" in {report.float_dtype}" if report.float_dtype else ""
    before = f"{size(report.float_bytes)}{dtype}"
    if report.widened:
        before += f", {size(report.source_bytes)} in {report.source_dtype}"
    out = [("parameters", f"{size(report.stored_bytes)} in memory; before, {before}")]
    bits, own = report.bits(), report.bits(report.quantized)
    if bits is not None:
        where = f", {own:.2f} where quantized" if own is not None else ""
        out.append(("bits per weight", f"{bits:.2f} over all{where}"))
    return out
