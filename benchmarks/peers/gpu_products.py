"""Products by torch's own kernels and by gemlite's, in a process without jax: times on the device.

    python -m benchmarks.peers.gpu_products --seconds 60 --layers '[["name", N, K], ...]' --tokens 1 16 4096

A JSON object a line: ``{"peer", "beside", "layer", "n", "k", "tokens", "us"}``, or "failure" in place of "us".
``beside`` is the beginning of the names of our kernels that compute the same. A round goes through weights of several
times the size of the L2 cache and is one CUDA graph: no launch from the host is in its time, while the short gaps
between kernels are. Where no graph can be made, events around the calls are taken, and the row says so.

gemlite is looked for in .carry/gemlite (benchmarks/README.md says how it gets there) and among installed packages.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CARRIED = Path(__file__).parents[2] / ".carry" / "gemlite"

ROTATE = 256 << 20
"""Bytes of weights that a round reads."""

GROUP = 128

Make = Callable[[Any, int, int, str], Any]
Call = Callable[[Any, Any, Any], Any]


def _bfloat16(torch: Any, n: int, k: int, where: str) -> Any:
    return torch.randn(n, k, device=where, dtype=torch.bfloat16)


def _int4(torch: Any, n: int, k: int, where: str) -> Any:
    pairs = torch.randint(0, 256, (n, k // 2), device=where, dtype=torch.uint8)
    numbers = torch.full((k // GROUP, n, 2), 0.01, device=where, dtype=torch.bfloat16)
    return torch.ops.aten._convert_weight_to_int4pack(pairs, 8), numbers


def _float8(torch: Any, n: int, k: int, where: str) -> Any:
    codes = torch.randn(n, k, device=where, dtype=torch.bfloat16).to(torch.float8_e4m3fn)
    return codes, torch.ones((1, n), device=where, dtype=torch.float32)


def _int8(torch: Any, n: int, k: int, where: str) -> Any:
    return torch.randint(-128, 128, (n, k), device=where, dtype=torch.int8)


def _gemlite(torch: Any, n: int, k: int, where: str) -> Any:
    if CARRIED.is_dir() and str(CARRIED) not in sys.path:
        sys.path.insert(0, str(CARRIED))
    from gemlite.helper import A16W4_HQQ_INT  # pyright: ignore[reportMissingImports]

    codes = torch.randint(0, 16, (n, k), device=where, dtype=torch.uint8)
    scales, zeros = (torch.full((n * k // GROUP, 1), v, device=where, dtype=torch.bfloat16) for v in (0.01, 8.0))
    return A16W4_HQQ_INT(device=where, dtype=torch.bfloat16).from_weights(codes, scales, zeros)


def _scaled(fast: bool, per_row: bool) -> Call:
    def call(torch: Any, x: Any, w: Any) -> Any:
        scales = [s if per_row else s[0, 0] for s in (x[1], w[1])]
        how = {"out_dtype": torch.bfloat16, "use_fast_accum": fast}
        return torch._scaled_mm(x[0], w[0].t(), scale_a=scales[0], scale_b=scales[1], **how)

    return call


def _inputs(torch: Any, kind: str, tokens: int, k: int, where: str) -> Any:
    x = torch.randn(tokens, k, device=where, dtype=torch.bfloat16)
    if kind == "float8":
        return x.to(torch.float8_e4m3fn), torch.ones((tokens, 1), device=where, dtype=torch.float32)
    return (x * 40).clamp(-127, 127).to(torch.int8) if kind == "int8" else x


PEERS: dict[str, tuple[str, str, Make, Call, float, int]] = {
    "torch bfloat16": ("", "bfloat16", _bfloat16, lambda t, x, w: x @ w.t(), 2, 1),
    "torch _weight_int4pack_mm": (
        "W4A16 int4 g128, bfloat16",
        "bfloat16",
        _int4,
        lambda t, x, w: t.ops.aten._weight_int4pack_mm(x, w[0], GROUP, w[1]),
        0.5,
        1,
    ),
    "gemlite A16W4": ("W4A16 int4 g128, bfloat16", "bfloat16", _gemlite, lambda t, x, w: w(x), 0.5, 1),
    "torch _scaled_mm, per row": ("W8A8 fp8", "float8", _float8, _scaled(False, True), 1, 1),
    "torch _scaled_mm, per tensor": ("W8A8 fp8", "float8", _float8, _scaled(False, False), 1, 1),
    "torch _scaled_mm, per tensor, fast sums": ("W8A8 fp8", "float8", _float8, _scaled(True, False), 1, 1),
    "torch _int_mm": ("W8A8 int8", "int8", _int8, lambda t, x, w: t._int_mm(x, w.t()), 1, 17),
}
"""By name: beside which of our kernels, inputs, weight, call, bytes a code, fewest tokens that it takes."""


def graph_us(torch: Any, calls: list[Callable[[], Any]], trials: int = 7) -> tuple[float, str]:
    """Microseconds of one of the calls, and by what: a graph of all of them, or events around them."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        run, how = graph.replay, "graph"
    except Exception:  # something that cannot be captured
        torch.cuda.synchronize()
        run, how = lambda: [call() for call in calls] and None, "events"
    times = []
    for _ in range(trials + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times[1:]), how


def wall_us(torch: Any, calls: list[Callable[[], Any]], trials: int = 2) -> tuple[float, str]:
    """The same without a GPU, for tests."""
    begun = time.perf_counter()
    for call in calls * trials:
        call()
    return (time.perf_counter() - begun) * 1e6 / trials / len(calls), "wall"


def rows(
    torch: Any, layers: list[Any], tokens: list[int], deadline: float, where: str = "cuda", rotate: int = ROTATE
) -> Iterator[dict[str, Any]]:
    """Every peer at every layer, while time lasts; a peer whose weight cannot be made fails once a layer."""
    clock = graph_us if where == "cuda" else wall_us
    for layer, n, k in layers:
        for peer, (beside, kind, make, call, code, fewest) in PEERS.items():
            base = {"peer": peer, "beside": beside, "layer": layer, "n": n, "k": k}
            if time.perf_counter() > deadline:
                return
            try:
                weights = [make(torch, n, k, where) for _ in range(max(2, -(-rotate // int(n * k * code))))]
            except Exception as failure:
                yield {**base, "tokens": None, "failure": f"{type(failure).__name__}: {failure}"[:300]}
                continue
            for count in tokens:
                if time.perf_counter() > deadline:
                    return
                if count < fewest:
                    continue
                try:
                    x = _inputs(torch, kind, count, k, where)
                    with torch.no_grad():
                        us, how = clock(torch, [lambda w=w, x=x, call=call: call(torch, x, w) for w in weights])
                    yield {**base, "tokens": count, "us": us, "clock": how}
                except Exception as failure:
                    yield {**base, "tokens": count, "failure": f"{type(failure).__name__}: {failure}"[:300]}
            del weights
            if where == "cuda":
                torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="after which nothing further is begun")
    parser.add_argument("--layers", type=json.loads, required=True, help="JSON: [[name, N, K], ...]")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 4096])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    given = parser.parse_args()
    deadline = time.perf_counter() + given.seconds
    import torch

    rotate = ROTATE if given.device == "cuda" else 1
    for row in rows(torch, given.layers, given.tokens, deadline, given.device, rotate):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
