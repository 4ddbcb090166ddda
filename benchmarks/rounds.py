"""Interleaved rounds and paired ratios; standard library only: a process without jax measures in the same way."""

from __future__ import annotations

import dataclasses
import gc
import random
import statistics
import time
from collections.abc import Callable, Collection
from typing import Any


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one case, round by round."""

    seconds: tuple[float, ...]

    @property
    def least(self) -> float:
        """The fastest round."""
        return min(self.seconds)

    @property
    def median(self) -> float:
        """The middle round."""
        return statistics.median(self.seconds)

    def over(self, other: Times) -> float:
        """Median over rounds of this case's time divided by the other's in the same round."""
        return statistics.median(a / b for a, b in zip(self.seconds, other.seconds, strict=True))

    def least_over(self, other: Times) -> float:
        """Ratio of the fastest rounds."""
        return self.least / other.least


def interleaved(
    cases: dict[str, Callable[[], Any]],
    *,
    rounds: int = 1000,
    budget: float = 5.0,
    least_rounds: int = 5,
    clock: Callable[[], float] = time.perf_counter,
    wait: Callable[[Any], Any] = lambda result: result,
    told: Collection[str] = (),
    pause: float = 0.0,
) -> dict[str, Times]:
    """Time every case once per round until the budget (seconds of wall time) or the number of rounds is used up.

    Args:
        cases: name -> what to run.
        rounds: most rounds. budget: seconds of wall time. least_rounds: at least so many, whatever the budget.
        clock: which clock to read; `time.thread_time` for single-threaded Python work on a busy machine.
        wait: waits for the result of a case that returns before it is computed.
        told: cases that return their seconds themselves, because another process runs them.
        pause: seconds of sleep before each case, for threads of the last one that spin when they are done.
    """
    names, shuffle = list(cases), random.Random(0)
    taken: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + budget
    for done in range(rounds):
        if done >= least_rounds and time.perf_counter() > end:
            break
        shuffle.shuffle(names)  # what ran just before leaves its caches: no case may always follow the same one
        for name in names:
            gc.collect()
            time.sleep(pause)
            start = clock()
            result = wait(cases[name]())
            taken[name].append(result if name in told else clock() - start)
    return {name: Times(tuple(taken[name])) for name in cases}
