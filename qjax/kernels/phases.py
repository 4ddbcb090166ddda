"""Unpacking codes without interleaving them.

Codes of 2 or 4 bits lie P = 8 / bits to a byte. Putting them back in order means writing every P-th element of a row,
which XLA on CPU does one element at a time: 0.25 ns an element, as long as a float matrix-vector product takes to
read its weight. But a sum does not care for the order of its terms. Phase p of a row is every P-th code from the
p-th on; unpacking one phase is a shift and a mask of whole vectors, and

    sum over k of x[k] * W[n, k]  =  sum over p of (sum over j of x[j*P + p] * W[n, j*P + p])

needs P products of rows P times shorter, for the same number of multiplications. Measured on XLA CPU for int4 groups
of 128: 1.0 to 1.25 times the speed of the float product at one row, against 0.4 interleaved.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from qjax.formats import MXFP4, NF4, NVFP4, Aux, DualGrained, Format, Int, Progressive, QArray
from qjax.kernels.unpack import widened

ELEMENTWISE = (Int, NF4, MXFP4, NVFP4, DualGrained, Progressive)
"""Formats whose decode treats every element by itself, given the numbers of its block."""


def phase_count(fmt: Format, length: int) -> int:
    """Return P, or 1 where rows of ``length`` codes cannot be split into phases."""
    if fmt.code_bits not in (2, 4) or not isinstance(fmt, ELEMENTWISE):
        return 1
    count = 8 // fmt.code_bits
    group = fmt.group if fmt.per == "group" else None
    if length % count or (group is not None and (group % count or length % group)):
        return 1
    return count


def code_phases(packed: Array, fmt: Format) -> list[Array]:
    """Return the codes of each phase, ``fmt.code_dtype`` [..., bytes], from packed rows uint8 [..., bytes]."""
    bits = fmt.code_bits
    phases = []
    for p in range(8 // bits):
        code = (packed >> jnp.uint8(p * bits)) & jnp.uint8(2**bits - 1)
        if fmt.signed:  # two's complement of few bits: flip the sign bit, then subtract its weight
            half = 1 << (bits - 1)
            code = (code ^ jnp.uint8(half)).astype(jnp.int8) - jnp.int8(half)
        phases.append(code)
    return phases


def decoded_phases(w: QArray) -> list[Array]:
    """Return the weight's phases as float32 [N, K / P], from a canonical matrix for which `phase_count` is above 1.

    Each group becomes a short row of its own, [N, groups, G / P], so that one number per block broadcasts and the
    format need not know that its groups have been thinned out.
    """
    n, nbytes = w.codes.shape
    groups, aux = w.fmt.groups(w.length), _thinned(w)
    return [
        w.fmt.decode(code.reshape(n, groups, nbytes // groups), aux).reshape(n, nbytes)
        for code in code_phases(w.codes, w.fmt)
    ]


def int8_phases(w: QArray) -> tuple[list[Array], Array]:
    """Return the phases of `Format.as_int8` as int8 [N, K / P], likewise, and the scales of rows, [N]."""
    n, nbytes = w.codes.shape
    groups, aux = w.fmt.groups(w.length), _thinned(w)
    parts = [w.fmt.as_int8(code.reshape(n, groups, nbytes // groups), aux) for code in code_phases(w.codes, w.fmt)]
    return [numbers.reshape(n, nbytes) for numbers, _ in parts], parts[0][1].reshape(n)


def _thinned(w: QArray) -> Aux:
    """The aux of a canonical matrix for groups that are rows of their own: [N or 1, groups or 1, 1]."""
    return {
        name: a.reshape(a.shape[0], 1, a.shape[1]) if name in w.fmt.row_aux else a.reshape(*a.shape, 1)
        for name, a in ((name, widened(a)) for name, a in w.aux.items())
    }


def split_phases(x: Array, count: int) -> list[Array]:
    """Return x[..., p::count] for each phase p."""
    return [x[..., p::count] for p in range(count)]
