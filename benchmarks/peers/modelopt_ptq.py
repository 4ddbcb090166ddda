"""AWQ of nvidia-modelopt on one linear layer: scales alone (lite), ranges alone (clip), and both (full)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from torch import nn

from benchmarks.matrices import Layer
from benchmarks.peers.matrix import GROUP, measured


def prepare(layer: Layer) -> dict[str, Callable[[], Any]]:
    w, x = torch.from_numpy(layer.w), torch.from_numpy(layer.calibration)

    def quantized(algorithm: str) -> torch.Tensor:
        model = nn.Sequential(nn.Linear(w.shape[1], w.shape[0], bias=False))
        model[0].weight.data = w.clone()
        config = copy.deepcopy(mtq.INT4_AWQ_CFG)
        config["algorithm"] = algorithm
        assert f"-1: {GROUP}" in str(config), config
        linear = mtq.quantize(model, config, lambda m: m(x))[0]
        # what the layer computes: its rounded weight, times the factors that its inputs are multiplied by
        factors = getattr(linear.input_quantizer, "pre_quant_scale", None)
        q = linear.weight_quantizer(linear.weight)
        return q if factors is None else q * factors

    return {
        "RTN": lambda: quantized("max"),
        "AWQ: lite": lambda: quantized("awq_lite"),
        "AWQ: clip": lambda: quantized("awq_clip"),
        "AWQ: full": lambda: quantized("awq_full"),
    }


if __name__ == "__main__":
    with torch.no_grad():
        torch.set_num_threads(1)
        measured(("nvidia-modelopt", "torch"), prepare)
