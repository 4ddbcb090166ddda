"""Logarithms to an adaptive base: the format of AdaLog (Wu et al., ECCV 2024, arXiv 2407.12951, section 3).

Probabilities behind a softmax and what a GELU leaves follow a power law: most are near nothing, a few are large. Evenly
spaced codes waste themselves on the large ones. Here code c stands for a power of a base B that is searched per tensor,

    value = scale * B**-c,    B = 2**(q / 37),

and a product with it needs no power of B on the device. With c q = 37 E + rest, B**-c = 2**-E * 2**(-rest / 37): a
shift by E, and one of 37 fractions, kept as a numerator over a denominator D = 2**(b+1) - 2 that all codes share. So

    value = scale * 2**-E[c] * M[c] / D,    E[c] = c q div 37,    M[c] = rint(2**(-(c q mod 37) / 37) * D).

Both tables are made here, on the host, in float64. What is rounded is a logarithm, and logarithms differ in their last
digit between platforms. So a code is found by comparing instead: it is the number of k for which x / scale lies below
2**(-(k + 1/2) q / 37). Those bounds are made in float64 too and rounded up to float32, which changes no comparison.

Zero is no power of a base. Three policies say what becomes of numbers below the last level:

- "mask": they become 0, beside n = 2**b levels. That is what the authors' code does and what published figures mean.
  These are n + 1 numbers, which b bits cannot hold: code n means zero, and b + 1 bits are stored (two bytes at b = 8).
- "reserve": code n - 1 means zero, and n - 1 levels remain. Fits in b bits; 0 is exact.
- "clamp": they become the last level, the equation as the paper writes it. Fits in b bits; 0 is not exact.

With "mask" and "clamp", x / scale is first raised to 1e-15, as the authors do. Where levels reach down there, 0 becomes
about 1e-15 of the scale: under "mask" at q > 118 for 4 bits, q > 29 for 6 bits, and at every q for 8 bits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from qjax.errors import FormatError, near
from qjax.formats.base import Aux, Format, ImplicitPer
from qjax.formats.nf4 import lookup
from qjax.formats.numerics import SMALLEST_SCALE, AnyArray, power_of_two, scale_for
from qjax.formats.packing import BitStream, Bytes, Packing, TwoBytes
from qjax.formats.qarray import QArray, quantize_array
from qjax.formats.registry import register_format

R = 37
"""Denominator of the logarithm of the base; a prime, so that every q but its multiples runs through all residues."""

FLOOR = 1e-15
"""What x / scale is raised to before its logarithm is taken."""

ZERO_POLICIES = ("mask", "reserve", "clamp")

_LARGEST_Q = 255  # up to there c * q stays below 2**16 for all codes, and the division by 37 is one multiplication


def denominator(bits: int) -> int:
    """Return D = 2**(b+1) - 2, the denominator of all fractions at so many bits."""
    return 2 ** (bits + 1) - 2


def fractions(bits: int, r: int = R) -> np.ndarray:
    """Return the numerators of the r fractions 2**(-m/r), m = 0 .. r - 1: int32 [r], from 2**b - 1 to D."""
    return np.rint(2.0 ** (-np.arange(r) / r) * denominator(bits)).astype(np.int32)


def bounds(q: int, count: int, r: int = R) -> np.ndarray:
    """Return float32 [count] such that ``rint(-log2(u) * r / q) > k`` exactly where ``u < bounds[k]``, for float32 u.

    Bound k is 2**(-(k + 1/2) q / r) rounded up to float32. Where it is a power of two, u can fall on it: rounding half
    to even then asks for k if k is even and for k + 1 if it is odd, which the next float32 above gives.
    """
    k = np.arange(count)
    exact = 2.0 ** (-(k + 0.5) * q / r)
    nearest = exact.astype(np.float32)
    up = np.where(nearest < exact, np.nextafter(nearest, np.float32(1)), nearest)
    tie = ((2 * k + 1) * q % (2 * r) == 0) & (k % 2 == 1)
    return np.where(tie, np.nextafter(up, np.float32(1)), up)


@register_format("log")
@dataclasses.dataclass(frozen=True)
class Log(Format):
    """Powers of 2**(-q/37) under one scale: ``value = scale * 2**-E[code] * M[code] / D - shift``.

    For numbers that are not negative, as probabilities are, or that ``shift`` makes so. Negative numbers become what 0
    becomes. The largest number of what shares a scale is exact. See the top of `qjax.formats.log` for the equations,
    and for what becomes of 0.

    Args:
        bits: 2 to 8.
        q: the base is 2**(q/r), q = 1 .. 255; 37 is base 2. AdaLog searches 10 .. 137.
        r: 37 in AdaLog, 1 to 64; q = 1 and r = 2 is base sqrt 2, which 37 cannot express.
        zero: "mask", "reserve" or "clamp".
        shift: added before and taken off after: minus the minimum of the GELU that stands in front.
        folded: the shift is not taken off, since the bias behind the product that reads the numbers has it: they decode
            to what they are, plus the shift.
        per: "tensor" (one scale for all, as in AdaLog), "channel" or "token".
        group: length of a group along the contracted axis; excludes ``per``.

    Raises:
        FormatError: for settings that cannot be.
    """

    bits: int
    q: int = R
    _: dataclasses.KW_ONLY
    zero: str = "reserve"
    shift: float = 0.0
    folded: bool = False
    r: int = R
    per: str = ImplicitPer("tensor")
    group: int | None = None

    elementwise = True
    symmetric = False

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise FormatError(f"Log: bits={self.bits!r}; 2 to 8 bits are possible")
        if isinstance(self.q, bool) or not isinstance(self.q, int | np.integer) or not 1 <= self.q <= _LARGEST_Q:
            raise FormatError(f"Log: q={self.q!r}; the base is 2**(q/{R}) with a whole q from 1 to {_LARGEST_Q}")
        object.__setattr__(self, "q", int(self.q))
        if isinstance(self.r, bool) or not isinstance(self.r, int | np.integer) or not 1 <= self.r <= 64:
            raise FormatError(f"Log: r={self.r!r}; the base is 2**(q/r) with a whole r from 1 to 64")
        object.__setattr__(self, "r", int(self.r))
        if self.zero not in ZERO_POLICIES:
            hint = near(str(self.zero), ZERO_POLICIES)
            raise FormatError(f"Log: zero={self.zero!r}{hint}; one of {', '.join(ZERO_POLICIES)}")
        if not isinstance(self.shift, int | float) or not 0 <= self.shift < float("inf"):
            raise FormatError(f"Log: shift={self.shift!r}; a finite number, not negative, in the units of the values")
        object.__setattr__(self, "shift", float(self.shift))
        if not isinstance(self.folded, bool):
            raise FormatError(f"Log: folded={self.folded!r}; True or False")
        self._check_granularity()

    @property
    def name(self) -> str:
        """For example ``log4 q25 per tensor``."""
        shifted = f" shift {self.shift:.4g}{' folded' if self.folded else ''}" if self.shift else ""
        base = f"q{self.q}" if self.r == R else f"q{self.q}/{self.r}"
        return f"log{self.bits} {base}{self._suffix()}{shifted} {self.zero}"

    @property
    def code_bits(self) -> int:
        """Stored bits of one code, one more than ``bits`` where zero has a code beside all levels; at most 8."""
        return min(8, self.bits + (self.zero == "mask"))

    @property
    def code_dtype(self) -> np.dtype:
        """uint8; uint16 for 8 bits and a masked zero, which are 257 numbers."""
        return np.dtype(np.uint16 if self._wide else np.uint8)

    @property
    def packing(self) -> Packing:
        """A stream of ``code_bits`` bits; two bytes a code for 8 bits and a masked zero."""
        if self._wide:
            return TwoBytes()
        return Bytes() if self.code_bits == 8 else BitStream(self.code_bits, signed=False)

    @property
    def levels(self) -> int:
        """How many powers of the base there are beside zero: n, or n - 1 where a code is reserved."""
        return 2**self.bits - (self.zero == "reserve")

    @property
    def zero_code(self) -> int | None:
        """The code that means zero; None under "clamp"."""
        return None if self.zero == "clamp" else self.levels

    def tables(self) -> tuple[np.ndarray, np.ndarray, int]:
        """Return (E, M, D): shifts int32 [n], numerators int32 [n] and their denominator, n = 2**bits.

        Code c stands for ``scale * 2**-E[c] * M[c] / D``. Under "reserve" the numerator of the last code is 0; under
        "mask" code n, which is not in the tables, means zero.
        """
        products = np.arange(2**self.bits) * self.q
        numerators = fractions(self.bits, self.r)[products % self.r]
        numerators[self.levels :] = 0
        return (products // self.r).astype(np.int32), numerators, denominator(self.bits)

    def values(self) -> np.ndarray:
        """Return what the codes stand for at scale 1 and without shift: float64 [n], or [n + 1] under "mask"."""
        shifts, numerators, below = self.tables()
        values = np.ldexp(numerators / below, -shifts)
        return np.append(values, 0.0) if self.zero == "mask" else values

    def bounds(self) -> np.ndarray:
        """Return the threshold form: the code of u = (x + shift) / scale is the number of bounds above u.

        float32, descending; those that ``u >= 1e-15`` never falls below are left out.
        """
        found = bounds(self.q, 2**self.bits - (self.zero != "mask"), self.r)
        if (
            self.zero == "reserve"
        ):  # below the smallest normal number only 0 is left, which has to fall below all bounds
            return np.maximum(found, np.float32(SMALLEST_SCALE))
        return found[found > np.float32(FLOOR)]

    def from_range(self, low: AnyArray, high: AnyArray, shared: Mapping[str, AnyArray] | None = None) -> Aux:
        """Return {"scale": float32 high + shift}, blocked; 1 where that is not positive."""
        return {"scale": scale_for(jnp.asarray(high) + np.float32(self.shift), 1.0, 1.0)}

    def encode(self, x: AnyArray, aux: Aux) -> Array:
        """Return codes. NaN counts as 0, infinity as the scale."""
        x = jnp.asarray(x, jnp.float32)
        shifted = jnp.where(jnp.isnan(x), 0, x) + np.float32(self.shift)
        u = shifted * self.spread(1.0 / aux["scale"], x.shape[-1])
        if self.zero != "reserve":
            u = jnp.maximum(u, np.float32(FLOOR))
        return count_above(u, self.bounds()).astype(self.code_dtype)

    def decode(self, codes: AnyArray, aux: Aux) -> Array:
        """Return scale * 2**-E[code] * M[code] / D - shift in float32; with the shift, if that is folded."""
        value = decode_unit(codes, self) * self.spread(aux["scale"], codes.shape[-1])
        return value if self.folded else value - np.float32(self.shift)

    def quantize(self, x: ArrayLike, *, scale: ArrayLike | None = None) -> QArray:
        """Return x as packed codes, along its last axis.

        Args:
            x: float array [..., K] of any rank but 0.
            scale: what the largest level stands for (1 for probabilities): a number, or a blocked array for the
                matrix [N, K] of all rows of x. None takes the largest element, plus the shift.

        Raises:
            FormatError: x has no axis, or the scale is a number that is not positive.
        """
        x = jnp.asarray(x)
        if not x.ndim:
            raise FormatError(f"{self.name}: an array with at least one axis is quantized; a single number was given")
        aux: Aux | None = None
        if scale is not None:
            if isinstance(scale, int | float) and not 0 < scale < float("inf"):
                raise FormatError(f"{self.name}: scale={scale!r}; a positive number")
            scale = jnp.asarray(scale, jnp.float32)
            aux = {"scale": scale.reshape(1, 1) if scale.ndim == 0 else scale}
        return quantize_array(x, self, in_axes=x.ndim - 1, aux=aux)

    @property
    def _wide(self) -> bool:
        return self.zero == "mask" and self.bits == 8


def count_above(u: Array, descending: np.ndarray) -> Array:
    """Return how many of these constants lie above each number: int32 of the shape of u.

    By bisection, a comparison a bit, each with the constant that the bits before it select. Elementwise, as `lookup`:
    comparing with every constant takes ten times as long at 4 bits, and reducing over them a hundred times.
    """
    size = 1 << len(descending).bit_length()
    table = np.append(descending, np.full(size - 1 - len(descending), -np.inf)).astype(np.float32)
    count = jnp.zeros(u.shape, jnp.int32)
    while size > 1:
        half = size // 2
        constants = table[half - 1 :: size]
        bound = lookup(count // size, constants) if len(constants) > 1 else constants[0]
        count = count + jnp.where(u < bound, half, 0)
        size = half
    return count


def decode_unit(codes: AnyArray, fmt: Log, over: int | None = None) -> Array:
    """Return what codes stand for at scale 1 and without shift, float32: correctly rounded, and exact for q = 37.

    Up to 5 bits one table of all codes is looked up; above, the r fractions, and the shift is set as an exponent.

    Args:
        codes: of the format.
        fmt: the format.
        over: what numerators are divided by; None for their denominator, 1 for the numerators times 2**-E, which are
            exact.
    """
    codes = jnp.asarray(codes)
    below = denominator(fmt.bits) if over is None else over
    if fmt.bits <= 5:
        shifts, numerators, _ = fmt.tables()
        values = np.ldexp(numerators / below, -shifts)
        return lookup(codes, padded(np.append(values, 0.0) if fmt.zero == "mask" else values))
    product = codes.astype(jnp.uint32) * np.uint32(fmt.q)
    if fmt.r == R:
        shift = (product * np.uint32(56680)) >> np.uint32(21)  # product div 37, exact below 2**16
    else:
        shift = product // np.uint32(fmt.r)
    part = product - shift * np.uint32(fmt.r)
    fraction = lookup(part, padded(fractions(fmt.bits, fmt.r) / below))
    # Levels below 2**-126 are out of reach of float32 and of codes, whose numbers are at least 1e-15 of the scale.
    value = fraction * power_of_two(-jnp.minimum(shift, np.uint32(126)).astype(jnp.int32))
    return value if fmt.zero_code is None else jnp.where(codes >= fmt.zero_code, 0, value)


def padded(values: np.ndarray) -> np.ndarray:
    """Return values as float32, filled with zeros to a power of two, as `lookup` takes them."""
    size = 1 << (len(values) - 1).bit_length()
    return np.pad(values, (0, size - len(values))).astype(np.float32)
