"""How a Triton kernel is launched: the one place that knows by which route.

Two routes lead from JAX to Triton. Pallas has a Triton backend, which comes with jax, runs in Pallas' interpreter on
any machine and is compiled by XLA itself; it is deprecated since jax 0.11 and still there in 0.12. What jax names as
successors is Mosaic GPU, whose wgmma is for Hopper, and ``jax_triton``. That one takes kernels in Triton's own
language, wants the triton package (190 MB) beside jax and, in its released versions, a driver when lowering, so that
nothing of it could be tried on a machine without a GPU. Kernels here are plain Pallas, which the compiler and the
interpreter both take, so the first route is taken while jax has it. `has_triton` is the switch: where it says no, no
kernel is chosen, and one that is named says why.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import jax
from jax import Array
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import mlir

MOST_ELEMENTS = 2**31 - 1
"""Elements of an operand. Pallas counts places in 32 bits with a sign, up to arrays of 4 GiB."""


@functools.cache
def has_triton() -> bool | str:
    """Return whether this jax can compile Triton kernels as ours are written, or why not."""
    try:
        plt = pallas_triton()[1]
    except ImportError as error:
        return f"jax {jax.__version__} offers no Triton backend of Pallas here ({error})"
    missing = [name for name in ("CompilerParams", "load", "store") if not hasattr(plt, name)]
    return not missing or f"Pallas Triton of jax {jax.__version__} lacks {', '.join(missing)}, which the kernel needs"


def pallas_triton() -> tuple[Any, Any]:
    """The modules of Pallas: slow to import, and needed on GPUs alone."""
    return tuple(map(importlib.import_module, ("jax.experimental.pallas", "jax.experimental.pallas.triton")))  # type: ignore[return-value]


@dataclasses.dataclass(frozen=True)
class TritonKernel:
    """A kernel with all that is fixed when it is compiled.

    Attributes:
        body: called with references to whole operands, then to the result.
        name: as profilers show it.
        out: shape and dtype of the result.
        grid: programs along up to three axes.
        warps: threads of a program, in units of 32.
        stages: steps of a loop whose loads are under way at once.
        interpret: whether Pallas' interpreter runs it, for tests.
    """

    body: Callable[..., None]
    name: str
    out: jax.ShapeDtypeStruct
    grid: tuple[int, ...]
    warps: int
    stages: int
    interpret: bool = False

    def __call__(self, *operands: Array) -> Array:
        """Run it, inside `jax.jit` or a lowering."""
        return self._call(*operands) if self.interpret else _kernel_p.bind(*operands, kernel=self)

    def _call(self, *operands: Array) -> Array:
        pl, plt = pallas_triton()
        return pl.pallas_call(
            self.body,
            out_shape=self.out,
            grid=self.grid,
            name=self.name,
            interpret=self.interpret,
            compiler_params=plt.CompilerParams(num_warps=self.warps, num_stages=self.stages),
        )(*operands)


# A primitive, because the warning below is raised while an equation is lowered, long after the call has returned.
_kernel_p = Primitive("triton_kernel")
_kernel_p.def_impl(lambda *operands, kernel: jax.jit(functools.partial(_kernel_p.bind, kernel=kernel))(*operands))
_kernel_p.def_abstract_eval(lambda *_, kernel: ShapedArray(kernel.out.shape, kernel.out.dtype))


def _lower(ctx: Any, *operands: Any, kernel: TritonKernel) -> Any:
    with warnings.catch_warnings():
        # jax 0.11 and newer warn at each kernel that the backend will go. The user can do nothing about it: the choice
        # is ours, and is made above.
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
        return mlir.lower_fun(kernel._call, multiple_results=False)(ctx, *operands)


mlir.register_lowering(_kernel_p, _lower)
