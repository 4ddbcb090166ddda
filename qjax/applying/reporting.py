"""Filling the report: a row per site, from the program, the plan and what was stored."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from qjax import ops
from qjax.analysis.naming import Site
from qjax.applying.planning import Plan
from qjax.applying.storage import LeafPlan, Stored
from qjax.formats import SMOOTH, QArray, QStack, is_quantized
from qjax.program import Program
from qjax.report.data import Report, SiteRow
from qjax.rewriting.log_attention import lowering_of
from qjax.sources import Dynamic, Fixed

NOT_QUANTIZED_HERE = {
    "matmul": "a product of two activations: no rule names op='matmul'",
    "attention": "no rule names op='attention'",
    "softmax": "no rule names op='softmax'",
    "activation": "no rule names op='activation'",
    "norm": "no rule names op='norm'",
    "embedding": "no rule names op='embedding'",
}

ROWS = ops.Choice("rows", "")
NO_CHOICE = ops.Choice("dequantize", "dequantized where it is read: see the notes")


def build_report(
    program: Program,
    plan: Plan,
    stored: Sequence[Any],
    sqnr: dict[int, dict[tuple[int, ...], float]],
    rewriter: Any,
    *,
    name: str,
    recipe: str,
) -> Report:
    """The report of one quantization.

    Args:
        program, plan: what was found and decided.
        stored: the parameter leaves as stored.
        sqnr: leaf position -> slice -> SQNR in dB.
        rewriter: has replayed the program with these leaves, and knows where weights were dequantized.
        name: the model's name. recipe: the recipe's.
    """
    position = {leaf: i for i, leaf in enumerate(program.leaf_names)}
    seen: set[tuple[str, tuple[int, ...]]] = set()
    rows, carried = [], 0
    for site in program.sites:
        if site.leaf is None:
            rows.append(_free_row(site, plan, rewriter))
            continue
        leaf = position[site.leaf]
        leaf_plan = plan.leaves.get(leaf)
        row, key = _leaf_row(site, plan, leaf_plan, stored[leaf], sqnr.get(leaf, {}), rewriter)
        if (site.leaf, key) in seen or (site.leaf, ()) in seen:
            row = _without_bytes(row)
        else:
            carried += row.bytes_before
        seen.add((site.leaf, key))
        rows.append(row)
    notes = sorted(n for where in ("loops",) for n in rewriter.notes.get(where, ()))
    notes += [f"dequantized at run time: {n}" for n in sorted(rewriter.notes.get("dequantized", ()))]
    notes += _of_sqnr(plan)
    return Report(
        model=name,
        recipe=recipe,
        rows=tuple(rows),
        other_bytes=max(0, plan.float_bytes - carried),
        float_bytes=plan.float_bytes,
        stored_bytes=sum(a.nbytes if is_quantized(a) else math.prod(a.shape) * a.dtype.itemsize for a in stored),
        notes=tuple(notes),
        float_dtype=dtypes_of(program.leaf_avals),
    )


def dtypes_of(leaves: Sequence[Any]) -> str:
    """The float dtypes of leaves, that of most bytes first: ``bfloat16, float32``."""
    total: Counter[str] = Counter()
    for leaf in leaves:
        if jnp.issubdtype(leaf.dtype, jnp.floating):
            total[leaf.dtype.name] += math.prod(leaf.shape) * leaf.dtype.itemsize
    return ", ".join(name for name, _ in total.most_common())


def _of_sqnr(plan: Plan) -> list[str]:
    """What SQNR does not say of weights whose rounding has looked at activations."""
    used = {s.rounding for leaf in plan.leaves.values() for s in leaf.slices.values() if s.fmt is not None}
    names = sorted({type(r).__name__ for r in used if getattr(r, "needs_batches", False)})
    if not names:
        return []
    return [
        f"SQNR is that of the weights. {' and '.join(names)} rounded them for what the layers put out, which is worth "
        "a lower SQNR: compare it with other roundings by KL divergence, not by SQNR"
    ]


def _spelled(source: Any) -> str:
    """The format of an operand; its scales may be one for each head, of which the format itself knows nothing."""
    name = source.fmt.name
    return name.replace("per tensor", "per head") if isinstance(source, Fixed) and len(source.scale) > 1 else name


def _free_row(site: Site, plan: Plan, rewriter: Any) -> SiteRow:
    decision = plan.decisions[site.name]
    if decision.operands and not decision.skip:
        formats = {name: _spelled(source) for name, source in decision.operands.items()}
        lowering, note = lowering_of(rewriter, site)
        return SiteRow(
            name=site.name,
            op=site.op,
            leaf="",
            shape=site.out_shape,
            format=", ".join(dict.fromkeys(formats.values())),
            inputs=", ".join(f"{name} {fmt}" for name, fmt in formats.items()),
            lowering=lowering,
            note=note,
            repeats=site.repeats or 1,
            flops=site.flops,
        )
    reason = site.reason or decision.reason
    if not site.reason and decision.rule is None:
        reason = NOT_QUANTIZED_HERE.get(site.op, reason)
    return SiteRow(
        name=site.name,
        op=site.op,
        leaf="",
        shape=site.out_shape,
        format=site.dtype,
        reason=reason or "nothing to quantize",
        repeats=site.repeats or 1,
        flops=site.flops,
    )


def _leaf_row(
    site: Site, plan: Plan, leaf: LeafPlan | None, value: Any, sqnr: dict[tuple[int, ...], float], rewriter: Any
) -> tuple[SiteRow, tuple[int, ...]]:
    decision = plan.decisions[site.name]
    elements = math.prod(site.weight_shape or ())
    key: tuple[int, ...] = ()
    stored = Stored(reason=site.reason or decision.reason)
    if leaf is not None:
        at = dict(site.slice)
        key = tuple(at[a] for a in leaf.key_axes) if all(a in at for a in leaf.key_axes) else ()
        stored = leaf.slices.get(key) or (leaf.uniform or Stored(reason="slices of several formats"))
    elif site.slice:
        key = tuple(p for _, p in site.slice)
    act = decision.inputs.fmt if decision.inputs is not None and not decision.skip else None
    inputs = f"{act.name} {'dynamic' if isinstance(decision.inputs, Dynamic) else 'static'}" if act else "float"
    if stored.fmt is None:
        reason = stored.reason or decision.reason or NOT_QUANTIZED_HERE.get(site.op, "no rule of the recipe matches it")
        if act is not None:
            reason = ""
        row = SiteRow(
            name=site.name,
            op=site.op,
            leaf=site.leaf or "",
            shape=site.weight_shape or (),
            format=site.dtype,
            reason=reason,
            bits_per_element=8.0 * site.bytes / elements if elements else 0.0,
            bytes_before=site.bytes,
            bytes_after=site.bytes,
            inputs=inputs,
            repeats=site.repeats or 1,
            flops=site.flops,
        )
        return row, key
    part = _slice_value(value, leaf, key) if leaf is not None else value
    nbytes = _slice_bytes(part, leaf, key)
    where = rewriter.where(site.read)
    choice = rewriter.choices.get((where, stored.fmt.name), ROWS if site.op == "embedding" else NO_CHOICE)
    notes = [stored.note, *_of_inputs(part), choice.note, *sorted(rewriter.notes.get(site.name, ()))]
    row = SiteRow(
        name=site.name,
        op=site.op,
        leaf=site.leaf or "",
        shape=site.weight_shape or (),
        format=stored.fmt.name,
        bits_per_element=8.0 * nbytes / elements if elements else 0.0,
        bytes_before=site.bytes,
        bytes_after=nbytes,
        sqnr_db=sqnr.get(key, min(sqnr.values()) if sqnr else None),
        inputs=inputs,
        lowering=choice.name,
        note="; ".join(n for n in notes if n),
        repeats=site.repeats or 1,
        flops=site.flops,
    )
    return row, key


def _of_inputs(part: Any) -> list[str]:
    """What is stored beside codes and scales to change the activations, which a format's name does not tell."""
    if not isinstance(part, QArray) or SMOOTH not in part.aux:
        return []
    return [
        "activations are divided by a factor for each input channel as they pass (input.smooth, float32, counted in "
        "the bits)"
    ]


def _slice_value(value: Any, leaf: LeafPlan, key: tuple[int, ...]) -> Any:
    """The part of a stored leaf in which a slice lies."""
    if isinstance(value, QStack) and key:
        return value.parts[value.assign[key[0]][0]]
    return value


def _slice_bytes(part: Any, leaf: LeafPlan | None, key: tuple[int, ...]) -> int:
    """Bytes of one slice: an equal share of the part that holds it."""
    if leaf is None or not key or not isinstance(part, QArray):
        return int(part.nbytes)
    count = math.prod(part.shape[a] for a in leaf.key_axes)
    return int(part.nbytes) // max(count, 1)


def _without_bytes(row: SiteRow) -> SiteRow:
    from dataclasses import replace

    return replace(row, bytes_before=0, bytes_after=0)


def explain_row(row: SiteRow, recipe: str = "") -> str:
    """One site in words, for ``model.explain``."""
    lines = [f"{row.name}: {row.op} of {'×'.join(map(str, row.shape))}" + (f", leaf {row.leaf}" if row.leaf else "")]
    if row.quantized:
        bits = f": {row.bits_per_element:.3f} bits per weight, scales included" if row.leaf else ""
        lines.append(f"  {'stored' if row.leaf else 'rounded'} as {row.format}{bits}")
        if row.bytes_before:
            lines.append(f"  {row.bytes_before:,} -> {row.bytes_after:,} bytes")
        if row.sqnr_db is not None:
            lines.append(f"  SQNR {row.sqnr_db:.1f} dB against the float weight")
        lines.append(f"  inputs: {row.inputs}")
        lines.append(f"  runs as: {row.lowering or 'float'}")
    else:
        lines.append(f"  left in {row.format}: {row.reason}")
    if row.note:
        lines.append(f"  note: {row.note}")
    return "\n".join(lines)
