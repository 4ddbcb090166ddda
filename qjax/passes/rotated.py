"""Rotation of single weights: any rounding, applied to the weight as a Hadamard rotation makes it.

A weight W [N, K] is kept as the codes of W R, R = diag(signs) · H / √n (`qjax.formats.rotation`), and its activations
are multiplied by R as they pass: (x R)(W R)ᵀ = x Wᵀ. Columns with outliers are spread over all columns of their block
before they are rounded, on both sides of the product (QuaRot, Ashkboos et al. 2024, arXiv:2404.00456, section 4; QuIP#,
Tseng et al. 2024, arXiv:2402.04396, section 3). Second moments turn with the weight: H -> Rᵀ H R.

The price is the transform of the activations, K · (sum of the factors of K) operations a row and no weight traffic.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
from jax import Array

from qjax.calibration import Observer, State
from qjax.errors import FormatError, RecipeError
from qjax.formats import SIGNS, SMOOTH, Aux, Format, hadamard
from qjax.formats.numerics import AnyArray
from qjax.formats.rotation import random_signs, rotate
from qjax.passes.rounding import RTN, Rounding, rounding_flops, rounding_statistics
from qjax.statistics import Statistic


@dataclasses.dataclass(frozen=True)
class Rotated:
    """A rounding of the rotated weight.

    Linear sites, experts and stacked layers are rotated along all they sum over; convolutions along their input
    channels, at each place of the kernel alike, so that the image can be rotated in front. Layers of one width share
    their signs.

    Args:
        inner: the rounding that sees the rotated weight (and rotated statistics).
        seed: of the random signs; None for the plain Hadamard matrix.
        block: rotate in blocks of this length, which divides the number of channels; None for all of them at once. A
            block as long as a group of the format keeps the groups apart; a mesh may cut a row between blocks.
    """

    inner: Any = RTN()
    seed: int | None = 0
    block: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Rounding) or isinstance(self.inner, Rotated):
            raise FormatError(f"Rotated: inner={self.inner!r}; a rounding such as qjax.GPTQ(), which is not rotated")
        if getattr(self.inner, "tunes", False):
            raise FormatError(
                f"Rotated: {self.inner!r} trains whole blocks, and sees them as they are; fold the rotation instead, "
                "prepare=[qjax.passes.Rotate()]"
            )
        if getattr(self.inner, "smooths", False):
            raise FormatError(
                f"Rotated: {self.inner!r} divides channels by factors, and a rotation leaves no channels; leave "
                "one of the two out"
            )
        blind = [s for s in rounding_statistics(self.inner) if type(s).rotated is Statistic.rotated]
        if blind:
            raise FormatError(
                f"Rotated: {self.inner!r} looks at {blind[0]!r}, which does not say what it is of rotated activations; "
                "use a rounding that looks at second moments, such as qjax.GPTQ()"
            )
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int)):
            raise FormatError(f"Rotated: seed={self.seed!r}; an integer, or None for no random signs")
        if self.block is not None and (
            isinstance(self.block, bool) or not isinstance(self.block, int) or self.block < 2
        ):
            raise FormatError(f"Rotated: block={self.block!r}; a number of channels, 2 or more, or None for all")

    @property
    def needs_batches(self) -> bool:
        """That of the inner rounding."""
        return self.inner.needs_batches

    @property
    def sequential(self) -> bool:
        """That of the inner rounding."""
        return getattr(self.inner, "sequential", False)

    @property
    def statistics(self) -> tuple[Statistic, ...]:
        """Those of the inner rounding, of the activations before they are rotated."""
        return rounding_statistics(self.inner)

    def check_format(self, fmt: Format) -> None:
        """Raise a FormatError if the inner rounding cannot round a format."""
        inner = getattr(self.inner, "check_format", None)
        if inner is not None:
            inner(fmt)

    def doubts(self, state: Mapping[str, AnyArray]) -> Iterator[tuple[str, str]]:
        """Yield what makes the inner rounding doubt the statistics of a weight."""
        inner = getattr(self.inner, "doubts", None)
        yield from inner(state) if inner is not None else ()

    def flops(self, n: int, k: int, fmt: Format) -> float:
        """Return those of the inner rounding; the rotation is small beside them."""
        return rounding_flops(self.inner, n, k, fmt)

    def kept(self, length: int) -> Aux:
        """What is kept with a weight of rows of this length: {"input.signs": int8 [1, width]}."""
        width = length if self.block is None else self.block
        if not length:
            return {}
        if length % width:
            raise FormatError(f"Rotated(block={self.block}): rows of {length} numbers; a block has to divide them")
        return {SIGNS: jnp.asarray(random_signs(width, self.seed)[None])}

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
            observer: goes before the inner rounding's own.
            weight: not taken: an importance of single elements has no meaning once they are mixed.
            statistics: of the activations as they come, if the inner rounding looks at them.

        Returns:
            Codes [N, K] of W R, and its aux with "input.signs" int8 [1, width].

        Raises:
            FormatError: the block does not divide K; the inner rounding smooths its inputs, or a statistic of it does
                not say how it rotates.
        """
        if weight is not None:
            raise FormatError("Rotated.round takes no weight=: elements are mixed before they are rounded")
        kept = self.kept(w.shape[-1])
        w = jnp.asarray(w, jnp.float32)
        turned = rotate(w, kept[SIGNS]) if kept else w
        settings: dict[str, Any] = {"observer": observer}
        if self.needs_batches:
            if statistics is None:
                raise FormatError(f"Rotated({self.inner!r}).round needs statistics")
            seen: Any = dict(statistics)
            for part in self.statistics if kept else ():
                seen = {**seen, **part.rotated(seen, kept[SIGNS])}
            settings["statistics"] = seen
        codes, aux = self.inner.round(turned, fmt, **settings)
        if SMOOTH in aux:
            raise FormatError(f"Rotated: {self.inner!r} smooths its inputs, and it was given rotated ones")
        return codes, {**aux, **kept}

    def seen_by(self, observer: Observer) -> Observer:
        """An observer of the activations as they will be rounded, rotated."""
        return RotatedRange(observer, self)

    def for_site(self, site: Any) -> tuple[Any, str]:
        """This rounding at one site, and what the report should say of it.

        Raises:
            RecipeError: the block does not divide the channels of the site.
        """
        if not site.weight_shape or not site.in_axes:
            return self, ""
        gone = [axis for axis, _ in site.slice]
        sizes = [site.weight_shape[a - sum(g < a for g in gone)] for a in site.in_axes if a not in gone]
        if site.op != "conv":
            length = math.prod(sizes)
            if length and self.block is not None and length % self.block:
                raise RecipeError(
                    f"{site.name}: Rotated(block={self.block}) does not divide the {length} numbers that it sums over; "
                    "use a divisor, or block=None for all of them"
                )
            return self, _said(length if self.block is None else self.block)
        channels = sizes[-1]
        if channels < 2:
            return self.inner, "not rotated: its kernel has one input channel"
        width = self.block if self.block is not None and channels % self.block == 0 else channels
        return dataclasses.replace(self, block=width), f"{_said(width)}, along the channels of the image"


def _said(width: int) -> str:
    """What the report should say of a rotation in blocks of this width."""
    if not width:
        return ""
    part = hadamard.blocked(width)
    if part != width:
        return f"its activations are rotated in blocks of {part}: no larger part of {width} has a matrix to do it"
    if not hadamard.spreads(width):
        return f"its activations are rotated by a Hartley matrix: {width} has no Hadamard matrix here"
    return f"its activations are rotated by a Hadamard matrix of order {width}"


@dataclasses.dataclass(frozen=True)
class RotatedRange(Observer):
    """An observer that sees rotated activations.

    Args:
        observer: what it hands them to.
        by: how they are rotated.
    """

    observer: Observer
    by: Rotated

    @property
    def collective(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """That of the observer."""
        return self.observer.collective

    def init(self, fmt: Format, shape: Any) -> State:
        return self.observer.init(fmt, shape)

    def update(self, state: State, x: AnyArray, fmt: Format) -> State:
        x = rotate(jnp.asarray(x, jnp.float32), self.by.kept(x.shape[-1])[SIGNS])
        return self.observer.update(state, x, fmt)

    def range(self, state: State, fmt: Format) -> tuple[Array, Array]:
        return self.observer.range(state, fmt)

    def merge(self, a: State, b: State) -> State:
        return self.observer.merge(a, b)
