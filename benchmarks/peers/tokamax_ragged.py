"""tokamax's ragged product of bfloat16 tokens with int4 experts in groups of 128, where tokamax can be imported.

tokamax 0.0.17 wants Python 3.12, jax 0.11.1 or newer and some packages, pure Python but for pydantic-core. It is
looked for in .carry/tokamax (benchmarks/README.md says how it gets there) and among installed packages. It imports
xprof, a profiler of some hundred megabytes, for benchmarks of its own; where that is missing, an empty module stands
for it.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

CARRIED = Path(__file__).parents[2] / ".carry" / "tokamax"

GROUP = 128


def _without_profiler() -> None:
    if "xprof" in sys.modules or importlib.util.find_spec("xprof") is not None:
        return
    for name in ("xprof", "xprof.cli", "xprof.cli.tools"):
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.modules["xprof.cli.tools"].__dict__.setdefault("get_kernel_stats_tool", None)


def imported() -> tuple[Any, Any] | str:
    """Tokamax and qwix, whose arrays it takes; or why not."""
    if CARRIED.is_dir() and str(CARRIED) not in sys.path:
        sys.path.append(str(CARRIED))  # behind what is installed: jax is the one at hand
    try:
        _without_profiler()
        import qwix  # pyright: ignore[reportMissingImports]
        import tokamax  # pyright: ignore[reportMissingImports]
    except Exception as failure:  # also where a dependency does not suit this jax
        return f"tokamax cannot be imported ({type(failure).__name__}: {str(failure)[:150]})"
    return tokamax, qwix


def drawn(n: int, k: int, groups: int, seed: int) -> tuple[jax.Array, jax.Array]:
    """Random codes int4 [G, N, K] and their scales bfloat16 [G, K/128, N]: K last, as its kernel reads them."""
    codes = jax.jit(lambda key: jax.random.randint(key, (groups, n, k), -8, 8, jnp.int8).astype(jnp.int4))
    return codes(jax.random.key(seed)), jnp.full((groups, k // GROUP, n), 0.01, jnp.bfloat16)


def change_for(tokens: int) -> dict[str, Any]:
    """What is tried beside its own heuristic for Hopper (64 tokens, 64 rows, 2 stages, persistent)."""
    return {"block_m": 16 if tokens <= 64 else 128, "num_stages": 4}


def products(tokens: int) -> dict[str, Callable[..., jax.Array]] | str:
    """By name, (x [M, K], codes and scales of `drawn`, sizes [G]) -> [M, N]; "xla" first, its oracle. Or why none."""
    found = imported()
    if isinstance(found, str):
        return found
    tokamax, qwix = found

    def made(implementation: Any) -> Callable[..., jax.Array]:
        def ragged(x: jax.Array, w: tuple[jax.Array, jax.Array], sizes: jax.Array) -> jax.Array:
            codes, scales = w
            experts = qwix.QArray(qvalue=jnp.swapaxes(codes, 1, 2), scale=scales, zero_point=None, qtype=jnp.int4)
            return tokamax.ragged_dot(x, experts, sizes, implementation=implementation)

        return ragged

    out = {"xla": made("xla"), "tokamax": made("mosaic")}
    try:
        from tokamax._src.ops.ragged_dot import api  # pyright: ignore[reportMissingImports]

        kernel = api.IMPLEMENTATIONS["mosaic_gpu"]
        its_own = {"block_m": 64, "block_n": 64, "block_k": GROUP, "num_stages": 2, "split_k": 1, "persistent": True}
        change = change_for(tokens)
        config = kernel.config_cls(**{**its_own, **change})
        name = ", ".join(f"{key} {value}" for key, value in change.items())
        out[f"tokamax, {name}"] = made((dataclasses.replace(kernel, config=config),))
    except Exception as failure:  # its insides have moved: then its own choice alone
        print(f"tokamax: no other configuration ({type(failure).__name__}: {str(failure)[:100]})")
    return out
