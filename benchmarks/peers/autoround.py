"""Intel auto-round on the weights of `benchmarks.autoround`: 4-bit integers by 128, rounded block by block.

Runs in an environment of its own (``pip install torch auto-round transformers``) as ``python -I autoround.py JSON``;
prints one line of JSON. Embeddings and the head, which is tied to them, stay in float, which is the tool's default. It
trains in bfloat16 by default; ``amp=False`` is float32.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import sys
import time
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from auto_round import AutoRound
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer


def logits_of(model: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model(part[:, :-1]).logits.float() for part in rows.split(8)])


def scores(reference: torch.Tensor, logits: torch.Tensor) -> dict[str, float]:
    """Mean KL of the predictions in nats, in float64, and how often the most probable token is the same."""
    total, same, count = 0.0, 0, 0
    for a, b in zip(reference, logits, strict=True):
        log_p, log_q = (F.log_softmax(x.double(), dim=-1) for x in (a, b))
        total += float((log_p.exp() * (log_p - log_q)).sum())
        same, count = same + int((a.argmax(-1) == b.argmax(-1)).sum()), count + len(a)
    return {"kl": total / count, "agreement": same / count}


def loaded(folder: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def tuned(given: dict[str, Any], case: dict[str, Any], calibration: torch.Tensor) -> tuple[nn.Module, float]:
    """The model with its weights replaced by their rounded values, and the seconds it took."""
    # In the dtype of the folder, as its command line loads it; float32 where it is to train in float32.
    model = loaded(given["folder"], torch.bfloat16 if case["amp"] else torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(given["folder"])
    begun = time.perf_counter()
    work = AutoRound(
        model,
        tokenizer,
        bits=4,
        group_size=128,
        sym=case["sym"],
        iters=given["iters"],
        dataset=list(calibration.split(given["rows"])),
        nsamples=len(calibration),
        seqlen=calibration.shape[1],
        batch_size=given["rows"],
        amp=case["amp"],
        device_map=given["device"],
        enable_torch_compile=False,
    )
    found, _ = work.quantize()
    seconds = time.perf_counter() - begun
    found = found.cpu()
    out = loaded(given["folder"])  # scored in float32 by the float model with these weights
    state = {name: value.float() for name, value in found.state_dict().items()}
    own = out.state_dict()
    changed = [name for name in own if name in state and not torch.equal(own[name], state[name])]
    linears = [f"{n}.weight" for n, m in out.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in n]
    if sorted(changed) != sorted(linears):
        raise RuntimeError(f"other tensors changed than the linears of the blocks: {sorted(changed)}")
    for name in linears:  # 16 values at most in a group
        row = state[name][0, :128]
        if len(row.unique()) > 16:
            raise RuntimeError(f"{name} has {len(row.unique())} values in a group of 128")
    out.load_state_dict({name: state.get(name, value) for name, value in own.items()})
    return out, seconds


def main() -> None:
    given = json.loads(sys.argv[1])
    torch.set_num_threads(given["threads"])
    data = np.load(given["data"])
    calibration, test = torch.tensor(data["calibration"]).long(), torch.tensor(data["test"]).long()
    reference = logits_of(loaded(given["folder"]), test)
    out: dict[str, Any] = {
        "versions": {n: importlib.metadata.version(n) for n in ("auto-round", "torch", "transformers")},
        "count": reference.shape[0] * reference.shape[1],
    }
    out["measured"] = rows = []
    for case in given["cases"]:
        try:
            with contextlib.redirect_stdout(sys.stderr):
                torch.manual_seed(0)
                model, seconds = tuned(given, case, calibration)
        except Exception as error:  # said in the table, not a reason to lose the other rows
            rows.append({**case, "failed": f"{type(error).__name__}: {error}"[:300]})
            continue
        rows.append({**case, **scores(reference, logits_of(model, test)), "seconds": seconds})
        print(rows[-1], file=sys.stderr, flush=True)
    print(json.dumps(out))


if __name__ == "__main__":
    main()
