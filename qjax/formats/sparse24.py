"""2:4 sparsity: of every four weights of a row two are kept, as codes of four or eight bits and two places of two bits.

The storage arithmetic is that of Sparse-Marlin (arXiv:2408.11743): 2 x 4 bits of codes and 2 x 2 bits of places in four
weights are 3 bits a weight, and a 16-bit scale for 128 weights makes it 3.125.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from qjax.errors import FormatError, near
from qjax.formats.base import Aux, Format
from qjax.formats.integer import Int
from qjax.formats.numerics import AnyArray, finite_part
from qjax.formats.packing import Packing
from qjax.formats.registry import register_format

SCALE_DTYPES = ("float16", "bfloat16", "float32")
_SMALLEST = {"float16": 2.0**-14, "bfloat16": 2.0**-126, "float32": 2.0**-126}
RUN = 8
"""Elements of a run: two quads."""


@dataclasses.dataclass(frozen=True)
class SparsePacking:
    """Two of four codes, and where they stand; a code that is not stored is 0.

    A row is cut into runs of eight elements (two quads), the last one filled up with zeros. A run takes

        4 bits     three bytes: a byte of codes per quad, the first of the two in the low half; then the byte of places
        8 bits     five bytes: two bytes of codes per quad; then the byte of places

    and the byte of places holds, from its lowest bits, the two of the first quad and the two of the second, each 0 to 3
    and the lower one first. A quad with fewer than two nonzero codes keeps them and the first places that are left,
    whose codes are 0: an all-zero quad has the places 0 and 1. Of a quad with more than two, the first two are kept.

    The order is neutral: what the tensor cores of a device want is made from it when a weight is packed for them.

    Args:
        bits: 4 or 8.
    """

    bits: int

    @property
    def run_bytes(self) -> int:
        """Bytes of a run."""
        return 3 if self.bits == 4 else 5

    def row_bytes(self, length: int) -> int:
        return self.run_bytes * -(-length // RUN)

    def capacity(self, nbytes: int) -> int:
        return nbytes // self.run_bytes * RUN

    def offset(self, element: int) -> int | None:
        return None if element % RUN else element // RUN * self.run_bytes

    def pack(self, codes: ArrayLike) -> Array:
        codes = jnp.asarray(codes).astype(jnp.int8)
        codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % RUN)])
        four = codes.reshape(*codes.shape[:-1], codes.shape[-1] // RUN, 2, 4)
        columns = [four[..., j] for j in range(4)]
        # Nonzero codes first, then zeros, each by place: how many stand before.
        full = [(c != 0).astype(jnp.uint8) for c in columns]
        many = functools.reduce(jnp.add, full)
        rank = []
        for j in range(4):
            ones = functools.reduce(jnp.add, full[:j], jnp.zeros_like(many))
            rank.append(jnp.where(full[j] != 0, ones, many + np.uint8(j) - ones))
        kept = [r < 2 for r in rank]
        place, value, seen = [jnp.zeros_like(many)] * 2, [jnp.zeros_like(columns[0])] * 2, jnp.zeros_like(many)
        for j in range(4):
            for slot in range(2):
                here = kept[j] & (seen == slot)
                place[slot] = jnp.where(here, np.uint8(j), place[slot])
                value[slot] = jnp.where(here, columns[j], value[slot])
            seen = seen + kept[j].astype(jnp.uint8)
        low, high = (v.astype(jnp.uint8) for v in value)
        both = place[0] | (place[1] << np.uint8(2))  # [..., runs, 2]
        places = both[..., 0] | (both[..., 1] << np.uint8(4))
        if self.bits == 4:
            stored = (low & np.uint8(15)) | ((high & np.uint8(15)) << np.uint8(4))
            parts = [stored[..., 0], stored[..., 1], places]
        else:
            parts = [low[..., 0], high[..., 0], low[..., 1], high[..., 1], places]
        packed = jnp.stack(parts, axis=-1)
        return packed.reshape(*packed.shape[:-2], packed.shape[-2] * self.run_bytes)

    def unpack(self, packed: ArrayLike, length: int) -> Array:
        packed = jnp.asarray(packed)
        if packed.shape[-1] < self.row_bytes(length):
            raise FormatError(
                f"2:4 codes: {length} codes of {self.bits} bits need {self.row_bytes(length)} bytes, the row has "
                f"{packed.shape[-1]}"
            )
        packed = packed[..., : self.row_bytes(length)]
        runs = packed.reshape(*packed.shape[:-1], packed.shape[-1] // self.run_bytes, self.run_bytes)
        columns = []
        for quad in range(2):
            places = runs[..., -1] >> np.uint8(4 * quad)
            first, second = places & np.uint8(3), (places >> np.uint8(2)) & np.uint8(3)
            if self.bits == 4:
                low = _signed4(runs[..., quad] & np.uint8(15))
                high = _signed4(runs[..., quad] >> np.uint8(4))
            else:
                low, high = (runs[..., 2 * quad + i].astype(jnp.int8) for i in range(2))
            for j in range(4):
                code = jnp.where(second == j, high, jnp.int8(0))
                columns.append(jnp.where(first == j, low, code))
        codes = jnp.stack(columns, axis=-1)
        return codes.reshape(*codes.shape[:-2], codes.shape[-2] * RUN)[..., :length]


def _signed4(code: Array) -> Array:
    """Two's complement of four bits as int8: flip the sign bit, then subtract its weight."""
    return (code ^ np.uint8(8)).astype(jnp.int8) - jnp.int8(8)


def keep_two(saliency: list[Array]) -> list[Array]:
    """Return which two of four are the largest, bool [...] each; of equal ones, the first."""
    kept = []
    for j, mine in enumerate(saliency):
        before = [(other > mine) | ((other == mine) & (m < j)) for m, other in enumerate(saliency) if m != j]
        kept.append(functools.reduce(jnp.add, [b.astype(jnp.int8) for b in before]) < 2)
    return kept


@register_format("sparse24")
@dataclasses.dataclass(frozen=True)
class Sparse24(Format):
    """Symmetric integers of which at most two in four neighbours of a row are not 0: ``value = code * scale``.

    Codes and scales are those of ``Int(bits, group=group)``; a weight that is pruned has the code 0 and is not stored.
    A row whose length four does not divide ends in a quad that is filled up with zeros.

    Rounded to nearest, the two weights of largest magnitude are kept. At half the weights this ruins a language model;
    `qjax.SparseGPT` chooses by what the inputs make of a weight, and corrects the ones that are kept.

    Bits per weight: 3 of 4-bit codes, 5 of 8-bit codes, and 16 / group for scales: 3.125 with float16 or bfloat16 in
    groups of 128 (float32 makes it 3.25), where 8 divides the row.

    Args:
        bits: 4 or 8.
        group: length of a group along the contracted axis, of kept and pruned weights together; None, kept as 0, is one
            scale per row.
        scale_dtype: "float16", "bfloat16" or "float32"; float16 saturates at 65504.

    Raises:
        FormatError: for settings that cannot be.
    """

    bits: int = 4
    group: int | None = 128
    scale_dtype: str = "float16"

    affine = True

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or self.bits not in (4, 8):
            raise FormatError(f"Sparse24: bits={self.bits!r}; 4 or 8")
        if self.group is None:  # descriptions of formats leave out what is None
            object.__setattr__(self, "group", 0)
        if isinstance(self.group, bool) or not isinstance(self.group, int) or self.group < 0:
            raise FormatError(f"Sparse24: group={self.group!r}; a number of elements, 1 or more, or None")
        if self.scale_dtype not in SCALE_DTYPES:
            raise FormatError(
                f"Sparse24: scale_dtype={self.scale_dtype!r}{near(str(self.scale_dtype), SCALE_DTYPES)}; one of "
                + ", ".join(SCALE_DTYPES)
            )

    @property
    def per(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Where there are groups "group", else "channel"."""
        return "group" if self.group else "channel"

    @property
    def name(self) -> str:
        """For example ``sparse24 int4 g128``."""
        return f"sparse24 int{self.bits}{self._suffix()}" + (
            f" {self.scale_dtype}" if self.scale_dtype != "float16" else ""
        )

    @property
    def dense(self) -> Int:
        """The format of the codes, without sparsity."""
        return Int(self.bits, group=self.group) if self.group else Int(self.bits, per="channel")

    @property
    def code_bits(self) -> int:
        """Bits of an unpacked code."""
        return self.bits

    @property
    def code_dtype(self) -> np.dtype:
        """int8."""
        return np.dtype(np.int8)

    @property
    def packing(self) -> Packing:
        """`SparsePacking`."""
        return SparsePacking(self.bits)

    def from_range(self, low: AnyArray, high: AnyArray, shared: Mapping[str, AnyArray] | None = None) -> Aux:
        """Return {"scale": ``scale_dtype``}, blocked: that of `Int`, as it is stored."""
        return {"scale": self.as_stored(self.dense.from_range(low, high)["scale"])}

    def as_stored(self, scale: AnyArray) -> Array:
        """Return float32 scales in the dtype that they are stored in, none 0 or infinite."""
        dtype = jnp.dtype(self.scale_dtype)
        return jnp.clip(scale, _SMALLEST[self.scale_dtype], float(jnp.finfo(dtype).max)).astype(dtype)

    def encode(self, x: AnyArray, aux: Aux) -> Array:
        """Return int8 codes: of each four, those of the two largest magnitudes, and 0. NaN and infinity go first."""
        x = jnp.asarray(x, jnp.float32)
        codes = self.dense.encode(x, self._wide(aux))
        length = x.shape[-1]
        size = jnp.abs(finite_part(x))
        size = jnp.pad(size, [(0, 0)] * (size.ndim - 1) + [(0, -length % 4)])
        size = size.reshape(*size.shape[:-1], size.shape[-1] // 4, 4)
        kept = jnp.stack(keep_two([size[..., j] for j in range(4)]), axis=-1)
        kept = kept.reshape(*kept.shape[:-2], kept.shape[-2] * 4)[..., :length]
        return jnp.where(kept, codes, jnp.int8(0))

    def decode(self, codes: AnyArray, aux: Aux) -> Array:
        """Return code * scale in float32."""
        return self.dense.decode(codes, self._wide(aux))

    def _wide(self, aux: Aux) -> Aux:
        return {"scale": jnp.asarray(aux["scale"], jnp.float32)}
