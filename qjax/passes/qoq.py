"""QoQ's weights: ranges clipped by output error, then rounded with the error of each column fed back.

Lin et al. 2024, "QServe" (arXiv:2405.04532), as the released configurations have it: clipping for one scale per output
channel, none for groups; GPTQ with the scales and zero points chosen before (dampening 0.01, blocks of 128).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array

from qjax.calibration import Observer
from qjax.errors import FormatError
from qjax.formats import Aux, Format, Int, Progressive
from qjax.formats.numerics import AnyArray
from qjax.passes.gptq import GPTQ
from qjax.passes.output_error import clipped, moment_of
from qjax.statistics import SecondMoment, Statistic


@dataclasses.dataclass(frozen=True)
class QoQ:
    """QoQ's rounding of `Progressive` weights and of `Int` ones; needs calibration data.

    The paper judges the clipping of query and key projections by the output of the attention block; here every site is
    judged by its own output. With groups, each is clipped by the error of its own inputs, and the scale of the row
    stays that of all of it.

    Args:
        clip: search how far ranges shrink. None: for formats with one range per row, not for groups, as released.
        grid: candidates are 1 and 1 - 0.8 i / grid for i = 1..grid.
        error_feedback: round by GPTQ, the scales and zero points fixed; False rounds to nearest.
        dampening_frac: as in `GPTQ`.
        block_size: as in `GPTQ`.
        actorder: as in `GPTQ`.
    """

    clip: bool | None = None
    grid: int = 80
    error_feedback: bool = True
    dampening_frac: float = 0.01
    block_size: int = 128
    actorder: str | None = None

    needs_batches: ClassVar[bool] = True
    sequential: ClassVar[bool] = True
    statistics: ClassVar[tuple[Statistic, ...]] = (SecondMoment(),)

    def __post_init__(self) -> None:
        if self.clip not in (None, True, False):
            raise FormatError(f"QoQ: clip={self.clip!r}; True, False, or None for what the format asks for")
        if isinstance(self.grid, bool) or not isinstance(self.grid, int) or self.grid < 1:
            raise FormatError(f"QoQ: grid={self.grid!r}; a number of steps, such as 80")
        self._gptq()  # which checks the rest

    def _gptq(self) -> GPTQ:
        return GPTQ(self.dampening_frac, self.block_size, self.actorder)

    @property
    def ratios(self) -> np.ndarray:
        """The factors by which ranges may shrink, 1 first and 0.2 last."""
        return 1 - 0.8 * np.arange(self.grid + 1) / self.grid

    def check_format(self, fmt: Format) -> None:
        """Raise a FormatError for formats that QoQ does not have."""
        if not isinstance(fmt, Progressive | Int) or fmt.per not in ("group", "channel", "token"):
            raise FormatError(
                f"QoQ rounds qjax.formats.Progressive, or Int with scales per channel or group, not {fmt.name}"
            )

    def doubts(self, state: Mapping[str, AnyArray]) -> Iterator[tuple[str, str]]:
        """Yield (kind, sentence) for what makes the statistics of a weight doubtful, as `GPTQ.doubts`."""
        if self.error_feedback:
            yield from self._gptq().doubts(state)

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
            fmt: a `Progressive` or an `Int`.
            observer: how the range of each block is chosen, in place of the search.
            weight: not used: the importance of columns is in the second moment.
            statistics: {"second_moment": float32 [K, K], ..}, as `SecondMoment` gathers it.

        Returns:
            Codes [N, K] of ``fmt.code_dtype`` and aux.

        Raises:
            FormatError: another format, or no statistics.
        """
        self.check_format(fmt)
        if statistics is None:
            raise FormatError("QoQ.round needs statistics: the second moment of the inputs")
        w = jnp.asarray(w, jnp.float32)
        search = fmt.per != "group" if self.clip is None else self.clip
        if observer is not None:
            aux = observer.fit(w, fmt)
        else:
            aux = clipped(w, fmt, moment_of(statistics), self.ratios) if search else fmt.fit(w)
        if not self.error_feedback:
            return fmt.encode(w, aux), aux
        return self._gptq().round(w, fmt, statistics=statistics, aux=aux)
