"""Rotation folded into parameters: channels that the program lets be mixed are, and nothing is left to do at run time.

QuaRot (Ashkboos et al. 2024, arXiv:2404.00456, section 4) and the block-input rotation of QServe (Lin et al. 2024,
arXiv:2405.04532): scales of norms are folded into the weights behind them, then each weight that writes to the residual
stream is multiplied by R on its output side, and each that reads it by Rᵀ on its input side. Here the stream is not
looked up by the names of layers: `qjax.analysis.channels` says for the input of every site whether its channels can be
mixed and what then changes, which finds the residual stream, the values of each attention head up to the weight that
reads them, and whatever else there is.

A LayerNorm takes a mean over the channels, so R has to keep the vector of ones: then the mean of x R is that of x, and
nothing need be taken out of the weights first.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from qjax.analysis.channels import ChannelGroup, Fold, Read, Refusal, Touch, channel_group
from qjax.analysis.turning import folded, overlaid, rotated
from qjax.errors import FormatError, QjaxError
from qjax.formats.rotation import random_signs, rotate_on_host
from qjax.lazy import Lazy
from qjax.passes.leaves import Leaves
from qjax.passes.prepare import Edits
from qjax.patterns import compile_pattern
from qjax.program import Program


@dataclasses.dataclass(frozen=True)
class Rotate:
    """Rotate what quantized weights read, where that can be folded into parameters.

    The float function stays as it was, up to the rounding of parameters to their dtype. A site whose channels cannot be
    rotated this way is named in the report with the reason; `qjax.Rotated` rotates them as they pass.

    Args:
        seed: of the random signs; None for the plain Hadamard matrix.
        match: pattern for the names of the sites whose inputs are to be rotated.
        least: blocks of fewer channels than this are left alone.
    """

    seed: int | None = 0
    match: str = "**"
    least: int = 8

    needs_batches: ClassVar[bool] = False
    exact: ClassVar[bool] = True
    lazy: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.seed is not None and (isinstance(self.seed, bool) or not isinstance(self.seed, int)):
            raise FormatError(f"Rotate: seed={self.seed!r}; an integer, or None for no random signs")
        if isinstance(self.least, bool) or not isinstance(self.least, int) or self.least < 2:
            raise FormatError(f"Rotate: least={self.least!r}; a number of channels, 2 or more")
        compile_pattern(self.match)

    def edit(self, program: Program, leaves: Leaves, chosen: Sequence[str]) -> Edits:
        """Return the rotated slices: see `PreparePass`."""
        matches = compile_pattern(self.match).fullmatch
        avals = dict(zip(program.leaf_names, program.leaf_avals, strict=True))
        changed: dict[tuple[str, Any], Any] = {}
        done: dict[Any, str] = {}
        mixed: dict[int, list[ChannelGroup]] = {}
        refused: dict[str, list[str]] = {}

        now = Leaves(leaves.names, leaves.values)  # what is read later must not see what is made of it here
        now.edits = {n: dict(edits) for n, edits in leaves.edits.items()}

        for name in chosen:
            site = program.by_name[name]
            if site.op not in ("dot", "conv", "ragged_dot") or site.leaf is None or not matches(name + "/"):
                continue
            group = channel_group(program, name, kind="rotate")
            if isinstance(group, Refusal):
                refused.setdefault(_of_any_layer(group.reason), []).append(name)
                continue
            key = frozenset((t.leaf, t.slice, t.index.tobytes()) for t in group.touches)
            if key not in done:
                before = _reading(now, dict(changed))
                done[key] = self._refusal(group, before)
                if not done[key]:
                    mixed.setdefault(int(np.bincount(group.blocks).max()), []).append(group)
                    for place in _places(group):
                        changed[place] = self._turned(group, place, before, avals[place[0]], leaves)
            if done[key]:
                refused.setdefault(done[key], []).append(name)
        notes = []
        for size, groups in mixed.items():
            names = list(dict.fromkeys(leaf for group in groups for leaf in group.leaves))
            notes.append(f"blocks of {size} channels are rotated in {len(names)} leaves: {_some(names)}")
        notes += [f"not folded: {why}: {_some(names)}" for why, names in refused.items()]
        return Edits(slices=changed, notes=tuple(notes))

    def _refusal(self, group: ChannelGroup, read: Read) -> str:
        """Why a group cannot be rotated; empty if it can."""
        longest = int(np.bincount(group.blocks).max())
        if longest < self.least:
            return f"blocks of {longest} channels are shorter than least={self.least}"
        if group.untie:
            return (
                f"{', '.join(group.untie)} is embedding and head in one, and the scale of the norm before the head "
                "would have to go into one of them alone; store it twice"
            )
        try:  # scales and biases tell; weights need not be read for that
            folded(_only(group, lambda touch: touch.index.ndim < 2), read)
        except QjaxError as error:
            return str(error)
        return ""

    def _turned(self, group: ChannelGroup, place: tuple[str, Any], before: Read, aval: Any, leaves: Leaves) -> Any:
        """What becomes of one slice: now, or of one that is read when it is due, then."""
        own = _only(group, lambda touch: (touch.leaf, touch.slice) == place)
        turn = _transform(self.seed, bool(group.keeps_ones))

        def value() -> np.ndarray:
            new = folded(own, before)
            new |= rotated(own, turn, overlaid(new, before))
            return np.asarray(new[place] if place in new else before(*place))

        if not isinstance(leaves.values[leaves.number[place[0]]], Lazy):
            return jnp.asarray(value())
        gone = {axis for axis, _ in place[1]}
        return Lazy(tuple(n for axis, n in enumerate(aval.shape) if axis not in gone), aval.dtype, value)


def _reading(leaves: Leaves, changed: Mapping[tuple[str, Any], Any]) -> Read:
    """Slices as NumPy arrays, changes made so far included."""
    return lambda leaf, key: np.asarray(changed[leaf, key] if (leaf, key) in changed else leaves.slice(leaf, key))


def _places(group: ChannelGroup) -> list[tuple[str, Any]]:
    """Every slice that a rotation changes, with the scales that it folds."""
    touches = [*group.touches, *(t for f in group.folds if not isinstance(f.group, Refusal) for t in f.group.touches)]
    return list(dict.fromkeys((t.leaf, t.slice) for t in touches))


def _only(group: ChannelGroup, wanted: Callable[[Touch], bool]) -> ChannelGroup:
    """A group as if it changed some slices alone; scales that go into them stay, since they say by how much."""
    folds: list[Fold] = []
    for fold in group.folds:
        if isinstance(fold.group, Refusal):
            folds.append(fold)
        elif any(map(wanted, fold.group.touches)):
            own = (fold.leaf, fold.slice)
            kept = tuple(t for t in fold.group.touches if wanted(t) or (t.leaf, t.slice) == own)
            folds.append(dataclasses.replace(fold, group=dataclasses.replace(fold.group, touches=kept)))
    return dataclasses.replace(group, touches=tuple(filter(wanted, group.touches)), folds=tuple(folds))


def _of_any_layer(reason: str) -> str:
    """A reason with the numbers of layers left out, so that it is said once."""
    return re.sub(r"(?<=/)[0-9]+(?=/)", "*", reason)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _transform(seed: int | None, ones: bool) -> Callable[[np.ndarray], np.ndarray]:
    """What multiplies rows [.., n] by a rotation of n channels, on the host."""

    def turn(rows: np.ndarray) -> np.ndarray:
        n = rows.shape[-1]
        signs = random_signs(n, seed)
        turned = rotate_on_host(rows, signs)
        if ones:  # what R makes of the vector of ones is reflected back to it
            unit = np.full((1, n), 1 / np.sqrt(n))
            w = (rotate_on_host(unit, signs) - unit)[0]
            if w @ w > 1e-12:
                w = w * np.sqrt(2 / (w @ w))
                turned = turned - (turned @ w.astype(rows.dtype))[..., None] * w.astype(rows.dtype)
        return turned

    return turn
