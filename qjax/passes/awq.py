"""AWQ: input channels that meet large activations are made larger before rounding, and ranges are clipped.

Lin et al. 2023 (arXiv:2306.00978), section 3.2. Column k of the weight is multiplied by s_k and the activations are
divided by it, which leaves the product as it was and rounds column k s_k times as finely, as long as s_k does not widen
the range of its group. With x_k the mean magnitude of channel k,

    s = x^a    or    s = x^a / m^(1-a)    ("duo": m_k, the mean over outputs of |W_k| over the largest of its group)

and a is searched on a grid, by what rounding does to the outputs: with H = XᵀX the sum over all rows of x is

    |X (W - Q/s)ᵀ|² = tr((W - Q/s) H (W - Q/s)ᵀ)

so that nothing but H is kept of the activations. Then each group's range is shrunk as its own part of that is least,
(w - q)_g H_gg (w - q)_gᵀ, from 1 in steps of 1/40 down to over 1/2 (half the steps of the released code).

The factors are kept beside the weight as ``input.smooth``, and divide the activations as they pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from qjax.calibration import Observer, State
from qjax.errors import FormatError
from qjax.formats import SMOOTH, Aux, Format
from qjax.formats.blocks import grouped
from qjax.formats.numerics import AnyArray
from qjax.passes.awq_folded import folded_scales
from qjax.passes.folding import UNFOLDED
from qjax.passes.gptq import GPTQ
from qjax.passes.leaves import Leaves
from qjax.passes.prepare import Edits
from qjax.passes.rounding import RTN, Rounding, rounding_statistics
from qjax.patterns import compile_pattern
from qjax.program import Program
from qjax.statistics import MeanMagnitude, SecondMoment, Statistic

SEARCHED = 256
"""Rows of a weight that choose a: one number for all needs no more, and each costs K² multiplications a step."""

_FARTHEST = 2.0**20  # from the middle factor: beyond it float32 would not bring a weight back


@dataclasses.dataclass(frozen=True)
class AWQ:
    """Activation-aware scaling and clipping; needs calibration data. Settings are named as in llm-compressor.

    Works for every format; ranges are clipped for those that are fitted from ranges. As a rounding, each weight is
    scaled by itself, which costs one multiplication an activation. As a pass in ``prepare``, weights that read the same
    activations get the same factors, which are folded into what is in front where the equations allow it::

        Recipe([Rule("**", weights=Int(4, group=128), rounding=AWQ(scale=False))], prepare=[AWQ()])

    Args:
        n_grid: values of a, 2 or more.
        duo_scaling: whether s looks at weights too; "both" tries both kinds, half of the grid each.
        clip: whether ranges are searched as well.
        inner: the rounding of the scaled weight, `RTN` or `GPTQ`; where ranges are searched it rounds with them, and
            its observer is not asked.
        scale: whether factors are searched; False clips only, behind an AWQ in ``prepare``.
        match, unfolded: of a pass in ``prepare``: which sites, and what becomes of factors that nothing takes up, as in
            `SmoothQuant`.
        channels: input channels that share a factor over all places of a kernel, for convolutions, whose images are
            divided; a recipe sets it.
    """

    n_grid: int = 20
    duo_scaling: bool | str = "both"
    clip: bool = True
    inner: Any = RTN()
    scale: bool = True
    match: str = "**"
    unfolded: str = "beside"
    channels: int | None = None

    needs_batches: ClassVar[bool] = True
    exact: ClassVar[bool] = True
    sequential: ClassVar[bool] = True
    statistics: ClassVar[tuple[Statistic, ...]] = (SecondMoment(), MeanMagnitude())

    def __post_init__(self) -> None:
        if isinstance(self.n_grid, bool) or not isinstance(self.n_grid, int) or self.n_grid < 2:
            raise FormatError(f"AWQ: n_grid={self.n_grid!r}; a number of values, 2 or more, such as 20")
        if self.duo_scaling not in (True, False, "both"):
            raise FormatError(f"AWQ: duo_scaling={self.duo_scaling!r}; True, False or 'both'")
        for name in ("clip", "scale"):
            if not isinstance(getattr(self, name), bool):
                raise FormatError(f"AWQ: {name}={getattr(self, name)!r}; True or False")
        if self.unfolded not in UNFOLDED:
            raise FormatError(f"AWQ: unfolded={self.unfolded!r}; one of {', '.join(UNFOLDED)}")
        compile_pattern(self.match)
        inner = self.inner
        if not isinstance(inner, RTN | GPTQ) and (
            self.clip or not isinstance(inner, Rounding) or not {*rounding_statistics(inner)} <= {SecondMoment()}
        ):
            raise FormatError(
                f"AWQ: inner={inner!r}; qjax.RTN(), qjax.GPTQ(), or with clip=False another that looks at no more than "
                "second moments"
            )

    @property
    def smooths(self) -> bool:
        """Whether activations are divided by factors that it finds."""
        return self.scale

    def check_format(self, fmt: Format) -> None:
        """Raise a FormatError if a format cannot be rounded in this way."""
        if self.clip and type(fmt).from_range is Format.from_range:
            raise FormatError(
                f"AWQ: {fmt.name} is not fitted from ranges, so there are none to clip; use AWQ(clip=False)"
            )
        inner = getattr(self.inner, "check_format", None)
        if inner is not None:
            inner(fmt)

    def for_site(self, site: Any) -> tuple[Any, str]:
        """This rounding at one site, and what the report should say of it."""
        if site.op != "conv" or not self.scale or not site.weight_shape or not site.in_axes:
            return self, ""
        gone = [axis for axis, _ in site.slice]
        sizes = [site.weight_shape[a - sum(g < a for g in gone)] for a in site.in_axes if a not in gone]
        return dataclasses.replace(self, channels=sizes[-1]), "scaled along the channels of the image"

    def doubts(self, state: Mapping[str, AnyArray]) -> Iterator[tuple[str, str]]:
        """Yield what makes the inner rounding doubt the statistics of a weight."""
        inner = getattr(self.inner, "doubts", None)
        yield from inner(state) if inner is not None else ()

    def kept(self, length: int) -> Aux:
        """What is kept with a weight of rows of this length: {"input.smooth": float32 [1, length]}, and the inner's."""
        inner = getattr(self.inner, "kept", None)
        return {
            **(inner(length) if inner is not None else {}),
            **({SMOOTH: jnp.ones((1, length), jnp.float32)} if self.scale else {}),
        }

    def edit(self, program: Program, leaves: Leaves, chosen: Sequence[str], states: Mapping[str, State]) -> Edits:
        """Search the factors of the sites of a block and fold them: see `qjax.passes.PreparePass`."""

        def search(*args: Any, duo_scaling: Any) -> Array:
            return awq_scales(*args, n_grid=self.n_grid, duo_scaling=duo_scaling)

        return folded_scales(search, self.duo_scaling, self.match, self.unfolded, program, leaves, chosen, states)

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
            fmt: the format.
            observer: goes before the inner rounding's own; not asked where ranges are clipped.
            weight: not used: the importance of columns is in the statistics.
            statistics: the fields of `SecondMoment` and `MeanMagnitude` for this matrix.

        Returns:
            Codes [N, K] of the scaled weight, and its aux with "input.smooth" float32 [1, K].

        Raises:
            FormatError: there are no statistics, or the format cannot be clipped.
        """
        if statistics is None:
            raise FormatError("AWQ.round needs statistics: the second moment and the mean magnitude of the inputs")
        self.check_format(fmt)
        w = jnp.asarray(w, jnp.float32)
        h = jnp.asarray(statistics["second_moment"], jnp.float32)
        mean = jnp.asarray(statistics["magnitude"]) / jnp.maximum(jnp.asarray(statistics["magnitude_rows"]), 1)
        s = jnp.ones(w.shape[-1], jnp.float32)
        if self.scale:
            how = {"n_grid": self.n_grid, "duo_scaling": self.duo_scaling, "channels": self.channels}
            s = awq_scales([w], mean, h, fmt, **how)
        kept = {SMOOTH: s[None]} if self.scale else {}
        scaled, moment = w * s, h / (s[:, None] * s[None, :])
        settings: dict[str, Any] = {"observer": observer}
        if self.inner.needs_batches:
            settings["statistics"] = {**statistics, "second_moment": moment}
        if self.clip:
            aux = awq_clip(scaled, moment, fmt)
            if isinstance(self.inner, RTN):
                return fmt.encode(scaled, aux), {**aux, **kept}
            settings["aux"] = aux
        codes, aux = self.inner.round(scaled, fmt, **settings)
        return codes, {**aux, **kept}


def awq_scales(
    weights: Sequence[AnyArray],
    mean: AnyArray,
    h: AnyArray,
    fmt: Format,
    *,
    n_grid: int = 20,
    duo_scaling: bool | str = "both",
    channels: int | None = None,
) -> Array:
    """Find the factors of the input channels of weights that read the same activations.

    Args:
        weights: float32 [N, K] each.
        mean: the mean magnitude of each channel of the activations, float32 [K].
        h: their second moment, float32 [K, K].
        fmt: the format of the weights.
        n_grid: values of a.
        duo_scaling: see `AWQ`.
        channels: see `AWQ`.

    Returns:
        float32 [K], positive; 1 where a channel was never seen.
    """
    mean, k = jnp.asarray(mean, jnp.float32), weights[0].shape[-1]
    some = [w[np.arange(min(len(w), SEARCHED)) * len(w) // min(len(w), SEARCHED)] for w in weights]
    tied = lambda a: a if channels is None else jnp.tile(jnp.mean(a.reshape(-1, channels), axis=0), k // channels)  # noqa: E731
    mean = tied(mean)
    seen = mean > 0
    log_mean = jnp.log(jnp.where(seen, mean, 1.0))
    log_weight = jnp.log(tied(_relative_size(weights, fmt)) + 1e-4)
    unit = jnp.maximum(jnp.trace(h) / k, 1e-30)

    def factors(ratio: Array, duo: Array) -> Array:
        log = ratio * log_mean - jnp.where(duo, (1 - ratio) * log_weight, 0.0)
        middle = jnp.max(jnp.where(seen, log, -jnp.inf)) + jnp.min(jnp.where(seen, log, jnp.inf))
        far = float(np.log(_FARTHEST))
        log = jnp.clip(log - jnp.where(jnp.any(seen), middle / 2, 0.0), -far, far)
        return jnp.where(seen, jnp.exp(log), 1.0)

    def loss(s: Array) -> Array:
        total = jnp.float32(0.0)
        for w in some:
            scaled = w * s
            aux = fmt.fit(scaled)
            off = w - fmt.decode(fmt.encode(scaled, aux), aux) / s
            total = total + jnp.sum(jnp.matmul(off, h, precision=lax.Precision.HIGHEST) * off) / unit
        return total

    def step(best: tuple[Array, Array], at: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
        least, kept = best
        s = factors(*at)
        here = loss(s)
        better = here < least
        return (jnp.where(better, here, least), jnp.where(better, s, kept)), None

    ratios, duo = (jnp.asarray(a) for a in _grid(n_grid, duo_scaling))
    (_, s), _ = lax.scan(step, (jnp.float32(jnp.inf), jnp.ones(k, jnp.float32)), (ratios, duo))
    return s


def awq_clip(w: AnyArray, h: AnyArray, fmt: Format) -> Aux:
    """Find the range of each block by its own part of the output error.

    Args:
        w: float32 [N, K], scaled.
        h: second moment of the activations that it meets, float32 [K, K].
        fmt: a format that is fitted from ranges.

    Returns:
        aux.
    """
    w, k = jnp.asarray(w, jnp.float32), w.shape[-1]
    low, high = fmt.range_of(w)
    shared = fmt.shared_aux(low, high)
    blocks = low.shape[-1]
    size = fmt.group if fmt.per == "group" and fmt.group is not None else k
    short = blocks * size - k
    h = jnp.pad(jnp.asarray(h, jnp.float32), ((0, short), (0, short)))
    own = jnp.stack([h[g * size : (g + 1) * size, g * size : (g + 1) * size] for g in range(blocks)])  # [blocks, n, n]
    own = own / jnp.maximum(jnp.trace(h) / k, 1e-30)

    def error(shrink: Array) -> Array:
        aux = fmt.from_range(low * shrink, high * shrink, shared)
        off = jnp.moveaxis(grouped(w - fmt.decode(fmt.encode(w, aux), aux), size), 1, 0)  # [blocks, N, n]
        lost = jnp.sum(jnp.matmul(off, own, precision=lax.Precision.HIGHEST) * off, axis=-1).T  # [N, blocks]
        return lost if lost.shape == low.shape else jnp.sum(lost, axis=0, keepdims=True)

    def step(best: tuple[Array, Array], shrink: Array) -> tuple[tuple[Array, Array], None]:
        least, factor = best
        here = error(shrink)
        better = here < least
        return (jnp.where(better, here, least), jnp.where(better, shrink, factor)), None

    start = (error(jnp.float32(1.0)), jnp.ones_like(low))
    (_, factor), _ = lax.scan(step, start, jnp.asarray(1 - np.arange(1, 20) / 40, jnp.float32))
    return fmt.from_range(low * factor, high * factor, shared)


def _grid(n_grid: int, duo_scaling: bool | str) -> tuple[np.ndarray, np.ndarray]:
    """Values of a, and whether weights are looked at; a = 0 without them, the weight as it is, is always among them."""
    if duo_scaling == "both":
        half = max(2, n_grid // 2)
        return np.tile(np.linspace(0, 1, half, dtype=np.float32), 2), np.arange(2 * half) >= half
    if duo_scaling:
        return np.append(0, np.linspace(0, 1, n_grid - 1, dtype=np.float32)), np.arange(n_grid) > 0
    return np.linspace(0, 1, n_grid, dtype=np.float32), np.zeros(n_grid, bool)


def _relative_size(weights: Sequence[AnyArray], fmt: Format) -> Array:
    """The mean over all outputs of each magnitude over the largest of its block: float32 [K]."""
    total: Any = 0.0
    for w in weights:
        size = jnp.abs(jnp.asarray(w, jnp.float32))
        top = fmt.spread(fmt.reduce(size, jnp.max), w.shape[-1])
        total = total + jnp.sum(size / jnp.maximum(top, 1e-30), axis=0)
    return total / sum(len(w) for w in weights)
