"""SparseGPT: 2:4 pruning and rounding in one sweep over the columns, errors corrected in those still to come.

Frantar & Alistarh 2023 (arXiv:2301.00774), algorithm 1 with the semi-structured masks of section 3.3 and the joint
quantization of section 3.5. With H the second moment of the inputs and U the upper Cholesky factor of its inverse, at
every fourth column the mask of the next four is chosen from the weights as they are by then: the two with the largest

    saliency_ij = w_ij**2 / U_jj**2

stay (U_jj**2 is the j-th diagonal entry of the inverse of H restricted to the columns from j on). Then, column by
column, what is pruned or rounded away is carried on as in GPTQ:

    q_j = round(w_j) where kept, else 0      e = (w_j - q_j) / U_jj      w_l -= e U_jl for l > j
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array, lax

from qjax.calibration import Observer
from qjax.errors import FormatError
from qjax.formats import Aux, Format, Sparse24
from qjax.formats.numerics import AnyArray
from qjax.formats.sparse24 import keep_two
from qjax.passes.gptq import GPTQ
from qjax.passes.gptq import _factor as inverse_factor
from qjax.statistics import SecondMoment, Statistic


@dataclasses.dataclass(frozen=True)
class SparseGPT:
    """Second-order 2:4 pruning with rounding, for `qjax.formats.Sparse24`; needs calibration data.

    Settings are named as in llm-compressor. Masks are chosen row by row. Inputs that were always 0 are pruned first.
    The range of a group is that of its weights, to be pruned or not, when its first column is reached.

    Args:
        sparsity: "2:4", the only pattern that the format stores.
        dampening_frac: what is added to the diagonal of H, as a part of its mean.
        block_size: columns after which the rest of the matrix is corrected.
        observer: how the range of each block is chosen; None takes all of it.
    """

    sparsity: str = "2:4"
    dampening_frac: float = 0.01
    block_size: int = 128
    observer: Observer | None = None

    needs_batches: ClassVar[bool] = True
    sequential: ClassVar[bool] = True
    statistics: ClassVar[tuple[Statistic, ...]] = (SecondMoment(),)

    def __post_init__(self) -> None:
        if self.sparsity != "2:4":
            raise FormatError(f"SparseGPT: sparsity={self.sparsity!r}; '2:4' is what can be stored")
        if isinstance(self.dampening_frac, bool) or not 0 <= self.dampening_frac < 1:
            raise FormatError(f"SparseGPT: dampening_frac={self.dampening_frac!r}; from 0 to below 1, such as 0.01")
        if isinstance(self.block_size, bool) or not isinstance(self.block_size, int) or self.block_size < 4:
            raise FormatError(f"SparseGPT: block_size={self.block_size!r}; a number of columns, 4 or more, such as 128")
        if self.observer is not None and not isinstance(self.observer, Observer):
            raise FormatError(f"SparseGPT: observer={self.observer!r}; an observer such as qjax.MSE()")

    def check_format(self, fmt: Format, fitted: bool = False) -> None:
        """Raise a FormatError if the format cannot hold what this rounding makes of rows longer than a group."""
        self._check_kind(fmt)
        if (fmt.group or 0) % 4:
            raise FormatError(
                f"SparseGPT: a group of {fmt.group} ends within four weights that are pruned together; use a group "
                "that 4 divides, such as 128, or None for one scale a row"
            )

    def _check_kind(self, fmt: Format) -> None:
        if not isinstance(fmt, Sparse24):
            raise FormatError(
                f"SparseGPT prunes two of every four weights, which {fmt.name} does not store; use "
                "qjax.formats.Sparse24(bits=4, group=128), or GPTQ for this format"
            )

    def doubts(self, state: Mapping[str, AnyArray]) -> Iterator[tuple[str, str]]:
        """Yield (kind, sentence) for what makes the statistics of a weight doubtful."""
        for kind, sentence in GPTQ(self.dampening_frac).doubts(state):
            yield kind, sentence.replace("GPTQ", "SparseGPT")

    def round(
        self,
        w: AnyArray,
        fmt: Format,
        *,
        observer: Observer | None = None,
        weight: AnyArray | None = None,
        statistics: Mapping[str, AnyArray] | None = None,
    ) -> tuple[Array, Aux]:
        """Prune and round a matrix.

        Args:
            w: float32 [N, K].
            fmt: `qjax.formats.Sparse24`.
            observer: goes before the rounding's own.
            weight: not used: the importance of columns is in H.
            statistics: {"second_moment": float32 [K, K], "rows": float32 []}, as `SecondMoment` gathers them.

        Returns:
            Codes int8 [N, K], at most two of four not 0, and aux.

        Raises:
            FormatError: another format, groups that cut a quad, or there are no statistics.
        """
        self._check_kind(fmt)
        assert isinstance(fmt, Sparse24)
        if statistics is None:
            raise FormatError("SparseGPT.round needs statistics: the second moment of the inputs")
        w = jnp.asarray(w, jnp.float32)
        n, k = w.shape
        observer = observer or self.observer
        several = fmt.groups(k) > 1
        group = fmt.group if several and fmt.group else 0
        if group:
            self.check_format(fmt)
        size = group * max(1, self.block_size // group) if group else min(self.block_size // 4 * 4, -(-k // 4) * 4)

        h = jnp.asarray(statistics["second_moment"], jnp.float32)
        factor, seen = inverse_factor(h, self.dampening_frac), jnp.diagonal(h) > 0
        aux = fmt.fit(w) if observer is None else observer.fit(w, fmt.dense)
        column = dataclasses.replace(fmt, group=None)

        def stored(aux: Mapping[str, AnyArray]) -> Array:
            """Scales as the format keeps them."""
            return fmt.as_stored(jnp.asarray(aux["scale"], jnp.float32))

        scales = jnp.swapaxes(stored(aux), 0, 1)  # [groups, N]
        rest = -k % size  # columns of zeros that nothing is carried into or out of
        columns = jnp.pad(w.T, ((0, rest), (0, 0)))
        factor = jnp.pad(factor, ((0, rest), (0, rest))) + jnp.diag((jnp.arange(k + rest) >= k).astype(jnp.float32))
        seen = jnp.pad(seen, (0, rest))

        def four_columns(start: Array, q: Array, state: Any) -> Any:
            block, u, codes, errors, scales = state
            at = 4 * q
            if group:
                scales = lax.cond((start + at) % group == 0, lambda: entered(scales, block, start, at), lambda: scales)
            scale = scales[(start + at) // group if group else 0]
            now = lax.dynamic_slice_in_dim(block, at, 4, 0)
            lines = lax.dynamic_slice_in_dim(u, at, 4, 0)  # [4, size]
            alive = lax.dynamic_slice_in_dim(seen, start + at, 4, 0)
            saliency = []
            for j in range(4):
                worth = (now[j] / lines[j, at + j]) ** 2
                saliency.append(jnp.where(alive[j], worth, 1e-12 * now[j] ** 2))
            for j, kept in enumerate(keep_two(saliency)):
                value = block[at + j]
                here = {"scale": scale.astype(jnp.float32)[:, None]}
                code = jnp.where(kept[:, None], column.dense.encode(value[:, None], here), jnp.int8(0))
                error = (value - column.dense.decode(code, here)[:, 0]) / lines[j, at + j]
                block = block - lines[j][:, None] * error[None]
                codes, errors = codes.at[at + j].set(code[:, 0]), errors.at[at + j].set(error)
            return block, u, codes, errors, scales

        def entered(scales: Array, block: Array, start: Array, at: Array) -> Array:
            here = lax.dynamic_slice_in_dim(block, at, group, 0)
            there = start + at + jnp.arange(group) < k  # a short last group: zeros widen no range
            matrix = jnp.where(there[:, None], here, 0.0).T
            fresh = column.fit(matrix) if observer is None else observer.fit(matrix, column.dense)
            return scales.at[(start + at) // group].set(stored(fresh)[:, 0])

        def one_block(b: Array, state: Any) -> Any:
            columns, codes, scales = state
            start = b * size
            block = lax.dynamic_slice_in_dim(columns, start, size, 0)
            u = lax.dynamic_slice(factor, (start, start), (size, size))
            inner = (block, u, jnp.zeros((size, n), jnp.int8), jnp.zeros((size, n), jnp.float32), scales)
            left = jnp.minimum(size, k - start)  # columns of the last group's padding are left alone
            _, _, done, errors, scales = lax.fori_loop(0, -(-left // 4), lambda q, s: four_columns(start, q, s), inner)
            later = (jnp.arange(len(columns)) >= start + size)[None, :]
            ahead = jnp.where(later, lax.dynamic_slice_in_dim(factor, start, size, 0), 0.0)
            columns = columns - jnp.matmul(ahead.T, errors, precision=lax.Precision.HIGHEST)
            return columns, lax.dynamic_update_slice_in_dim(codes, done, start, 0), scales

        state = (columns, jnp.zeros(columns.shape, jnp.int8), scales)
        _, codes, scales = lax.fori_loop(0, len(columns) // size, one_block, state)
        return codes[:k].T, {"scale": jnp.swapaxes(scales, 0, 1)}
