"""DGQ: a search for the two scales of `DualGrained` weights by their output error.

Zhang et al. 2023, "Dual Grained Quantization" (arXiv:2310.04836), as their released code has it. Two searches in
place of one over both scales:

    fine      the float step S' and zero point of each group, 20 shrink ratios, judged by the group's own inputs
    coarse    the scale s1 of each row, 80 ratios; S2 = round(S' / s1), judged by the output of the whole row
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array

from qjax.calibration import Observer
from qjax.errors import FormatError
from qjax.formats import Aux, DualGrained, Format
from qjax.formats.blocks import reduce_blocks, spread
from qjax.formats.numerics import AnyArray, round_even, scale_for
from qjax.passes.output_error import by_rows, diagonal_blocks, group_errors, least, moment_of, row_errors
from qjax.statistics import SecondMoment, Statistic

TOP = 15


def fine_ratios(count: int) -> np.ndarray:
    """Return 1.02 - 0.22 t / count for t = 1..count: 1.009 down to 0.80 for 20."""
    return 1.02 - 0.22 * np.arange(1, count + 1) / count


def coarse_ratios(count: int) -> np.ndarray:
    """Return 1.02 - 0.82 t / count for t = 1..count: 1.00975 down to 0.20 for 80."""
    return 1.02 - 0.82 * np.arange(1, count + 1) / count


def fine_steps(w: AnyArray, h: AnyArray, group: int, ratios: np.ndarray) -> tuple[Array, Array, Array]:
    """Search the step of each group on its own.

    For a ratio r and the range of the group, 0 included: S' = r (max - min) / 15, zero = round(-r min / S'), codes
    clip(round(clip(w, r min, r max) / S') + zero, 0, 15); the error is the form of e = w - S' (q - zero) with the
    group's block of H.

    Args:
        w: float32 [N, K].
        h: second moment [K, K].
        group: length of a group.
        ratios: shrink factors to try.

    Returns:
        Steps float32 [N, groups] (0 for a group of zeros), zero points uint8 [N, groups], the errors [N, groups].
    """
    blocks = diagonal_blocks(h, group)

    def one(w: Array) -> tuple[Array, Array, Array]:
        low = reduce_blocks(w, "group", group, lambda v, **kw: jnp.min(v, initial=0.0, **kw))
        high = reduce_blocks(w, "group", group, lambda v, **kw: jnp.max(v, initial=0.0, **kw))

        def step_of(ratio: Array) -> tuple[Array, Array]:
            step = ratio * (high - low) / TOP
            safe = jnp.where(step > 0, step, 1.0)
            return step, jnp.clip(jnp.round(-ratio * low / safe), 0, TOP)

        def error(ratio: Array) -> Array:
            step, zero = step_of(ratio)
            wide = lambda a: spread(a, w.shape[-1], group)  # noqa: E731
            safe = wide(jnp.where(step > 0, step, 1.0))
            steps = round_even(jnp.clip(w, wide(ratio * low), wide(ratio * high)) / safe)
            centred = jnp.clip(steps + wide(zero), 0, TOP) - wide(zero)
            return group_errors(w - safe * centred, blocks)

        ratio, errors = least(ratios, error)
        step, zero = step_of(ratio)
        return step, zero.astype(jnp.uint8), errors

    return by_rows(one, jnp.asarray(w, jnp.float32))


def coarse_scale(
    w: AnyArray, h: AnyArray, fine: AnyArray, zero: AnyArray, fmt: DualGrained, ratios: np.ndarray
) -> tuple[Aux, Array]:
    """Search the scale of each row, with the steps and zero points of its groups given.

    For a ratio r: s1 = r absmax / 127 as it is stored, S2 = max(round(S' / s1), 1), codes within the guard; the error
    is the form of what the row is off by with all of H.

    Args:
        w: float32 [N, K].
        h: second moment [K, K].
        fine: float32 [N, groups], the steps S'.
        zero: uint8 [N, groups].
        fmt: the format.
        ratios: factors to try.

    Returns:
        Aux of the best scales, and the errors [N].
    """

    def one(w: Array, fine: Array, zero: Array) -> tuple[Aux, Array]:
        absmax = jnp.max(jnp.abs(w), axis=-1, keepdims=True, initial=0.0)

        def aux_of(ratio: Array) -> Aux:
            return fmt.with_steps(fine, zero, fmt.stored_scale(scale_for(ratio * absmax, fmt.reach, 128)))

        def error(ratio: Array) -> Array:
            aux = aux_of(ratio)
            return row_errors(w - fmt.decode(fmt.encode(w, aux), aux), h)[:, None]

        ratio, errors = least(ratios, error)
        return aux_of(ratio), errors

    aux, errors = by_rows(one, jnp.asarray(w, jnp.float32), jnp.asarray(fine), jnp.asarray(zero))
    return aux, errors[:, 0]


@dataclasses.dataclass(frozen=True)
class DGQ:
    """The two-phase search of DGQ, then rounding to nearest within the guard; needs calibration data.

    Where the released code leaves room: a group's range includes 0, so that its zero point is a code; S' is kept in
    float32 (nothing of it is stored), and candidates for s1 are judged as they are stored, in bfloat16; the error is
    taken over all calibration data, not over its last sequence. A group of zeros has step 1, a row of zeros scale 1.

    Args:
        fine: ratios for the steps of groups, from 1.02 down to 0.80.
        coarse: ratios for the scales of rows, from 1.02 down to 0.20.
    """

    fine: int = 20
    coarse: int = 80

    needs_batches: ClassVar[bool] = True
    sequential: ClassVar[bool] = True
    statistics: ClassVar[tuple[Statistic, ...]] = (SecondMoment(),)

    def __post_init__(self) -> None:
        for name in ("fine", "coarse"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise FormatError(f"DGQ: {name}={value!r}; a number of ratios to try, such as {name}=20")

    def check_format(self, fmt: Format) -> None:
        """Raise a FormatError for any format but `DualGrained`."""
        if not isinstance(fmt, DualGrained):
            raise FormatError(f"DGQ searches the two scales of qjax.formats.DualGrained, not those of {fmt.name}")

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
            fmt: a `DualGrained`.
            observer: refused: the ranges are what is searched.
            weight: not used: the importance of columns is in the second moment.
            statistics: {"second_moment": float32 [K, K], ..}, as `SecondMoment` gathers it.

        Returns:
            uint8 codes [N, K] and aux.

        Raises:
            FormatError: another format, an observer, or no statistics.
        """
        self.check_format(fmt)
        assert isinstance(fmt, DualGrained)
        if observer is not None:
            raise FormatError(f"DGQ searches the ranges of weights itself; drop the observer {observer!r}")
        if statistics is None:
            raise FormatError("DGQ.round needs statistics: the second moment of the inputs")
        w, h = jnp.asarray(w, jnp.float32), moment_of(statistics)
        fine, zero, _ = fine_steps(w, h, fmt.group, fine_ratios(self.fine))
        aux, _ = coarse_scale(w, h, fine, zero, fmt, coarse_ratios(self.coarse))
        return fmt.encode(w, aux), aux
