"""GPTQ: rounding a weight column by column, each column's error corrected in those that are still to come.

Frantar et al. 2023 (arXiv:2210.17323), algorithm 1. With H the second moment of the inputs and U the upper Cholesky
factor of its inverse, for every column i in turn

    q_i = round(w_i)      e = (w_i - q_i) / U_ii      w_j -= e U_ij for j > i

which keeps the product with inputs of that kind as it was, as well as the columns that are left allow.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from qjax.calibration import Observer
from qjax.errors import FormatError
from qjax.formats import Aux, Format
from qjax.formats.numerics import AnyArray
from qjax.statistics import SecondMoment, Statistic

ORDERS = (None, "static", "weight")


@dataclasses.dataclass(frozen=True)
class GPTQ:
    """Second-order rounding; needs calibration data. Settings are named as in llm-compressor.

    Works for the formats whose elements share nothing but scales and zero points (`Int`, `Float8`).

    Args:
        dampening_frac: what is added to the diagonal of H, as a part of its mean.
        block_size: columns after which the rest of the matrix is corrected.
        actorder: None goes from the first column to the last, and a group's range is that of its columns when the first
            of them is reached. "static" (or "weight") goes by falling H_ii, and ranges are those of the weight as it
            was, so that groups lie as they did.
        observer: how the range of each block is chosen; None takes all of it.

    A column whose input was always 0 is rounded to nearest. Where float32 does not suffice for the factor, it is
    computed in float64 on the host.
    """

    dampening_frac: float = 0.01
    block_size: int = 128
    actorder: str | None = None
    observer: Observer | None = None

    needs_batches: ClassVar[bool] = True
    sequential: ClassVar[bool] = True
    statistics: ClassVar[tuple[Statistic, ...]] = (SecondMoment(),)

    def __post_init__(self) -> None:
        if isinstance(self.dampening_frac, bool) or not 0 <= self.dampening_frac < 1:
            raise FormatError(f"GPTQ: dampening_frac={self.dampening_frac!r}; from 0 to below 1, such as 0.01")
        if isinstance(self.block_size, bool) or not isinstance(self.block_size, int) or self.block_size < 1:
            raise FormatError(f"GPTQ: block_size={self.block_size!r}; a number of columns, such as 128")
        if self.actorder not in ORDERS:
            raise FormatError(f"GPTQ: actorder={self.actorder!r}; None or 'static'")
        if self.observer is not None and not isinstance(self.observer, Observer):
            raise FormatError(f"GPTQ: observer={self.observer!r}; an observer such as qjax.MSE()")

    def round(
        self,
        w: AnyArray,
        fmt: Format,
        *,
        observer: Observer | None = None,
        weight: AnyArray | None = None,
        statistics: Mapping[str, AnyArray] | None = None,
        aux: Aux | None = None,
    ) -> tuple[Array, Aux]:
        """Round a matrix.

        Args:
            w: float32 [N, K].
            fmt: the format.
            observer: goes before the rounding's own.
            weight: not used: the importance of columns is in H.
            statistics: {"second_moment": float32 [K, K], "rows": float32 []}, as `SecondMoment` gathers them.
            aux: scales that are chosen already and stay, canonical as ``fmt.fit`` returns them; an observer is then not
                asked. The format may be any whose elements are encoded one by one, given the numbers of their block.

        Returns:
            Codes [N, K] of ``fmt.code_dtype`` and aux.

        Raises:
            FormatError: the format's elements share more than scales, or there are no statistics.
        """
        if statistics is None:
            raise FormatError("GPTQ.round needs statistics: the second moment of the inputs")
        # Given its block's numbers, a column is encoded as it is: one element of a row is one block.
        column = _column_format(fmt) if aux is None else fmt
        w = jnp.asarray(w, jnp.float32)
        n, k = w.shape
        group = fmt.group if fmt.per == "group" and fmt.group is not None else None
        size = _block_size(self.block_size, group, k)
        observer = observer or self.observer

        h = jnp.asarray(statistics["second_moment"], jnp.float32)
        by_order = self.actorder is not None
        order = jnp.argsort(-jnp.diagonal(h), stable=True) if by_order else jnp.arange(k)
        factor = _factor(h[order][:, order], self.dampening_frac)
        # Ranges of the weight as it was: all there are in static order or without groups, else overwritten as
        # groups are reached.
        fixed = aux is not None
        if aux is None:
            aux = fmt.fit(w) if observer is None else observer.fit(w, fmt)
        rows = {name: jnp.swapaxes(jnp.asarray(a), 0, 1) for name, a in aux.items()}  # [groups, N or 1]
        group_of = order // group if group is not None else jnp.zeros(k, jnp.int32)

        padded = -(-k // size) * size
        rest = padded - k  # columns of zeros that nothing is carried into or out of
        columns = jnp.pad(w.T[order], ((0, rest), (0, 0)))
        factor = jnp.pad(factor, ((0, rest), (0, rest))) + jnp.diag((jnp.arange(padded) >= k).astype(jnp.float32))
        group_of = jnp.pad(group_of, (0, rest), mode="edge")
        as_reached = group or 0 if not by_order and not fixed else 0  # length of groups fitted when reached

        def of_column(rows: Mapping[str, Array], j: Array) -> Aux:
            return {name: a[jnp.minimum(group_of[j], len(a) - 1)][:, None] for name, a in rows.items()}

        def one_column(start: Array, i: Array, state: Any) -> Any:
            block, u, codes, errors, rows = state
            here = of_column(rows, start + i)
            value = lax.dynamic_index_in_dim(block, i, 0, keepdims=False)
            code = column.encode(value[:, None], here)
            near = column.decode(code, here)[:, 0]
            line = lax.dynamic_index_in_dim(u, i, 0, keepdims=False)  # U_ij of this block, 0 for j < i
            error = (value - near) / line[i]
            block = block - line[:, None] * error[None, :]
            put = lambda a, v: lax.dynamic_update_index_in_dim(a, v, i, 0)  # noqa: E731
            return block, u, put(codes, code[:, 0]), put(errors, error), rows

        def one_block(b: Array, state: Any) -> Any:
            columns, codes, rows = state
            start = b * size
            block = lax.dynamic_slice_in_dim(columns, start, size, 0)
            u = lax.dynamic_slice(factor, (start, start), (size, size))
            inner = (block, u, jnp.zeros((size, n), codes.dtype), jnp.zeros((size, n), jnp.float32), rows)
            if not as_reached:
                inner = lax.fori_loop(0, size, lambda i, s: one_column(start, i, s), inner)
            elif as_reached >= size:

                def entered(rows: dict[str, Array]) -> dict[str, Array]:
                    ahead = jnp.pad(columns, ((0, as_reached), (0, 0)))
                    return _refitted(rows, ahead, start, k, column, observer, as_reached, start // as_reached)

                rows = lax.cond(start % as_reached == 0, entered, lambda rows: rows, rows)
                inner = lax.fori_loop(0, size, lambda i, s: one_column(start, i, s), (*inner[:4], rows))
            else:

                def one_group(g: Array, state: Any) -> Any:
                    block, u, codes, errors, rows = state
                    at = g * as_reached
                    rows = lax.cond(
                        start + at < k,
                        lambda rows: _refitted(
                            rows, block, at, k - start, column, observer, as_reached, (start + at) // as_reached
                        ),
                        lambda rows: rows,
                        rows,
                    )
                    state = (block, u, codes, errors, rows)
                    return lax.fori_loop(at, at + as_reached, lambda i, s: one_column(start, i, s), state)

                inner = lax.fori_loop(0, size // as_reached, one_group, inner)
            _, _, done, errors, rows = inner
            later = (jnp.arange(padded) >= start + size)[None, :]
            ahead = jnp.where(later, lax.dynamic_slice_in_dim(factor, start, size, 0), 0.0)
            columns = columns - jnp.matmul(ahead.T, errors, precision=lax.Precision.HIGHEST)
            return columns, lax.dynamic_update_slice_in_dim(codes, done, start, 0), rows

        codes = jnp.zeros((padded, n), fmt.code_dtype)
        _, codes, rows = lax.fori_loop(0, padded // size, one_block, (columns, codes, rows))
        codes = codes[:k][jnp.argsort(order)] if by_order else codes[:k]
        return codes.T, {name: jnp.swapaxes(a, 0, 1) for name, a in rows.items()}


def _column_format(fmt: Format) -> Format:
    """The format of a column: the same without groups."""
    if not fmt.elementwise:
        raise FormatError(
            f"GPTQ rounds columns one by one, and the elements of {fmt.name} share more than a scale; use Int or "
            "Float8, or round-to-nearest for it"
        )
    settings = {f.name: getattr(fmt, f.name) for f in dataclasses.fields(fmt) if f.init}  # type: ignore[arg-type]
    return type(fmt)(**{**settings, "group": None, "per": "channel"}) if fmt.group is not None else fmt


def _block_size(wanted: int, group: int | None, k: int) -> int:
    """Columns per block: a multiple of the group or a divisor of it, so that groups begin where blocks do."""
    if group is None:
        return min(wanted, k)
    if group <= wanted:
        return group * max(1, wanted // group)
    return wanted if group % wanted == 0 else group


def _refitted(
    rows: dict[str, Array],
    columns: Array,
    start: Array,
    end: Any,
    column: Format,
    observer: Observer | None,
    group: int,
    number: Array,
) -> dict[str, Array]:
    """The ranges with those of one group taken from its columns as they are now."""
    here = lax.dynamic_slice_in_dim(columns, start, group, 0)
    there = start + jnp.arange(group) < end
    matrix = jnp.where(there[:, None], here, 0.0).T  # a short last group: zeros widen no range
    aux = column.fit(matrix) if observer is None else observer.fit(matrix, column)
    return {
        name: lax.dynamic_update_index_in_dim(a, jnp.asarray(aux[name])[:, 0].astype(a.dtype), number, 0)
        for name, a in rows.items()
    }


def _factor(h: Array, dampening: float) -> Array:
    """The upper triangular U with UᵀU = H⁻¹, of H with its diagonal dampened; dead columns stand apart."""
    diagonal = jnp.diagonal(h)
    dead = diagonal <= 0
    mean = jnp.sum(jnp.where(dead, 0.0, diagonal)) / jnp.maximum(jnp.sum(~dead), 1)
    mean = jnp.where(mean > 0, mean, 1.0)
    h = jnp.where(dead[:, None] | dead[None, :], 0.0, h / mean) + jnp.diag(jnp.where(dead, 1.0, dampening))
    # H = R Rᵀ with R upper triangular (the Cholesky factor from the last row upwards) makes U = R⁻¹.
    lower = lax.linalg.cholesky(h[::-1, ::-1])
    r = lower[::-1, ::-1]
    u = lax.linalg.triangular_solve(r, jnp.eye(h.shape[0], dtype=h.dtype), left_side=True, lower=False)
    good = jnp.all(jnp.isfinite(u))
    shape = jax.ShapeDtypeStruct(h.shape, h.dtype)
    return lax.cond(good, lambda: u, lambda: jax.pure_callback(_factor_in_float64, shape, h))


def _factor_in_float64(h: Any) -> np.ndarray:
    """`_factor` of a dampened H on the host, with more dampening until it exists."""
    h = np.asarray(h, np.float64)
    extra = 0.0
    for _ in range(12):
        try:
            r = np.linalg.cholesky((h + extra * np.eye(len(h)))[::-1, ::-1])[::-1, ::-1]
            u = np.linalg.solve(r, np.eye(len(h)))
            if np.isfinite(u).all():
                return np.triu(u).astype(np.float32)
        except np.linalg.LinAlgError:
            pass
        extra = max(10 * extra, 1e-8)
    return np.eye(len(h), dtype=np.float32) * math.sqrt(1 / max(float(np.mean(np.diagonal(h))), 1e-30))
