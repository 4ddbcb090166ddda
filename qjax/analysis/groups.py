"""What is known of channels that change together: the answers of `qjax.analysis.channels`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import numpy as np

from qjax.analysis.naming import SliceKey

Kind = Literal["scale", "permute", "rotate"]
Side = Literal["input", "output"]


@dataclasses.dataclass(frozen=True, eq=False)
class Touch:
    """What happens to one leaf slice.

    Attributes:
        leaf, slice: the leaf's path and the slice, as in `Site`.
        index: int32, of the slice's rank (sliced axes dropped) and of size one along axes where it repeats: the factor
            that multiplies each element, or -1 where none does.
        power: +1: the elements are multiplied by their factor; -1: divided by it.
        offset: what is multiplied is the leaf plus this number (a norm that multiplies by ``1 + w``): the new leaf is
            ``(leaf + offset) * f - offset``.
    """

    leaf: str
    slice: SliceKey
    index: np.ndarray = dataclasses.field(repr=False)
    power: int
    offset: float = 0.0

    @property
    def axes(self) -> tuple[int, ...]:
        """Axes of the whole leaf along which the factors differ."""
        gone = {axis for axis, _ in self.slice}
        kept = [axis for axis in range(self.index.ndim + len(gone)) if axis not in gone]
        return tuple(axis for axis, n in zip(kept, self.index.shape, strict=True) if n > 1)


@dataclasses.dataclass(frozen=True)
class Fold:
    """A scale per channel that stands in the way of a rotation until it is one.

    Attributes:
        leaf, slice: where it is.
        offset: the scale is the leaf plus this number.
        group: the factors that it can be exchanged with (see `folded`), or why it cannot be folded: a table that the
            head shares with the embedding, say, has to be stored twice first.
    """

    leaf: str
    slice: SliceKey
    offset: float
    group: ChannelGroup | Refusal = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels that change together.

    Attributes:
        site: the site asked for.
        kind: ``"scale"``: any positive factors; ``"permute"``: orders that stay within blocks; ``"rotate"``:
            orthogonal matrices that mix within blocks.
        size: how many factors are free.
        channels: int32 [K] (flattened input axes, as in the canonical matrix of the site; [E, K] where a batch of
            matrices has channels of its own): the factor that each channel is multiplied by, -1 where it has to stay.
        blocks: int32 [size]: a permutation or rotation mixes only channels of the same block; zeros for factors.
        touches: what has to be multiplied; a leaf slice may appear more than once.
        sites: every linear site whose input is multiplied by some of the factors, with its own ``channels``.
        divided: those whose input is divided by some, likewise.
        folds: for rotations: scales (of norms) that have to be folded into their readers first.
        keeps_ones: for rotations: reasons why the matrix has to leave the vector of ones of each block as it is
            (names of the norms that subtract a mean); empty if any orthogonal matrix will do.
    """

    site: str
    kind: Kind
    size: int
    channels: np.ndarray = dataclasses.field(repr=False)
    blocks: np.ndarray = dataclasses.field(repr=False)
    touches: tuple[Touch, ...]
    sites: Mapping[str, np.ndarray] = dataclasses.field(repr=False)
    divided: Mapping[str, np.ndarray] = dataclasses.field(repr=False)
    folds: tuple[Fold, ...] = ()
    keeps_ones: tuple[str, ...] = ()

    @property
    def leaves(self) -> tuple[str, ...]:
        """The leaves touched, in program order, once each."""
        return tuple(dict.fromkeys(t.leaf for t in self.touches))

    @property
    def untie(self) -> tuple[str, ...]:
        """Leaves that have to be stored twice before the scales can be folded: a head that is the embedding."""
        refused = [f.group for f in self.folds if isinstance(f.group, Refusal)]
        return tuple(dict.fromkeys(r.consumer for r in refused if r.kind == "shared"))


@dataclasses.dataclass(frozen=True)
class Refusal:
    """Why a site's channels have to stay.

    Attributes:
        site: the site asked for.
        reason: a sentence.
        consumer: the site or primitive that forbids it.
        kind: ``"equation"`` that lets nothing through, ``"shared"`` leaf (``consumer``) that would have to be stored
            twice, ``"argument"`` or ``"result"`` of the function, or ``"blocks"`` of single channels.
    """

    site: str
    reason: str
    consumer: str
    kind: str = "equation"

    def __str__(self) -> str:
        return f"{self.site}: {self.reason}"
