"""PTQTP: weights as trit-planes, without data (arXiv:2509.16989)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jax import Array

from qjax.calibration import Observer
from qjax.errors import FormatError
from qjax.formats import Aux, Format, TritPlanes
from qjax.formats.numerics import AnyArray
from qjax.formats.trit_fit import check_settings


@dataclasses.dataclass(frozen=True)
class PTQTP:
    """Rounding to trit-planes; needs no data. Planes, groups and tied scales are those of the format.

    `TritPlanes` without it does the same with these defaults. Where the paper is silent or readings of it disagree:

        eps is relative to the mean magnitude of the group, so that scaling a weight scales the result;
        the ridge is taken to its limit 0 (`qjax.formats.trit_steps`), so thresholds for it do not matter;
        scales are fitted once more to the final planes, rounded to the dtype in which they are stored, and trits chosen
        once more for the rounded scales.

    Args:
        iterations: rounds at most, T_max in the paper.
        eps: a group stops once its scales move by less than this part of its mean magnitude.
        init: the planes to start from. "residual" takes the sign of what earlier planes leave; "sign" takes that of the
            weight for every plane, as the paper does, with an error 1 % higher for normal weights and 9 % for
            heavy-tailed ones.
    """

    iterations: int = 50
    eps: float = 1e-4
    init: str = "residual"

    needs_batches: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_settings("PTQTP", self.iterations, self.eps, self.init)

    def check_format(self, fmt: Format, fitted: bool = False) -> None:
        """Raise a FormatError if a format is no trit-planes."""
        if not isinstance(fmt, TritPlanes):
            raise FormatError(
                f"PTQTP makes trit-planes, and {fmt.name} was asked for; use qjax.formats.TritPlanes(planes=2, "
                "group=128), or another rounding"
            )

    def round(
        self, w: AnyArray, fmt: Format, *, observer: Observer | None = None, weight: AnyArray | None = None
    ) -> tuple[Array, Aux]:
        """Round a matrix.

        Args:
            w: float32 [N, K]; stack axes may stand in front.
            fmt: `qjax.formats.TritPlanes`.
            observer: has to be None: scales are fitted, not taken from a range.
            weight: not looked at.

        Returns:
            Codes uint8 [N, K] and aux.

        Raises:
            FormatError: another format, or an observer.
        """
        self.check_format(fmt)
        assert isinstance(fmt, TritPlanes)
        if observer is not None:
            raise FormatError(f"PTQTP fits its scales; leave out the observer {observer!r}")
        w = jnp.asarray(w, jnp.float32)
        aux = fmt.fit_with(w, iterations=self.iterations, eps=self.eps, init=self.init)
        return fmt.encode(w, aux), aux
