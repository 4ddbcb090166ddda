"""What a number format is.

A format says which numbers can be stored and how; it does not say which tensor, nor where the scale comes from. All
of it is mathematics on one canonical matrix [*stack, N, K]: N rows of output, K the contracted axis, any number of
stacked matrices in front. Three functions define a format:

    fit(x) -> aux             the numbers that describe the codes: scales, zero points, codebooks
    encode(x, aux) -> codes   rounding to the nearest representable number
    decode(codes, aux) -> x   the oracle, and what runs where no kernel knows the format

Most formats need only the range of each block to fit: they define `from_range`, and `fit`, calibration observers and
range searches follow. The built-in formats are written through this protocol and nothing else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import jax.numpy as jnp
import numpy as np
from jax import Array

from qjax.errors import FormatError, near
from qjax.formats.blocks import GRANULARITIES, group_count, reduce_blocks, spread
from qjax.formats.numerics import AnyArray, finite_part
from qjax.formats.packing import BitStream, Bytes, Packing

Aux = dict[str, AnyArray]


class ImplicitPer(str):
    """The default of a setting ``per``: tells ``Int(4, group=128)`` from ``Int(4, per="channel", group=128)``."""


class Format:
    """Base of all number formats. Subclasses are frozen dataclasses whose fields are plain Python values.

    Attributes:
        key: the name under which the class is registered.
        code_bits: stored bits of one code, 1 to 8; below 8 the codes are packed into a bit stream, at 8 they are
            stored as ``code_dtype``. A format whose rows lie otherwise defines `packing`, and says here how many
            bits hold one unpacked code.
        code_dtype: dtype of the codes that `encode` returns and `decode` takes: int8, uint8 or an 8-bit float.
        per: what shares a scale: "tensor", "channel", "token" (the same as channel, said of activations) or "group".
        group: length of a group along K, or None.
        affine: whether ``decode`` is ``(code - zero) * scale`` with the code read as a number (``zero`` absent: 0), so
            that a product can be formed on codes and scaled afterwards.
        elementwise: whether, without groups, ``encode`` and ``decode`` treat every element by itself, with whatever
            element of aux broadcasting puts beside it; a weight can then be rounded before it is transposed.
        symmetric: whether only the magnitude of a range counts, so that an observer may look at magnitudes alone.
        shares_constant: whether one number serves the whole tensor beside the scales of blocks (NVFP4): static
            activations keep that number and take the rest from the values as they pass.
        int8_rows: whether the codes of a row stand for int8 numbers under one float scale, which `as_int8` gives: a
            product with integer activations is then one of int8 over the whole row, whatever groups the format has.
        weights_only: whether a recipe refuses the format for activations: encoding them as they pass would cost more
            than the product gains.
        row_aux: names in aux whose last axis does not run along K (a codebook per row, say).
        whole_matrix: whether aux holds numbers of the whole matrix [N, K] in an order of their own (scales of tiles of
            rows, sparse corrections), as [*stack, 1, anything] named in ``row_aux``. Such an array is sliced along
            stack axes only; views that would cut or reorder rows or columns raise `LayoutError`.
    """

    key: ClassVar[str] = ""
    affine: ClassVar[bool] = False
    elementwise: ClassVar[bool] = False
    int8_rows: ClassVar[bool] = False
    weights_only: ClassVar[bool] = False
    shares_constant: ClassVar[bool] = False
    symmetric: bool = True
    row_aux: ClassVar[tuple[str, ...]] = ()
    whole_matrix: ClassVar[bool] = False

    code_bits: int
    per: str
    group: int | None

    @property
    def name(self) -> str:
        """A short name for tables."""
        return self.key + self._suffix()

    @property
    def code_dtype(self) -> np.dtype:
        """Dtype of one unpacked code."""
        raise NotImplementedError(f"{type(self).__name__} has to define code_dtype")

    @property
    def packing(self) -> Packing:
        """How the codes of a row lie in its bytes: a stream of ``code_bits`` bits each, unless a format has its own."""
        return Bytes() if self.code_bits == 8 else BitStream(self.code_bits, self.signed)

    def from_range(self, low: AnyArray, high: AnyArray, shared: Mapping[str, AnyArray] | None = None) -> Aux:
        """Return aux for blocks whose elements lie in [low, high].

        Args:
            low: float32 blocked array, at most 0.
            high: float32 blocked array, at least 0.
            shared: what `shared_aux` returned for the whole matrix; None means "compute it from this range".
        """
        raise FormatError(f"{self.name}: this format is not fitted from a range; use its own fit without an observer")

    def shared_aux(self, low: AnyArray, high: AnyArray) -> Aux:
        """Return the aux entries that all blocks of one matrix share, which a search over ranges holds fixed."""
        return {}

    def constant_aux(self, low: AnyArray, high: AnyArray) -> Aux:
        """Return what static activations keep, from the range of the whole tensor, [1, 1] each."""
        return dict(self.shared_aux(low, high)) if self.shares_constant else self.from_range(low, high)

    def fit(self, x: AnyArray, weight: AnyArray | None = None) -> Aux:
        """Return aux for x, from the range of each block.

        Args:
            x: float32 [*stack, N, K].
            weight: importance per element, broadcastable to x; ignored by formats fitted from ranges alone.

        Returns:
            Arrays of the rank of x that broadcast in blocks: see `qjax.formats.blocks`.
        """
        return self.from_range(*self.range_of(x))

    def encode(self, x: AnyArray, aux: Aux) -> Array:
        """Return the codes of x: code_dtype [*stack, N, K]. NaN is encoded as zero, infinity as the largest code."""
        raise NotImplementedError(f"{type(self).__name__} has to define encode")

    def decode(self, codes: AnyArray, aux: Aux) -> Array:
        """Return float32 [*stack, N, K] from codes of the same shape."""
        raise NotImplementedError(f"{type(self).__name__} has to define decode")

    def scale_of(self, aux: Aux) -> Array:
        """Return the float32 blocked scale, for kernels that compute on codes."""
        return jnp.asarray(aux["scale"], jnp.float32)

    def zero_of(self, aux: Aux) -> Array | None:
        """Return the integer zero point as a blocked array, or None."""
        return jnp.asarray(aux["zero"]) if "zero" in aux else None

    def as_int8(self, codes: AnyArray, aux: Aux) -> tuple[Array, Array]:
        """Return int8 numbers of the shape of ``codes`` and the float32 scale of each row; for ``int8_rows``.

        ``numbers * scale`` is what `decode` returns, exactly.
        """
        raise NotImplementedError(f"{type(self).__name__} has to define as_int8")

    # Helpers for subclasses and for code that works on any format.

    @property
    def signed(self) -> bool:
        """Whether packed codes are two's complement."""
        return np.issubdtype(self.code_dtype, np.signedinteger)

    @property
    def is_integer(self) -> bool:
        """Whether codes are integers that may be multiplied as such."""
        return self.affine and np.issubdtype(self.code_dtype, np.integer)

    def groups(self, length: int) -> int:
        """Return the number of blocks along a row of ``length`` elements."""
        return group_count(length, self.group if self.per == "group" else None)

    def clamped(self, length: int) -> Format:
        """Return this format with one group over the whole row if its group is longer than ``length``, else itself."""
        if not self._too_long(length):
            return self
        per = {"per": "group"} if "per" in self._settable() else {}
        return type(self)(**{name: getattr(self, name) for name in self._settable()} | {"group": length} | per)

    def ungrouped(self) -> Format:
        """Return this format with one scale per row in place of one per group, else itself."""
        if "group" not in self._settable() or self.group is None:
            return self
        per = {"per": "channel"} if "per" in self._settable() else {}
        return type(self)(**{name: getattr(self, name) for name in self._settable()} | {"group": None} | per)

    def reduce(self, x: AnyArray, function: Callable[..., Array]) -> Array:
        """Reduce each block of x [*stack, N, K] to one number; see `qjax.formats.blocks.reduce_blocks`."""
        return reduce_blocks(x, self.per, self.group, function)

    def spread(self, blocked: AnyArray, length: int) -> Array:
        """Repeat a blocked array over the elements of rows of ``length``, so that it broadcasts against them."""
        return spread(blocked, length, self.group if self.per == "group" else None)

    def range_of(self, x: AnyArray) -> tuple[Array, Array]:
        """Return the smallest and largest finite element of each block, with 0 included: float32 blocked arrays.

        Raises:
            FormatError: if the group is longer than the rows (`clamped` makes it one group).
        """
        if x.ndim < 2:
            raise FormatError(f"{self.name}: fit takes a matrix [*stack, N, K], an array of shape {x.shape} was given")
        self._check_length(x.shape[-1])
        x = finite_part(jnp.asarray(x, jnp.float32))
        low = self.reduce(x, lambda v, **kw: jnp.min(v, initial=0.0, **kw))
        high = self.reduce(x, lambda v, **kw: jnp.max(v, initial=0.0, **kw))
        return low, high

    def _too_long(self, length: int) -> bool:
        # A block length that a standard fixes (32 in MX) is no setting: there a short row is simply a short block.
        return "group" in self._settable() and self.group is not None and 0 < length < self.group

    def _check_length(self, length: int) -> None:
        if self._too_long(length):
            raise FormatError(
                f"{self.name}: groups of {self.group} were asked for on rows of {length} elements; "
                f"use a group of at most {length}, or no group (one scale per row)"
            )

    @classmethod
    def _settable(cls) -> dict[str, dataclasses.Field]:
        return {f.name: f for f in dataclasses.fields(cls) if f.init} if dataclasses.is_dataclass(cls) else {}

    def _suffix(self) -> str:
        return f" g{self.group}" if self.per == "group" else f" per {self.per}"

    def _check_granularity(self, allowed: tuple[str, ...] = GRANULARITIES) -> None:
        """Validate ``per`` and ``group`` together and settle ``per``; for `__post_init__`."""
        explicit = not isinstance(self.per, ImplicitPer)
        if self.group is not None:
            if isinstance(self.group, bool) or not isinstance(self.group, int) or self.group < 1:
                raise FormatError(
                    f"{type(self).__name__}: group={self.group!r}; a group is a number of elements, 1 or more"
                )
            if explicit and self.per != "group":
                raise FormatError(
                    f"{type(self).__name__}: per={self.per!r} and group={self.group} exclude each other; "
                    "give group alone for one scale per group, or per alone"
                )
            object.__setattr__(self, "per", "group")
        else:
            if self.per == "group":
                raise FormatError(f"{type(self).__name__}: per='group' needs a length; say group=128")
            if self.per not in allowed:
                names = ", ".join(a for a in allowed if a != "group")
                raise FormatError(
                    f"{type(self).__name__}: per={self.per!r}{near(str(self.per), allowed)}; "
                    f"one of {names}, or group=128"
                )
            object.__setattr__(self, "per", str(self.per))

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able description that `qjax.formats.format_from_dict` reads back."""
        if not self.key:
            raise FormatError(
                f"{type(self).__name__} is not registered; call register_format(key, {type(self).__name__})"
            )
        spec: dict[str, Any] = {"format": self.key}
        for name in self._settable():
            value = getattr(self, name)
            if value is None or (name == "per" and value == "group"):
                continue
            spec[name] = _describe(value)
        return spec

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        """Build the format from its settings, refusing unknown ones with the nearest names."""
        known = cls._settable()
        for name in settings:
            if name not in known:
                raise FormatError(
                    f"format {cls.key!r} has no setting {name!r}{near(str(name), known)}; "
                    f"it has {', '.join(known) or 'none'}"
                )
        try:
            return cls(**{name: _rebuild(value) for name, value in settings.items()})
        except TypeError as error:
            raise FormatError(f"format {cls.key!r}: {str(error).split('__init__() ')[-1]}") from None


def _describe(value: Any) -> Any:
    if isinstance(value, Format):
        return value.to_dict()
    if isinstance(value, tuple):
        return [_describe(v) for v in value]
    return value


def _rebuild(value: Any) -> Any:
    if isinstance(value, Mapping) and "format" in value:
        from qjax.formats.registry import format_from_dict  # the registry imports this module

        return format_from_dict(value)
    if isinstance(value, list | tuple):
        return tuple(_rebuild(v) for v in value)
    return value
