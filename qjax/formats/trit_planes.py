"""Trit-planes: each weight is a sum of one to three trits, each plane with a scale per group (arXiv:2509.16989)."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from qjax.errors import FormatError, near
from qjax.formats.base import Aux, Format
from qjax.formats.numerics import AnyArray
from qjax.formats.packing import BitStream, Packing
from qjax.formats.registry import register_format
from qjax.formats.trit_fit import fit_scales
from qjax.formats.trit_steps import PLANES, levels, trits_of

PACKINGS = ("base3", "two_bit", "nibble")
SCALE_DTYPES = ("float16", "bfloat16", "float32")
_POWERS = 3 ** np.arange(5)


@dataclasses.dataclass(frozen=True)
class TritPacking:
    """Trits of each plane in bytes of their own, planes side by side.

    A row is cut into runs of as many elements as one byte holds trits, the last one padded with trits 0. Each run takes
    one byte per plane, plane 1 first; so the bytes of an element lie together, and a row can be cut between runs.

        base3      five trits: byte = sum over i of 3**i (t_i + 1), 0 to 242
        two_bit    four trits: bits 2i and 2i + 1 hold t_i in two's complement, 00, 01 or 11

    Args:
        planes: 1 to 3.
        base3: which of the two.
    """

    planes: int
    base3: bool

    @property
    def run(self) -> int:
        """Elements of a run."""
        return 5 if self.base3 else 4

    def row_bytes(self, length: int) -> int:
        return self.planes * -(-length // self.run)

    def capacity(self, nbytes: int) -> int:
        return nbytes // self.planes * self.run

    def offset(self, element: int) -> int | None:
        return None if element % self.run else element // self.run * self.planes

    def pack(self, codes: ArrayLike) -> Array:
        codes = jnp.asarray(codes)
        zero = (3**self.planes - 1) // 2
        tail = -codes.shape[-1] % self.run
        codes = jnp.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, tail)], constant_values=zero)
        codes = codes.reshape(*codes.shape[:-1], codes.shape[-1] // self.run, self.run)
        planes = []
        for digit in trits_of(codes, self.planes):
            if self.base3:
                parts = [digit[..., i] * np.uint8(_POWERS[i]) for i in range(5)]
                planes.append(functools.reduce(jnp.add, parts))
            else:
                parts = [((digit[..., i] - np.uint8(1)) & np.uint8(3)) << np.uint8(2 * i) for i in range(4)]
                planes.append(functools.reduce(jnp.bitwise_or, parts))
        packed = jnp.stack(planes, axis=-1)
        return packed.reshape(*packed.shape[:-2], packed.shape[-2] * self.planes)

    def unpack(self, packed: ArrayLike, length: int) -> Array:
        packed = jnp.asarray(packed)
        if packed.shape[-1] < self.row_bytes(length):
            raise FormatError(
                f"trit-planes: {length} codes of {self.planes} planes need {self.row_bytes(length)} bytes, "
                f"the row has {packed.shape[-1]}"
            )
        packed = packed[..., : self.row_bytes(length)]
        runs = packed.reshape(*packed.shape[:-1], packed.shape[-1] // self.planes, self.planes)
        columns = []
        rest = [runs[..., k].astype(jnp.uint16) for k in range(self.planes)]
        for _ in range(self.run):
            code = None
            for k, byte in enumerate(rest):
                if self.base3:
                    third = (byte * np.uint16(171)) >> np.uint16(9)  # byte // 3, exactly, for all bytes
                    digit, rest[k] = byte - third * np.uint16(3), third
                else:
                    # 00, 01, 11 -> 1, 2, 0
                    digit, rest[k] = ((byte & np.uint16(3)) + np.uint16(1)) & np.uint16(3), byte >> np.uint16(2)
                code = digit if code is None else code * np.uint16(3) + digit
            columns.append(jnp.asarray(code).astype(jnp.uint8))
        codes = jnp.stack(columns, axis=-1)
        return codes.reshape(*codes.shape[:-2], codes.shape[-2] * self.run)[..., :length]


@register_format("trit_planes")
@dataclasses.dataclass(frozen=True)
class TritPlanes(Format):
    """``value = sum over k of scale_k t_k`` with trits t_k in {-1, 0, 1} and a scale per plane and group.

    An unpacked code is sum over k of 3**(K-k) (t_k + 1): 0..2, 0..8 or 0..26; plane 1 has the largest scale. Scales are
    aux ``scale0``, ``scale1``, .. in this order, none negative. Tied planes have one, ``scale``, that of the last;
    those before it are 3 and 9 times as large, which is the uniform grid of 3**K levels.

    `fit` is the method itself, which needs no data: scales in closed form and trits by exhaustive choice in turn, from
    the residual signs, at most 50 rounds (`qjax.formats.trit_steps`; `qjax.PTQTP` has the settings). `encode` picks the
    nearest level of the scales as they are stored. Importances of elements are not looked at.

    Bits per weight with float16 scales and groups of G: 1.6 K (base3, where 5 divides the row), 2 K (two_bit) or 4
    (nibble), and 16 K / G, or 16 / G if tied.

    Args:
        planes: K, 1 to 3.
        group: length of a group along the contracted axis; the last one may be shorter.
        store: "base3", five trits of a plane in a byte; "two_bit", four; "nibble", the code 0..8 of two planes in four
            bits.
        tied: whether the scales of a group are in the ratio 3.
        scale_dtype: "float16" as in the paper, "bfloat16" or "float32". Weights beyond 65504 need one of the others:
            float16 scales saturate there.

    Raises:
        FormatError: for settings that contradict each other.
    """

    planes: int = 2
    group: int = 128
    store: str = "base3"
    tied: bool = False
    scale_dtype: str = "float16"

    per = "group"
    weights_only = True

    def __post_init__(self) -> None:
        if isinstance(self.planes, bool) or self.planes not in PLANES:
            raise FormatError(f"TritPlanes: planes={self.planes!r}; 1, 2 or 3")
        if isinstance(self.group, bool) or not isinstance(self.group, int) or self.group < 1:
            raise FormatError(f"TritPlanes: group={self.group!r}; a number of elements, 1 or more (128 in the paper)")
        if self.store not in PACKINGS:
            raise FormatError(
                f"TritPlanes: store={self.store!r}{near(str(self.store), PACKINGS)}; one of " + ", ".join(PACKINGS)
            )
        if self.store == "nibble" and self.planes != 2:
            raise FormatError(
                f"TritPlanes: store='nibble' holds the codes 0..8 of two planes, planes={self.planes} were asked for; "
                "use store='base3' or 'two_bit'"
            )
        if not isinstance(self.tied, bool):
            raise FormatError(f"TritPlanes: tied={self.tied!r}; True or False")
        if self.scale_dtype not in SCALE_DTYPES:
            raise FormatError(
                f"TritPlanes: scale_dtype={self.scale_dtype!r}{near(str(self.scale_dtype), SCALE_DTYPES)}; one of "
                + ", ".join(SCALE_DTYPES)
            )

    @property
    def name(self) -> str:
        """For example ``trits2 g128``, ``trits2 g128 tied two_bit``."""
        words = [f"trits{self.planes} g{self.group}"]
        words += ["tied"] if self.tied else []
        words += [value for value, usual in ((self.store, "base3"), (self.scale_dtype, "float16")) if value != usual]
        return " ".join(words)

    @property
    def code_bits(self) -> int:
        """Bits of one unpacked code: 2, 4 or 5."""
        return (2, 4, 5)[self.planes - 1]

    @property
    def code_dtype(self) -> np.dtype:
        """uint8."""
        return np.dtype(np.uint8)

    @property
    def packing(self) -> Packing:
        """`TritPacking`, or the bit stream of nibbles."""
        return BitStream(4, False) if self.store == "nibble" else TritPacking(self.planes, self.store == "base3")

    def fit(self, x: AnyArray, weight: AnyArray | None = None) -> Aux:
        """Return {"scale0", ..} or, tied, {"scale"}: ``scale_dtype`` [*stack, N, groups]."""
        return self.fit_with(x, iterations=50, eps=1e-4, init="residual")

    def fit_with(self, x: AnyArray, *, iterations: int, eps: float, init: str) -> Aux:
        """`fit` with settings of the rounds: see `qjax.PTQTP`."""
        self._check_length(x.shape[-1])
        found = fit_scales(x, self.group, self.planes, tied=self.tied, iterations=iterations, eps=eps, init=init)
        dtype = jnp.dtype(self.scale_dtype)
        top = float(jnp.finfo(dtype).max)
        stored = [jnp.minimum(a, top).astype(dtype) for a in found]
        return {"scale": stored[-1]} if self.tied else {f"scale{k}": a for k, a in enumerate(stored)}

    def scales(self, aux: Aux) -> Array:
        """Return the scale of each plane, float32 [K, *stack, N, groups]."""
        if self.tied:
            last = jnp.asarray(aux["scale"], jnp.float32)
            return jnp.stack([last * np.float32(3 ** (self.planes - 1 - k)) for k in range(self.planes)])
        return jnp.stack([jnp.asarray(aux[f"scale{k}"], jnp.float32) for k in range(self.planes)])

    def encode(self, x: AnyArray, aux: Aux) -> Array:
        """Return uint8 codes of the nearest levels; ties as `qjax.formats.trit_steps` says."""
        x = jnp.asarray(x, jnp.float32)
        length, size = x.shape[-1], jnp.abs(x)
        middles, codes = jax.lax.optimization_barrier(levels(self.scales(aux)))
        code = jnp.zeros(x.shape, jnp.int8)
        for i, middle in enumerate(middles):
            rise = self.spread((codes[i + 1] - codes[i]).astype(jnp.int8), length)
            code = code + jnp.where(size > self.spread(middle, length), rise, jnp.int8(0))
        return (jnp.where(x < 0, -code, code) + jnp.int8((3**self.planes - 1) // 2)).astype(jnp.uint8)

    def decode(self, codes: AnyArray, aux: Aux) -> Array:
        """Return sum over k of scale_k t_k in float32. Codes above the largest one stand for it."""
        length = codes.shape[-1]
        code = jnp.minimum(jnp.asarray(codes), jnp.uint8(3**self.planes - 1))
        scales = self.scales(aux)
        terms = [
            (digit.astype(jnp.float32) - 1.0) * self.spread(scale, length)
            for digit, scale in zip(trits_of(code, self.planes), scales, strict=True)
        ]
        return functools.reduce(jnp.add, terms)
