"""Float parameter leaves as prepare passes see them: read whole or slice by slice, and edited slice by slice."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from qjax.analysis.naming import SliceKey


class Leaves:
    """Parameter leaves by name, with edits laid over them.

    A mapping from names to leaves: ``leaves[name]``, ``name in leaves``, iteration over names.

    A leaf may be `qjax.Lazy`: then nothing of it is read before a slice is asked for, and the edits are all that is
    kept of it in memory.

    Args:
        names: of the leaves.
        values: arrays or `qjax.Lazy`.
        editable: whether a slice may be changed; None means that all may.
        formats: site -> the format that its weight will be stored in, of the sites that a pass is asked about.
    """

    def __init__(
        self,
        names: Sequence[str],
        values: Sequence[Any],
        editable: Callable[[str, SliceKey], bool] | None = None,
        formats: Mapping[str, Any] | None = None,
    ):
        self.names = tuple(names)
        self.values, self.number = list(values), {name: n for n, name in enumerate(names)}
        self.edits: dict[int, dict[SliceKey, Any]] = {}
        self._editable = editable
        self.formats: Mapping[str, Any] = dict(formats or {})

    def __iter__(self) -> Iterator[str]:
        """Names."""
        return iter(self.names)

    def __contains__(self, name: object) -> bool:
        """Whether there is such a leaf."""
        return name in self.number

    def __len__(self) -> int:
        """How many there are."""
        return len(self.names)

    def __getitem__(self, name: str) -> Any:
        """The leaf with its edits; one that is lazy and was not edited stays so."""
        return self.at(self.number[name])

    def slice(self, name: str, key: SliceKey) -> Any:
        """A slice of a leaf as it is now: the axes that ``key`` names are dropped.

        Args:
            name: of the leaf.
            key: ((axis, position), ...), axes of the whole leaf; () for all of it.
        """
        return self.part(self.number[name], ordered(key))

    def editable(self, name: str, key: SliceKey) -> bool:
        """Whether a pass may change this slice now: nothing outside the block that is at hand reads it."""
        return self._editable is None or self._editable(name, ordered(key))

    def only(self, editable: Callable[[str, SliceKey], bool], formats: Mapping[str, Any] | None = None) -> Leaves:
        """The same leaves and edits, of which only some may be changed."""
        view = Leaves(self.names, self.values, editable, formats)
        view.values, view.edits = self.values, self.edits
        return view

    # By number, for those who put leaves together.

    def put(self, number: int, key: SliceKey, value: Any) -> None:
        """Lay a new value over a slice; over the whole leaf (``key`` empty) it takes the place of earlier edits."""
        if not key:
            self.edits[number] = {(): value}
        else:
            edits = self.edits.setdefault(number, {})
            edits.pop(ordered(key), None)  # they are applied in the order in which they came
            edits[ordered(key)] = value

    def forget(self, number: int, key: SliceKey) -> None:
        """Give up an edit that nobody reads any more."""
        self.edits.get(number, {}).pop(ordered(key), None)

    def at(self, number: int) -> Any:
        """The whole leaf with its edits."""
        edits = self.edits.get(number, {})
        value = edits.get((), self.values[number])
        for key, part in edits.items():
            if key:
                value = jnp.asarray(value)
                value = value.at[_where(key, value.ndim)].set(part)
        return value

    def part(self, number: int, key: SliceKey) -> Any:
        """A slice with its edits, the axes of ``key`` dropped; of a lazy leaf no more than that is read, if it can."""
        edits = list(self.edits.get(number, {}).items())
        if not key:
            return self.at(number)
        # What an edit covers as a whole need not be read.
        covered = max((n for n, (other, _) in enumerate(edits) if set(other) <= set(key)), default=None)
        if covered is not None:
            out, rest = jnp.asarray(edits[covered][1]), edits[covered + 1 :]
            out = out[_where(_below(key, edits[covered][0]), out.ndim)]
        else:
            out, rest = self._read(number, key), edits
        ndim = len(self.values[number].shape)
        wanted = dict(key)
        for other, part in rest:
            if any(wanted.get(axis, at) != at for axis, at in other):
                continue
            place = _below(tuple((axis, at) for axis, at in other if axis not in wanted), key, ndim)
            taken = _below(tuple((axis, at) for axis, at in key if axis not in dict(other)), other, ndim)
            out = out.at[_where(place, out.ndim)].set(part[_where(taken, part.ndim)])
        return out

    def _read(self, number: int, key: SliceKey) -> Any:
        value = self.values[number]
        if key[0][0] == 0:  # what `Lazy` can read by itself
            out, key = jnp.asarray(value[key[0][1]]), tuple((axis - 1, at) for axis, at in key[1:])
        else:
            out = jnp.asarray(value)
        return out[_where(key, out.ndim)]


def _below(key: SliceKey, dropped: SliceKey, ndim: int = 64) -> SliceKey:
    """A slice key in terms of the axes that are left once those of ``dropped`` are gone."""
    gone = dict(dropped)
    left = [axis for axis in range(ndim) if axis not in gone]
    return tuple((left.index(axis), at) for axis, at in key if axis not in gone)


def ordered(key: SliceKey) -> SliceKey:
    """A slice key with its axes in order."""
    return tuple(sorted((int(axis), int(at)) for axis, at in key))


def _where(key: SliceKey, ndim: int) -> tuple[Any, ...]:
    at = dict(key)
    return tuple(at.get(axis, slice(None)) for axis in range(ndim))
