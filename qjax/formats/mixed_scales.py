"""Scales of 2-bit and 4-bit strips: one per row and strip, those of 2-bit strips quantized once more.

Per row and strip of b bits, with the range widened to hold 0,

    s = (max - min) / (2**b - 1)      z = clip(round(-min / s), 0, 2**b - 1)      value = (code - z) * s

In a tile, ``tile`` (16) rows of one 2-bit strip, the scales become codes of ``bits`` bits under an FP16 scale s' and a
zero z' of as many bits, in the form that needs no sign. With L = 2**bits - 1,

    s' = max(smax - smin, smin) / L     z' = clip(round(smin / s'), 0, L)     c = clip(round(s / s') - z', 0, L)
    s = (c + z') * s'

Rows of zeros in a tile have no scale: they do not count for smin, their codes are 0. A scale that is not zero stays so:
c + z' is at least 1. z is taken again with the scale that is stored, as the codes of the weight are.

Three 2-bit strips share a 16-bit word per row, low bits first: z of each (2 bits each), then the scale codes (3, 3 and
4 bits); and a 16-bit word per tile, z' in bits 0..3, 4..7 and 8..11. All of it is in numbers so scaled that the largest
of the matrix lies in [2**12, 2**13): FP16 then holds scales down to 1e-8 of it.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array

from qjax.formats.numerics import AnyArray, round_even
from qjax.formats.packing import pack_bits, unpack_bits

TOP = 12
"""The largest number of a matrix is scaled into [2**TOP, 2**(TOP + 1))."""

SMALLEST_SCALE = 2.0**-14  # the smallest normal float16

NARROW, WIDE = 3, 15
"""Largest codes of 2 and 4 bits."""


def zero_point(low: AnyArray, scale: AnyArray, top: int) -> Array:
    """Return the zero points, float32, for ranges that begin at ``low``."""
    return jnp.clip(round_even(-low / scale), 0, top)


def fit_narrow(low: AnyArray, high: AnyArray, tile: int, bits: tuple[int, int, int]) -> tuple[Array, Array, Array]:
    """Quantize the scales of 2-bit strips.

    Args:
        low, high: range of each row and strip, float32 [N, strips], at most and at least 0.
        tile: rows of a tile.
        bits: bits of the scale codes of three adjacent strips.

    Returns:
        The words of rows, uint16 [N, triples]; s', float16 [tiles, 3 * triples]; the words of tiles, uint16
        [tiles, triples].
    """
    n, strips = low.shape
    triples, tiles = -(-strips // 3), -(-n // tile)
    widths = np.tile(np.array(bits), triples)
    pad = ((0, tiles * tile - n), (0, 3 * triples - strips))
    low, high = jnp.pad(low, pad), jnp.pad(high, pad)
    scale = ((high - low) / NARROW).reshape(tiles, tile, 3 * triples)
    there = scale > 0
    largest = jnp.max(scale, axis=1, initial=0.0)
    least = jnp.min(jnp.where(there, scale, jnp.inf), axis=1, initial=jnp.inf)
    least = jnp.where(largest > 0, least, 0.0)
    top = jnp.asarray(2.0**widths - 1, jnp.float32)
    step = jnp.maximum(largest - least, least) / top
    step = jnp.where(largest > 0, jnp.maximum(step, SMALLEST_SCALE), 1.0).astype(jnp.float16)
    unit = step.astype(jnp.float32)
    offset = jnp.clip(round_even(least / unit), 0, top)
    code = jnp.clip(round_even(scale / unit[:, None]) - offset[:, None], 0, top)
    code = jnp.where(there, jnp.maximum(code, jnp.where(offset > 0, 0.0, 1.0)[:, None]), 0.0)
    near = jnp.where(there, (code + offset[:, None]) * unit[:, None], 1.0)
    zero = jnp.where(there, zero_point(low.reshape(scale.shape), near, NARROW), 0.0)
    row = lambda a: a.astype(jnp.uint16).reshape(tiles * tile, triples, 3)[:n]  # noqa: E731
    words = _word([row(zero), row(code)], [(2, 2, 2), bits])
    return words, step, _word([offset.astype(jnp.uint16).reshape(tiles, triples, 3)], [(4, 4, 4)])


def narrow_of(
    words: AnyArray, step: AnyArray, offsets: AnyArray, strips: int, tile: int, bits: tuple[int, int, int]
) -> tuple[Array, Array]:
    """Return the scales and zero points, float32 [N, strips] each, from what `fit_narrow` returned."""
    zero, code = _fields(words, [(2, 2, 2), bits])
    (offset,) = _fields(offsets, [(4, 4, 4)])
    n, triples = words.shape
    rows = lambda a: jnp.repeat(a.reshape(-1, 3 * triples), tile, axis=0)[:n]  # noqa: E731
    scale = (code.reshape(n, 3 * triples) + rows(offset)) * rows(jnp.asarray(step, jnp.float32))
    return scale[:, :strips], zero.reshape(n, 3 * triples)[:, :strips]


def fit_wide(low: AnyArray, high: AnyArray, per_group: int) -> tuple[Array, Array]:
    """Scales of 4-bit strips.

    Args:
        low, high: range of each row and strip, float32 [N, strips].
        per_group: strips, in the order of columns, that share a scale.

    Returns:
        Scales, float16 [N, groups], and zero points of 4 bits, uint8 [N, ceil(groups / 2)].
    """
    n, strips = low.shape
    groups = -(-strips // per_group)
    shape = (n, groups, per_group)
    pad = ((0, 0), (0, groups * per_group - strips))
    low = jnp.min(jnp.pad(low, pad).reshape(shape), axis=-1, initial=0.0)
    high = jnp.max(jnp.pad(high, pad).reshape(shape), axis=-1, initial=0.0)
    scale = (high - low) / WIDE
    scale = jnp.where(scale > 0, jnp.maximum(scale, SMALLEST_SCALE), 1.0).astype(jnp.float16)
    zero = zero_point(low, scale.astype(jnp.float32), WIDE).astype(jnp.uint8)
    return scale, pack_bits(zero, 4)


def wide_of(scale: AnyArray, zeros: AnyArray, strips: int, per_group: int) -> tuple[Array, Array]:
    """Return the scales and zero points, float32 [N, strips] each, from what `fit_wide` returned."""
    scale = jnp.asarray(scale, jnp.float32)
    zero = unpack_bits(zeros, 4, scale.shape[-1], signed=False).astype(jnp.float32)
    spread = lambda a: jnp.repeat(a, per_group, axis=-1)[:, :strips]  # noqa: E731
    return spread(scale), spread(zero)


def _word(fields: list[Array], widths: list[tuple[int, ...]]) -> Array:
    """Put fields uint16 [..., 3] side by side in words uint16 [...], low bits first."""
    word, at = jnp.zeros(fields[0].shape[:-1], jnp.uint16), 0
    for values, bits in zip(fields, widths, strict=True):
        for k, width in enumerate(bits):
            word, at = word | (values[..., k] << np.uint16(at)), at + width
    return word


def _fields(words: AnyArray, widths: list[tuple[int, ...]]) -> list[Array]:
    """Read `_word` backwards: float32 [..., 3] per field."""
    out, at = [], 0
    for bits in widths:
        columns = []
        for width in bits:
            columns.append((words >> np.uint16(at)) & np.uint16(2**width - 1))
            at += width
        out.append(jnp.stack(columns, axis=-1).astype(jnp.float32))
    return out
