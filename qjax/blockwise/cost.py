"""What a quantization will take, before it begins: memory at its highest, and work.

All of it follows from shapes. Memory is that of arrays as the program names them: XLA fuses many of them away, so it is
a bound on the side of caution rather than a measurement. The formula, for a job that goes block by block:

    peak = parameters held + packed so far + max over blocks of
           (float parameters of the block, if they are read when it is due)
         + batches x (values handed on to later blocks)
         + statistics of the block
         + the larger of: the block's own values for one batch, the largest weight being rounded

and for one that runs the whole function, the same with one block.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qjax._compat import open_jaxpr, sub_jaxprs
from qjax.applying.planning import Plan
from qjax.applying.static import taps_of
from qjax.blockwise.schedule import Block, Schedule, nbytes, result_avals, sharing
from qjax.formats import is_quantized
from qjax.passes import rounding_flops, rounding_statistics

ROUNDING_COPIES = 4
"""float32 copies of a weight while it is rounded: itself, in canonical order, its codes before packing, its error."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a job takes.

    Attributes:
        parts: of the peak, in bytes, by what they are; those of the worst block.
        block: the name of that block; "" where the whole function runs at once.
        flops: floating-point operations of products: running the batches, gathering, rounding.
    """

    parts: dict[str, int]
    block: str
    flops: float

    @property
    def peak_bytes(self) -> int:
        """Bytes at the highest."""
        return sum(self.parts.values())

    def seconds(self, flops_per_second: float | None = None) -> float:
        """An estimate of the time, without compilation.

        Args:
            flops_per_second: what the device does in float32 products; None measures one now.
        """
        return self.flops / (flops_per_second or product_speed())

    def __str__(self) -> str:
        """The formula with its numbers."""
        where = f" at {self.block}" if self.block else ""
        terms = " + ".join(f"{_bytes(n)} {name}" for name, n in self.parts.items() if n)
        return f"peak about {_bytes(self.peak_bytes)}{where} = {terms}; {self.flops / 1e9:,.1f} GFLOP of products"


def product_speed(size: int = 1024) -> float:
    """float32 operations per second of one large product on the default device, the fastest of three."""
    x = jnp.ones((size, size))
    product = jax.jit(lambda x: x @ x)
    jax.block_until_ready(product(x))
    best = math.inf
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready(product(x))
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def job_cost(plan: Plan, schedule: Schedule, batches: int, lazy: Sequence[bool], by_blocks: bool) -> Cost:
    """The cost of a quantization with data.

    Args:
        plan: what becomes of each leaf.
        schedule: the program of the example batch, in blocks.
        batches: how many batches there are, taken to be of the example's shape; 0 for a job without data.
        lazy: for each leaf, whether it is read when it is needed.
        by_blocks: whether the job goes block by block.
    """
    program = plan.program
    taps, avals = taps_of(plan.decisions), program.leaf_avals
    if by_blocks:  # the whole function gathers at each site by itself
        leaders = sharing(program, taps)
        taps = {name: tap for name, tap in taps.items() if leaders[name] == name}
    held = sum(nbytes(a) for a, later in zip(avals, lazy, strict=True) if not later)
    packed = sum(a.nbytes for a in plan.arrays if is_quantized(a))
    kept = sum(
        nbytes(a) for a, later, stored in zip(avals, lazy, plan.arrays, strict=True)
        if later and not is_quantized(stored)
    )  # fmt: skip
    rounded = _rounding_bytes(plan)
    passes = 2 if by_blocks and plan.recipe.sequential else 1
    flops = batches * passes * sum(site.flops for site in program.sites if site.op in _PRODUCTS)
    flops += sum(_gathering_flops(plan, name, batches) for name in taps) + _rounding_flops(plan)
    sizes = _sizes(schedule)
    if not by_blocks:
        states = sum(_state_bytes(plan, name) for name in taps)
        parts = {
            "parameters": held,
            "packed": packed,
            "statistics": states,
            "values of a batch, or a weight being rounded": max(_peak(program.jaxpr) if batches else 0, rounded),
        }
        return Cost(parts, "", flops)
    worst: tuple[dict[str, int], str] = ({}, "")
    for number, block in enumerate(schedule.blocks):
        later = {v for b in schedule.blocks[number + 1 :] for v in b.takes}
        handed = sum(sizes[v] for v in later & (set(block.gives) | _alive(schedule, number)))
        parts = {
            "parameters": held,
            "packed": packed,
            "parameters kept as they are": kept,
            "parameters of the block": sum(
                nbytes(avals[u.value]) // (avals[u.value].shape[0] if u.index is not None else 1)
                for u in block.reads
                if u.value < len(lazy) and lazy[u.value]
            ),
            "handed on": batches * handed,
            "statistics": sum(_state_bytes(plan, name) for name in block.sites if name in taps),
            "values of a batch, or a weight being rounded": max(_block_peak(block, sizes), rounded),
        }
        if sum(parts.values()) > sum(worst[0].values()):
            worst = (parts, block.name)
    return Cost(worst[0], worst[1], flops)


_PRODUCTS = ("dot", "conv", "ragged_dot", "matmul")


def _alive(schedule: Schedule, number: int) -> set[int]:
    """Values of earlier blocks that are still to be read."""
    made = {v for b in schedule.blocks[: number + 1] for v in b.gives}
    return made & {v for b in schedule.blocks[number + 1 :] for v in b.takes}


def _sizes(schedule: Schedule) -> dict[int, int]:
    """Bytes of every value that items define."""
    out = {}
    for block in schedule.blocks:
        for item in block.items:
            for v, aval in zip(item.results, result_avals(item), strict=True):
                out[v] = nbytes(aval)
    return out


def _block_peak(block: Block, sizes: dict[int, int]) -> int:
    """Bytes of a block's values for one batch, each counted from where it is made to where it is last read."""
    last = {use.value: n for n, item in enumerate(block.items) for use in item.uses}
    alive: dict[int, int] = {v: sizes.get(v, 0) for v in block.takes}
    peak = 0
    for n, item in enumerate(block.items):
        inner = max((_peak(sub) for _, sub in sub_jaxprs(item.eqn.params)), default=0) if not item.stack else 0
        alive |= {v: sizes[v] for v in item.results}
        peak = max(peak, sum(alive.values()) + inner)
        alive = {v: size for v, size in alive.items() if last.get(v, -1) > n or v in block.gives}
    return peak


def _peak(jaxpr: Any) -> int:
    """Bytes of the values that a jaxpr defines, each counted from where it is made to where it is last read."""
    inner = open_jaxpr(jaxpr)
    last: dict[Any, int] = {}
    for n, eqn in enumerate(inner.eqns):
        for atom in eqn.invars:
            if hasattr(atom, "aval") and not hasattr(atom, "val"):
                last[atom] = n
    kept = {v for v in inner.outvars if not hasattr(v, "val")}
    alive: dict[Any, int] = {}
    peak = 0
    for n, eqn in enumerate(inner.eqns):
        below = max((_peak(sub) for _, sub in sub_jaxprs(eqn.params)), default=0)
        alive |= {v: nbytes(v.aval) for v in eqn.outvars}
        peak = max(peak, sum(alive.values()) + below)
        alive = {v: size for v, size in alive.items() if last.get(v, -1) > n or v in kept}
    return peak


def _length(plan: Plan, name: str) -> tuple[tuple[int, ...], int]:
    """(stack, K) of the weight that a site reads."""
    site = plan.program.by_name[name]
    shape = plan.program.leaf_avals[plan.program.leaf_names.index(site.leaf)].shape
    return tuple(shape[a] for a in site.batch_axes), math.prod(shape[a] for a in site.in_axes)


def _state_bytes(plan: Plan, name: str) -> int:
    stack, k = _length(plan, name)
    tap = taps_of({name: plan.decisions[name]})[name]
    return sum(part.nbytes((*stack, 1, k) if part.stacked else (1, k)) for part in tap.parts)


def _gathering_flops(plan: Plan, name: str, batches: int) -> float:
    """Of second moments: 2 K² for each row."""
    if not any(part.stacked for part in taps_of({name: plan.decisions[name]})[name].parts):
        return 0.0
    site, (_, k) = plan.program.by_name[name], _length(plan, name)
    n = math.prod(site.weight_shape or (1,)) / max(k, 1)
    return batches * site.flops * k / max(n, 1)


def _rounding_flops(plan: Plan) -> float:
    """Of roundings by second moments."""
    total = 0.0
    for leaf in plan.leaves.values():
        k = math.prod(leaf.shape[a] for a in leaf.in_axes)
        keyed = math.prod(leaf.shape[a] for a in leaf.key_axes)
        stacked = math.prod(leaf.shape[a] for a in leaf.stack_axes if a not in leaf.key_axes)
        n = math.prod(leaf.shape) // max(k * keyed * stacked, 1)
        for stored in leaf.slices.values():
            if stored.fmt is not None and rounding_statistics(stored.rounding):
                total += stacked * rounding_flops(stored.rounding, n, k, stored.fmt)
    return total


def _rounding_bytes(plan: Plan) -> int:
    """Of the largest weight being rounded, with the copies of its second moment."""
    largest = 0
    for leaf in plan.leaves.values():
        slices = math.prod(leaf.shape[a] for a in leaf.key_axes)
        k = math.prod(leaf.shape[a] for a in leaf.in_axes)
        looks = any(rounding_statistics(stored.rounding) for stored in leaf.slices.values())
        size = ROUNDING_COPIES * 4 * math.prod(leaf.shape) // max(slices, 1) + (3 * 4 * k * k if looks else 0)
        largest = max(largest, size)
    return largest


def _bytes(n: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if n < 1000 or unit == "GB":
            return f"{n:.3g} {unit}"
        n /= 1000
    raise AssertionError
