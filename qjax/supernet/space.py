"""What a supernet can be run as: the forms that each site may have, and choices among them.

A `Space` is what a user writes. With the names of a program's sites it becomes a `Domain`: for each site the values
that each of its columns may have. A choice is an int32 array [N, 5], a row a site in the order of the domain:

    0  bits of the weight, 2 to 8
    1  bits of the activations, 2 to 8, or 0 for float
    2  1 where the weight has a scale for each output channel, 0 where it has one for the tensor
    3  1 where the weight is symmetric
    4  1 where the activations are symmetric
    5  in a space with groups: index into ``Space.groups``

Source: EQ-Net (Xu et al. 2023, arXiv:2308.07650), section 3 and its configurations.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from qjax.errors import RecipeError, SearchError, near
from qjax.patterns import compile_pattern

BITS = tuple(range(2, 9))
"""Bit widths that quantizers have a column for."""

COLUMNS = ("weight_bits", "act_bits", "per_channel", "weight_symmetric", "act_symmetric", "group")
"""Names of the columns of a choice."""


@dataclasses.dataclass(frozen=True)
class At:
    """What the sites of a pattern may be, in place of what the space says.

    Attributes:
        match: pattern for site names, as in a `qjax.Rule`.
        weight_bits, act_bits, per_channel, weight_symmetric, act_symmetric, groups: as in `Space`; None keeps its.
        skip: leave these sites in float; they have no row in a choice.
        optional: the pattern may match no site.
    """

    match: str
    _: dataclasses.KW_ONLY
    weight_bits: tuple[int, ...] | None = None
    act_bits: tuple[int, ...] | None = None
    per_channel: tuple[bool, ...] | None = None
    weight_symmetric: tuple[bool, ...] | None = None
    act_symmetric: tuple[bool, ...] | None = None
    groups: tuple[int, ...] | None = None
    skip: bool = False
    optional: bool = False

    def __post_init__(self) -> None:
        compile_pattern(self.match)
        for name in ("weight_bits", "act_bits"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _bits(f"At({self.match!r}): {name}", value, name == "act_bits"))
        for name in ("per_channel", "weight_symmetric", "act_symmetric"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, _flags(f"At({self.match!r}): {name}", value))
        if self.groups is not None:
            object.__setattr__(self, "groups", tuple(self.groups))


@dataclasses.dataclass(frozen=True)
class Space:
    """The forms that a supernet can be run as.

    Attributes:
        weight_bits: bit widths of weights, among 2 to 8.
        act_bits: bit widths of activations, among 2 to 8, or 0 for float: ``(0,)`` is a space of weights alone.
        per_channel: whether weights have a scale for each output channel, or one for the tensor.
        weight_symmetric, act_symmetric: which symmetries there are.
        groups: lengths of groups along the contracted axis, of which a choice picks one; empty for none. A space with
            groups has no per-channel or per-tensor scales, so ``per_channel`` has one value then.
        at: what some sites may be; the first pattern that matches a site decides.
        ends: bits of weights and activations at the first and the last site, where no ``at`` speaks of them (EQ-Net
            runs both at 8 in every subnet); None treats them as the others. Activations that are float everywhere stay.
        tied: groups of patterns; all sites that match any of one group have the same row.
        abs_offset: use the magnitude of offsets, as the authors' code does, which breaks left-skewed tensors. For
            comparing with it only.
    """

    weight_bits: tuple[int, ...] = BITS
    act_bits: tuple[int, ...] = BITS
    per_channel: tuple[bool, ...] = (False, True)
    weight_symmetric: tuple[bool, ...] = (True, False)
    act_symmetric: tuple[bool, ...] = (True, False)
    _: dataclasses.KW_ONLY
    groups: tuple[int, ...] = ()
    at: tuple[At, ...] = ()
    ends: int | None = 8
    tied: tuple[tuple[str, ...], ...] = ()
    abs_offset: bool = False

    def __post_init__(self) -> None:
        set_ = functools.partial(object.__setattr__, self)
        set_("weight_bits", _bits("Space: weight_bits", self.weight_bits, False))
        set_("act_bits", _bits("Space: act_bits", self.act_bits, True))
        for name in ("per_channel", "weight_symmetric", "act_symmetric"):
            set_(name, _flags(f"Space: {name}", getattr(self, name)))
        set_("groups", tuple(self.groups))
        for group in self.groups:
            if isinstance(group, bool) or not isinstance(group, int) or group < 1:
                raise RecipeError(f"Space: groups={self.groups!r}; lengths of groups are integers from 1 on")
        if len(set(self.groups)) != len(self.groups):
            raise RecipeError(f"Space: groups={self.groups!r} names a length twice")
        if self.groups:
            set_("per_channel", (True,))
        set_("at", tuple(self.at))
        if self.ends is not None:
            _bits("Space: ends", (self.ends,), False)
        set_("tied", tuple((group,) if isinstance(group, str) else tuple(group) for group in self.tied))
        for group in self.tied:
            for pattern in group:
                compile_pattern(pattern)
        for rule in self.at:
            if self.groups and rule.per_channel is not None:
                raise RecipeError(f"At({rule.match!r}): per_channel has no meaning in a space with groups")
            for group in rule.groups or ():
                if group not in self.groups:
                    raise RecipeError(
                        f"At({rule.match!r}): groups={rule.groups!r}, and the space has {self.groups or 'none'}"
                    )

    @property
    def columns(self) -> int:
        """Columns of a choice: 5, or 6 with groups."""
        return 6 if self.groups else 5

    def skips(self, name: str) -> bool:
        """Whether a site is left in float."""
        rule = self._rule(name)
        return rule is not None and rule.skip

    def domain(self, sites: Sequence[str], shared: Mapping[str, str] | None = None) -> Domain:
        """The choices for a program's sites.

        Args:
            sites: the names of all sites that could be elastic, in program order; those to be skipped among them.
            shared: site -> the first site that reads the same weight; such sites are tied.

        Raises:
            RecipeError: a pattern that no site matches, tied sites that have nothing in common, or fewer than two
                choices in all.
        """
        known = [
            f"{rule.match!r} in at"
            for rule in self.at
            if not rule.optional and not any(_matches(rule.match, s) for s in sites)
        ]
        known += [
            f"{pattern!r} in tied"
            for group in self.tied
            for pattern in group
            if not any(_matches(pattern, s) for s in sites)
        ]
        if known:
            pattern = known[0].split("'")[1]
            hint = "" if known[0].endswith("tied") else "; or set optional=True"
            raise RecipeError(f"Space: no site matches {known[0]}{near(pattern, sites)}{hint}")
        names = tuple(s for s in sites if not self.skips(s))
        rows = [self._row(name, position in (0, len(names) - 1)) for position, name in enumerate(names)]
        leaders = list(range(len(names)))
        for group in self.tied:
            members = [n for n, name in enumerate(names) if any(_matches(p, name) for p in group)]
            for n in members:
                _join(leaders, members[0], n)
        for n, name in enumerate(names):
            owner = (shared or {}).get(name, name)
            if owner in names:
                _join(leaders, names.index(owner), n)
        leaders = [_root(leaders, n) for n in range(len(names))]
        for leader in sorted(set(leaders)):
            members = [n for n in range(len(names)) if leaders[n] == leader]
            for c in range(self.columns):
                common = [v for v in rows[leader][c] if all(v in rows[n][c] for n in members)]
                if not common:
                    raise RecipeError(
                        f"Space: the tied sites {', '.join(names[n] for n in members)} have no {COLUMNS[c]} in common"
                    )
                for n in members:
                    rows[n] = (*rows[n][:c], tuple(common), *rows[n][c + 1 :])
        domain = Domain(self, names, tuple(rows), tuple(leaders))
        if domain.size < 2:
            raise RecipeError(
                f"Space: it has {domain.size} choices over {len(names)} sites, and a supernet needs two or more; "
                "allow more bits, granularities or symmetries (the first and last site are at `ends` bits)"
            )
        return domain

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for files; `from_dict` reads them."""
        out = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in ("_", "at")}
        rules = [{k: v for k, v in dataclasses.asdict(rule).items() if v is not None} for rule in self.at]
        return jax.tree.map(lambda a: a, {**{k: listed(v) for k, v in out.items()}, "at": listed(rules)})

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Space:
        """The space of `to_dict`, or of a TOML table.

        Raises:
            RecipeError: an unknown setting, the nearest ones named, or a wrong value.
        """
        known = [f.name for f in dataclasses.fields(cls) if f.name != "_"]
        for name in settings:
            if name not in known:
                raise RecipeError(f"a space has no setting {name!r}{near(str(name), known)}; it has {', '.join(known)}")
        given = {k: _tupled(v) for k, v in settings.items() if k != "at"}
        try:
            rules = tuple(At(**{k: _tupled(v) for k, v in rule.items()}) for rule in settings.get("at", ()))
            return cls(**given, at=rules)
        except TypeError as error:
            raise RecipeError(f"a space: {str(error).split('__init__() ')[-1]}") from None

    def _rule(self, name: str) -> At | None:
        return next((rule for rule in self.at if _matches(rule.match, name)), None)

    def _row(self, name: str, end: bool) -> tuple[tuple[int, ...], ...]:
        rule = self._rule(name)

        def allowed(field: str) -> Any:
            own = getattr(rule, field) if rule is not None else None
            if own is not None:
                return own
            if end and self.ends is not None and field in ("weight_bits", "act_bits"):
                return getattr(self, field) if getattr(self, field) == (0,) else (self.ends,)
            return getattr(self, field)

        columns = [allowed(field) for field in COLUMNS[:5]]
        if self.groups:
            columns.append([self.groups.index(g) for g in allowed("groups")])
        return tuple(tuple(int(v) for v in values) for values in columns)


@dataclasses.dataclass(frozen=True)
class Domain:
    """The choices for the sites of one program. Made by `Space.domain`.

    Attributes:
        space: where it comes from.
        sites: names, one for each row of a choice.
        allowed: for each site and column the values that it may have.
        leaders: for each site the first of those it is tied to; itself where it is tied to none before it.
    """

    space: Space
    sites: tuple[str, ...]
    allowed: tuple[tuple[tuple[int, ...], ...], ...]
    leaders: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of a choice."""
        return len(self.sites), self.space.columns

    @property
    def free_ends(self) -> bool:
        """Whether the first or the last site has bits to choose: then both count in averages and codes as others do."""
        return any(len(self.allowed[n][column]) > 1 for n in (0, -1) for column in (0, 1)) if self.sites else False

    @property
    def size(self) -> int:
        """How many different choices there are; symmetric activations and asymmetric ones that are float count once."""
        total = 1
        for n, row in enumerate(self.allowed):
            if self.leaders[n] == n:
                acts = sum(len(row[4]) if bits else 1 for bits in row[1])
                total *= acts * math.prod(len(row[c]) for c in range(self.space.columns) if c not in (1, 4))
        return total

    @functools.cached_property
    def table(self) -> np.ndarray:
        """int32 [N, columns, most]: the values of each column in ascending order, the last one repeated."""
        most = max((len(v) for row in self.allowed for v in row), default=1)
        out = np.zeros((*self.shape, most), np.int32)
        for n, row in enumerate(self.allowed):
            for c, values in enumerate(row):
                ordered = sorted(values)
                out[n, c] = [*ordered, *[ordered[-1]] * (most - len(ordered))]
        return out

    @functools.cached_property
    def counts(self) -> np.ndarray:
        """int32 [N, columns]: how many values each column may have."""
        return np.asarray([[len(values) for values in row] for row in self.allowed], np.int32).reshape(self.shape)

    def uniform(
        self,
        weight_bits: int,
        act_bits: int | None = None,
        form: Sequence[bool] | None = None,
        *,
        group: int | None = None,
    ) -> np.ndarray:
        """The choice with these bits and one form everywhere, where the domain allows it.

        Sites that may not have a value (the first and the last one, say) have the allowed value nearest to it, the
        larger of two; float activations count as above 8 bits.

        Args:
            weight_bits: 2 to 8.
            act_bits: 2 to 8, or 0 for float; None is as many as the weights.
            form: (per channel, weights symmetric, activations symmetric); None is per channel and symmetric.
            group: a length among ``Space.groups``; None is the first of them. A site that may not have it has the one
                that stands nearest to it in that list.

        Returns:
            int32 [N, 5 or 6].

        Raises:
            SearchError: the space has no such group.
        """
        groups = self.space.groups
        if group is not None and group not in groups:
            raise SearchError(f"uniform: group={group!r}; the space has {', '.join(map(str, groups)) or 'no groups'}")
        place = 0 if group is None else groups.index(group)
        wanted = (weight_bits, weight_bits if act_bits is None else act_bits, *(form or (True, True, True)), place)
        out = np.zeros(self.shape, np.int32)
        for n, row in enumerate(self.allowed):
            for c, values in enumerate(row):
                key = functools.partial(_distance, int(wanted[c]), c == 1)
                out[n, c] = min(values, key=key)
        return out[list(self.leaders)]

    def check(self, choice: Any) -> np.ndarray:
        """The choice as int32, if the domain has it.

        Raises:
            SearchError: another shape, or a value that a site may not have; the message names the first site.
        """
        array = np.asarray(choice)
        if array.shape != self.shape or not np.issubdtype(array.dtype, np.integer):
            raise SearchError(
                f"a choice for these sites is int32 {list(self.shape)}, not {array.dtype} {list(array.shape)}"
            )
        for n, row in enumerate(self.allowed):
            for c, values in enumerate(row):
                if int(array[n, c]) not in values:
                    raise SearchError(
                        f"{self.sites[n]}: the choice says {COLUMNS[c]} = {int(array[n, c])}, and the space allows "
                        f"{', '.join(map(str, sorted(values)))}"
                    )
            leader = self.leaders[n]
            if leader != n and (array[n] != array[leader]).any():
                raise SearchError(f"{self.sites[n]} is tied to {self.sites[leader]}, and the choice has them differ")
        return array.astype(np.int32)


# ------------------------------------------------------------------------------------------------------------- checking


def _bits(where: str, values: Any, zero: bool) -> tuple[int, ...]:
    given: Any = (values,) if np.ndim(values) == 0 else values
    values = tuple(given)
    for v in values:
        if isinstance(v, bool) or not isinstance(v, (int, np.integer)) or not (2 <= v <= 8 or (zero and v == 0)):
            raise RecipeError(f"{where}={values!r}; bit widths are 2 to 8{', or 0 for float' if zero else ''}")
    return _some(where, tuple(int(v) for v in values))


def _flags(where: str, values: Any) -> tuple[bool, ...]:
    given: Any = (values,) if np.ndim(values) == 0 else values
    values = tuple(given)
    if any(not isinstance(v, (bool, np.bool_)) for v in values):
        raise RecipeError(f"{where}={values!r}; True, False or both")
    return _some(where, tuple(bool(v) for v in values))


def _some(where: str, values: tuple[Any, ...]) -> tuple[Any, ...]:
    if not values:
        raise RecipeError(f"{where} is empty; name one value or more")
    if len(set(values)) != len(values):
        raise RecipeError(f"{where}={values!r} names a value twice")
    return values


def _matches(pattern: str, name: str) -> bool:
    return compile_pattern(pattern).fullmatch(name + "/") is not None


def _root(leaders: list[int], n: int) -> int:
    while leaders[n] != n:
        n = leaders[n]
    return n


def _join(leaders: list[int], a: int, b: int) -> None:
    a, b = _root(leaders, a), _root(leaders, b)
    leaders[max(a, b)] = min(a, b)


def _distance(wanted: int, acts: bool, value: int) -> tuple[int, int]:
    """How far an allowed value is from the wanted one, the larger of two equally far ones first."""
    if acts:
        wanted, value = wanted or 9, value or 9
    return abs(value - wanted), -value


def listed(value: Any) -> Any:
    """A value with lists in place of tuples, as it comes back from JSON."""
    if isinstance(value, (tuple, list)):
        return [listed(v) for v in value]
    return {k: listed(v) for k, v in value.items()} if isinstance(value, dict) else value


def _tupled(value: Any) -> Any:
    return tuple(_tupled(v) for v in value) if isinstance(value, (list, tuple)) else value
