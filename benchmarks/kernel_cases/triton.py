"""W4A16, W8A16 and W8A8 by Triton: each kind for Ampere, Ada and Hopper, at few tokens and many."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import aot_triton
from benchmarks.kernel_cases.weights16 import BOTH, given_terms, plus
from qjax.formats import Float8, Int
from qjax.kernels.dot.rows8 import rows8
from qjax.kernels.dot.rows16 import rows16
from qjax.kernels.dot.triton import cut_for

G128 = Int(4, group=128)


@dataclasses.dataclass(frozen=True)
class Case:
    """One compiled kernel, cut as its lowering cuts it on a device of 132 processors."""

    fmt: Int | Float8
    dtype: str
    target: str
    tokens: int
    codes: bool = False
    n: int = 4096
    k: int = 4096
    terms: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """As the table calls it."""
        return f"{kind(self.fmt, self.dtype, self.target, self.codes, self.terms)}, {self.tokens} tokens"

    @property
    def multiplies(self) -> str:
        """The instruction that it has to use; Triton has float8 in float16 on Hopper."""
        hopper = self.target == "sm_90a"
        if self.codes and isinstance(self.fmt, Float8):
            return "HMMA" if hopper else "QMMA"
        return ("IGMMA" if hopper else "IMMA") if self.codes else ("HGMMA" if hopper else "HMMA")

    def function(self) -> Any:
        """The kernel, and the shapes of its arguments."""
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=_device(self.target))):
            act = dataclasses.replace(self.fmt, per="token") if self.codes else None
            cut = cut_for(self.fmt, act, self.n, self.k, self.tokens)
        one = lambda dtype, *shape: jax.ShapeDtypeStruct((1, *shape), dtype)  # noqa: E731
        how = {"out_dtype": jnp.dtype(self.dtype), "cut": cut}
        if self.codes:
            kinds = (self.fmt.code_dtype, np.float32)
            arguments = [
                one(t, m, *([self.k] if i == 0 else [])) for m in (self.n, self.tokens) for i, t in enumerate(kinds)
            ]
            return self._whole(functools.partial(rows8, **how), *arguments)
        assert isinstance(self.fmt, Int)
        cells, groups = self.k * self.fmt.bits // 8, self.fmt.groups(self.k)
        arguments = (
            one(np.uint8 if self.fmt.bits == 4 else self.fmt.code_dtype, self.n, cells),
            one(np.float32, self.n, groups),
            None if self.fmt.symmetric else one(np.uint8, self.n, groups),
            one(self.dtype, self.tokens, self.k),
        )
        return self._whole(functools.partial(rows16, fmt=self.fmt, **how), *arguments)

    def _whole(self, run: Any, *arguments: Any) -> Any:
        return given_terms(run, arguments, self.terms, self.n, self.tokens, self.dtype)

    def compiled(self, function: Any, arguments: Any) -> dict[str, Any]:
        """What the assembler says of it."""
        return aot_triton.compiled(function, arguments, self.target)


def kind(fmt: Int | Float8, dtype: str, target: str, codes: bool = False, terms: tuple[str, ...] = ()) -> str:
    """The kernel without its tile of tokens."""
    return f"Triton W{fmt.code_bits}A{8 if codes else 16} {fmt.name}{plus(terms)}, {dtype}, {target}"


def _device(target: str) -> Any:
    return jax.sharding.AbstractDevice(device_kind=aot_triton.TARGETS[target][0], num_cores=132, platform="gpu")


def cases() -> list[Case]:
    """Every kind of scale, zero point and code for one target at least; the main ones for all three."""
    out = [Case(G128, "bfloat16", target, t) for target in aot_triton.TARGETS for t in (1, 32, 64, 256)]
    out += [Case(Int(8), "bfloat16", target, t, codes=True) for target in aot_triton.TARGETS for t in (16, 4096)]
    out += [Case(Float8(), "bfloat16", target, t, codes=True) for target in ("sm_90a", "sm_89") for t in (16, 4096)]
    for target, t in (("sm_80", 16), ("sm_89", 256)):
        out += [
            Case(fmt, dtype, target, t)
            for fmt, dtype in (
                (Int(4, group=32), "bfloat16"),
                (Int(4, group=64, symmetric=False), "float16"),
                (Int(4, symmetric=False), "bfloat16"),
                (Int(8), "bfloat16"),
                (Int(8, symmetric=False), "bfloat16"),
                (Int(8, group=128, symmetric=False), "float16"),
            )
        ]
    # A residual is read in the kernel where K is not cut.
    out += [Case(G128, "bfloat16", "sm_80", t, terms=BOTH, n=n) for t, n in ((16, 32768), (256, 4096))]
    return [*out, Case(Int(8), "bfloat16", "sm_89", 4096, codes=True, terms=BOTH)]
