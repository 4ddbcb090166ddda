"""GPTQ: rounding a weight column by column, each column's error corrected in those that are still to come.

Frantar et al. 2023 (arXiv:2210.17323), algorithm 1. With H the second moment of the inputs and U the upper Cholesky
factor of its inverse, for every column i in turn

    q_i = round(w_i)      e = (w_i - q_i) / U_ii      w_j -= e U_ij for j > i

which keeps the product with inputs of that kind as it was, as well as the columns that are left allow.

It is computed without the inverse. With H = R Rᵀ, R upper triangular (so that U = R⁻¹), what column j has become when
its turn comes is

    w_j + Σ_{i<j} (w_i - q_i) R_ij / R_jj

with the weights as they were: the errors of all columns before are brought in when a column is reached, and not carried
on to all that follow (GPTQ as Babai's nearest plane: Chen et al. 2025, arXiv:2507.18553). That is a third of the work
for the factor, and sums are taken over what was there instead of over what was added up on the way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from qjax.calibration import Observer
from qjax.errors import FormatError, warn
from qjax.formats import Aux, Format
from qjax.formats.numerics import AnyArray
from qjax.statistics import SecondMoment, Statistic

ORDERS = (None, "static", "weight", "group", "dynamic")

_SMALL = 16
"""Columns that are corrected one by one; those before them come in by a product."""


@dataclasses.dataclass(frozen=True)
class GPTQ:
    """Second-order rounding; needs calibration data. Settings are named as in llm-compressor.

    Works for the formats whose elements share nothing but scales and zero points (`Int`, `Float8`).

    Args:
        dampening_frac: what is added to the diagonal of H, as a part of its mean.
        block_size: columns after which the rest of the matrix is corrected.
        actorder: None goes from the first column to the last, and a group's range is that of its columns when the first
            of them is reached. "static" (or "weight") goes by falling H_ii, and ranges are those of the weight as it
            was, so that groups lie as they did. "group" (or "dynamic") would make groups of columns that follow each
            other in that order; it is refused for formats with groups, which lie next to each other in every layout
            here (llm-compressor has given it up too), and is the same as "static" for the others.
        observer: how the range of each block is chosen; None takes all of it. An observer that weighs errors (`MSE`)
            weighs columns by H_ii, which lowers the error of the outputs beside equal weights.

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
            raise FormatError(f"GPTQ: actorder={self.actorder!r}; None or 'static' (which 'weight' is another name of)")
        if self.observer is not None and not isinstance(self.observer, Observer):
            raise FormatError(f"GPTQ: observer={self.observer!r}; an observer such as qjax.MSE()")

    def check_format(self, fmt: Format, fitted: bool = False) -> None:
        """Raise a FormatError if a format cannot be rounded in this way; ``fitted``: its scales are chosen already."""
        if not fitted:
            _column_format(fmt)
        if self.actorder in ("group", "dynamic") and fmt.per == "group":
            raise FormatError(
                f"GPTQ: actorder={self.actorder!r} makes groups of columns that follow each other by the size of their "
                f"inputs, and {fmt.name} stores groups of neighbouring columns, with no room for an index; use "
                "actorder='static', which keeps them where they are, or a format without groups"
            )

    def doubts(self, state: Mapping[str, AnyArray]) -> Iterator[tuple[str, str]]:
        """Yield (kind, sentence) for what makes the statistics of a weight doubtful."""
        rows, k = float(np.min(np.asarray(state["rows"]))), state["second_moment"].shape[-1]
        if rows < k:
            yield (
                "rows",
                f"{int(rows)} rows of calibration data cannot fill a second moment of {k} inputs, so GPTQ corrects "
                f"for what only these rows have in common; give {k} rows or more, better {8 * k}, or raise "
                f"dampening_frac={self.dampening_frac}",
            )

    def flops(self, n: int, k: int, fmt: Format) -> float:
        """Return floating-point operations of products in rounding a matrix [n, k].

        K³/3 for the factor; for the errors, 2 N for each pair of columns of different blocks, and the square of a block
        within it, once more where groups are fitted as they are reached.
        """
        group = fmt.group if self.actorder is None and fmt.per == "group" and fmt.group is not None else 0
        size = _block_size(self.block_size, group, k)
        within = 2 * (size + min(_SMALL, size)) + (2 * size + group if group else 0)
        return k**3 / 3 + k * n * (k - size + within)

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
            weight: not used: the importance of columns is in H, whose diagonal observers are given as such.
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
        self.check_format(fmt, aux is not None)
        # Given its block's numbers, a column is encoded as it is: one element of a row is one block.
        column = _column_format(fmt) if aux is None else fmt
        w = jnp.asarray(w, jnp.float32)
        n, k = w.shape
        group = fmt.group if fmt.per == "group" and fmt.group is not None else None
        as_reached = 0 if self.actorder is not None or aux is not None else group or 0  # groups fitted when reached
        size = _block_size(self.block_size, as_reached, k)
        observer = observer or self.observer

        h = jnp.asarray(statistics["second_moment"], jnp.float32)
        importance = jnp.diagonal(h) / jnp.maximum(jnp.mean(jnp.diagonal(h)), 1e-30)
        by_order = self.actorder is not None
        order = jnp.argsort(-jnp.diagonal(h), stable=True) if by_order else jnp.arange(k)
        carried = _carried(h[order][:, order] if by_order else h, self.dampening_frac)
        # Ranges of the weight as it was: all there are in static order or without groups, else overwritten as
        # groups are reached.
        if aux is None:
            aux = fmt.fit(w) if observer is None else observer.fit(w, fmt, importance[None])
        rows = {name: jnp.swapaxes(jnp.asarray(a), 0, 1) for name, a in aux.items()}  # [groups, N or 1]
        group_of = order // group if group is not None else jnp.zeros(k, jnp.int32)

        padded = -(-k // size) * size
        rest = padded - k  # columns of zeros that nothing is carried into or out of
        columns = jnp.pad(w.T[order] if by_order else w.T, ((0, rest), (0, 0)))
        carried = jnp.pad(carried, ((0, rest), (0, rest)))
        group_of = jnp.pad(group_of, (0, rest), mode="edge")
        weights = jnp.pad(importance, (0, rest))  # for groups fitted as they are reached, which are in order
        small = max(d for d in range(1, min(_SMALL, as_reached or size) + 1) if (as_reached or size) % d == 0)

        def of_column(rows: Mapping[str, Array], j: Array) -> Aux:
            return {name: a[jnp.minimum(group_of[j], len(a) - 1)][:, None] for name, a in rows.items()}

        def one_column(start: Array, i: Array, state: Any) -> Any:
            """Column start + i, the i-th of a few whose corrections from outside are in ``values``."""
            rows, block, values, among, codes, errors = state
            here = of_column(rows, start + i)
            value = _row(values, i) + _row(among, i) @ errors
            code = column.encode(value[:, None], here)
            error = _row(block, i) - column.decode(code, here)[:, 0]
            return rows, block, values, among, _put(codes, code[:, 0], i), _put(errors, error, i)

        def few_columns(start: Array, f: Array, state: Any) -> Any:
            rows, block, values, among, codes, errors = state
            at = f * small
            part = lambda a: lax.dynamic_slice_in_dim(a, at, small, 0)  # noqa: E731
            into = part(among)
            inner = (
                rows,
                part(block),
                part(values) + _product(into, errors),
                lax.dynamic_slice_in_dim(into, at, small, 1),
                part(codes),
                part(errors),
            )
            *_, done, off = lax.fori_loop(0, small, lambda i, s: one_column(start + at, i, s), inner)
            return rows, block, values, among, _put(codes, done, at), _put(errors, off, at)

        def one_group(start: Array, g: Array, state: Any) -> Any:
            """A group whose ranges are those of its columns as the errors before it have moved them."""
            rows, block, values, among, codes, errors = state
            at = g * as_reached
            part = lambda a: lax.dynamic_slice_in_dim(a, at, as_reached, 0)  # noqa: E731
            into = part(among)
            moved = part(values) - part(block) + _product(into, errors)
            within = jnp.eye(as_reached) + lax.dynamic_slice_in_dim(into, at, as_reached, 1)
            now = part(block) + lax.linalg.triangular_solve(within, moved, left_side=True, lower=True)
            there = start + at + jnp.arange(as_reached) < k  # a short last group: zeros widen no range
            weight = lax.dynamic_slice_in_dim(weights, start + at, as_reached, 0)
            now = jnp.where(there[:, None], now, 0.0)
            rows = _refitted(rows, now, weight, column, observer, (start + at) // as_reached)
            first = at // small
            state = (rows, block, values, among, codes, errors)
            return lax.fori_loop(first, first + as_reached // small, lambda f, s: few_columns(start, f, s), state)

        def one_block(b: Array, state: Any) -> Any:
            codes, errors, rows = state
            start = b * size
            part = lambda a: lax.dynamic_slice_in_dim(a, start, size, 0)  # noqa: E731
            block = part(columns)

            def add(p: Array, values: Array) -> Array:
                into = lax.dynamic_slice(carried, (p * size, start), (size, size)).T
                return values + _product(into, lax.dynamic_slice_in_dim(errors, p * size, size, 0))

            values = lax.fori_loop(0, b, add, block)
            among = lax.dynamic_slice(carried, (start, start), (size, size)).T
            inner = (rows, block, values, among, part(codes), part(errors))
            if as_reached:
                left = jnp.minimum(size // as_reached, -((start - k) // as_reached))
                inner = lax.fori_loop(0, left, lambda g, s: one_group(start, g, s), inner)
            else:
                inner = lax.fori_loop(0, size // small, lambda f, s: few_columns(start, f, s), inner)
            rows, *_, done, off = inner
            return _put(codes, done, start), _put(errors, off, start), rows

        codes, errors = jnp.zeros((padded, n), fmt.code_dtype), jnp.zeros((padded, n), jnp.float32)
        codes, _, rows = lax.fori_loop(0, padded // size, one_block, (codes, errors, rows))
        codes = codes[:k][jnp.argsort(order)] if by_order else codes[:k]
        return codes.T, {name: jnp.swapaxes(a, 0, 1) for name, a in rows.items()}


def _row(a: Array, i: Any) -> Array:
    return lax.dynamic_index_in_dim(a, i, 0, keepdims=False)


def _put(a: Array, part: Array, at: Any) -> Array:
    return lax.dynamic_update_slice_in_dim(a, part.reshape(-1, a.shape[1]), at, 0)


def _product(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def _column_format(fmt: Format) -> Format:
    """The format of a column: the same without groups."""
    if not fmt.elementwise:
        raise FormatError(
            f"GPTQ rounds columns one by one, and the elements of {fmt.name} share more than a scale; use Int or "
            "Float8, or round-to-nearest for it"
        )
    return fmt.ungrouped()


def _block_size(wanted: int, group: int, k: int) -> int:
    """Columns per block; a multiple of the length of groups that are fitted as they are reached, if there are any."""
    return min(wanted, k) if not group else group * max(1, min(wanted, k) // group)


def _refitted(
    rows: dict[str, Array], columns: Array, weight: Array, column: Format, observer: Observer | None, number: Array
) -> dict[str, Array]:
    """The ranges with those of one group taken from its columns as they are now, [group, N]."""
    aux = column.fit(columns.T) if observer is None else observer.fit(columns.T, column, weight[None])
    return {
        name: lax.dynamic_update_index_in_dim(a, jnp.asarray(aux[name])[:, 0].astype(a.dtype), number, 0)
        for name, a in rows.items()
    }


def _carried(h: Array, dampening: float) -> Array:
    """R_ij / R_jj above the diagonal and 0 elsewhere, of the factor that `_upper` gives."""
    r = _upper(h, dampening)
    return jnp.triu(r / jnp.diagonal(r)[None, :], 1)


def _factor(h: Array, dampening: float) -> Array:
    """The upper triangular U with UᵀU = H⁻¹, of H with its diagonal dampened; dead columns stand apart."""
    r = _upper(h, dampening)
    return lax.linalg.triangular_solve(r, jnp.eye(h.shape[0], dtype=h.dtype), left_side=True, lower=False)


def _upper(h: Array, dampening: float) -> Array:
    """The upper triangular R with R Rᵀ = H over its mean, its diagonal dampened; dead columns stand apart."""
    diagonal = jnp.diagonal(h)
    dead = diagonal <= 0
    mean = jnp.sum(jnp.where(dead, 0.0, diagonal)) / jnp.maximum(jnp.sum(~dead), 1)
    mean = jnp.where(mean > 0, mean, 1.0)
    h = jnp.where(dead[:, None] | dead[None, :], 0.0, h / mean) + jnp.diag(jnp.where(dead, 1.0, dampening))
    # From the last row upwards: the Cholesky factor of H with its order turned round.
    h = h[::-1, ::-1]
    lower = lax.linalg.cholesky(h, symmetrize_input=False)
    good = jnp.all(jnp.isfinite(lower))
    shape = jax.ShapeDtypeStruct(h.shape, h.dtype)
    lower = lax.cond(good, lambda: lower, lambda: jax.pure_callback(_factor_in_float64, shape, h))
    return lower[::-1, ::-1]


def _factor_in_float64(h: Any) -> np.ndarray:
    """The lower Cholesky factor of a dampened H on the host, with more dampening until it exists."""
    h = np.asarray(h, np.float64)
    extra = 0.0
    for _ in range(12):
        try:
            lower = np.linalg.cholesky(h + extra * np.eye(len(h))).astype(np.float32)
            if np.isfinite(lower).all() and (np.diagonal(lower) > 0).all():
                break
        except np.linalg.LinAlgError:
            pass
        extra = max(10 * extra, 1e-8)
    else:
        lower = np.eye(len(h), dtype=np.float32)
    if extra:
        warn(
            f"a second moment of {len(h)} inputs is singular, and {extra:.0e} of its mean was added to its "
            "diagonal; give more calibration data, or a dampening_frac above 0"
        )
    return lower
