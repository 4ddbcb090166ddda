"""Roundings of llm-compressor: its observers and GPTQ, called as its modifiers call them; AWQ by its modifier."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationArgs, fake_quantize
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from llmcompressor.observers import Observer

from benchmarks.matrices import Layer
from benchmarks.peers.matrix import GROUP, measured


def prepare(layer: Layer) -> dict[str, Callable[[], Any]]:
    w, x = torch.from_numpy(layer.w), torch.from_numpy(layer.calibration)
    h = 2 * (x.T @ x) / len(x)

    def settings(symmetric: bool, observer: str, actorder: str | None) -> QuantizationArgs:
        return QuantizationArgs(
            num_bits=4,
            type="int",
            symmetric=symmetric,
            strategy="group",
            group_size=GROUP,
            observer=observer,
            actorder=actorder,
        )

    def ranges(args: QuantizationArgs) -> tuple[torch.Tensor, torch.Tensor]:
        observer = Observer.load_from_registry(args.observer, base_name="weight", args=args)
        observer(w)
        found = observer.get_qparams()
        return found["scale"], found["zero_point"]

    def nearest(symmetric: bool, observer: str) -> torch.Tensor:
        args = settings(symmetric, observer, None)
        return fake_quantize(w, *ranges(args), args)

    def gptq(symmetric: bool, observer: str, actorder: str | None) -> torch.Tensor:
        args = settings(symmetric, observer, actorder)
        scale, zero = ranges(args)
        q, _, fell_back = quantize_weight(w[None].clone(), h[None].clone(), scale[None], zero[None], None, args)
        if fell_back.any():
            raise RuntimeError("it fell back to rounding to nearest")
        return q[0]

    return {
        "RTN": lambda: nearest(True, "memoryless_minmax"),
        "RTN asymmetric": lambda: nearest(False, "memoryless_minmax"),
        "MSE": lambda: nearest(True, "memoryless_mse"),
        "MSE asymmetric": lambda: nearest(False, "memoryless_mse"),
        "GPTQ": lambda: gptq(True, "memoryless_minmax", None),
        "GPTQ asymmetric": lambda: gptq(False, "memoryless_minmax", None),
        "GPTQ asymmetric, MSE, static": lambda: gptq(False, "memoryless_mse", "static"),
    }


if __name__ == "__main__":
    with torch.no_grad():
        torch.set_num_threads(1)
        measured(("llmcompressor", "compressed-tensors", "torch"), prepare)
