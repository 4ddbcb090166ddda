"""The model and the step of `benchmarks.training` in torch, and the measuring of a tool's steps beside its float step.

A peer calls `measured` with functions that make a tool's training model out of the float one. It prints one line of
JSON: versions, and "measured", a list of {"case", "first", "seconds", "over_float", "least_over_float"}, or {"case",
"failed"} where a step did not run. First: the first step, with what torch.compile takes; ratios: within a round, and of
minima.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.rounds import interleaved


@dataclasses.dataclass(frozen=True)
class Shape:
    """What the parent measures, so that both sides run the same step."""

    width: int
    tokens: int
    row: int
    layers: int
    head: int
    vocab: int
    group: int
    threads: int
    budget: float

    @property
    def linears(self) -> int:
        """Matrices to quantize: query, key, value, out, up, down in every layer, and the head."""
        return 6 * self.layers + 1


class Block(nn.Module):
    """One layer: attention without a mask, then an MLP of 4 times the width."""

    def __init__(self, width: int, head: int) -> None:
        super().__init__()
        self.head = head
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, length, width] -> the same."""
        y = self.norm1(x)
        q, k, v = (f(y).unflatten(-1, (-1, self.head)).transpose(1, 2) for f in (self.query, self.key, self.value))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class Transformer(nn.Module):
    """`benchmarks.qwix.Transformer` in torch."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed = nn.Embedding(shape.vocab, shape.width)
        self.blocks = nn.Sequential(*(Block(shape.width, shape.head) for _ in range(shape.layers)))
        self.norm, self.head = nn.LayerNorm(shape.width), nn.Linear(shape.width, shape.vocab, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[rows, length] -> logits [rows, length, vocab]."""
        return self.head(self.norm(self.blocks(self.embed(tokens))))


def step(model: nn.Module, tokens: torch.Tensor, compiled: bool) -> Callable[[], torch.Tensor]:
    """Loss, gradient and Adam; compiled: forward and backward by torch.compile, Adam is one fused kernel anyway."""
    adam = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)

    def loss() -> torch.Tensor:
        logits = model(tokens)[:, :-1]
        return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1))

    value = torch.compile(loss) if compiled else loss

    def run() -> torch.Tensor:
        adam.zero_grad()
        out = value()
        out.backward()
        adam.step()
        return out.detach()

    return run


Quantizer = Callable[[nn.Module, Shape, torch.Tensor], tuple[nn.Module, int]]


def measured(tool: str, quantizers: dict[str, Quantizer]) -> None:
    """Measure every quantizer's step beside the float one, eager and compiled, and print the line.

    Args:
        tool: the distribution whose version is printed.
        quantizers: name -> function of a float model, the shape and the tokens, to the model that is trained and the
            number of its matrices that are rounded.
    """
    shape = Shape(**json.loads(sys.argv[1]))
    torch.set_num_threads(shape.threads)
    torch.manual_seed(0)
    tokens = torch.randint(shape.vocab, (shape.tokens // shape.row, shape.row))
    source = Transformer(shape)
    models: dict[str, nn.Module] = {"float": source}
    for name, quantizer in quantizers.items():
        models[name], rounded = quantizer(copy.deepcopy(source), shape, tokens)
        if rounded != shape.linears or torch.allclose(models[name](tokens), source(tokens), rtol=1e-3):
            raise RuntimeError(f"{name} rounds {rounded} matrices of {shape.linears}: it would look too fast")
    rows = [row for compiled in (False, True) for row in compared(models, tokens, shape.budget, compiled)]
    versions = {name: importlib.metadata.version(name) for name in (tool, "torch")}
    print(json.dumps({"versions": versions, "measured": rows}))


def compared(models: dict[str, nn.Module], tokens: torch.Tensor, budget: float, compiled: bool) -> list[dict[str, Any]]:
    """One row for each model, the float one first; what fails is a result as well."""
    cases, first, failed = {}, {}, {}
    for name, model in models.items():
        case = step(copy.deepcopy(model), tokens, compiled)
        try:
            start = time.perf_counter()
            case()
            first[name] = time.perf_counter() - start
            case()  # the first step makes Adam's moments and may compile again
            cases[name] = case
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    times = interleaved(cases, budget=budget)
    rows: list[dict[str, Any]] = []
    for name in models:
        row: dict[str, Any] = {"case": f"{name}, compiled" if compiled else name}
        if name not in times:
            row["failed"] = failed[name]
        else:
            row["first"] = first[name]
            row["seconds"] = times[name].least
            if "float" in times:
                row["over_float"] = times[name].over(times["float"])
                row["least_over_float"] = times[name].least_over(times["float"])
        rows.append(row)
    return rows
