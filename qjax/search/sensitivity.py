"""What was measured of each group and choice, as data."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qjax.errors import SearchError, near
from qjax.formats import Format
from qjax.formats.registry import format_from_dict

MEASURES = ("kl", "output", "fisher")
"""What can be measured: see `qjax.search.sensitivities`."""


@dataclasses.dataclass(frozen=True)
class Part:
    """One product of a group: outputs and contracted axis of its weight, and rows of its activations."""

    n: int
    k: int
    rows: float


@dataclasses.dataclass(frozen=True)
class Row:
    """One group.

    Attributes:
        name: of its first site.
        sites: names of all of them.
        ops: their ops.
        elements: numbers in its weights.
        parts: its products.
        bytes: choice -> bytes as stored; only choices that the group has.
        losses: measure -> choice -> loss; 0 for float.
        formats: choice -> (weights, activations), as ``Format.to_dict`` has them, or None.
    """

    name: str
    sites: tuple[str, ...]
    ops: tuple[str, ...]
    elements: int
    parts: tuple[Part, ...]
    bytes: Mapping[str, int]
    losses: Mapping[str, Mapping[str, float]]
    formats: Mapping[str, tuple[dict[str, Any] | None, dict[str, Any] | None]]

    def formats_of(self, choice: str) -> tuple[Format | None, Format | None]:
        """The formats of weights and activations of a choice."""
        weights, act = (None if d is None else format_from_dict(d) for d in self.formats[choice])
        return weights, act


@dataclasses.dataclass(frozen=True)
class Sensitivities:
    """Losses and sizes of all groups and choices.

    Attributes:
        rows: the groups.
        recipes: choice -> its recipe, as ``Recipe.to_dict`` has it; "float" has none.
        other_bytes: of the parameters that no choice quantizes.
        predictions: how many predictions the losses are a mean over.
        measures: what was measured.
    """

    rows: tuple[Row, ...]
    recipes: Mapping[str, dict[str, Any]]
    other_bytes: int
    predictions: int
    measures: tuple[str, ...]

    def __repr__(self) -> str:
        by = ", ".join(self.measures) or "sizes alone"
        return f"Sensitivities({len(self.rows)} groups in {', '.join(self.choices)}; {by})"

    @property
    def choices(self) -> tuple[str, ...]:
        """Names of the choices, "float" last."""
        return (*self.recipes, "float")

    @property
    def elements(self) -> int:
        """Numbers in the weights that are searched over."""
        return sum(row.elements for row in self.rows)

    def loss(self, by: str) -> list[dict[str, float]]:
        """Return for each group the losses by choice.

        Raises:
            SearchError: it was not measured, or is not finite somewhere.
        """
        if by not in self.measures:
            raise SearchError(f"{by!r} was not measured{near(by, self.measures)}; there are {', '.join(self.measures)}")
        for row in self.rows:
            for choice, value in row.losses[by].items():
                if not math.isfinite(value):
                    raise SearchError(
                        f"{row.name}: the loss {by!r} of {choice} is {value}, so it cannot be compared; leave the "
                        "choice out, or take another measure"
                    )
        return [dict(row.losses[by]) for row in self.rows]

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        return {"version": 1, **dataclasses.asdict(self)}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Sensitivities:
        """Read what `to_dict` wrote.

        Raises:
            SearchError: it is something else.
        """
        try:
            if data["version"] != 1:
                raise SearchError(f"sensitivities of version {data['version']} are not known; 1 is")
            rows = tuple(
                Row(
                    **{
                        **row,
                        "sites": tuple(row["sites"]),
                        "ops": tuple(row["ops"]),
                        "parts": tuple(Part(**p) for p in row["parts"]),
                        "formats": {c: tuple(f) for c, f in row["formats"].items()},
                    }
                )
                for row in data["rows"]
            )
            more = {name: data[name] for name in ("recipes", "other_bytes", "predictions")}
            return Sensitivities(rows, measures=tuple(data["measures"]), **more)
        except (KeyError, TypeError, AttributeError) as e:
            raise SearchError(f"these are no sensitivities: {type(e).__name__} {e}") from e

    def save(self, path: str | Path) -> None:
        """Write a JSON file."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=1) + "\n")

    @staticmethod
    def load(path: str | Path) -> Sensitivities:
        """Read a JSON file.

        Raises:
            SearchError: it holds something else.
        """
        try:
            return Sensitivities.from_dict(json.loads(Path(path).read_text()))
        except ValueError as e:
            if isinstance(e, SearchError):
                raise
            raise SearchError(f"{path} is no JSON: {e}") from e
