"""HQQ: zero points, and scales if wanted, that keep all but a few of a group's numbers; no data are needed.

Badri and Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models". The error of rounding is split
into a sparse part E, for the outliers, and the rest:

    min over z, E    |E|_p^p  +  β/2 |E - (W - s (Q - z))|²        with p < 1 and Q = clip(round(W / s + z))

which is solved in turns, β growing by κ from turn to turn:

    E ← shrink(W - s (Q - z)),   shrink(x) = sign(x) max(|x| - |x|^(p-1) / β, 0)
    z ← mean over the group of (Q - (W - E) / s)

Numbers are those of the unit in which the largest range of a group is 1, so that p and β mean the same for every
weight. With ``scales`` the scale is fitted as well, after each z: the least squares s for W - E and Q - z.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from jax import Array, lax

from qjax.calibration import Observer
from qjax.errors import FormatError
from qjax.formats import Aux, Format, Int
from qjax.formats.blocks import block_rows, in_chunks
from qjax.formats.numerics import AnyArray, finite_part

_CHUNK = 1 << 16
"""Numbers that are worked on together on a CPU: they stay in its cache."""


@dataclasses.dataclass(frozen=True)
class HQQ:
    """Half-quadratic rounding of asymmetric `Int` weights; needs no data.

    Each group keeps the zero point (and scale) of the turn whose codes came nearest to it. With ``Int(...,
    symmetric=False, zero="float")`` zero points go where they should; with integer ones they go to the nearest code.

    Args:
        lp_norm: p, above 0 and at most 1.
        beta: β of the first turn, above 0.
        kappa: what β is multiplied by from turn to turn, 1 or more.
        iters: turns, 1 or more.
        scales: whether scales are fitted as well; the paper keeps those of the range.
        observer: how the range that is begun with is chosen; None takes all of it.
    """

    lp_norm: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    iters: int = 20
    scales: bool = True
    observer: Observer | None = None

    needs_batches: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if isinstance(self.lp_norm, bool) or not 0 < self.lp_norm <= 1:
            raise FormatError(f"HQQ: lp_norm={self.lp_norm!r}; above 0 and at most 1, such as 0.7")
        if isinstance(self.beta, bool) or not self.beta > 0:
            raise FormatError(f"HQQ: beta={self.beta!r}; above 0, such as 10")
        if isinstance(self.kappa, bool) or not self.kappa >= 1:
            raise FormatError(f"HQQ: kappa={self.kappa!r}; 1 or more, such as 1.01")
        if isinstance(self.iters, bool) or not isinstance(self.iters, int) or self.iters < 1:
            raise FormatError(f"HQQ: iters={self.iters!r}; a number of turns, 1 or more")
        if not isinstance(self.scales, bool):
            raise FormatError(f"HQQ: scales={self.scales!r}; True or False")
        if self.observer is not None and not isinstance(self.observer, Observer):
            raise FormatError(f"HQQ: observer={self.observer!r}; an observer such as qjax.MSE()")

    def check_format(self, fmt: Format) -> None:
        """Raise a FormatError if a format has no zero point to move."""
        if not isinstance(fmt, Int) or fmt.symmetric:
            raise FormatError(
                f"HQQ moves zero points, and {fmt.name} has none; use Int(bits, symmetric=False, zero='float'), or "
                "another rounding"
            )

    def round(
        self, w: AnyArray, fmt: Format, *, observer: Observer | None = None, weight: AnyArray | None = None
    ) -> tuple[Array, Aux]:
        """Round a matrix.

        Args:
            w: float32 [N, K]; stack axes may stand in front.
            fmt: `Int` with zero points.
            observer: goes before the rounding's own.
            weight: importance per element, broadcastable to w.

        Returns:
            Codes [N, K] of ``fmt.code_dtype`` and aux.

        Raises:
            FormatError: the format has no zero points.
        """
        self.check_format(fmt)
        w = jnp.asarray(w, jnp.float32)
        observer = observer or self.observer
        aux = fmt.fit(w, weight) if observer is None else observer.fit(w, fmt, weight)
        finite = finite_part(w)
        counts = jnp.broadcast_to(1.0 if weight is None else jnp.asarray(weight, jnp.float32), w.shape)
        rows, counted = (block_rows(a, fmt.per, fmt.group) for a in (finite, counts))
        flat = lambda a: jnp.asarray(a).reshape(-1, 1)  # noqa: E731
        scale, zero = in_chunks(
            lambda x, m, s, z: self._fitted(x, m, s, z, fmt.ungrouped()),
            (rows, counted, flat(aux["scale"]), flat(aux["zero"])),
            _CHUNK,
        )
        aux = {"scale": scale.reshape(aux["scale"].shape), "zero": zero.reshape(aux["zero"].shape)}
        return fmt.encode(w, aux), aux

    def _fitted(self, x: Array, m: Array, scale: Array, zero: Array, fmt: Any) -> tuple[Array, Array]:
        """Scales and zero points [rows, 1] of blocks [rows, n] that count as m says, from those to begin with."""
        stored, low, high = zero.dtype, *fmt.code_range
        unit = (high - low) * scale
        count = jnp.maximum(jnp.sum(m, -1, keepdims=True), 1e-30)
        mean = lambda a: jnp.sum(m * a, -1, keepdims=True) / count  # noqa: E731

        def turn(i: Array, state: Any) -> Any:
            beta, scale, zero, least, kept = state
            aux = {"scale": scale, "zero": zero}
            codes = fmt.encode(x, aux)
            off = x - fmt.decode(codes, aux)
            error = mean(jnp.square(off / unit))
            better = error < least
            kept = jnp.where(better, scale, kept[0]), jnp.where(better, zero, kept[1])
            least = jnp.minimum(error, least)
            size = jnp.abs(off) / unit
            shrunk = jnp.maximum(size - jnp.maximum(size, 1e-12) ** (self.lp_norm - 1) / beta, 0.0)
            target = x - jnp.sign(off) * shrunk * unit
            q = codes.astype(jnp.float32)
            zero = mean(q - target / scale)
            if stored == jnp.uint8:
                zero = jnp.clip(jnp.round(zero), low, high)
            zero = zero.astype(stored)
            if self.scales:
                above = q - zero.astype(jnp.float32)
                ratio = mean(target * above) / jnp.maximum(mean(above * above), 1e-30)
                scale = jnp.where(ratio > 0.1 * scale, ratio, scale)
            return beta * self.kappa, scale, zero, least, kept

        start = (jnp.float32(self.beta), scale, zero, jnp.full_like(scale, jnp.inf), (scale, zero))
        return lax.fori_loop(0, self.iters, turn, start)[-1]
