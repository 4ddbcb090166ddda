"""Products of a layer by torch, torchao and ggml on a CPU, for `benchmarks.cpu_peers`, in a process without jax.

    PYTHON -m benchmarks.peers.products THREADS [torch] [torchao] [ggml]

Serves (`benchmarks.peers.served`); what is given is {"n", "k", "tokens", "cache", "cold"}: a weight [n, k] and tokens
of normal numbers, the same as on the other side (`layer`), in so many copies that they are larger than the cache, if
``cold``. Errors are those of results to float64 products of the unrounded numbers, in parts of them.
"""

from __future__ import annotations

import itertools
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from benchmarks.peers.served import serve

GROUP = 128
CHECKED = 4
"""Tokens that are compared with float64."""

PACKAGES = {"torch": ("torch",), "torchao": ("torchao",), "ggml": ("llama-cpp-python",)}
Case = tuple[Callable[[], Any], Callable[[], np.ndarray]]
"""What runs, and what reads its last result [tokens, n]."""


def layer(n: int, k: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """A weight [n, k] and tokens [tokens, k], float32."""
    rng = np.random.default_rng(n + k)
    w = rng.standard_normal((n, k), np.float32) / np.float32(k**0.5)
    return w, np.random.default_rng(tokens).standard_normal((tokens, k), np.float32)


def error(y: np.ndarray, w: np.ndarray, x: np.ndarray) -> float:
    """Relative error of the first tokens of a result [tokens, n]."""
    want = x[:CHECKED].astype(np.float64) @ w.T.astype(np.float64)
    return float(np.linalg.norm(y[:CHECKED] - want) / np.linalg.norm(want))


def copies(nbytes: int, given: dict[str, Any]) -> int:
    """How many weights of that size."""
    return -(-given["cache"] // nbytes) + 1 if given["cold"] else 2


def _in_turn(run: Callable[[Any], Any], weights: list[Any]) -> Case:
    """Run with the next weight each time; results are torch tensors."""
    turn, last = itertools.cycle(weights), list[Any]()

    def once() -> None:
        last[:] = [run(next(turn))]

    return once, lambda: last[0].float().numpy()


def of_torch(w: np.ndarray, x: np.ndarray, given: dict[str, Any]) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Of torch itself: floats, dynamic int8, int4 with bfloat16 activations."""
    import torch

    n, k = w.shape
    weight, rows = torch.from_numpy(w), torch.from_numpy(x)

    def floats(dtype: Any) -> Case:
        each = weight.numel() * dtype.itemsize
        many = [weight.to(dtype, copy=True) for _ in range(copies(each, given))]
        inputs = rows.to(dtype)
        return _in_turn(lambda m: torch.nn.functional.linear(inputs, m), many)

    def int8() -> Case:
        scales = weight.abs().amax(1).double() / 127
        codes = torch.quantize_per_channel(weight, scales, torch.zeros(n, dtype=torch.long), 0, torch.qint8)
        many = [torch.ops.quantized.linear_prepack(codes, None) for _ in range(copies(n * k, given))]
        return _in_turn(lambda m: torch.ops.quantized.linear_dynamic(rows, m, False), many)

    def int4() -> Case:
        groups = weight.reshape(n, k // GROUP, GROUP)
        low, high = groups.amin(-1), groups.amax(-1)
        scales = (high - low) / 15
        codes = ((groups - low[..., None]) / scales[..., None]).round().clamp(0, 15).int().reshape(n, k)
        both = torch.stack([scales, low + 8 * scales], -1).transpose(0, 1).contiguous().bfloat16()
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        many = [packed.clone() for _ in range(copies(n * k // 2, given))]
        inputs = rows.bfloat16()
        return _in_turn(lambda m: torch.ops.aten._weight_int4pack_mm_for_cpu(inputs, m, GROUP, both), many)

    yield "torch float32", lambda: floats(torch.float32)
    yield "torch bfloat16", lambda: floats(torch.bfloat16)
    yield "torch linear_dynamic", int8
    yield "torch int4pack_mm", int4


def of_torchao(w: np.ndarray, x: np.ndarray, given: dict[str, Any]) -> Iterator[tuple[str, Callable[[], Case]]]:
    """What quantize_ of torchao gives, as it comes and compiled by torch.compile."""
    import torch
    import torchao.quantization as ao

    n, k = w.shape

    def made(config: Any, bits: int, compiled: bool, dtype: Any = torch.float32) -> Case:
        many = []
        for _ in range(copies(n * k * bits // 8, given)):
            one = torch.nn.Linear(k, n, bias=False, dtype=dtype)
            one.weight = torch.nn.Parameter(torch.from_numpy(w).to(dtype), requires_grad=False)
            ao.quantize_(one, config)
            many.append(one)
        inputs = torch.from_numpy(x).to(dtype)
        # The weight is an argument, so that all copies share one compiled program.
        product = torch.nn.functional.linear
        run = torch.compile(product, dynamic=False) if compiled else product
        with torch.no_grad():
            run(inputs, many[0].weight)

        def once(one: Any) -> Any:
            with torch.no_grad():
                return run(inputs, one.weight)

        return _in_turn(once, many)

    yield "torchao W8A8", lambda: made(ao.Int8DynamicActivationInt8WeightConfig(), 8, False)
    yield "torchao W8A8 compiled", lambda: made(ao.Int8DynamicActivationInt8WeightConfig(), 8, True)
    yield "torchao W8A16 compiled", lambda: made(ao.Int8WeightOnlyConfig(), 8, True, torch.bfloat16)


def of_ggml(
    library: Any, w: np.ndarray, x: np.ndarray, given: dict[str, Any]
) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Of ggml: Q4_0 and Q8_0 weights, in the kinds of buffers that it has."""
    sizes = {"Q4_0": 9 / 16, "Q8_0": 17 / 16}  # bytes a weight

    def made(kind: str, buffer: Any) -> Case:
        return library.products(w, kind, x, copies(int(w.size * sizes[kind]), given), buffer)

    for kind in sizes:
        for name, buffer in library.buffers().items():
            if name in given["ggml"]:
                yield f"ggml {kind} {name}", lambda kind=kind, buffer=buffer: made(kind, buffer)


def main() -> None:
    """Serve."""
    threads, *tools = sys.argv[1:]
    warnings.filterwarnings("ignore")
    library: Any = None
    if "torch" in tools or "torchao" in tools:
        import torch

        torch.set_num_threads(int(threads))
    if "ggml" in tools:
        from benchmarks.peers.ggml import Ggml

        library = Ggml(int(threads))

    def prepare(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, float], dict[str, str]]:
        if library is not None:
            library.release()
        w, x = layer(given["n"], given["k"], given["tokens"])
        cases: dict[str, Any] = {}
        errors: dict[str, float] = {}
        failed: dict[str, str] = {}
        makers = {"torch": of_torch, "torchao": of_torchao, "ggml": lambda *a: of_ggml(library, *a)}
        for tool in tools:
            for name, make in makers[tool](w, x, given):
                try:
                    run, result = make()
                    run()
                    errors[name] = error(result(), w, x)
                    cases[name] = run
                except LookupError:
                    continue  # a kind of buffer that is for other weights
                except Exception as e:
                    failed[name] = f"{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e) else ''}"[:200]
        return cases, errors, failed

    serve(prepare, [p for tool in tools for p in PACKAGES[tool]])


if __name__ == "__main__":
    main()
