"""How long a function takes on the device, per call.

Three clocks, by what there is:

    wall        platforms without kernels of their own: from the call until the result is there
    cupti       CUDA: the sum of the durations of all kernels that a call launches, as the driver records them. What a
                launch costs on the host, gaps between kernels, and copies and fills that are no kernels are left out
    difference  CUDA without CUPTI: a program of 2 m calls less a program of m calls, by the wall

A weight that the last call left in the L2 cache is read many times faster than one in memory. So calls go through
several sets of arguments in turn: give as many as are several times the size of the cache together.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

from qjax.errors import DeviceError, warn

CALLS = 4
"""Calls that the shorter program of a difference has at least."""

MOST_CALLS = 64
"""Calls of the longer program at which a difference is given up."""

CLEAR = 0.25
"""Share of the longer program that a difference has to be, so that it is no noise."""


def device_seconds(
    function: Callable[..., Any],
    argument_sets: Sequence[Sequence[Any]],
    *,
    trials: int = 7,
    method: str | None = None,
) -> float:
    """Return the seconds that one call takes on the default device: the median over trials.

    A trial calls the function on every set of arguments, in order, and divides by their number. It is compiled and run
    on all of them before.

    Args:
        function: jax-traceable, and jitted here; or compiled (`jax.stages.Compiled`) for arguments of these shapes.
        argument_sets: tuples of positional arguments (arrays or pytrees of them) of the same shapes.
        trials: rounds through the sets.
        method: "wall", "cupti" or "difference"; None chooses by `timing_method`.

    Raises:
        DeviceError: no arguments or trials, an unknown method, a clock that is not there (if it is named), or a
            difference that noise drowns.
    """
    sets = [tuple(arguments) for arguments in argument_sets]
    if not sets or trials < 1:
        raise DeviceError(f"device_seconds: {len(sets)} sets of arguments and trials={trials}; one of each is needed")
    if method not in (None, *_CLOCKS):
        raise DeviceError(f"device_seconds: method={method!r}; there are {', '.join(_CLOCKS)}, or None to choose")
    once = function if isinstance(function, jax.stages.Compiled) else jax.jit(function)
    for arguments in sets:  # what fails, fails here and not under a profiler
        jax.block_until_ready(once(*arguments))
    return _CLOCKS[method or timing_method()](once, sets, trials)


def timing_method() -> str:
    """Return by which clock `device_seconds` measures here. A CUDA device without CUPTI is warned of, once."""
    if jax.default_backend() not in ("gpu", "cuda"):
        return "wall"
    if not _state:
        why = _no_cupti()
        _state.append("difference" if why else "cupti")
        if why:
            warn(f"times are differences of whole programs, which are noisy below 50 us, because {why}")
    return _state[0]


_state: list[str] = []


def _no_cupti() -> str | None:
    """Return why the profiler does not answer, or None. It is asked to time a kernel, for importing it says little."""
    try:
        timed = _profiler().measure(jax.jit(lambda a: a * 2 + 1))
        _, milliseconds = timed(jax.numpy.ones(1024))
    except Exception as failure:  # whatever is missing: the library, the permission, a second profiler
        return f"CUPTI does not answer ({type(failure).__name__}: {str(failure)[:200]})"
    return None if milliseconds else "CUPTI recorded no kernel"


def _profiler() -> Any:
    return importlib.import_module("jax.experimental.mosaic.gpu.profiler")


class _Round(jax.stages.Wrapped):
    """All sets of arguments in turn, as one function without arguments that the profiler takes for a compiled one."""

    def __init__(self, once: Any, sets: Sequence[tuple[Any, ...]]):
        self.once, self.sets = once, sets

    def __call__(self) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        for arguments in self.sets:
            last = self.once(*arguments)  # earlier results are freed: the profiler keeps what is returned
        return last  # pyright: ignore[reportPossiblyUnboundVariable]

    # The profiler only calls it. That it is not traced is the point: tracing would make one program of all calls.
    def trace(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


def _cupti(once: Any, sets: Sequence[tuple[Any, ...]], trials: int) -> float:
    rounds = _Round(once, sets)
    try:
        _, milliseconds = _profiler().measure(rounds, iterations=trials)()
    except RuntimeError:  # records of the rounds that cannot be told apart, such as kernels of several streams
        milliseconds = [_profiler().measure(rounds)()[1] for _ in range(trials)]
    if milliseconds is None or (isinstance(milliseconds, list) and None in milliseconds):
        raise DeviceError("device_seconds: the function launches no kernel on the device")
    times = milliseconds if isinstance(milliseconds, list) else [milliseconds]
    return statistics.median(times) / 1e3 / len(sets)


def _wall(once: Any, sets: Sequence[tuple[Any, ...]], trials: int) -> float:
    times = []
    for _ in range(trials):
        begun = time.perf_counter()
        for arguments in sets:
            jax.block_until_ready(once(*arguments))
        times.append((time.perf_counter() - begun) / len(sets))
    return statistics.median(times)


def _difference(once: Any, sets: Sequence[tuple[Any, ...]], trials: int) -> float:
    if isinstance(once, jax.stages.Compiled):
        raise DeviceError("device_seconds: a compiled function cannot be put into a program; give the function itself")
    short = max(CALLS, len(sets))
    while True:
        brief, long = (_program_seconds(once, sets, calls, trials) for calls in (short, 2 * short))
        if long - brief >= CLEAR * long:
            return (long - brief) / short
        if 2 * short >= MOST_CALLS:
            raise DeviceError(
                f"device_seconds: {2 * short} calls take {long * 1e6:.0f} us and {short} calls {brief * 1e6:.0f} us: "
                "the difference drowns in noise. Let nothing else run, or take a larger product"
            )
        short *= 2


def _program_seconds(once: Any, sets: Sequence[tuple[Any, ...]], calls: int, trials: int) -> float:
    """Seconds of one program of so many calls, one after the other: the fastest, for a difference wants least noise."""
    # An array that is given twice is two parameters, so equal calls are not merged.
    given = [sets[i % len(sets)] for i in range(calls)]

    @jax.jit
    def program(given: Sequence[tuple[Any, ...]]) -> list[Any]:
        results: list[Any] = []
        for one in given:  # each waits for the one before, and is not fused with it
            arguments, _ = lax.optimization_barrier((one, results[-1:]))
            results.append(once(*arguments))
        return results

    jax.block_until_ready(program(given))
    best = float("inf")
    for _ in range(trials):
        begun = time.perf_counter()
        jax.block_until_ready(program(given))
        best = min(best, time.perf_counter() - begun)
    return best


_CLOCKS = {"wall": _wall, "cupti": _cupti, "difference": _difference}
