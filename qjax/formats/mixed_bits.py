"""2, 4 and 16 bits in one matrix: strips of 2 bits, a few strips of 4, a few single numbers in FP16.

As "Fast and Efficient 2-bit LLM Inference on GPU: 2/4/16-bit in a Weight Matrix with Asynchronous Dequantization"
(arXiv:2311.16442) describes it. There is no official code, and what the paper leaves open is decided here; each
decision is named where it is made: the order of codes and bytes in `qjax.formats.mixed_layout`, scales in
`qjax.formats.mixed_scales`, sparse numbers in `qjax.formats.mixed_outliers`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from qjax.errors import FormatError, near
from qjax.formats import mixed_outliers, mixed_scales
from qjax.formats.base import Aux, Format
from qjax.formats.mixed_layout import MixedPacking, StripRule, Strips, order_of, pack_map, picked, places_of, unpack_map
from qjax.formats.numerics import AnyArray, finite_part, floor_log2, power_of_two, round_even, times_power_of_two
from qjax.formats.registry import register_format

CHOICES = ("aligned", "global")


@register_format("mixed_bits")
@dataclasses.dataclass(frozen=True)
class MixedBits(Format):
    """``value = (code - zero) * scale``, codes of 2 or 4 bits by strips of columns, plus a sparse FP16 correction.

    Scales of 2-bit strips are quantized once more, over tiles of rows; those of 4-bit strips are FP16. Fitted without
    data, the 4-bit strips are those with the largest sum over rows of squared ranges, and the outliers those with the
    largest squared errors; `qjax.TwoBit` chooses both, and rounds, with the second moment of the inputs.

    Args:
        share: the part of the strips that is 4-bit, 0 to 1.
        select: "aligned" takes one strip in every four, so that a row is made of 128-bit words (share 1/4); "global"
            the ``floor(share * strips)`` best of the matrix.
        outliers: the part of the 2-bit weights that is corrected in FP16, 0 to 0.1; 0.005 in the paper.
        strip: columns of a strip: 8, 16, 32 or 64.
        tile: rows whose scales of one strip share a second scale.
        wide_group: columns of 4-bit strips, counted without those between them, that share a scale; a multiple of
            ``strip``.
        scale_bits: bits of the scale codes in every three 2-bit strips, 1 to 4 each, 10 together at most.

    Raises:
        FormatError: for settings that contradict each other.

    Tiles and sparse rows belong to the whole matrix, so it is sliced along stack axes only. Numbers are stored in units
    of a power of two per matrix, so that FP16 scales neither overflow nor fade.
    """

    share: float = 0.25
    _: dataclasses.KW_ONLY
    select: str = "aligned"
    outliers: float = 0.0
    strip: int = 16
    tile: int = 16
    wide_group: int = 128
    scale_bits: tuple[int, int, int] = (3, 3, 4)

    code_bits = 4
    per = "group"
    symmetric = False
    weights_only = True
    whole_matrix = True
    row_aux: ClassVar[tuple[str, ...]] = (
        "words",
        "tile_scale",
        "tile_zero",
        "wide_scale",
        "wide_zero",
        "strips",
        "outlier_value",
        "outlier_column",
        "outlier_row",
    )

    def __post_init__(self) -> None:
        def whole(name: str, allowed: Callable[[int], bool], what: str) -> None:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not allowed(value):
                raise FormatError(f"MixedBits: {name}={value!r}; {what}")

        def part(name: str, most: float) -> None:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
                raise FormatError(f"MixedBits: {name}={value!r}; a part, 0 to {most:g}")
            object.__setattr__(self, name, float(value))

        part("share", 1)
        part("outliers", 0.1)
        whole("strip", lambda v: v in (8, 16, 32, 64), "8, 16, 32 or 64 columns")
        whole("tile", lambda v: v >= 1, "a number of rows, 1 or more")
        whole("wide_group", lambda v: v >= 1 and v % self.strip == 0, f"a multiple of the strip, {self.strip} columns")
        if self.select not in CHOICES:
            raise FormatError(
                f"MixedBits: select={self.select!r}{near(str(self.select), CHOICES)}; 'aligned' or 'global'"
            )
        if self.select == "aligned" and self.share != 0.25:
            raise FormatError(
                f"MixedBits: share={self.share} with select='aligned', which takes one strip in four; "
                "say select='global' for another share"
            )
        if self.share == 1 and self.outliers:
            raise FormatError("MixedBits: outliers stand in 2-bit strips only, and share=1 leaves none; outliers=0")
        bits = tuple(self.scale_bits)
        if len(bits) != 3 or any(not isinstance(b, int) or not 1 <= b <= 4 for b in bits) or sum(bits) > 10:
            raise FormatError(
                f"MixedBits: scale_bits={self.scale_bits!r}; three numbers of 1 to 4 bits, 10 together at most, so "
                "that a row's scale codes and zero points of three strips fit in 16 bits"
            )
        object.__setattr__(self, "scale_bits", bits)

    @property
    def name(self) -> str:
        """For example ``mixed 2/4 25%`` or ``mixed 2/4/16 25% +0.5%``."""
        sparse = f" +{100 * self.outliers:g}%" if self.outliers else ""
        kind = "" if self.select == "aligned" or self.share in (0, 1) else " global"
        return f"mixed 2/4{'/16' if self.outliers else ''} {100 * self.share:g}%{kind}{sparse}"

    @property
    def code_dtype(self) -> np.dtype:
        """uint8: 0 to 3 in 2-bit strips, 0 to 15 in others."""
        return np.dtype(np.uint8)

    @property
    def group(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The strip, of which each row has a scale."""
        return self.strip

    @property
    def rule(self) -> StripRule:
        """How many strips of a row are 4-bit."""
        return StripRule(self.strip, self.share, self.select == "aligned")

    @property
    def packing(self) -> MixedPacking:
        """Words of 2-bit strips and halves of 4-bit ones: see `qjax.formats.mixed_layout`."""
        return MixedPacking(self.rule)

    def strips(self, length: int) -> Strips:
        """Return how rows of ``length`` are cut into strips."""
        return self.rule.of(length)

    def outlier_count(self, n: int, length: int) -> int:
        """Return how many numbers of a matrix [n, length] are corrected."""
        return int(self.outliers * n * self.strips(length).narrow_columns + 1e-9)

    # Fitting.

    def fit(self, x: AnyArray, weight: AnyArray | None = None) -> Aux:
        """Return aux for x [*stack, N, K].

        Args:
            x: float32.
            weight: importance per element, broadcastable to x. Its mean over a strip stands for the second moment of
                the strip's inputs.
        """
        x = jnp.asarray(x, jnp.float32)
        if x.ndim < 2:
            raise FormatError(f"{self.name}: fit takes a matrix [*stack, N, K], an array of shape {x.shape} was given")
        importance = jnp.ones((), jnp.float32) if weight is None else jnp.asarray(weight, jnp.float32)
        importance = jnp.broadcast_to(importance, x.shape) if weight is not None else importance

        def one(x: Array, importance: Array) -> Aux:
            if not importance.ndim:
                importance = jnp.ones((1, x.shape[-1]), jnp.float32)
            return self.fit_matrix(x, self.sensitivity(x, importance), importance)

        for _ in range(x.ndim - 2):
            one = jax.vmap(one, in_axes=(0, 0 if importance.ndim else None))
        return one(x, importance)

    def sensitivity(self, x: AnyArray, importance: AnyArray) -> Array:
        """Return what each strip of a matrix loses at few bits: sum over rows of squared range times importance.

        Args:
            x: float32 [N, K].
            importance: float32 [N or 1, K]: the diagonal of the second moment, or ones.

        Returns:
            float32 [strips], in units of the matrix (`unit_exponent`).
        """
        strips = self.strips(x.shape[-1])
        x, _ = _in_units(x)
        parts = strips.split(x)
        span = jnp.max(parts, axis=-1, initial=0.0) - jnp.min(parts, axis=-1, initial=0.0)
        columns = jnp.sum(strips.split(jnp.ones(x.shape[-1], jnp.float32)), axis=-1)
        mean = jnp.sum(strips.split(importance), axis=-1) / jnp.maximum(columns, 1)
        return jnp.sum(span * span * mean, axis=0)

    def chosen(self, sensitivity: AnyArray, length: int) -> Array:
        """Return which strips are 4-bit, bool [strips], by sensitivity [strips]; the first of equal ones."""
        strips = self.strips(length)
        sensitivity = jnp.asarray(sensitivity)
        if not strips.count:
            return jnp.zeros(0, bool)
        if self.rule.aligned:
            best = jnp.argmax(sensitivity.reshape(-1, 4), axis=-1)
            if strips.forced is not None:
                best = best.at[-1].set(0)
            return (best[:, None] == jnp.arange(4)).reshape(-1)
        if strips.wide in (0, strips.count):
            return jnp.full(strips.count, strips.wide > 0)
        if length % self.strip:  # an incomplete strip is 2-bit
            sensitivity = sensitivity.at[-1].set(-1.0)
        best = jnp.argsort(-sensitivity, stable=True)[: strips.wide]
        return jnp.zeros(strips.count, bool).at[best].set(True)

    def fit_matrix(self, x: AnyArray, sensitivity: AnyArray, importance: AnyArray) -> Aux:
        """Return aux of one matrix.

        Args:
            x: float32 [N, K].
            sensitivity: float32 [strips]: the larger, the sooner a strip is 4-bit.
            importance: float32 [N or 1, K]: weight of squared errors in the choice of outliers.
        """
        n, length = x.shape
        strips, is_wide = self.strips(length), self.chosen(sensitivity, length)
        x, exponent = _in_units(x)
        aux: Aux = {"exponent": exponent.astype(jnp.int8).reshape(1, 1), **self._scales(x, is_wide)}
        if 0 < strips.wide < strips.count:
            aux["strips"] = pack_map(is_wide, self.rule)[None]
        count = self.outlier_count(n, length)
        if not count:
            return aux
        where = self._outliers(x, aux, is_wide, importance, count)
        aux |= self._scales(jnp.where(where, 0.0, x), is_wide)
        scale, zero, top = self._grid(aux, n, strips)
        dense = strips.join((_codes(strips.split(x), scale, zero, top) - zero[..., None]) * scale[..., None])
        return aux | self.sparse_aux(x - dense, where)

    def _scales(self, x: AnyArray, is_wide: AnyArray) -> Aux:
        """Scales and zero points of both kinds of strips, from x [N, K] in units of the matrix."""
        strips = self.strips(x.shape[-1])
        parts = strips.split(x)
        ordered = order_of(is_wide)
        low = picked(jnp.min(parts, axis=-1, initial=0.0), ordered, axis=-1)
        high = picked(jnp.max(parts, axis=-1, initial=0.0), ordered, axis=-1)
        m, aux = strips.narrow, {}
        if strips.narrow:
            words, step, offsets = mixed_scales.fit_narrow(low[:, :m], high[:, :m], self.tile, self.scale_bits)
            aux |= {"words": words, "tile_scale": step.reshape(1, -1), "tile_zero": offsets.reshape(1, -1)}
        if strips.wide:
            scale, zeros = mixed_scales.fit_wide(low[:, m:], high[:, m:], self.wide_group // self.strip)
            aux |= {"wide_scale": scale, "wide_zero": zeros}
        return aux

    def _outliers(self, x: AnyArray, aux: Aux, is_wide: AnyArray, importance: AnyArray, count: int) -> Array:
        """Which numbers of x [N, K] are corrected: bool [N, K].

        Numbers more than three standard deviations from the mean of their strip (over all rows) come first, by squared
        error times importance; where they are fewer than there is room for, the others follow by the same.
        """
        n, length = x.shape
        strips = self.strips(length)
        parts = strips.split(x)
        scale, zero, top = self._grid(aux, n, strips)
        error = parts - (_codes(parts, scale, zero, top) - zero[..., None]) * scale[..., None]
        number = n * jnp.sum(strips.split(jnp.ones(length, jnp.float32)), axis=-1)  # without padding
        number = jnp.maximum(number, 1.0)
        mean = jnp.sum(parts, axis=(0, 2)) / number
        there = strips.split(jnp.ones(length, jnp.float32))
        away = (parts - mean[:, None]) * there
        sigma = jnp.sqrt(jnp.sum(away * away, axis=(0, 2)) / number)
        score = error * error * strips.split(jnp.broadcast_to(importance, (importance.shape[0], length)))
        allowed = (there > 0) & ~is_wide[:, None]
        keys = mixed_outliers.ranked(score, jnp.abs(away) > 3 * sigma[:, None], jnp.broadcast_to(allowed, parts.shape))
        return mixed_outliers.largest(strips.join(keys), count)

    def sparse_aux(self, residual: AnyArray, where: AnyArray) -> Aux:
        """Return the aux of corrections: what is left of x [N, K], in units of the matrix, at ``where``."""
        count = self.outlier_count(*residual.shape)
        values, columns, rows = mixed_outliers.to_sparse(residual, where, count)
        return {"outlier_value": values[None], "outlier_column": columns[None], "outlier_row": rows[None]}

    # Encoding.

    def grid(self, aux: Aux, n: int, length: int) -> tuple[Array, Array, Array]:
        """Return scale, zero point (float32 [N, K]) and largest code (float32 [K]) of every element of one matrix."""
        strips = self.strips(length)
        scale, zero, top = self._grid(aux, n, strips)
        unit = power_of_two(jnp.asarray(aux["exponent"], jnp.int32))
        spread = lambda a: strips.join(jnp.repeat(a[..., None], self.strip, axis=-1))  # noqa: E731
        return spread(scale) * unit, spread(zero), spread(top)

    def is_wide(self, aux: Aux, length: int) -> Array:
        """Return which strips of one matrix are 4-bit: bool [strips]."""
        packed = aux.get("strips")
        return unpack_map(None if packed is None else jnp.asarray(packed)[0], self.rule, self.strips(length))

    def _grid(self, aux: Aux, n: int, strips: Strips) -> tuple[Array, Array, Array]:
        """Scale and zero point [N, strips] and largest code [strips], strips in the order of columns."""
        is_wide = self.is_wide(aux, strips.length)
        parts = []
        if strips.narrow:
            aux_rows = (jnp.asarray(aux[k]) for k in ("words", "tile_scale", "tile_zero"))
            words, step, offsets = aux_rows
            tiled = (step.reshape(-1, 3 * strips.triples), offsets.reshape(-1, strips.triples))
            parts.append(mixed_scales.narrow_of(words, *tiled, strips.narrow, self.tile, self.scale_bits))
        if strips.wide:
            wide = (aux["wide_scale"], aux["wide_zero"], strips.wide, self.wide_group // self.strip)
            parts.append(mixed_scales.wide_of(*wide))
        if not parts:
            return jnp.zeros((n, 0)), jnp.zeros((n, 0)), jnp.zeros(0)
        places = places_of(is_wide)
        scale, zero = (picked(jnp.concatenate(a, axis=-1), places, axis=-1) for a in zip(*parts, strict=True))
        return scale, zero, jnp.where(is_wide, float(mixed_scales.WIDE), float(mixed_scales.NARROW))

    def encode(self, x: AnyArray, aux: Aux) -> Array:
        """Return the codes of x as they stand in a row, sorted by width; corrections are not taken off."""

        def one(x: Array, aux: Aux) -> Array:
            n, length = x.shape
            strips = self.strips(length)
            scale, zero, top = self._grid(aux, n, strips)
            scale = scale * power_of_two(jnp.asarray(aux["exponent"], jnp.int32))
            codes = _codes(strips.split(x), scale, zero, top).astype(jnp.uint8)
            return strips.sorted_codes(codes, self.is_wide(aux, length))

        return _over_stack(one, jnp.asarray(x, jnp.float32), aux)

    def arranged(self, codes: AnyArray, aux: Aux) -> Array:
        """Return codes of one matrix, uint8 [N, K] in the order of columns, as they stand in a row."""
        strips = self.strips(codes.shape[-1])
        return strips.sorted_codes(strips.split(codes), self.is_wide(aux, codes.shape[-1]))

    def decode(self, codes: AnyArray, aux: Aux) -> Array:
        """Return (code - zero) * scale plus the corrections, in float32."""

        def one(codes: Array, aux: Aux) -> Array:
            n, length = codes.shape
            strips = self.strips(length)
            scale, zero, top = self._grid(aux, n, strips)
            unit = power_of_two(jnp.asarray(aux["exponent"], jnp.int32))
            parts = strips.strips_of(codes, self.is_wide(aux, length)) & top.astype(jnp.uint8)[:, None]
            dense = strips.join((parts.astype(jnp.float32) - zero[..., None]) * (scale * unit)[..., None])
            if "outlier_value" not in aux:
                return dense
            sparse = tuple(jnp.asarray(aux[f"outlier_{k}"])[0] for k in ("value", "column", "row"))
            return mixed_outliers.add_sparse(dense, sparse, unit[0, 0])  # pyright: ignore[reportArgumentType]

        return _over_stack(one, jnp.asarray(codes), aux)

    # Accounting.

    def average_bits(self, outlier_bits: int = 32) -> float:
        """Return the bits per weight of a large matrix, in which nothing is left over.

        The formula of the format's description: codes, scales of both orders, zero points and ``outlier_bits`` per
        stored outlier (16 for the value, 32 with its column). Row pointers and the map of strips are left out;
        `storage_bits` counts them.
        """
        p, g1, g2 = self.share, self.strip, self.tile
        word = (6 + sum(self.scale_bits)) / 3
        two = 2 + word / g1 + (16 + 16 / 3) / (g1 * g2)
        return (1 - p) * two + p * (4 + 20 / self.wide_group) + (1 - p) * self.outliers * outlier_bits

    def storage_bits(self, shape: Sequence[int]) -> dict[str, int]:
        """Return what is stored for canonical matrices of this shape [*stack, N, K], in bits by part.

        The parts are "main" and "tail" (codes), and the aux arrays by name; together 8 times the `nbytes` of the
        quantized array.
        """
        *stack, n, length = shape
        strips, word, count = self.strips(length), 8 * self.packing.word, self.outlier_count(n, length)
        tiles, groups = -(-n // self.tile), -(-strips.wide * self.strip // self.wide_group)
        parts = {
            "main": n * strips.count * word,
            "tail": n * strips.wide * word,
            "words": n * strips.triples * 16,
            "tile_scale": tiles * strips.triples * 48,
            "tile_zero": tiles * strips.triples * 16,
            "wide_scale": n * groups * 16,
            "wide_zero": n * -(-groups // 2) * 8,
            "strips": 0,
            "exponent": 8,
            "outlier_value": count * 16,
            "outlier_column": count * 8 * mixed_outliers.column_dtype(length).itemsize,
            "outlier_row": 32 * (n + 1) if count else 0,
        }
        if 0 < strips.wide < strips.count:
            parts["strips"] = 8 * (-(-strips.count // 16) if self.rule.aligned else -(-strips.count // 8))
        return {name: bits * math.prod(stack) for name, bits in parts.items()}


def captured(sensitivity: AnyArray, is_wide: AnyArray) -> Array:
    """Return how much of the sensitivity the 4-bit strips hold, as a part of what the best as many would hold.

    One strip in four, wherever they are, costs something where two sensitive strips stand side by side: this says how
    much.

    Args:
        sensitivity: float [strips].
        is_wide: bool [strips].
    """
    sensitivity, is_wide = jnp.asarray(sensitivity), jnp.asarray(is_wide)
    falling = -jnp.sort(-sensitivity)
    best = jnp.sum(jnp.where(jnp.arange(sensitivity.shape[0]) < jnp.sum(is_wide), falling, 0.0))
    return jnp.sum(jnp.where(is_wide, sensitivity, 0.0)) / jnp.where(best > 0, best, 1.0)


def unit_exponent(x: AnyArray) -> Array:
    """Return the exponent, int32 [], of the power of two in which the numbers of a matrix are stored."""
    top = jnp.max(jnp.abs(finite_part(x)), initial=0.0)
    return jnp.clip(floor_log2(top) - mixed_scales.TOP, -126, 115)


def _in_units(x: AnyArray) -> tuple[Array, Array]:
    """The finite part of a matrix in its own units, and their exponent."""
    x, exponent = finite_part(jnp.asarray(x, jnp.float32)), unit_exponent(x)
    return times_power_of_two(x, -exponent), exponent


def _codes(parts: AnyArray, scale: AnyArray, zero: AnyArray, top: AnyArray) -> Array:
    """Codes, float32, of strips [N, strips, strip]; NaN becomes the zero point."""
    inverse = jnp.where(scale > 0, 1.0 / jnp.where(scale > 0, scale, 1.0), 0.0)
    steps = round_even(parts * inverse[..., None])
    codes = jnp.clip(steps + zero[..., None], 0, top[:, None])
    return jnp.where(jnp.isnan(steps), zero[..., None], codes)


def _over_stack(function: Any, x: Array, aux: Aux) -> Array:
    """Apply a function of one matrix [N, K] and its aux to each of a stack."""
    stack = x.shape[:-2]
    aux = {k: jnp.broadcast_to(a, (*stack, *a.shape[len(stack) :])) for k, a in aux.items()}
    for _ in stack:
        function = jax.vmap(function)
    return function(x, aux)
