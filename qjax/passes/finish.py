"""Finishing passes: edits of other parameters once the weights of a block are rounded.

A finishing pass is a frozen dataclass named in ``Recipe(finish=[...])``. Each weight of a block has just been rounded
when the pass is called, with what it lost and what was gathered of the activations that met it. It may edit what the
block at hand alone reads, such as the bias that follows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

from qjax.analysis.naming import Site
from qjax.calibration import State
from qjax.errors import RecipeError
from qjax.passes.leaves import Leaves
from qjax.passes.prepare import Edits
from qjax.program import Program
from qjax.statistics import Statistic


@runtime_checkable
class FinishPass(Protocol):
    """What a finishing pass offers.

    Attributes:
        needs_batches: True.
        statistics: what it needs of the activations at each site whose weight is rounded (`qjax.statistics`).
        sequential: whether later blocks are to see what earlier ones became.
    """

    needs_batches: ClassVar[bool]
    sequential: ClassVar[bool]
    statistics: ClassVar[tuple[Statistic, ...]]

    def after(self, program: Program, leaves: Leaves, site: Site, error: Any, state: State) -> Edits | str:
        """Return edits, or why there are none, which the report says.

        Args:
            program: the trace.
            leaves: the float parameters; ``leaves.editable`` says which slices may be changed.
            site: a site whose weight was rounded.
            error: the weight less what it became, float32, in the axes of its leaf but those that ``site.slice`` drops.
            state: what was gathered at the site.
        """
        ...


def checked_finish(passes: Sequence[Any]) -> tuple[Any, ...]:
    """Return the finishing passes.

    Raises:
        RecipeError: something is no such pass.
    """
    for step in passes:
        if not isinstance(step, FinishPass) or not step.statistics:
            raise RecipeError(
                f"finish holds {step!r}, which is no finishing pass: a pass has needs_batches, sequential, statistics "
                "and after(program, leaves, site, error, state)"
            )
    return tuple(passes)
