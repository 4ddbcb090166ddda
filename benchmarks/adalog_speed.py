"""Candidates tried in a second by AdaLog's search: ours beside a plain loop of the same algorithm in torch.

    python -m benchmarks.adalog_speed [--tokens 6304] [--products float32]

The layers of ViT-Ti with the tokens of 32 images. A candidate is one scale with one zero point or base, for all rows of
a weight; the loop quantizes, multiplies and compares for each, as the authors' code does in chunks. Both use all cores.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks import measure
from qjax.passes import fpcs_losses

F = np.float32
BITS = 4


def cases(tokens: int, count: int, products: Any) -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """Name -> (ours, torch), each trying ``count`` candidates."""
    import torch

    rng = np.random.default_rng(0)
    out: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {}

    def uniform(x: Any, s: Any, z: Any) -> Any:
        return (torch.clamp(torch.round(x / s) + z, 0, 2**BITS - 1) - z) * s

    def add(name: str, k: int, n: int) -> None:
        x, w = rng.standard_normal((tokens, k)).astype(F), rng.standard_normal((n, k)).astype(F)
        near_x, near_w = np.round(x * 2) / 2, np.round(w * 3) / 3
        scales, zeros = rng.uniform(0.2, 0.5, (1, count)).astype(F), np.full((1, count), 8, F)
        qs = rng.integers(10, 138, (1, count)).astype(F)
        known, form = fpcs_losses.moments(x, near_x), fpcs_losses.form_of(x, w, near_w)
        wide = [np.broadcast_to(a, (n, count)) for a in (scales, zeros)]
        tx, tw, tnx, tnw = map(torch.from_numpy, (x, w, near_x, near_w))
        want = tx @ tw.T
        positive = x - x.min()
        laid, log_form = fpcs_losses.logs_of(positive, F(0)), fpcs_losses.form_of(positive, w, near_w)
        tpos, twant = torch.from_numpy(positive), torch.from_numpy(positive) @ tw.T

        def inputs() -> Any:
            return [((uniform(tx, s, z) @ tnw.T - want) ** 2).mean() for s, z in zip(scales[0], zeros[0], strict=True)]

        def weights() -> Any:
            return [((tnx @ uniform(tw, s, z).T - want) ** 2).mean(0) for s, z in zip(scales[0], zeros[0], strict=True)]

        def logs() -> Any:
            found = []
            table = torch.round(2.0 ** (-torch.arange(37) / 37) * 30) / 30
            for s, q in zip(scales[0] * 10, qs[0], strict=True):
                code = torch.round(-torch.log2(torch.clamp(tpos / s, 1e-15, 1)) * 37 / q)
                at = torch.clamp(code, 0, 15) * q
                near = s * table[(at % 37).long()] * 2.0 ** -torch.floor(at / 37) * (code < 16)
                found.append(((near @ tnw.T - twant) ** 2).mean())
            return found

        how: Any = dict(bits=BITS, products=products)
        out[f"{name}: inputs"] = (lambda: fpcs_losses.input_uniform(x, form, scales, zeros, **how)), inputs
        out[f"{name}: weights"] = (lambda: fpcs_losses.weight_uniform(w, known, *wide, **how)), weights
        if k > n:
            ours = lambda: fpcs_losses.input_log(laid, log_form, scales * 10, qs, zero="mask", **how)  # noqa: E731
            out[f"{name}: inputs, base and scale"] = ours, logs

    add("qkv 192 to 576", 192, 576)
    add("fc1 192 to 768", 192, 768)
    add("fc2 768 to 192", 768, 192)
    return out


def main() -> None:
    parser = measure.parser(__doc__ or "")
    parser.add_argument("--tokens", type=int, default=6304)
    parser.add_argument("--candidates", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--products", choices=("float32", "bfloat16"), default=None)
    given = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    products, rows = fpcs_losses.chosen_products(given.products), []
    for name, (ours, theirs) in cases(given.tokens, given.candidates, products).items():
        jax.block_until_ready(ours())  # compiled before it is timed
        times = measure.interleaved({"qjax": ours, "torch": theirs}, rounds=given.rounds)
        best = {k: given.candidates / t.least for k, t in times.items()}
        ratio = times["torch"].over(times["qjax"])
        rows.append({"layer": name, **best, "ratio": ratio})
        print(rows[-1], flush=True)
    text = f"Candidates a second, {given.tokens} tokens, {BITS} bits, products: {products}; "
    text += "the ratio is the median over rounds.\n\n"
    text += measure.table(
        ["layer", "qjax", "torch loop", "times"],
        [[r["layer"], f"{r['qjax']:.0f}", f"{r['torch']:.0f}", f"{r['ratio']:.1f}"] for r in rows],
    )
    measure.save("adalog_speed", {"measured": rows}, text, given.out)


if __name__ == "__main__":
    main()
