"""HQQ as its own library computes it, and as optimum-quanto does; quanto's plain range search beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hqq.core.quantize import Quantizer
from optimum.quanto import qint4
from optimum.quanto.tensor import HqqOptimizer, MaxOptimizer, quantize_weight

from benchmarks.matrices import Layer
from benchmarks.peers.matrix import GROUP, measured


def prepare(layer: Layer) -> dict[str, Callable[[], Any]]:
    w = torch.from_numpy(layer.w)

    def hqq() -> torch.Tensor:
        codes, found = Quantizer.quantize(
            w, nbits=4, group_size=GROUP, axis=1, device="cpu", compute_dtype=torch.float32, bitpack=False
        )
        return Quantizer.dequantize(codes, found)

    def quanto(optimizer: Any) -> torch.Tensor:
        scale, shift = optimizer(w, qint4, 0, GROUP)
        return quantize_weight(w, qint4, 0, scale, shift, GROUP, optimized=False).dequantize()

    return {
        "HQQ: hqq": hqq,
        "RTN asymmetric: quanto": lambda: quanto(MaxOptimizer()),
        "HQQ: quanto": lambda: quanto(HqqOptimizer()),
    }


if __name__ == "__main__":
    with torch.no_grad():
        torch.set_num_threads(1)
        measured(("hqq", "optimum-quanto", "torch"), prepare)
