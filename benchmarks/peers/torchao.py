"""QAT of torchao: int4 weights in groups, with int8 activations scaled per token (asymmetric: it offers no other)."""

from __future__ import annotations

import torch
import torchao.quantization as ao
from torch import nn
from torchao.quantization import qat

from benchmarks.peers.step import Shape, measured


def prepared(model: nn.Module, shape: Shape, act: bool) -> tuple[nn.Module, int]:
    group = ao.PerGroup(shape.group)
    if act:
        config = ao.Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=group)
    else:
        config = ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=group)
    ao.quantize_(model, qat.QATConfig(config, step="prepare"))
    return model, sum(isinstance(m, qat.FakeQuantizedLinear) for m in model.modules())


if __name__ == "__main__":
    measured(
        "torchao",
        {
            "weight-only": lambda model, shape, tokens: prepared(model, shape, act=False),
            "W4A8": lambda model, shape, tokens: prepared(model, shape, act=True),
        },
    )
