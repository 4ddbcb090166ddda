"""AdaLog: post-training quantization of vision transformers to few bits (Wu et al., ECCV 2024, arXiv:2407.12951).

Weights and activations get codes of 3 to 8 bits from some 32 images, without training. Everything is quantized evenly,
with a scale and a zero point that `qjax.passes.fpcs` searches, but for the two kinds of numbers that follow a power
law: the probabilities of attentions and the outputs of GELUs get `qjax.formats.Log`, whose base is searched too.

What a unit (`qjax.passes.units`) goes through, every other one staying in float meanwhile:

    linear      weights by their own error, inputs by their own error; then, so many rounds, weights by the error of
                the outputs with quantized inputs, and inputs by that with quantized weights
    GELU first  the same, the inputs by base and scale
    attention   queries and keys in turn by the error of their product, head by head; then in turn the base of the
                probabilities and the values by the error of theirs
    conv        weights by the error of the outputs, once

Behind a LayerNorm, inputs differ by channel more than one scale can serve. So scales s_c and zero points z_c are
searched for each channel first, and their difference from the mean s and z is moved into what stands around:

    rho = s_c / s,  beta = z s - z_c s_c / rho;    gamma / rho,  bias / rho - beta;    W rho,  b + (W rho) beta.

Quantizers that AdaLog is compared with are settings of the same search: logarithms to base 2 and sqrt 2 (for GELUs with
a searched scale), twin uniform grids (PTQ4ViT, arXiv:2111.12293; the ratio of the steps is searched by the error of the
outputs, where its authors weight it by gradients), and uniform ones whose ranges are those of the data, or percentiles
of them (of 99.9, 99.99 and 99.999 the one with the least error, as in RepQ-ViT, arXiv:2212.08254).

The float function stays what it is. A channel that is constant on the calibration data has no scale of its own and
keeps rho = 1: 1e-4, where the search stops, would blow gamma up.

Once the weight is rounded, the shift of a GELU is folded into the bias behind the product: b - shift (row sums of W^).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from qjax.errors import RecipeError, near
from qjax.formats import Int, Log, TwinUniform
from qjax.formats.log import ZERO_POLICIES
from qjax.passes import fpcs, fpcs_losses
from qjax.passes.fpcs import Pairs, Search

Found = dict[str, np.ndarray]
"""What was found for a unit, as arrays by name: it is kept on disk as such."""

POWER = ("adalog", "log2", "log_sqrt2", "twin", "uniform")
"""Quantizers of probabilities and of what a GELU gives."""

UNIFORM = ("fpcs", "minmax", "percentile")
"""How ranges of uniform quantizers are found."""

BLOCK_INPUTS = ("float", "quantized")
"""What a block is trained on in reconstruction."""

PRODUCTS = ("bfloat16", "float32")
"""In what numbers errors are multiplied while candidates are compared."""

FIXED_BASE = {"log2": 37.0, "log_sqrt2": 18.5}
"""The base of quantizers that do not search it, as q of 2**(q/37)."""

PERCENTILES = (0.999, 0.9999, 0.99999)

TWIN_RATIOS = range(13)

_ELEMENTS = 1 << 20
"""Elements of inputs that one pass over the candidates has before it: what a core's cache and memory bear."""


@dataclasses.dataclass(frozen=True)
class AdaLog:
    """The search, for ``Recipe(rules, settle=AdaLog())``. Needs calibration data, 8 images or more.

    The rules say which sites are quantized and to how many bits: weights and inputs of products, operands q, k, p and v
    of attentions. The search says how: what follows a GELU gets `Log`, where the rule says `Int`; operand p whatever
    the rule says, a `Log` with the base that is found.

    Args:
        rounds: how often weights and inputs (or two operands) are searched in turn.
        steps, candidates, best: of FPCS, see `qjax.passes.fpcs.Search`.
        reparameterize: move scales of channels into LayerNorms, where weights and inputs have the same bits.
        zero: what becomes of the smallest outputs of a GELU, as in `Log`; for probabilities the rule says it.
        softmax: quantizer of probabilities: "adalog", "log2", "log_sqrt2", "twin" or "uniform".
        gelu: quantizer of what a GELU gives, likewise.
        uniform: how scales and zero points of all others are found: "fpcs", "minmax" or "percentile".
        rows: how many rows (tokens) the search for inputs by the error of outputs looks at, drawn at random; None: all.
            Ranges, channels and weights are searched with all rows whatever this says.
        images: how many examples the search for operands of attentions looks at; None: all. Each window of an attention
            in windows (Swin) counts as one.
        seed: of the draws.
        products: how rounding errors are multiplied while candidates are compared: "float32", "bfloat16" (errors and
            the other operand are rounded to it, sums stay in float32), or None: bfloat16 where that is quick, which is
            on GPU and TPU, and on CPUs with AMX where the compiled kernels are there (`qjax.passes.fpcs_losses`).
        reconstruct: steps of the training of each block that follows the search (`qjax.settling.reconstruct`); 0: none.
            The authors take 20,000, with 1,024 images.
        batch: examples in a step of it.
        block_inputs: what a block is trained on: "float", what the float model has there (as the authors), or
            "quantized", what the trained blocks before it put out.
    """

    rounds: int = 3
    steps: int = 6
    candidates: int = 128
    best: bool = False
    reparameterize: bool = True
    zero: str = "mask"
    softmax: str = "adalog"
    gelu: str = "adalog"
    uniform: str = "fpcs"
    rows: int | None = None
    images: int | None = None
    seed: int = 0
    products: str | None = None
    reconstruct: int = 0
    batch: int = 32
    block_inputs: str = "float"

    needs_batches: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.rounds, bool) or not isinstance(self.rounds, int) or self.rounds < 0:
            raise RecipeError(f"AdaLog: rounds={self.rounds!r}; a whole number, 0 or more")
        for name in ("rows", "images"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise RecipeError(f"AdaLog: {name}={value!r}; a whole number, 1 or more, or None for all")
        if not isinstance(self.best, bool) or not isinstance(self.reparameterize, bool):
            raise RecipeError(f"AdaLog: best={self.best!r}, reparameterize={self.reparameterize!r}; True or False each")
        if (
            isinstance(self.candidates, bool)
            or not isinstance(self.candidates, int)
            or self.candidates not in range(32, 1 << 20, 32)
        ):
            raise RecipeError(f"AdaLog: candidates={self.candidates!r}; a multiple of 32, such as the authors' 128")
        for name, least in (("reconstruct", 0), ("batch", 1), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise RecipeError(f"AdaLog: {name}={value!r}; a whole number, {least} or more")
        if self.products not in (None, *PRODUCTS):
            hint = near(str(self.products), PRODUCTS)
            raise RecipeError(f"AdaLog: products={self.products!r}{hint}; one of {', '.join(PRODUCTS)}, or None")
        if self.zero not in ZERO_POLICIES:
            raise RecipeError(
                f"AdaLog: zero={self.zero!r}{near(str(self.zero), ZERO_POLICIES)}; one of {', '.join(ZERO_POLICIES)}"
            )
        for name, known in (
            ("softmax", POWER),
            ("gelu", POWER),
            ("uniform", UNIFORM),
            ("block_inputs", BLOCK_INPUTS),
        ):
            value = getattr(self, name)
            if value not in known:
                hint = near(str(value), known)
                raise RecipeError(f"AdaLog: {name}={value!r}{hint}; one of {', '.join(known)}")
        _ = self.search

    @property
    def _products(self) -> fpcs_losses.Products:
        return fpcs_losses.chosen_products(self.products)

    @property
    def search(self) -> Search:
        """The settings of FPCS."""
        return Search(self.candidates, steps=self.steps, log_scales=self.candidates // 8, best=self.best)

    def settled(self, unit: Any, data: tuple[np.ndarray, ...], weights: np.ndarray | None) -> Found:
        """Return what is found for one unit.

        Args:
            unit: from `qjax.passes.units`.
            data: inputs [M, K] of a linear unit; q, k, p and v of an attention, [B, H, tokens, channels] each.
            weights: of a linear unit, [N, K], those of its sites one below the other.

        Returns:
            Linear: ``scale`` and ``zero`` [N]; ``input_scale`` [1] with ``input_zero`` or ``q`` [1]; ``rho`` and
            ``beta`` [K] where a LayerNorm is re-parameterized. Attention: ``q.scale``, ``q.zero`` [H] and so on,
            ``p.q`` for a base.
        """
        if weights is None:
            return self._attention(unit.decision.operands, *data)
        return self._linear(unit, data[0], weights)

    # ----------------------------------------------------------------------------------------------- linear
    def _linear(self, unit: Any, x: np.ndarray, w: np.ndarray) -> Found:
        decision = unit.decisions[0]
        bits = bits_of(decision.weights, unit.name) if decision.weights is not None else None
        inputs = bits_of(decision.inputs.fmt, unit.name) if decision.inputs is not None else None
        if bits is None:
            raise RecipeError(f"{unit.name}: its inputs are quantized and its weights are not; give both, or skip it")
        if self.uniform != "fpcs":
            return self._by_ranges(unit, x, w, bits, inputs)
        grid = fpcs.uniform_grid(w, bits, False, self.search)
        if inputs is None:
            found = self._weights(w, x, x, bits, grid)
            return {"scale": found.scale, "zero": found.other}
        out: Found = {}
        if unit.kind == "norm" and self.reparameterize and inputs == bits:
            out["rho"], out["beta"] = self.channel_moves(x, inputs)
            x, w = x / out["rho"] - out["beta"], w * out["rho"]
            grid = fpcs.uniform_grid(w, bits, False, self.search)
        own = fpcs.search_uniform(
            lambda s, z: np.asarray(fpcs_losses.own_uniform(w, s, z, bits=bits, products=self._products)),
            *grid,
            self.search,
        )
        drawn = self._drawn(x, self.rows)
        power = unit.kind == "gelu" and self.gelu != "uniform"
        if power and self.gelu == "twin":
            pair, rounded, searched = self._twin_inputs(drawn, x, inputs, unit.shift)
        elif power:
            pair, rounded, searched = self._log_inputs(drawn, x, inputs, unit.shift)
        else:
            pair, rounded, searched = self._uniform_inputs(drawn, x, inputs)
        for _ in range(self.rounds):
            if power:
                pair = searched(w, dequantized(w, own, bits))
                own = self._weights(w, x, rounded(pair), bits, grid)
            else:
                own = self._weights(w, x, rounded(pair), bits, grid)
                pair = searched(w, dequantized(w, own, bits))
        out |= {"scale": own.scale, "zero": own.other, "input_scale": pair.scale}
        out[("twin" if self.gelu == "twin" else "q") if power else "input_zero"] = pair.other
        return out

    def _by_ranges(self, unit: Any, x: np.ndarray, w: np.ndarray, bits: int, inputs: int | None) -> Found:
        """A linear unit whose quantizers take their ranges from the data; nothing looks at outputs."""
        out: Found = {}
        if inputs is not None and unit.kind == "norm" and self.reparameterize and inputs == bits:
            out["rho"], out["beta"] = self.channel_moves(x, inputs)
            x, w = x / out["rho"] - out["beta"], w * out["rho"]
        own = ranged(w, bits, "minmax")
        out |= {"scale": own.scale, "zero": own.other}
        if inputs is None:
            return out
        if unit.kind == "gelu" and self.gelu in FIXED_BASE:
            top = np.full(1, x.max() + unit.shift, np.float32)
            return out | {"input_scale": top, "q": np.full(1, FIXED_BASE[self.gelu], np.float32)}
        if unit.kind == "gelu" and self.gelu != "uniform":
            raise RecipeError(f"AdaLog: gelu={self.gelu!r} is searched; write uniform='fpcs' with it")
        pair = ranged(self._drawn(x, self.rows).reshape(1, -1), inputs, self.uniform)
        return out | {"input_scale": pair.scale, "input_zero": pair.other}

    def _twin_inputs(self, drawn: np.ndarray, x: np.ndarray, bits: int, shift: float) -> tuple[Pairs, Any, Any]:
        """`_uniform_inputs` by twin grids: the fine one covers the negative numbers, the ratio is searched."""
        fine = np.float32(shift / (2 ** (bits - 1) - 1))
        pairs = [Pairs(np.full(1, fine * r, np.float32), np.full(1, np.log2(r)), np.zeros(1), 0)
                 for r in 2.0 ** np.array(TWIN_RATIOS)]  # fmt: skip
        first = min(pairs, key=lambda pair: float(((_twin(drawn, pair, bits, True) - drawn) ** 2).sum()))

        def searched(w: np.ndarray, near_w: np.ndarray) -> Pairs:
            return min(pairs, key=lambda pair: _product_error(_twin(drawn, pair, bits, True), drawn, w, near_w))

        return first, lambda pair: _twin(x, pair, bits, True), searched

    def _weights(
        self, w: np.ndarray, x: np.ndarray, rounded: np.ndarray, bits: int, grid: tuple[np.ndarray, np.ndarray]
    ) -> Pairs:
        known, products = fpcs_losses.moments(x, rounded), self._products
        return fpcs.search_uniform(
            lambda s, z: np.asarray(fpcs_losses.weight_uniform(w, known, s, z, bits=bits, products=products)),
            *grid,
            self.search,
        )

    def _uniform_inputs(self, drawn: np.ndarray, x: np.ndarray, bits: int) -> tuple[Pairs, Any, Any]:
        """The first pair, by the error of the inputs; what it makes of all; and the search by the error of outputs."""
        grid = fpcs.uniform_grid(x.reshape(1, -1), bits, True, self.search)
        flat, products = jnp.asarray(drawn.reshape(1, -1)), self._products

        def search(evaluate: Any) -> Pairs:
            return fpcs.search_uniform(evaluate, *grid, self.search, fpcs.SMALLEST_INPUT_SCALE)

        first = search(lambda s, z: np.asarray(fpcs_losses.own_uniform(flat, s, z, bits=bits, products=products)))

        def rounded(pair: Pairs) -> np.ndarray:
            return np.asarray(fpcs_losses.uniform(x, pair.scale, pair.other, bits))  # type: ignore[arg-type]

        parts = parts_of(drawn)

        def searched(w: np.ndarray, near_w: np.ndarray) -> Pairs:
            forms = [fpcs_losses.form_of(part, w, near_w) for part in parts]
            return search(
                lambda s, z: summed(
                    fpcs_losses.input_uniform(part, form, s, z, bits=bits, products=products)
                    for part, form in zip(parts, forms, strict=True)
                )
            )

        return first, rounded, searched

    def _log_inputs(self, drawn: np.ndarray, x: np.ndarray, bits: int, shift: float) -> tuple[Pairs, Any, Any]:
        """`_uniform_inputs` behind a GELU. The first pair is base 2 with the scale that the search starts from."""
        ends = fpcs.positive_ends(x, self.search.quantile)
        start = fpcs.log_start(ends, shift, self.search)
        pairs = [Pairs(np.full(1, start, np.float32), np.full(1, 37, np.float32), np.full(1, np.inf), 0)]
        added = np.float32(shift)

        def rounded(pair: Pairs) -> np.ndarray:
            logs = _log2(x + added)
            return np.asarray(_logarithmic(logs, pair, bits, self.zero)) - added

        products, parts = self._products, parts_of(drawn)
        logs = [fpcs_losses.logs_of(part, added) for part in parts]

        def searched(w: np.ndarray, near_w: np.ndarray) -> Pairs:
            forms = [fpcs_losses.form_of(part, w, near_w) for part in parts]

            def evaluate(s: np.ndarray, q: np.ndarray) -> np.ndarray:
                return summed(
                    fpcs_losses.input_log(part, form, s, q, bits=bits, zero=self.zero, products=products)  # type: ignore
                    for part, form in zip(logs, forms, strict=True)
                )

            start = float(pairs[-1].scale[0])
            only = FIXED_BASE.get(self.gelu)
            pairs.append(fpcs.search_log(evaluate, ends, shift, start, self.search, only=only))
            return pairs[-1]

        return pairs[0], rounded, searched

    def channel_moves(self, x: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
        """Return rho and beta, float32 [K], of inputs [M, K]: see the top of this module."""
        channels = np.ascontiguousarray(x.T)
        if self.uniform != "fpcs":
            return moves(channels, ranged(channels, bits, self.uniform))
        grid = fpcs.uniform_grid(channels, bits, True, self.search)
        found = fpcs.search_uniform(
            lambda s, z: np.asarray(fpcs_losses.own_uniform(channels, s, z, bits=bits, products=self._products)),
            *grid,
            self.search,
            fpcs.SMALLEST_INPUT_SCALE,
        )
        return moves(channels, found)

    # -------------------------------------------------------------------------------------------- attention
    def _attention(self, operands: Any, q: np.ndarray, k: np.ndarray, p: np.ndarray, v: np.ndarray) -> Found:
        q, k, p, v = (self._drawn(a, self.images) for a in (q, k, p, v))
        vt = np.ascontiguousarray(np.swapaxes(v, -1, -2))
        out: Found = {}
        out |= self._turns(operands, ("q", q), ("k", k))
        out |= self._turns(operands, ("p", p), ("v", vt))
        return out

    def _turns(self, operands: Any, first: tuple[str, np.ndarray], second: tuple[str, np.ndarray]) -> Found:
        """Search two operands [B, H, rows, K] of a product that sums over K in turn."""
        sides = [_HeadOperand(name, x, operands[name].fmt, self) for name, x in (first, second) if name in operands]
        plain = {name: x for name, x in (first, second)}
        for _ in range(self.rounds):
            for side in sides:
                other = next(name for name in plain if name != side.name)
                near = next((s.rounded() for s in sides if s.name == other), plain[other])
                side.look(plain[other], near)
        return {key: value for side in sides for key, value in side.found().items()}

    def _drawn(self, x: np.ndarray, count: int | None) -> np.ndarray:
        if count is None or count >= len(x):
            return x
        rows = np.sort(np.random.default_rng(self.seed).choice(len(x), count, replace=False))
        return np.ascontiguousarray(x[rows])


class _HeadOperand:
    """One operand of a product of activations, [B, H, rows, K], while its numbers are searched."""

    def __init__(self, name: str, x: np.ndarray, fmt: Any, how: AdaLog):
        self.name, self.x, self.fmt, self.how, self.search = name, x, fmt, how, how.search
        power = isinstance(fmt, Log) and how.softmax != "uniform"
        self.log, self.twin = power and how.softmax != "twin", power and how.softmax == "twin"
        self.bits = bits_of(fmt, f"operand {name}")
        if self.log:  # the scale of probabilities is 1
            base = FIXED_BASE.get(how.softmax, float(fmt.q))
            self.pair = Pairs(np.ones(1, np.float32), np.full(1, base, np.float32), np.full(1, np.inf), 0)
            return
        if self.twin:
            coarse = np.full(1, 2.0 ** (1 - self.bits), np.float32)
            self.pairs = [Pairs(coarse, np.full(1, float(r)), np.zeros(1), 0) for r in TWIN_RATIOS]
            self.pair = self.pairs[self.bits - 1]
            return
        slices = np.moveaxis(x, 1, 0).reshape(x.shape[1], -1)
        if how.uniform != "fpcs":
            self.pair = ranged(slices, self.bits, how.uniform)
            return
        self.grid = fpcs.uniform_grid(slices, self.bits, False, self.search)
        at = max(0, self.grid[0].shape[1] - 2)  # the next to last
        scale, zero = (a[:, at] for a in self.grid)
        self.pair = Pairs(scale, zero, np.full(len(scale), np.inf), 0)

    def rounded(self) -> np.ndarray:
        if self.twin:
            return _twin(self.x, self.pair, self.bits, False)
        if self.log:
            logs = _log2(self.x)
            return np.asarray(_logarithmic(logs, self.pair, self.bits, self.fmt.zero))
        scale, zero = self.pair.scale[:, None, None], self.pair.other[:, None, None]
        return np.asarray(fpcs_losses.uniform(self.x, scale, zero, self.bits))  # type: ignore[arg-type]

    def look(self, other: np.ndarray, near: np.ndarray) -> None:
        """Search with the other operand as it is rounded now."""
        if self.twin:
            errors = [_product_error(_twin(self.x, p, self.bits, False), self.x, other, near) for p in self.pairs]
            self.pair = self.pairs[int(np.argmin(errors))]
            return
        if self.log and self.how.softmax in FIXED_BASE or not self.log and self.how.uniform != "fpcs":
            return
        x, form = jnp.asarray(self.x), fpcs_losses.form_of(self.x, other, near)  # type: ignore[arg-type]
        how: Any = dict(bits=self.bits, products=fpcs_losses.chosen_products(self.how.products))
        if self.log:
            logs = fpcs_losses.logs_of(x, np.float32(0))  # type: ignore[arg-type]
            self.pair = fpcs.search_base(
                lambda s, q: np.asarray(fpcs_losses.heads_log(logs, form, s, q, zero=self.fmt.zero, **how))  # type: ignore
            )
            return
        self.pair = fpcs.search_uniform(
            lambda s, z: np.asarray(fpcs_losses.heads_uniform(x, form, s, z, **how)),  # type: ignore[arg-type]
            *self.grid,
            self.search,
        )

    def found(self) -> Found:
        kind = "q" if self.log else "twin" if self.twin else "zero"
        return {f"{self.name}.scale": self.pair.scale, f"{self.name}.{kind}": self.pair.other}


def _logarithmic(logs: Any, pair: Pairs, bits: int, zero: str) -> Any:
    """Numbers with these logarithms as one scale and base leave them."""
    scale, q = (jnp.asarray(a[0], jnp.float32) for a in (pair.scale, pair.other))
    return fpcs_losses.logarithmic(logs, scale, q, bits, zero)


@jax.jit
def _log2(x: Any) -> Any:
    return jnp.log2(jnp.maximum(x, 0))


def bits_of(fmt: Any, where: str) -> int:
    """Return the bits of a format that the search can set.

    Raises:
        RecipeError: it is neither `Int` without groups nor `Log`.
    """
    if isinstance(fmt, Log) or isinstance(fmt, Int) and fmt.group is None:
        return fmt.bits
    raise RecipeError(
        f"{where}: AdaLog searches Int(bits, symmetric=False) and Log(bits), not {fmt.name}; write one of these"
    )


def ranged(slices: np.ndarray, bits: int, how: str) -> Pairs:
    """Return scales and zero points from the ranges of slices [S, M], each with 0 in it.

    Args:
        slices: what each scale serves.
        bits: of the codes.
        how: "minmax", or "percentile": of `PERCENTILES` the one with the least squared error, slice by slice.
    """
    best: Pairs | None = None
    for part in (1.0,) if how == "minmax" else PERCENTILES:
        ends = np.quantile(slices, [1 - part, part], axis=1) if part < 1 else (slices.min(1), slices.max(1))
        low, high = np.minimum(ends[0], 0), np.maximum(ends[1], 0)
        scale = np.maximum((high - low) / (2**bits - 1), 1e-8).astype(np.float32)
        zero = np.clip(np.rint(-low / scale), 0, 2**bits - 1).astype(np.float32)
        loss = np.asarray(fpcs_losses.own_uniform(slices, scale[:, None], zero[:, None], bits=bits), np.float64)[:, 0]
        pair = Pairs(scale, zero, loss, 1)
        best = pair if best is None else fpcs.better(best, pair)
    assert best is not None
    return best


def moves(channels: np.ndarray, found: Pairs) -> tuple[np.ndarray, np.ndarray]:
    """Return rho and beta of channels [K, M] with these scales and zero points: see the top of this module."""
    moving = np.ptp(channels, axis=1) > 0
    if not moving.any():
        return np.ones(len(channels), np.float32), np.zeros(len(channels), np.float32)
    scale, zero = found.scale.astype(np.float64), found.other.astype(np.float64)
    s, z = scale[moving].mean(), np.rint(zero[moving].mean())
    rho = np.where(moving, scale / s, 1.0)
    beta = np.where(moving, z * s - zero * scale / rho, 0.0)
    return rho.astype(np.float32), beta.astype(np.float32)


def _twin(x: np.ndarray, pair: Pairs, bits: int, negative: bool) -> np.ndarray:
    """Numbers as twin grids leave them; ``other`` is log2 of the ratio of the steps."""
    fmt = TwinUniform(bits, int(pair.other[0]), negative=negative)
    return np.asarray(_rounded_to(x, jnp.asarray(pair.scale), fmt))


@functools.partial(jax.jit, static_argnames="fmt")
def _rounded_to(x: Any, scale: Any, fmt: Any) -> Any:
    aux = {"scale": scale.reshape((1,) * x.ndim)}
    return fmt.decode(fmt.encode(x, aux), aux)


def _product_error(near: np.ndarray, x: np.ndarray, w: np.ndarray, near_w: np.ndarray) -> float:
    return float(fpcs_losses.product_error(near - x, x, w, near_w))  # type: ignore[arg-type]


def dequantized(w: np.ndarray, pair: Pairs, bits: int) -> np.ndarray:
    """Return weights [N, K] as quantization with these scales and zero points leaves them."""
    return np.asarray(fpcs_losses.uniform(w, pair.scale[:, None], pair.other[:, None], bits))  # type: ignore[arg-type]


def parts_of(x: np.ndarray) -> list[Any]:
    """Return the rows of x [M, K] in parts, so many that memory is bounded."""
    rows = max(256, _ELEMENTS // x.shape[1])
    return [jnp.asarray(x[at : at + rows]) for at in range(0, len(x), rows)]


def summed(losses: Iterable[Any]) -> np.ndarray:
    """Return the sum of losses in float64."""
    return np.sum([np.asarray(part, np.float64) for part in losses], axis=0)
