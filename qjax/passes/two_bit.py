"""Rounding to `qjax.formats.MixedBits`: which strips get 4 bits, which numbers stay FP16, and the codes of the rest.

After arXiv:2311.16442, which names the Hessian and the range of weights as what decides, and gives no formula; the
formulas here are choices. With H the second moment of the inputs (plus 1 % of its mean diagonal), strip by strip

    "hessian"   sum over rows of (max - min)**2, times the mean of H_jj
    "range"     sum over rows of (max - min)**2
    "inverse"   sum over rows and columns of w**2 / (H**-1)_jj

Scales, zero points and the places of outliers are those of the weight as it was. With error feedback, columns are then
rounded one after the other as in GPTQ (`qjax.passes.gptq`), each one's error corrected in those still to come. A
column's outliers are stored as they have become by then, so nearly nothing of their error is passed on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array, lax

from qjax.calibration import Observer
from qjax.errors import FormatError, near
from qjax.formats import Aux, Format, MixedBits
from qjax.formats.mixed_outliers import row_numbers
from qjax.formats.numerics import AnyArray, power_of_two, round_even
from qjax.passes.gptq import _carried, _factor
from qjax.statistics import SecondMoment, Statistic

SENSITIVITIES = ("hessian", "range", "inverse")


@dataclasses.dataclass(frozen=True)
class TwoBit:
    """Rounding of `qjax.formats.MixedBits`; needs calibration data.

    Args:
        sensitivity: by which strips get 4 bits: "hessian", "range" or "inverse", as the module says.
        feedback: whether errors of columns are corrected in later columns. False rounds to nearest.
        dampening_frac: what is added to the diagonal of H, as a part of its mean.
        block_size: columns after which the rest of the matrix is corrected.
    """

    sensitivity: str = "hessian"
    feedback: bool = True
    dampening_frac: float = 0.01
    block_size: int = 128

    needs_batches: ClassVar[bool] = True
    sequential: ClassVar[bool] = True
    statistics: ClassVar[tuple[Statistic, ...]] = (SecondMoment(),)

    def __post_init__(self) -> None:
        if self.sensitivity not in SENSITIVITIES:
            names = ", ".join(repr(s) for s in SENSITIVITIES)
            raise FormatError(
                f"TwoBit: sensitivity={self.sensitivity!r}{near(str(self.sensitivity), SENSITIVITIES)}; one of {names}"
            )
        if not isinstance(self.feedback, bool):
            raise FormatError(f"TwoBit: feedback={self.feedback!r}; True or False")
        if isinstance(self.dampening_frac, bool) or not 0 <= self.dampening_frac < 1:
            raise FormatError(f"TwoBit: dampening_frac={self.dampening_frac!r}; from 0 to below 1, such as 0.01")
        if isinstance(self.block_size, bool) or not isinstance(self.block_size, int) or self.block_size < 1:
            raise FormatError(f"TwoBit: block_size={self.block_size!r}; a number of columns, such as 128")

    def round(
        self,
        w: AnyArray,
        fmt: Format,
        *,
        observer: Observer | None = None,
        weight: AnyArray | None = None,
        statistics: Mapping[str, AnyArray] | None = None,
    ) -> tuple[Array, Aux]:
        """Round a matrix.

        Args:
            w: float32 [N, K].
            fmt: a `MixedBits`.
            observer: has to be None: ranges are those of the format.
            weight: not used: the importance of columns is in H.
            statistics: {"second_moment": float32 [K, K], "rows": float32 []}, as `SecondMoment` gathers them.

        Returns:
            Codes [N, K] of ``fmt.code_dtype`` and aux.

        Raises:
            FormatError: the format is another, an observer was given, or there are no statistics.
        """
        if not isinstance(fmt, MixedBits):
            raise FormatError(f"TwoBit rounds to qjax.formats.MixedBits, and the format is {fmt.name}; use GPTQ for it")
        if observer is not None:
            raise FormatError(f"TwoBit: observer {observer!r}; ranges of {fmt.name} are not chosen, leave it out")
        if statistics is None:
            raise FormatError("TwoBit.round needs statistics: the second moment of the inputs")
        w = jnp.asarray(w, jnp.float32)
        n, length = w.shape
        h = jnp.asarray(statistics["second_moment"], jnp.float32)
        importance = self._importance(h)
        aux = fmt.fit_matrix(w, self._sensitivity(w, fmt, h, importance), importance)
        if not self.feedback:
            return fmt.encode(w, aux), aux
        carried = _carried(h, self.dampening_frac)
        unit = power_of_two(aux["exponent"].astype(jnp.int32))
        count = fmt.outlier_count(n, length)
        where = sparse_places(aux, n, length) if count else None
        numbers, kept = rounded_columns(
            w, *fmt.grid(aux, n, length), where, unit, carried, min(self.block_size, length)
        )
        codes = fmt.arranged(numbers, aux)
        return codes, (aux | fmt.sparse_aux(kept, where) if where is not None else aux)

    def _importance(self, h: Array) -> Array:
        """The diagonal of H with its damping, float32 [1, K], 1 on average."""
        diagonal = jnp.maximum(jnp.diagonal(h), 0.0)
        mean = jnp.mean(diagonal) if diagonal.shape[0] else jnp.zeros(())
        damped = diagonal / jnp.where(mean > 0, mean, 1.0) + self.dampening_frac
        return jnp.where(mean > 0, damped, 1.0)[None]

    def _sensitivity(self, w: Array, fmt: MixedBits, h: Array, importance: Array) -> Array:
        """What each strip loses at few bits, float32 [strips]."""
        if self.sensitivity == "inverse":
            factor = _factor(h, self.dampening_frac)
            inverse = jnp.sum(factor * factor, axis=0)  # the diagonal of H**-1 = UᵀU
            seen = jnp.diagonal(h) > 0  # a column whose input was always 0 loses nothing
            loss = jnp.sum(w * w, axis=0) * jnp.where(seen, 1 / jnp.maximum(inverse, 1e-30), 0.0)
            return jnp.sum(fmt.strips(w.shape[-1]).split(loss), axis=-1)
        return fmt.sensitivity(w, jnp.ones_like(importance) if self.sensitivity == "range" else importance)


def sparse_places(aux: Aux, n: int, length: int) -> Array:
    """Return where the corrections of a matrix [n, length] stand, bool."""
    columns = aux["outlier_column"][0]
    row = row_numbers(aux["outlier_row"][0], columns.shape[0])
    return jnp.zeros((n, length), bool).at[row, columns.astype(jnp.int32)].set(True)


def rounded_columns(
    w: Array,
    scale: Array,
    zero: Array,
    top: Array,
    where: Array | None,
    unit: Array,
    carried: Array,
    size: int,
) -> tuple[Array, Array]:
    """Round column by column with error feedback, on a grid that is fixed.

    Args:
        w, scale, zero: float32 [N, K].
        top: the largest code of each column, float32 [K].
        where: bool [N, K], the numbers that are corrected in FP16, or None.
        unit: float32 [1, 1], what a correction of 1 stands for.
        carried: how much of the error of column i goes into column j, as `qjax.passes.gptq` computes it: R_ij / R_jj
            above the diagonal and 0 elsewhere, with H = R Rᵀ. Errors are those of the weight as it was. float32 [K, K].
        size: columns of a block.

    Returns:
        Codes [N, K], uint8, in the order of columns, and the corrections, float16 [N, K] in units, 0 elsewhere ([0, 0]
        if there are none).
    """
    n, k = w.shape
    if not n or not k:
        return jnp.zeros((n, k), jnp.uint8), jnp.zeros((n, k) if where is not None else (0, 0), jnp.float16)
    padded = -(-k // size) * size
    rest = padded - k  # columns of zeros that nothing is carried into or out of
    of_columns = lambda a: jnp.pad(a.T, ((0, rest), (0, 0)))  # noqa: E731
    original = of_columns(w)
    grid = (of_columns(scale), of_columns(zero), jnp.pad(top, (0, rest)))
    sparse = of_columns(where) if where is not None else None
    carried = jnp.pad(carried, ((0, rest), (0, rest)))

    def one_column(i: Array, state: Any, of_block: Any) -> Any:
        block, codes, kept, errors = state
        there, share, scale, zero, top, sparse = of_block
        at = lambda a: lax.dynamic_index_in_dim(a, i, 0, keepdims=False)  # noqa: E731
        value, step, offset = at(block), at(scale), at(zero)
        code = jnp.clip(round_even(value / jnp.where(step > 0, step, 1.0)) + offset, 0, at(top))
        close = (code - offset) * step
        put = lambda a, v: lax.dynamic_update_index_in_dim(a, v.astype(a.dtype), i, 0)  # noqa: E731
        if sparse is not None:
            left = jnp.where(at(sparse), (value - close) / unit[0, 0], 0.0).astype(jnp.float16)
            close = close + left.astype(jnp.float32) * unit[0, 0]
            kept = put(kept, left)
        error = at(there) - close
        return block + at(share)[:, None] * error[None, :], put(codes, code), kept, put(errors, error)

    def one_block(b: Array, state: Any) -> Any:
        columns, codes, kept = state
        start = b * size
        rows = lambda a: lax.dynamic_slice_in_dim(a, start, size, 0)  # noqa: E731
        share = lax.dynamic_slice(carried, (start, start), (size, size))
        of_block = (rows(original), share, *(rows(a) for a in grid), rows(sparse) if sparse is not None else None)
        inner = (
            rows(columns),
            jnp.zeros((size, n), jnp.uint8),
            jnp.zeros((size, n) if sparse is not None else (0, 0), jnp.float16),
            jnp.zeros((size, n), jnp.float32),
        )
        _, done, left, errors = lax.fori_loop(0, size, lambda i, s: one_column(i, s, of_block), inner)
        later = (jnp.arange(padded) >= start + size)[None, :]
        ahead = jnp.where(later, rows(carried), 0.0)
        columns = columns + jnp.matmul(ahead.T, errors, precision=lax.Precision.HIGHEST)
        if sparse is not None:
            kept = lax.dynamic_update_slice_in_dim(kept, left, start, 0)
        return columns, lax.dynamic_update_slice_in_dim(codes, done, start, 0), kept

    kept = jnp.zeros((padded, n) if where is not None else (0, 0), jnp.float16)
    state = (original, jnp.zeros((padded, n), jnp.uint8), kept)
    _, codes, kept = lax.fori_loop(0, padded // size, one_block, state)
    return codes[:k].T, kept[:k].T
