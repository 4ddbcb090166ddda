"""The record of one quantization: a row per site, totals, notes and scores.

This module is pure data. The transform fills it, the renderers (``text``, ``html``) read it, and nothing here imports
the rest of qjax but its errors, so a report that was saved on one machine can be read on any other.

Counting rules, the same everywhere:

* Bytes are bytes *as stored*: packed codes plus scales and zeros, never ``.nbytes`` of a sub-byte array.
* A leaf that several sites read is counted once: the first reader's row carries the bytes, further readers
  (``name#1``, ``name#2``) carry 0.
* ``bits_per_element`` is ``8 * bytes_after / elements`` of the row's weight, scales included.
* Scores come in pairs: ``perplexity`` is the quantized model's, ``float_perplexity`` the float model's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from qjax.errors import DataError

VERSION = 1
"""Version of the JSON form. A reader refuses what is newer than itself."""

LOWER_IS_BETTER = frozenset({"perplexity", "nll", "kl"})
"""Scores that improve downwards; every other score improves upwards."""


@dataclass(frozen=True)
class SiteRow:
    """One site of the program: where numbers could be quantized, and what became of them.

    Args:
        name: the site's name, ``layers/3/mlp/up/kernel``.
        op: what it computes: ``dot``, ``conv``, ``embedding``, ``attention``, ...
        leaf: path of the parameter leaf it reads, "" for a site without a weight.
        shape: shape of the weight this row stands for (one slice of a stacked leaf), in the user's layout.
        format: how the weight is stored, ``int4 g128``; the float dtype's name when it was left.
        reason: why it was left in float; "" when it was quantized.
        bits_per_element: stored bits per weight, scales included.
        bytes_before: bytes of the float weight; 0 for a further reader of a leaf and for a site without a weight.
        bytes_after: bytes as stored now; same rule.
        sqnr_db: 10 log10(sum w^2 / sum (w - q)^2) of the stored against the float weight; infinite when exact,
            None when it was not measured or not quantized.
        inputs: how the activations enter: ``float``, ``int8 dynamic per token``.
        lowering: name of the implementation that runs.
        note: anything to know: slower than float and why, one group because the axis is shorter, ...
        repeats: how often the site runs in one call of the model.
        flops: floating-point operations of one call, all repeats.
    """

    name: str
    op: str
    leaf: str
    shape: tuple[int, ...]
    format: str
    reason: str = ""
    bits_per_element: float = 32.0
    bytes_before: int = 0
    bytes_after: int = 0
    sqnr_db: float | None = None
    inputs: str = "float"
    lowering: str = ""
    note: str = ""
    repeats: int = 1
    flops: int = 0

    @property
    def quantized(self) -> bool:
        """True when the site's numbers are no longer all float."""
        return not self.reason

    @property
    def elements(self) -> int:
        """Number of weights that this row accounts for; 0 where another row carries the bytes."""
        return math.prod(self.shape) if self.bytes_before else 0

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dict; infinite and NaN figures become the strings "inf", "-inf", "nan"."""
        out = {f.name: _plain(getattr(self, f.name)) for f in fields(self)}
        out["shape"] = list(self.shape)
        return out

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> SiteRow:
        """Inverse of `to_dict`. Raises DataError for a missing or unknown key."""
        known = {f.name for f in fields(cls)}
        _refuse(set(d) - known, "unknown", "site row")
        _refuse({"name", "op", "leaf", "shape", "format"} - set(d), "missing", "site row")
        d = dict(d)
        d["shape"] = tuple(int(n) for n in d["shape"])
        for key in ("sqnr_db", "bits_per_element"):
            if d.get(key) is not None:
                d[key] = float(d[key])
        return cls(**d)


@dataclass(frozen=True)
class Report:
    """What quantizing one model did.

    Args:
        model: the model's name.
        recipe: the recipe's name.
        rows: one per site, in program order.
        other_bytes: bytes of the parameters that belong to no site (norm scales, biases); the same before and after.
        float_bytes: bytes of all parameters before.
        stored_bytes: bytes of all parameters as stored now.
        notes: what concerns the whole model.
        scores: name to number; see `LOWER_IS_BETTER` and the pairing rule in the module's docstring.
        float_dtype: what the parameters were before: ``float32``; several, the one of most bytes first.
        source_bytes: bytes of the parameters in the folder that they were read from, which may hold fewer bits each;
            0 where that is not known.
        source_dtype: what they are there: ``bfloat16``.
    """

    model: str = ""
    recipe: str = ""
    rows: tuple[SiteRow, ...] = ()
    other_bytes: int = 0
    float_bytes: int = 0
    stored_bytes: int = 0
    notes: tuple[str, ...] = ()
    scores: Mapping[str, float] = field(default_factory=dict)
    float_dtype: str = ""
    source_bytes: int = 0
    source_dtype: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(self.rows))
        object.__setattr__(self, "notes", tuple(self.notes))
        object.__setattr__(self, "scores", MappingProxyType(dict(self.scores)))

    def __hash__(self) -> int:
        return hash(
            (
                self.model,
                self.recipe,
                self.rows,
                self.float_bytes,
                self.stored_bytes,
                self.notes,
                tuple(sorted(self.scores.items())),
            )
        )

    def __getstate__(self) -> dict[str, Any]:
        # A mappingproxy can be neither pickled nor deep-copied; the plain dict can.
        return {**self.__dict__, "scores": dict(self.scores)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({**state, "scores": MappingProxyType(state["scores"])})

    # -- figures ---------------------------------------------------------------------------------------------------

    @property
    def quantized(self) -> tuple[SiteRow, ...]:
        """Rows whose weight or inputs were quantized."""
        return tuple(r for r in self.rows if r.quantized)

    @property
    def left(self) -> tuple[SiteRow, ...]:
        """Rows left in float, each with its reason."""
        return tuple(r for r in self.rows if not r.quantized)

    @property
    def compression(self) -> float:
        """Bytes before divided by bytes after; 1 for an empty model."""
        return self.float_bytes / self.stored_bytes if self.stored_bytes else 1.0

    @property
    def widened(self) -> bool:
        """Whether the folder held the parameters in fewer bytes than they were quantized from."""
        return 0 < self.source_bytes < self.float_bytes

    def bits(self, rows: tuple[SiteRow, ...] | None = None) -> float | None:
        """Average stored bits per weight over `rows` (all sites when None), scales included; None without weights."""
        rows = self.rows if rows is None else rows
        elements = sum(r.elements for r in rows)
        return 8.0 * sum(r.bytes_after for r in rows if r.elements) / elements if elements else None

    def row(self, name: str) -> SiteRow:
        """The row of one site. Raises DataError with near names when there is none."""
        for r in self.rows:
            if r.name == name:
                return r
        from qjax.errors import near

        raise DataError(f"no site is named {name!r}{near(name, (r.name for r in self.rows))}")

    def with_scores(self, scores: Mapping[str, float] | None = None, **more: float) -> Report:
        """Return a report with these scores added (a score of the same name is replaced)."""
        return replace(self, scores={**self.scores, **(scores or {}), **more})

    def with_notes(self, *notes: str) -> Report:
        """Return a report with these notes added; a note that is there already is not repeated."""
        return replace(self, notes=tuple(dict.fromkeys((*self.notes, *notes))))

    # -- storage ---------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dict with a ``version``."""
        return {
            "version": VERSION,
            "model": self.model,
            "recipe": self.recipe,
            "float_bytes": int(self.float_bytes),
            "stored_bytes": int(self.stored_bytes),
            "other_bytes": int(self.other_bytes),
            "float_dtype": self.float_dtype,
            "source_bytes": int(self.source_bytes),
            "source_dtype": self.source_dtype,
            "scores": {k: _plain(float(v)) for k, v in self.scores.items()},
            "notes": list(self.notes),
            "rows": [r.to_dict() for r in self.rows],
        }

    @classmethod
    def from_dict(cls, d: Mapping[str, Any]) -> Report:
        """Inverse of `to_dict`. Raises DataError for a newer version, a missing or an unknown key."""
        version = d.get("version")
        if not isinstance(version, int) or not 1 <= version <= VERSION:
            raise DataError(
                f"this report has version {version!r} and this qjax reads versions 1 to {VERSION}; "
                "read it with the qjax that wrote it, or quantize again"
            )
        known = {f.name for f in fields(cls)}
        _refuse(set(d) - known - {"version"}, "unknown", "report")
        _refuse({"rows", "float_bytes", "stored_bytes"} - set(d), "missing", "report")
        d = {k: v for k, v in d.items() if k != "version"}
        d["rows"] = tuple(SiteRow.from_dict(r) for r in d["rows"])
        d["scores"] = {k: float(v) for k, v in d.get("scores", {}).items()}
        return cls(**d)

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read a ``report.json``, or the one inside a folder. Raises DataError when it is missing or damaged."""
        path = Path(path)
        path = path / "report.json" if path.is_dir() else path
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
            raise DataError(f"{path} is not a readable report ({e}); quantize again to write a new one") from e

    # -- rendering -------------------------------------------------------------------------------------------------

    def text(self, width: int = 100) -> str:
        """Return the report as plain text of at most `width` columns (60 at least)."""
        from qjax.report.text import render_text

        return render_text(self, width)

    def json(self, indent: int | None = 1) -> str:
        """Return the report as JSON text (strict: no NaN or Infinity literals)."""
        return json.dumps(self.to_dict(), indent=indent, ensure_ascii=False, allow_nan=False) + "\n"

    def html(self) -> str:
        """Return the report as one self-contained HTML page: no file, font or script from anywhere else."""
        from qjax.report.html import render_html

        return render_html(self)

    def save(self, path: str | Path) -> tuple[Path, ...]:
        """Write the report and return the files written.

        Args:
            path: ``*.json``, ``*.html`` or ``*.txt`` writes that form; any other path is a folder, made where it is
                missing, that gets ``report.json``, ``report.html`` and ``report.txt``.
        """
        path = Path(path)
        forms = {".json": self.json, ".html": self.html, ".txt": self.text}
        if path.suffix in forms:
            files = {path: forms[path.suffix]}
        else:
            files = {path / f"report{suffix}": form for suffix, form in forms.items()}
        for file, form in files.items():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(form(), encoding="utf-8")
        return tuple(files)

    def __str__(self) -> str:
        return self.text()

    def _repr_html_(self) -> str:
        # A notebook shows the page in a frame, so that its style does not leak into the notebook.
        from html import escape

        return f'<iframe srcdoc="{escape(self.html())}" style="width:100%;height:640px;border:0"></iframe>'

    def __rich_console__(self, console: Any, options: Any) -> Any:
        from qjax.report.text import renderables

        yield from renderables(self, options.max_width)


def recovery(score: float, float_score: float, higher_is_better: bool = True) -> float:
    """Percent of the float model's score that the quantized model keeps.

    Args:
        score: the quantized model's score.
        float_score: the float model's score, in the same unit.
        higher_is_better: for accuracies ``100 * score / float_score``; otherwise, for perplexities,
            ``100 * float_score / score``, so that 100 always means "as good as float" and less means worse.
            (Perplexity 4.50 against 4.29 is 95.3 %. Other tools quote the increase instead, here 4.9 %.)

    Returns:
        Percent; NaN when the ratio has no meaning (a zero or negative denominator, or NaN in).
    """
    top, bottom = (score, float_score) if higher_is_better else (float_score, score)
    return 100.0 * top / bottom if bottom > 0 else math.nan


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):  # a NumPy or JAX scalar
        value = value.item()
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _refuse(keys: set[str], what: str, where: str) -> None:
    if keys:
        raise DataError(
            f"a {where} has {what} {'key' if len(keys) == 1 else 'keys'} {', '.join(sorted(keys))}; "
            "the file was not written by this version of qjax, quantize again to write a new one"
        )
