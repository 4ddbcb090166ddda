"""QAT of nvidia-modelopt: int4 weights in blocks, with int8 activations scaled per token or without.

The scales of weights are those of one calibration before training, as its configuration has them: a step rounds the
weights and does not look for their maxima.
"""

from __future__ import annotations

import copy

import modelopt.torch.quantization as mtq
import torch
from torch import nn

from benchmarks.peers.step import Shape, measured


def prepared(model: nn.Module, shape: Shape, tokens: torch.Tensor, act: bool) -> tuple[nn.Module, int]:
    config = copy.deepcopy(mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG)
    config["quant_cfg"][1]["cfg"]["block_sizes"][-1] = shape.group
    if act:
        per_token = {"num_bits": 8, "type": "dynamic", "block_sizes": {-1: None}}
        # by class, else the inputs of LayerNorm are rounded too
        inputs = {"quantizer_name": "*input_quantizer", "parent_class": "nn.Linear", "cfg": per_token}
        config["quant_cfg"].append(inputs)
    model = mtq.quantize(model, config, lambda m: m(tokens))
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    rounded = [m for m in linears if m.weight_quantizer.is_enabled and m.input_quantizer.is_enabled == act]
    return model, len(rounded)


if __name__ == "__main__":
    measured(
        "nvidia-modelopt",
        {
            "weight-only": lambda model, shape, tokens: prepared(model, shape, tokens, act=False),
            "W4A8": lambda model, shape, tokens: prepared(model, shape, tokens, act=True),
        },
    )
