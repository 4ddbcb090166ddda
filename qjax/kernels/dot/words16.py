"""Weights in words of 2, 4 and 8 bits times 16-bit activations, on the tensor cores of NVIDIA's Hopper.

    part[n, m]  = sum over k in block of (number[n, k] - zero[n, block]) * x[m, k]     on the tensor cores, in float32
    total[n, m] = sum over planes and blocks of scale[n, block] * part[n, m]
    y[m, n]     = total[n, m]

As in `tiles16`, the numbers of the left operand are exact in 16 bits, scales are applied to float32 sums, and blocks
of threads, ring and cut of K are those of `hopper`. What differs is where codes stand (`qjax.formats.word_tiles`) and
how they become numbers (`qjax.formats.words`): of any format whose decoder is a few instructions on a word. Several
planes of one weight, such as those of trits, are summed in one kernel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from qjax.formats.tiles import ROWS, rounded_up
from qjax.formats.word_tiles import COLUMNS, WORDS_OF_A_ROW, Plane
from qjax.kernels.dot.hopper import (
    STEP,
    WARPGROUPS,
    WIDE,
    Place,
    Schedule,
    Work,
    added,
    hopper_kernel,
    in_cells,
    load,
    own_rows,
    pallas,
    tiling,
    turned,
    written,
)
from qjax.kernels.dot.widen import widened

assert STEP == COLUMNS, "a step of the ring is a tile"


def words16(
    aux: Mapping[str, Array],
    x: Array,
    *,
    planes: Sequence[Plane],
    n: int,
    out_dtype: Any,
    schedule: Schedule,
    interpret: Any = None,
) -> Array:
    """Multiply a stack of activations by a stack of weights in words.

    Args:
        aux: the arrays that planes name, each [E, anything]; E matrices.
        x: bfloat16 or float16 [E, M, K], M at least 1.
        planes: of the weight.
        n: N, rows of a matrix.
        out_dtype: dtype of the result.
        schedule: how the work is cut.
        interpret: settings of the interpreter, for tests.

    Returns:
        [E, M, N].
    """
    count, tokens, length = x.shape
    rows, steps = rounded_up(n), rounded_up(length) // STEP
    x = in_cells(x, steps * STEP)  # the weight was padded when it was packed
    out = written(x, count, n, rows, out_dtype, schedule)
    operands = []
    for plane in planes:
        tiles = aux[plane.tiles].reshape(count * rows // ROWS, steps, plane.decoder.bits, WORDS_OF_A_ROW)
        numbers = [aux[name].reshape(count, -1, rows) for name in _numbers(plane)]
        operands += [tiles, *numbers]
    call = _kernel(out, x.dtype, tuple(planes), rows, steps // schedule.splits, schedule, interpret)
    return added(call(*operands, x), schedule)[:, :tokens, :n].astype(out_dtype)


def _numbers(plane: Plane) -> list[str]:
    """Names of the numbers of a plane, in the order in which the kernel takes them."""
    return [name for name in (plane.scale, plane.zero, plane.factor) if name]


def _kernel(
    out: jax.ShapeDtypeStruct,
    dtype: Any,
    planes: tuple[Plane, ...],
    rows: int,
    steps: int,
    schedule: Schedule,
    interpret: Any,
) -> Any:
    pl, plgpu = pallas()
    layouts, tile = plgpu.Layout, schedule.tokens
    of_rows = layouts.WGMMA.reduce(1)
    # One tiling of activations serves all planes.
    columns = min(16 if plane.factor else min(plane.block or ROWS, ROWS) for plane in planes)
    (late,) = {plane.block is None for plane in planes}  # whether scales are applied to the sum over all of K
    assert not late or len(planes) == 1

    def over_rows(numbers: Array, shape: tuple[int, ...]) -> Array:
        return lax.broadcast_in_dim(numbers, shape, (0,))

    def work(place: Place, *refs: Any) -> Work:
        given, x = list(refs[:-1]), refs[-1]
        group, e, i, j, part, *_ = place
        own = pl.ds(group * ROWS, ROWS)
        above = e * (rows // WIDE)
        ring = []
        in_ring: list[list[str]] = []  # what each plane has there, after its tiles
        scales = []
        for plane in planes:
            tiles, *numbers = given[: 1 + len(_numbers(plane))]
            given = given[len(numbers) + 1 :]
            shape = (WARPGROUPS, 1, plane.decoder.bits, WORDS_OF_A_ROW)
            ring.append((tiles, plgpu.BlockSpec(shape, lambda k: (above + i, part * steps + k, 0, 0))))
            scales.append(numbers[0])
            in_ring.append([])
            kinds = ["scale", *(["zero"] if plane.zero else []), *(["factor"] if plane.factor else [])]
            for kind, ref in zip(kinds, numbers, strict=True):
                if kind == "scale" and late:
                    continue
                in_ring[-1].append(kind)
                span = 16 if kind == "factor" else plane.block
                # A zero point per row is the same at every step.
                spec = plgpu.BlockSpec(
                    (STEP // (span or STEP), WIDE), lambda k, span=span: (part * steps + k if span else 0 * k, i)
                )
                ring.append((ref.at[e], spec))
        x_spec = plgpu.BlockSpec((tile, STEP), lambda k: (j, part * steps + k), transforms=tiling(columns, 16))
        ring.append((x.at[e], x_spec))

        def step(_: Any, *refs: Any) -> Array:
            rest, (x_s, total) = refs[:-2], refs[-2:]
            for plane, kinds in zip(planes, in_ring, strict=True):
                w_s, *numbers = rest[: 1 + len(kinds)]
                rest = rest[1 + len(kinds) :]
                total = add(plane, w_s, dict(zip(kinds, numbers, strict=True)), x_s, total)
            # The slot was read by ordinary loads and is refilled by TMA: two proxies, which a fence orders.
            plgpu.commit_smem()
            return total

        def add(plane: Plane, w_s: Any, numbers: dict[str, Any], x_s: Any, total: Array) -> Array:
            """The total and one step of a plane."""
            layout = layouts.WG_STRIDED((plane.decoder.bits, WORDS_OF_A_ROW), vec_size=4)
            loaded = load(w_s.at[group, 0], layout)
            parts = widened(plgpu, loaded, plane.decoder, dtype, columns, bool(interpret))
            block = plane.block or STEP

            def operand(at: int) -> Array:
                w = parts[at]
                if plane.zero:
                    z = load(numbers["zero"].at[at * columns // block, own], of_rows)
                    w = w - over_rows(z.astype(dtype), w.shape)
                if plane.factor:
                    w = w * over_rows(load(numbers["factor"].at[at, own], of_rows).astype(dtype), w.shape)
                return w

            def product(first: int, acc: Any) -> Array:
                for at in range(first, first + block // columns):
                    plgpu.wgmma(acc, operand(at), turned(x_s.at[:, pl.ds(at * columns, columns)]))
                plgpu.wgmma_wait(0)
                return acc[...]

            for b in range(STEP // block):
                first = b * block // columns

                def sums(acc: Any, first: int = first) -> Array:
                    return product(first, acc)

                one = pl.run_scoped(sums, plgpu.ACC((ROWS, tile), jnp.float32))
                if not late:
                    scale = load(numbers["scale"].at[b, own], of_rows).astype(jnp.float32)
                    one = one * over_rows(scale, one.shape)
                total = total + one
            return total

        def finish(total: Array) -> Array:
            if late:
                scale = load(scales[0].at[e, 0, own_rows(place)], of_rows).astype(jnp.float32)
                total = total * over_rows(scale, total.shape)
            (stretch,) = {plane.decoder.stretch[np.dtype(dtype)] for plane in planes}
            return total if stretch == 1 else total * jnp.float32(1 / stretch)

        return Work(step, finish, ring)

    how = {"schedule": schedule, "interpret": interpret}
    return hopper_kernel(work, out, rows=rows, steps=steps, sums=jnp.float32, **how)
