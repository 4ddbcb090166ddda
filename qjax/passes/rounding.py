"""Rounding: from one float matrix to codes and scales.

A rounding is a pure function on one canonical matrix [N, K] (or a stack of them), with no knowledge of the program
around it. Those that look at activations say so by ``needs_batches``.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax.numpy as jnp
from jax import Array

from qjax.calibration import Observer
from qjax.errors import FormatError, RecipeError
from qjax.formats import Aux, Format
from qjax.formats.numerics import AnyArray
from qjax.statistics import Statistic


@runtime_checkable
class Rounding(Protocol):
    """What every rounding offers.

    Those that look at activations also have ``statistics``, what they need of them (`qjax.statistics`), and may have
    ``sequential``, that later blocks are to see what earlier ones became; ``round`` then takes ``statistics=``, the
    fields of their states for this matrix. Those that are trained on the outputs of a block say ``tunes = True``, have
    ``tune`` (see `qjax.passes.AutoRound`), and get as statistics what that returned.

    ``doubts(state)``, where there is one, tells what makes a rounding doubt the data of a weight, as pairs of a kind
    and a sentence: a job says each kind once, as a `QjaxWarning`. ``check_format(fmt)``, where there is one, raises a
    FormatError for formats that the rounding cannot serve; a recipe asks it when it is built. ``flops(n, k, fmt)``,
    where there is one, is the work of products in rounding a matrix [n, k], for the cost that a plan states.
    """

    needs_batches: ClassVar[bool]

    def round(
        self, w: AnyArray, fmt: Format, *, observer: Observer | None = None, weight: AnyArray | None = None
    ) -> tuple[Array, Aux]:
        """Return (codes, aux) for w: see `RTN.round`."""
        ...


@dataclasses.dataclass(frozen=True)
class RTN:
    """Round to nearest.

    Args:
        observer: how the range of each block is chosen; None takes all of it.
    """

    observer: Observer | None = None

    needs_batches: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.observer is not None and not isinstance(self.observer, Observer):
            raise FormatError(f"RTN: observer={self.observer!r}; an observer such as qjax.MSE()")

    def round(
        self, w: AnyArray, fmt: Format, *, observer: Observer | None = None, weight: AnyArray | None = None
    ) -> tuple[Array, Aux]:
        """Round a matrix.

        Args:
            w: float32 [N, K], K contracted; stack axes may stand in front.
            fmt: the format.
            observer: goes before the rounding's own.
            weight: importance per element, broadcastable to w.

        Returns:
            Codes [N, K] of ``fmt.code_dtype`` and aux, as `qjax.formats.assemble` takes them.
        """
        w = w.astype(jnp.float32)
        observer = observer or self.observer
        aux = fmt.fit(w, weight) if observer is None else observer.fit(w, fmt, weight)
        return fmt.encode(w, aux), aux


def rounding_flops(rounding: Any, n: int, k: int, fmt: Format) -> float:
    """Return floating-point operations of products in rounding a matrix [n, k] by second moments.

    What the rounding itself says, or else that of one sweep over the columns with the inverse of the second moment:
    K³/3 for a factor, K³ for its inverse, and K² N for carrying errors on. A rounding that searches takes a multiple.
    """
    own = getattr(rounding, "flops", None)
    return own(n, k, fmt) if own is not None else 4 * k**3 / 3 + k**2 * n


def rounding_statistics(rounding: Any) -> tuple[Statistic, ...]:
    """What a rounding needs to know of activations.

    Raises:
        RecipeError: it says that it needs batches, and not what of them.
    """
    if not getattr(rounding, "needs_batches", False) or getattr(rounding, "tunes", False):
        return ()
    found: tuple[Any, ...] = tuple(getattr(rounding, "statistics", None) or ())
    if not found or not all(isinstance(s, Statistic) for s in found):
        raise RecipeError(
            f"{rounding!r} needs batches but its `statistics` is {found!r}; a tuple of qjax.statistics such as "
            "(SecondMoment(),) says what to gather"
        )
    return found
