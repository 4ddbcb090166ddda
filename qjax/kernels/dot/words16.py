"""Weights in words of 2, 4 and 8 bits times 16-bit activations, on the tensor cores of NVIDIA's Hopper.

    part[n, m]  = sum over k in block of (number[n, k] - zero[n, block]) * x[m, k]     on the tensor cores, in float32
    total[n, m] = sum over planes and blocks of scale[n, block] * part[n, m]
    y[m, n]     = total[n, m]

With few tokens the memory is the limit, and a warpgroup takes several tiles of rows and columns in one step, so that
enough bytes are under way. With many tokens fetching activations is: warpgroups that multiply 128 rows with the same
activations need half as many, but their registers hold one sum for each row and token, not two. The sum then rolls: it
is kept in units of the scale at hand,

    sum <- sum * scale[n, block - 1] / scale[n, block] + part[n, m of block]           added to by the tensor cores

and multiplied by the last scale in the end. A scale below 2^-40 of the largest of its row counts as that: what such a
block may add is below what float32 sums of that row tell apart.

The product is formed transposed, because the left operand of `wgmma` may come from registers. Its numbers are exact in
16 bits and scales are applied to float32 sums, so the weight is not rounded a second time. Blocks of threads, ring and
cut of K are those of `hopper`. Where codes stand says `qjax.formats.word_tiles`, and how they become numbers
`qjax.formats.words`, for any format whose decoder is a few instructions on a word. Several planes of one weight, such
as those of trits, are summed in one kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from qjax.formats.tiles import ROWS, rounded_up
from qjax.formats.word_tiles import COLUMNS, WORDS_OF_A_ROW, Plane
from qjax.kernels.dot.endings import Ending
from qjax.kernels.dot.hopper import (
    STEP,
    WARPGROUPS,
    WIDE,
    Place,
    Schedule,
    Work,
    accumulated,
    added,
    hopper_kernel,
    in_cells,
    load,
    pallas,
    tiling,
    turned,
    written,
)
from qjax.kernels.dot.widen import widened

assert STEP == COLUMNS, "a step of the ring is a tile, or several"

SUMS = 128
"""Tokens of the sums that are under way at once: 64 registers of a thread, besides those of the totals."""

QUIET = 2.0**-40
"""The smallest share of the largest scale of a row that a rolling sum tells from another (`no_quiet_ones`)."""


def words16(
    aux: Mapping[str, Array],
    x: Array,
    *,
    planes: Sequence[Plane],
    n: int,
    out_dtype: Any,
    schedule: Schedule,
    terms: Mapping[str, Array] = {},
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
        terms: what is added (`Ending`).
        interpret: settings of the interpreter, for tests.

    Returns:
        [E, M, N].
    """
    count, tokens, length = x.shape
    rows, columns = rounded_up(n), rounded_up(length)
    x = in_cells(x, columns)  # the weight was padded when it was packed
    out = written(x, count, n, rows, out_dtype, schedule)
    ending = Ending(terms, out_dtype, schedule)
    how = {"terms": ending.inside, "interpret": interpret}
    call = words16_kernel(out, x.dtype, tuple(planes), rows, columns, schedule, **how)
    y = call(*in_words(aux, planes, rows, columns, schedule), x, *ending.operands(out, rows))
    return ending.finished(added(y, schedule)[:, :tokens, :n])


def in_words(
    aux: Mapping[str, Array], planes: Sequence[Plane], rows: int, columns: int, schedule: Schedule
) -> list[Array]:
    """Return the arrays of a stack of weights as the kernel takes them, of a matrix with so many rows and columns."""
    operands = []
    for plane in planes:
        tiles = aux[plane.tiles]
        cells = (tiles.shape[0] * rows // ROWS, columns // COLUMNS, plane.decoder.bits, WORDS_OF_A_ROW)
        numbers = [aux[name].reshape(tiles.shape[0], -1, rows) for name in _numbers(plane)]
        if rolls(plane, schedule):
            numbers[0] = no_quiet_ones(numbers[0])
        operands += [tiles.reshape(cells), *numbers]
    return operands


def rolls(plane: Plane, schedule: Schedule) -> bool:
    """Whether the one sum of a plane is kept in units of the scale at hand; a scale per row has no others."""
    return schedule.rolling and plane.block is not None


def no_quiet_ones(scale: Array) -> Array:
    """Return scales [E, G, N'] of which none is far below the largest of its row, by which a sum is divided."""
    scale = scale.astype(jnp.float32)
    least = jnp.max(jnp.abs(scale), axis=1, keepdims=True) * jnp.float32(QUIET)
    return jnp.where(jnp.abs(scale) < least, least, scale)


def _numbers(plane: Plane) -> list[str]:
    """Names of the numbers of a plane, in the order in which the kernel takes them."""
    return [name for name in (plane.scale, plane.zero, plane.factor) if name]


def words16_kernel(
    out: jax.ShapeDtypeStruct,
    dtype: Any,
    planes: tuple[Plane, ...],
    rows: int,
    length: int,
    schedule: Schedule,
    *,
    tiles: int = 0,
    terms: Sequence[str] = (),
    interpret: Any = None,
) -> Any:
    """Return the kernel itself, on the arrays of `in_words` and activations [E, M', K'].

    Args:
        out: [splits E, M', N or N'] and its dtype.
        dtype: of the activations.
        planes: of the weight.
        rows: N'.
        length: K'.
        schedule: how the work is cut.
        tiles: where a table says which matrix a tile of tokens meets, its rows (`hopper_kernel`); then the activations
            are [1, M', K'] and the result is [splits, M', ...].
        terms: what the last operands are (`hopper_kernel`).
        interpret: settings of the interpreter, for tests.
    """
    pl, plgpu = pallas()
    layouts, tile, tall, deep = plgpu.Layout, schedule.tokens, schedule.tall, schedule.deep
    of_rows = layouts.WGMMA.reduce(1)
    wide, span = tall * WIDE, deep * STEP  # of a step
    steps = length // span // schedule.splits
    # One tiling of activations serves all planes.
    columns = min(16 if plane.factor else min(plane.block or ROWS, ROWS) for plane in planes)
    (late,) = {plane.block is None for plane in planes}  # whether scales are applied to the sum over all of K
    assert not late or len(planes) == 1
    rolling = rolls(planes[0], schedule)
    in_place = rolling or late and schedule.rolling
    assert not in_place or len(planes) == 1

    def over_rows(numbers: Array, shape: tuple[int, ...]) -> Array:
        return lax.broadcast_in_dim(numbers, shape, (0,))

    def work(place: Place, *refs: Any) -> Work:
        given, x = list(refs[:-1]), refs[-1]
        _, e, i, j, part, first, _ = place
        above = e * (rows // wide)
        ring = []
        in_ring: list[list[str]] = []  # what each plane has there, after its tiles
        scales = []
        for plane in planes:
            cells, *numbers = given[: 1 + len(_numbers(plane))]
            given = given[len(numbers) + 1 :]
            shape = (WARPGROUPS * tall, deep, plane.decoder.bits, WORDS_OF_A_ROW)
            ring.append((cells, plgpu.BlockSpec(shape, lambda k: (above + i, part * steps + k, 0, 0))))
            scales.append(numbers[0])
            in_ring.append([])
            kinds = ["scale", *(["zero"] if plane.zero else []), *(["factor"] if plane.factor else [])]
            for kind, ref in zip(kinds, numbers, strict=True):
                if kind == "scale" and late:
                    continue
                in_ring[-1].append(kind)
                block = 16 if kind == "factor" else plane.block
                # A zero point per row is the same at every step.
                spec = plgpu.BlockSpec(
                    (span // block if block else 1, wide),
                    lambda k, block=block: (part * steps + k if block else 0 * k, i),
                )
                ring.append((ref.at[e], spec))
        where, of_tokens, start = (e, tile, j) if first is None else (0, pl.Element(tile), first)
        x_spec = plgpu.BlockSpec((of_tokens, span), lambda k: (start, part * steps + k), transforms=tiling(columns, 16))
        ring.append((x.at[where], x_spec))

        def step(_: Any, *refs: Any) -> tuple[Array, ...]:
            rest, x_s, totals = refs[:-2], refs[-2], list(refs[-1])
            for plane, kinds in zip(planes, in_ring, strict=True):
                w_s, *numbers = rest[: 1 + len(kinds)]
                rest = rest[1 + len(kinds) :]
                add(plane, w_s, dict(zip(kinds, numbers, strict=True)), x_s, totals)
            # The slot was read by ordinary loads and is refilled by TMA: two proxies, which a fence orders.
            plgpu.commit_smem()
            return tuple(totals)

        def add(plane: Plane, w_s: Any, numbers: dict[str, Any], x_s: Any, totals: list[Array]) -> None:
            """Add one step of a plane to the totals."""
            block = plane.block or span
            layout = layouts.WG_STRIDED((plane.decoder.bits, WORDS_OF_A_ROW), vec_size=4)

            def operand(t: int, words: Array, at: int) -> Array:
                """The numbers of some columns of the step, [64, columns]."""
                place_in_tile = at % (COLUMNS // columns)
                w = widened(plgpu, words, plane.decoder, dtype, columns, place_in_tile, bool(interpret))
                if plane.zero:
                    z = load(numbers["zero"].at[at * columns // block if plane.block else 0, place.own(t)], of_rows)
                    base = plane.decoder.base[np.dtype(dtype)]
                    w = w - over_rows((z.astype(jnp.float32) + base if base else z).astype(dtype), w.shape)
                if plane.factor:
                    w = w * over_rows(load(numbers["factor"].at[at, place.own(t)], of_rows).astype(dtype), w.shape)
                return w

            def products(which: list[tuple[int, int]], accs: Sequence[Any]) -> None:
                """Of rows and blocks, each into its own sum, all under way at once."""
                words = functools.cache(lambda t, cell: load(w_s.at[place.group * tall + t, cell], layout))
                for (t, b), acc in zip(which, accs, strict=True):
                    for at in range(b * block // columns, (b + 1) * block // columns):
                        w = operand(t, words(t, at * columns // COLUMNS), at)
                        plgpu.wgmma(acc, w, turned(x_s.at[:, pl.ds(at * columns, columns)]))
                plgpu.wgmma_wait(0)

            def scale(t: int, b: int) -> Array:
                return load(numbers["scale"].at[b, place.own(t)], of_rows).astype(jnp.float32)

            every = [(t, b) for b in range(span // block) for t in range(tall)]
            room = SUMS if block >= STEP else SUMS // 2  # of shorter sums more operands wait in registers
            most = tall if in_place else max(1, room // tile)
            for which in (every[i : i + most] for i in range(0, len(every), most)):
                if in_place:
                    starts = totals[:tall]
                    if rolling:
                        now = [scale(t, b) for t, b in which]
                        for t, (s, before) in enumerate(zip(now, totals[tall:], strict=True)):
                            by = jnp.where(s == 0, jnp.float32(1), before / s)
                            starts[t] = starts[t] * over_rows(by, starts[t].shape)
                        totals[tall:] = now
                    totals[:tall] = accumulated(
                        lambda accs, which=which: products(which, accs), starts, bool(interpret)
                    )
                    continue

                def sums(*accs: Any, which: list[tuple[int, int]] = which) -> list[Array]:
                    products(which, accs)
                    return [acc[...] for acc in accs]

                one = pl.run_scoped(sums, *[plgpu.ACC((ROWS, tile), jnp.float32) for _ in which])
                for (t, b), found in zip(which, one, strict=True):
                    totals[t] = totals[t] + (found if late else found * over_rows(scale(t, b), found.shape))

        def finish(totals: tuple[Array, ...], t: int) -> Array:
            total = totals[t]
            if late:
                by = load(scales[0].at[e, 0, place.own_of_matrix(t)], of_rows).astype(jnp.float32)
            else:
                by = totals[tall + t] if rolling else None
            if by is not None:
                total = total * over_rows(by, total.shape)
            (stretch,) = {plane.decoder.stretch[np.dtype(dtype)] for plane in planes}
            return total if stretch == 1 else total * jnp.float32(1 / stretch)

        return Work(step, finish, ring, tall if rolling else 0)

    how = {"schedule": schedule, "tiles": tiles, "terms": terms, "interpret": interpret}
    return hopper_kernel(work, out, rows=rows, steps=steps, sums=jnp.float32, **how)
