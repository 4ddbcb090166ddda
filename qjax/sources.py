"""Where the scale of a quantized number comes from: the values as they pass, calibration data, or training.

A format says what can be represented; a source says how its range is found::

    dynamic(Int(8, per="token"))            from the values, each time they pass
    static(Int(8, per="tensor"), MSE())     a constant, from calibration data
    ema(Int(8, per="tensor"))               a moving average over training steps, then a constant
    learned(Int(3, group=128))              a parameter of the training, then a constant
    fixed(Int(4, per="tensor"), 0.1)        a constant that the recipe itself holds

Outside training a learned or averaged scale is a static one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qjax.formats.base import Format
else:  # jax is imported by the formats, and this module is imported by every `import qjax`
    Format = Any


@dataclass(frozen=True)
class Dynamic:
    """The scale is computed from the values themselves, each time they pass."""

    fmt: Format


@dataclass(frozen=True)
class Static:
    """The scale is a constant: of weights from their values, of activations from calibration data.

    ``observer`` says how the range is chosen; None means the largest magnitude seen. ``smooth`` is how much of the
    differences between input channels is moved into the weight, from 0 to 1; None means none.
    """

    fmt: Format
    observer: Any = None
    smooth: float | None = None


@dataclass(frozen=True)
class Ema(Static):
    """The range is a moving average over the steps of a training (Jacob et al. 2018, arXiv:1712.05877, section 3.1).

    ``decay`` is how much of it is kept in a step.
    """

    decay: float = 0.99


@dataclass(frozen=True)
class Learned(Static):
    """The scale is trained with the parameters.

    ``method`` is "lsq", the step size of Esser et al. 2020 (arXiv:1902.08153), or "pact", the clipping level of
    activations that are not negative of Choi et al. 2018 (arXiv:1805.06085).
    """

    method: str = "lsq"


@dataclass(frozen=True)
class Fixed:
    """The scale is a number that the recipe holds, or one for each head: of operands, which have no weight to keep it.

    ``scale`` and ``zero`` are tuples of one number, or of one for each head of the operand; ``zero`` is empty for
    formats without zero points.
    """

    fmt: Format
    scale: tuple[float, ...] = ()
    zero: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", tuple(float(s) for s in self.scale))
        object.__setattr__(self, "zero", tuple(int(z) for z in self.zero))


def fixed(fmt: Format, scale: Any, zero: Any = ()) -> Fixed:
    """Return ``fmt`` with constant scales that are known: for operands of attention and of products of activations.

    Args:
        fmt: with one scale per tensor.
        scale: a number, or one for each head.
        zero: zero points likewise, for formats that have them.
    """
    numbers = [tuple(n) if isinstance(n, tuple | list) else (n,) for n in (scale, zero)]
    return Fixed(fmt, *numbers)


def dynamic(fmt: Format) -> Dynamic:
    """Return ``fmt`` with scales computed from each batch of values as it passes."""
    return Dynamic(fmt)


def static(fmt: Format, observer: Any = None, smooth: float | None = None) -> Static:
    """Return ``fmt`` with constant scales: for activations they are calibrated on the batches given to quantize.

    Args:
        fmt: the format; of activations with one scale per tensor.
        observer: how the range is chosen; None takes the largest magnitude seen.
        smooth: for inputs, the strength a of SmoothQuant (arXiv:2211.10438): input channel k is divided by
            max|x_k|^a / max|W_k|^(1-a), and the weight multiplied by it, so that few large channels do not take the
            range of all. 0.5 shares it evenly, 0.8 suits channels with large outliers. The range is then that of the
            largest magnitudes, whatever else an observer might choose. Convolutions are left as they are.
    """
    return Static(fmt, observer, smooth)


def ema(fmt: Format, decay: float = 0.99) -> Ema:
    """Return ``fmt`` with a range that `qjax.fake_quant` averages over the steps of a training; for inputs.

    Args:
        fmt: with one scale per tensor.
        decay: the part of the average that a step keeps, from 0 to below 1.
    """
    return Ema(fmt, decay=decay)


def learned(fmt: Format, observer: Any = None, method: str = "lsq") -> Learned:
    """Return ``fmt`` with scales that `qjax.fake_quant` trains.

    Args:
        fmt: `Int`; symmetric for "lsq", asymmetric for "pact", whose range begins at 0.
        observer: where the scales of weights start; None is twice the mean magnitude over the root of the largest code
            (section 2.1 of the paper). Scales of inputs start from the range that the first batch shows.
        method: "lsq", or "pact" for inputs that are not negative.
    """
    return Learned(fmt, observer, method=method)


def check_source(source: Any, setting: str, refuse: Any) -> None:
    """Refuse a source that cannot serve a setting of a rule; ``refuse(why)`` makes the error."""
    if setting == "weights":
        if isinstance(source, Dynamic):
            raise refuse("weights do not change from call to call: give the format itself or static(format, observer)")
        if isinstance(source, Ema):
            raise refuse(
                "weights are there as a whole, so nothing is averaged: give the format itself, or learned(...)"
            )
    elif isinstance(source, Static) and source.fmt.per != "tensor" and not source.fmt.shares_constant:
        kind = type(source).__name__.lower()
        raise refuse(
            f"{kind} {source.fmt.name} {setting}: a constant scale serves the whole tensor; give the format "
            'per="tensor", or use dynamic(...)'
        )
    if isinstance(source, Static) and source.smooth is not None:
        _check_smooth(source, setting, refuse)
    if isinstance(source, Ema) and source.fmt.per != "tensor":
        raise refuse(f"ema({source.fmt.name}): an average is kept of one range for the tensor; use static(...) for it")
    if isinstance(source, Ema) and not 0 <= source.decay < 1:
        raise refuse(f"ema(decay={source.decay}): the part that is kept is from 0 to below 1")
    if isinstance(source, Learned):
        _check_learned(source, setting, refuse)


def check_operand(source: Any, setting: str, refuse: Any) -> None:
    """Refuse a source that cannot serve an operand; ``refuse(why)`` makes the error."""
    if isinstance(source, Fixed):
        fmt = source.fmt
        zeros = () if getattr(fmt, "symmetric", True) or not fmt.affine else source.scale
        if fmt.per != "tensor":
            raise refuse(f"fixed {fmt.name} {setting}: its scales are per tensor, or one for each head")
        if not source.scale or not all(0 < s < math.inf for s in source.scale):
            raise refuse(f"fixed {fmt.name} {setting}: scale={source.scale!r}; positive numbers, one or one a head")
        if len(source.zero) != len(zeros):
            raise refuse(f"fixed {fmt.name} {setting}: {len(source.zero)} zero points where {len(zeros)} are needed")
    elif isinstance(source, Static):
        check_source(source, setting, refuse)


def _check_smooth(source: Static, setting: str, refuse: Any) -> None:
    smooth = source.smooth
    if isinstance(smooth, bool) or not isinstance(smooth, int | float) or not 0 <= smooth <= 1:
        raise refuse(f"static(smooth={smooth!r}): the strength is from 0 to 1, such as 0.5")
    if type(source) is not Static:
        raise refuse(f"smooth is for static inputs, not for {type(source).__name__.lower()} ones")
    if setting != "inputs":
        raise refuse(f"smooth is for the inputs of a product, whose weight takes the other half; not for {setting}")
    if source.observer is not None:
        raise refuse(
            f"static(observer={source.observer!r}, smooth={smooth}): the range of smoothed inputs is that of the "
            "largest magnitudes per channel; drop one of the two"
        )


def _check_learned(source: Learned, setting: str, refuse: Any) -> None:
    from qjax.formats import Int

    fmt = source.fmt
    if source.method not in ("lsq", "pact"):
        raise refuse(f"learned(method={source.method!r}): 'lsq' or 'pact'")
    if not isinstance(fmt, Int):
        raise refuse(f"learned({fmt!r}): steps are learned for Int; other formats train with the range of the moment")
    if source.method == "pact" and (setting == "weights" or fmt.symmetric):
        raise refuse("learned(method='pact') is for inputs that are not negative, with Int(..., symmetric=False)")
    if source.method == "lsq" and not fmt.symmetric:
        raise refuse("learned(method='lsq') is for symmetric integers; for inputs that are not negative use 'pact'")


SOURCES = (Dynamic, Static, Ema, Learned, Fixed)
"""All sources; TOML names them in lower case."""
