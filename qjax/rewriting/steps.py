"""Which steps of a loop the code being emitted runs for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Steps:
    """The steps of one loop.

    Attributes:
        steps: in time order.
        traced: the running step, where the emitted code has to select among them; None where they all agree.
    """

    steps: tuple[int, ...]
    traced: Any = None


Context = Mapping[int, Steps]
"""Loop id -> its steps."""
