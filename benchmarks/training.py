"""The step of quantization-aware training beside the float step, and beside Qwix, in one process.

    python -m benchmarks.training [--width 512] [--tokens 1024]

The model is that of `benchmarks.qwix`, a Linen transformer of 4 layers; the step is loss, gradient and Adam, jitted,
for rows of 128 tokens. Weight-only: int4 in groups of 128. W4A8: with int8 activations scaled per token. Qwix trains by
`QtProvider` with the same formats. "learned": the scales of the weights are trained as well (LSQ).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import qwix

import qjax
from benchmarks import measure
from benchmarks.measure import interleaved, milliseconds
from benchmarks.qwix import GROUP, VOCAB, float_model

ROW = 128
BOUNDS = {"weight-only": 1.1, "W4A8": 1.3}
"""The largest ratios to the float step that the project allows itself."""


def recipe(act: bool, learned: bool = False) -> qjax.Recipe:
    """int4 weights in groups, with int8 activations or without."""
    weights: Any = qjax.Int(4, group=GROUP)
    inputs = qjax.dynamic(qjax.Int(8, per="token")) if act else None
    return qjax.Recipe([qjax.Rule("**", weights=qjax.learned(weights) if learned else weights, inputs=inputs)])


def steps(width: int, count: int) -> dict[str, Callable[[], Any]]:
    """Name -> one step from the same start."""
    module, variables = float_model(width)
    fn, params = qjax.from_linen(module, variables)
    tokens = jax.random.randint(jax.random.key(2), (count // ROW, ROW), 0, VOCAB)
    adam = optax.adam(1e-4)

    def step(forward: Callable[[Any], jax.Array], start: Any) -> Callable[[], Any]:
        def loss(trained: Any) -> jax.Array:
            logits = forward(trained)[:, :-1]
            return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()

        @jax.jit
        def run(trained: Any, moments: Any) -> Any:
            value, grads = jax.value_and_grad(loss)(trained)
            updates, moments = adam.update(grads, moments)
            return optax.apply_updates(trained, updates), moments, value

        return functools.partial(run, start, adam.init(start))

    cases = {"float": step(lambda p: fn(p, tokens), params)}
    for name, act, learned in (("weight-only", False, False), ("W4A8", True, False), ("learned", False, True)):
        t = qjax.fake_quant(fn, recipe(act, learned))
        state = t.init(params, tokens)
        cases[f"qjax {name}"] = step(lambda both, t=t: t.apply(both[0], both[1], tokens)[0], (params, state))
    for name, act in (("weight-only", False), ("W4A8", True)):
        rule = qwix.QtRule(
            module_path=".*",
            op_names=("dot_general",),
            weight_qtype=jnp.int4,
            act_qtype=jnp.int8 if act else None,
            tile_size=GROUP,
        )
        model = qwix.quantize_model(module, qwix.QtProvider([rule]))
        cases[f"Qwix {name}"] = step(lambda p, model=model: model.apply({"params": p}, tokens), variables["params"])
    return cases


def main() -> None:
    """Run, print, save."""
    options = measure.parser(__doc__)
    options.add_argument("--width", type=int, default=512)
    options.add_argument("--tokens", type=int, default=1024, help="of a step")
    options.add_argument("--budget", type=float, default=60.0, help="seconds")
    given = options.parse_args()
    cases = steps(given.width, given.tokens)
    for case in cases.values():
        jax.block_until_ready(case())
    times = interleaved(cases, budget=given.budget)
    base = times["float"]
    rows = [
        {"case": name, "seconds": t.least, "over_float": t.over(base), "bound": BOUNDS.get(name.removeprefix("qjax "))}
        for name, t in times.items()
    ]
    text = f"One training step, width {given.width}, {given.tokens} tokens; ratios are medians within a round.\n\n"
    text += measure.table(
        ["case", "ms", "over float", "at most"],
        [[r["case"], milliseconds(r["seconds"]), f"{r['over_float']:.2f}", r["bound"] or ""] for r in rows],
    )
    measure.save("training", {"width": given.width, "tokens": given.tokens, "measured": rows}, text, given.out)


if __name__ == "__main__":
    main()
