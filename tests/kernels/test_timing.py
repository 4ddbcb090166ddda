"""Clocks: each on a function whose time is known, the profiler by a stand-in for CUPTI."""

from __future__ import annotations

import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax.errors import DeviceError, QjaxWarning
from qjax.kernels import timing


def slow(seconds: float):
    """A function that sleeps on the host, so that its time is known on any machine."""

    def sleep(x):
        time.sleep(seconds)
        return np.asarray(x)

    return lambda x: jax.pure_callback(sleep, jax.ShapeDtypeStruct(x.shape, x.dtype), x)


def test_the_wall_clock_gives_the_time_of_one_call():
    sets = [(jnp.ones(2) * i,) for i in range(3)]
    assert 0.01 <= timing.device_seconds(slow(0.01), sets, trials=2) < 0.1


def test_a_difference_leaves_out_what_a_program_costs():
    sets = [(jnp.ones(2) * i,) for i in range(2)]
    seconds = timing.device_seconds(slow(0.01), sets, trials=1, method="difference")
    assert 0.008 <= seconds < 0.05


def test_equal_calls_of_a_difference_are_not_merged():
    calls = []

    def count(x):
        calls.append(1)
        return np.asarray(x)

    function = lambda x: jax.pure_callback(count, jax.ShapeDtypeStruct(x.shape, x.dtype), x)  # noqa: E731
    timing._program_seconds(jax.jit(function), [(jnp.ones(2),)], 6, 1)
    assert len(calls) == 2 * 6  # the first run, and the timed one


@pytest.mark.parametrize(
    "given", [{"argument_sets": []}, {"argument_sets": [(1,)], "trials": 0}, {"argument_sets": [(1,)], "method": "sun"}]
)
def test_what_cannot_be_timed_is_refused(given):
    with pytest.raises(DeviceError, match="device_seconds"):
        timing.device_seconds(lambda x: x, **given)


class Profiler:
    """Stands in for jax's profiler: calls what it is given, and answers with one kernel of 2 ms per call."""

    def __init__(self, fails: int = 0, milliseconds: float | None = 2.0):
        self.fails, self.milliseconds, self.taken = fails, milliseconds, []

    def measure(self, f, *, iterations: int = 1):
        self.taken.append(isinstance(f, jax.stages.Wrapped))

        def timed(*args):
            if self.fails:
                self.fails -= 1
                raise RuntimeError("Kernel names are not consistent across iterations")
            results = [f(*args) for _ in range(iterations)]
            count = len(getattr(f, "sets", [()]))
            one = None if self.milliseconds is None else self.milliseconds * count
            return results[0], one if iterations == 1 else [one] * iterations

        return timed


@pytest.mark.parametrize("fails", [0, 1])
def test_the_profiler_s_times_are_per_call(monkeypatch, fails):
    profiler = Profiler(fails)
    monkeypatch.setattr(timing, "_profiler", lambda: profiler)
    sets = [(jnp.ones(2) * i,) for i in range(5)]
    assert timing.device_seconds(lambda x: x + 1, sets, trials=3, method="cupti") == pytest.approx(2e-3)
    assert all(profiler.taken)  # or it would be jitted: one program, with the arguments as constants


def test_a_function_without_kernels_is_refused(monkeypatch):
    monkeypatch.setattr(timing, "_profiler", lambda: Profiler(milliseconds=None))
    with pytest.raises(DeviceError, match="no kernel"):
        timing.device_seconds(lambda x: x, [(jnp.ones(2),)], trials=1, method="cupti")


def test_a_gpu_without_cupti_is_warned_of_once(monkeypatch):
    monkeypatch.setattr(timing.jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(timing, "_state", [])
    monkeypatch.setattr(timing, "_profiler", lambda: types.SimpleNamespace())
    with pytest.warns(QjaxWarning, match="CUPTI does not answer"):
        assert timing.timing_method() == "difference"
    assert timing.timing_method() == "difference"


def test_the_profiler_of_this_jax_takes_a_round_for_a_compiled_function():
    stages = pytest.importorskip("jax._src.stages")
    assert isinstance(timing._Round(None, []), stages.Wrapped)
