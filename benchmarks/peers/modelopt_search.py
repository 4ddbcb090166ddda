"""auto_quantize of nvidia-modelopt on the weights of `benchmarks.search`: int4 by 128, int8 per channel, or float.

Runs in an environment of its own (``pip install torch nvidia-modelopt transformers requests huggingface_hub``) as
``python -I modelopt_search.py JSON``; prints one line of JSON. The head, which stays in float, is left out of its count
of bits, as it is of ours.
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import sys
import time

import modelopt.torch.quantization as mtq
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

INT4 = {
    "quant_cfg": [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 4, "block_sizes": {-1: 128}}},
    ],
    "algorithm": "max",
}
INT8 = {
    "quant_cfg": [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": 8, "axis": 0}},
    ],
    "algorithm": "max",
}


def logits_of(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(part[:, :-1]).logits for part in rows.split(8)])


def divergence(reference: torch.Tensor, logits: torch.Tensor) -> float:
    """Mean KL of the predictions, in nats, in float64."""
    log_p, log_q = (F.log_softmax(x.double(), dim=-1) for x in (reference, logits))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def bits_of(model: nn.Module) -> tuple[float, dict[str, int]]:
    """Average bits of the linears without scales, and what each of them has."""
    bits, total, found = 0.0, 0, {}
    for name, module in model.named_modules():
        quantizer = getattr(module, "weight_quantizer", None)
        if quantizer is None or not isinstance(module, nn.Linear) or "lm_head" in name:
            continue
        own = quantizer.num_bits if quantizer.is_enabled else 16
        found[name] = int(own)
        bits, total = bits + own * module.weight.numel(), total + module.weight.numel()
    return bits / total, found


def main() -> None:
    given = json.loads(sys.argv[1])
    torch.set_num_threads(given["threads"])
    torch.manual_seed(0)
    data = np.load(given["data"])
    calibration, test = torch.tensor(data["calibration"]).long(), torch.tensor(data["test"]).long()
    base = AutoModelForCausalLM.from_pretrained(given["folder"], dtype=torch.float32).eval()
    reference = logits_of(base, test)
    out = {"versions": {n: importlib.metadata.version(n) for n in ("nvidia-modelopt", "torch", "transformers")}}
    out["measured"] = rows = []
    for name, config in (("int4", INT4), ("int8", INT8)):
        model = mtq.quantize(copy.deepcopy(base), {**config, "quant_cfg": [*config["quant_cfg"], OFF]}, lambda m: None)
        rows.append({"case": name, "kl": divergence(reference, logits_of(model, test)), "bits": bits_of(model)[0]})
    for method in ("gradient", "kl_div"):
        begun = time.perf_counter()
        more = {"loss_func": lambda output, batch: output.loss} if method == "gradient" else {}
        forward = (
            (lambda m, batch: m(batch, labels=batch)) if method == "gradient" else (lambda m, batch: m(batch).logits)
        )
        try:
            model, _ = mtq.auto_quantize(
                copy.deepcopy(base),
                constraints={
                    "effective_bits": given["bits"],
                    "cost": {"excluded_module_name_patterns": ["*lm_head*"]},
                },
                quantization_formats=[INT4, INT8],
                data_loader=list(calibration.split(4)),
                forward_step=forward,
                disabled_layers="*lm_head*",
                num_calib_steps=8,
                num_score_steps=8,
                method=method,
                **more,
            )
        except Exception as error:  # said in the table, not a reason to lose the other rows
            rows.append({"case": f"auto_quantize, {method}", "failed": f"{type(error).__name__}: {error}"[:300]})
            continue
        seconds = time.perf_counter() - begun
        bits, found = bits_of(model)
        kl = divergence(reference, logits_of(model, test))
        rows.append({"case": f"auto_quantize, {method}", "kl": kl, "bits": bits, "seconds": seconds, "found": found})
    print(json.dumps(out))


OFF = {"quantizer_name": "*lm_head*", "enable": False}

if __name__ == "__main__":
    main()
