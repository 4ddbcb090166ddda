"""Strips of 2 and 4 bits on the GPU at hand: against float64 NumPy, then beside bfloat16, W4A16 and int2."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from benchmarks.gpu_parts.clock import CLOSE, SHAPES, Clock, checked, copies
from benchmarks.gpu_parts.lookup import product
from benchmarks.gpu_parts.weights16 import packed
from benchmarks.kernel_cases.mixed import ALONE, FORMATS, kernel
from qjax import ops
from qjax.formats import Int, MixedBits, QArray, assemble, pack_bits, quantize_array
from qjax.formats.mixed_layout import pack_map
from qjax.kernels.dot.mixed import MOST


def numbers(w: QArray, dtype: Any = None, sparse: Any = True) -> np.ndarray:
    """What a weight [N, K] in neutral order stands for, float64, strip by strip from the equations of its format.

    With a ``dtype``, scales are rounded to it (those of 2-bit strips to float16 first), and what they make of codes, as
    the kernel has it. FP16 corrections are left out without ``sparse``, or rounded to the dtype that it is.
    """
    fmt = w.fmt
    assert isinstance(fmt, MixedBits)
    codes, aux = np.asarray(w.unpacked()).astype(np.float64), {name: np.asarray(a) for name, a in w.aux.items()}
    n, k = codes.shape
    is_wide = _is_wide(fmt, aux.get("strips"), fmt.strips(k).count, fmt.share == 1)
    to = (lambda a, *kinds: a) if dtype is None else _rounded
    narrow_columns = sum(_columns(k, strip) for strip in range(len(is_wide)) if not is_wide[strip])
    out, seen, begins = np.zeros((n, k)), [0, 0], [0, narrow_columns]
    for strip, wide in enumerate(map(int, is_wide)):
        count, number, at = _columns(k, strip), seen[wide], begins[wide]
        seen[wide], begins[wide] = number + 1, at + count
        if wide:
            group = 16 * number // fmt.wide_group
            scale = to(aux["wide_scale"][:, group].astype(np.float64), dtype)
            zero = (aux["wide_zero"][:, group // 2] >> 4 * (group % 2) & 15).astype(np.float64)
        else:
            three, g = divmod(number, 3)
            word, of_tile = aux["words"][:, three].astype(np.int64), np.arange(n) // fmt.tile
            zero = (word >> 2 * g & 3).astype(np.float64)
            code = word >> 6 + sum(fmt.scale_bits[:g]) & (1 << fmt.scale_bits[g]) - 1
            steps = aux["tile_scale"].astype(np.float64).reshape(-1, aux["words"].shape[1], 3)[of_tile, three, g]
            offset = aux["tile_zero"].astype(np.int64).reshape(-1, aux["words"].shape[1])[of_tile, three] >> 4 * g & 15
            scale = to((code + offset) * steps, np.float16, dtype)
        own = codes[:, at : at + count]
        out[:, 16 * strip : 16 * strip + count] = to((own - zero[:, None]) * scale[:, None], dtype)
    if sparse and "outlier_value" in aux:
        begins = aux["outlier_row"][0].astype(np.int64)
        rows = np.repeat(np.arange(n), np.diff(begins))
        values = aux["outlier_value"][0].astype(np.float64 if sparse is True else sparse)
        out[rows, aux["outlier_column"][0].astype(np.int64)] += values.astype(np.float64)
    return out * 2.0 ** int(aux["exponent"].reshape(-1)[0])


def _is_wide(fmt: MixedBits, packed: Any, count: int, otherwise: bool) -> np.ndarray:
    """Which strips are 4-bit, of the map: 2 bits a quad, or a bit a strip."""
    if packed is None:
        return np.full(count, otherwise)
    bits = np.unpackbits(packed[0], bitorder="little")
    if fmt.select == "global":
        return bits[:count].astype(bool)
    which = bits[0::2] + 2 * bits[1::2]
    return (np.arange(4) == which[: count // 4, None]).reshape(-1)


def _columns(k: int, strip: int) -> int:
    """How many of K columns are in a strip."""
    return min(max(k - 16 * strip, 0), 16)


def _rounded(a: np.ndarray, *kinds: Any) -> np.ndarray:
    for kind in kinds:
        a = a.astype(kind).astype(np.float64)
    return a


def weight(fmt: MixedBits, n: int, k: int, seed: int = 0, outs: tuple[int, ...] = ()) -> QArray:
    """A weight [N, K], or [*outs, K], in neutral order, of random codes, scales, zero points and corrections."""
    rng = np.random.default_rng(seed)
    strips, count = fmt.strips(k), fmt.outlier_count(n, k)
    tiles, groups = -(-n // fmt.tile), -(-strips.wide * fmt.strip // fmt.wide_group)
    if fmt.select == "global":
        free = strips.count - (k % fmt.strip > 0 and strips.narrow > 0)  # a strip that is not whole is 2-bit
        is_wide = np.isin(np.arange(strips.count), rng.choice(free, strips.wide, replace=False))
    else:
        which = rng.integers(0, 4, strips.wide)
        which[-1] = 0 if strips.forced is not None else which[-1]
        is_wide = (np.arange(4) == which[:, None]).reshape(-1)
    codes = np.where(np.arange(k) < strips.narrow_columns, rng.integers(0, 4, (n, k)), rng.integers(0, 16, (n, k)))
    narrow = np.repeat(~is_wide, fmt.strip).nonzero()[0]
    narrow = narrow[narrow < k]
    places = np.sort(rng.choice(n * len(narrow), count, replace=False))
    aux: Any = {"exponent": np.full((1, 1), -17, np.int8)}
    if strips.narrow:
        aux |= {
            "words": rng.integers(0, 1 << 6 + sum(fmt.scale_bits), (n, strips.triples)).astype(np.uint16),
            "tile_scale": rng.uniform(1, 180, (1, 3 * tiles * strips.triples)).astype(np.float16),
            "tile_zero": rng.integers(0, 1 << 12, (1, tiles * strips.triples)).astype(np.uint16),
        }
    if strips.wide:
        aux |= {
            "wide_scale": rng.uniform(1, 1000, (n, groups)).astype(np.float16),
            "wide_zero": pack_bits(rng.integers(0, 16, (n, groups)).astype(np.uint8), 4),
        }
    if strips.narrow and strips.wide:
        aux["strips"] = pack_map(is_wide, fmt.rule)[None]
    if count:
        aux |= {
            "outlier_value": 99 * rng.normal(size=(1, count)).astype(np.float16),
            "outlier_column": narrow[places % len(narrow)][None].astype(np.uint16),
            "outlier_row": np.searchsorted(places // len(narrow), np.arange(n + 1))[None].astype(np.uint32),
        }
    aux = {name: jnp.asarray(a) for name, a in aux.items()}
    return assemble(jnp.asarray(codes, jnp.uint8), aux, fmt, shape=(*(outs or (n,)), k), in_axes=len(outs) or 1)


def checks(quick: bool) -> list[dict[str, Any]]:
    """Every kind and dtype at odd and even sizes."""
    out = []
    run = jax.jit(product, static_argnums=2)
    for fmt in dict.fromkeys((*FORMATS, *ALONE)):
        for n, k in ((264, 200), (512, 2048)):
            w = weight(fmt, n, k)
            p = ops.pack(w)
            for dtype, every in (("bfloat16", (1, 7, 17, 64, 130)), ("float16", (5, 64))):
                kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16
                exact = [numbers(w, kind, sparse) for sparse in (True, kind)]  # few tokens, many
                for tokens in every[:: 2 if quick else 1]:
                    row = {"kernel": f"{kernel(fmt)}, {dtype}", "case": f"[{n}, {k}], {tokens} tokens"}
                    with checked(row, out):
                        x = jnp.asarray(np.random.default_rng(tokens).normal(size=(tokens, k)), dtype)
                        y = np.asarray(run(x, p, jnp.float32), np.float64)
                        inputs, known = np.asarray(x, np.float64), exact[tokens > MOST]
                        worst = float(np.max(np.abs(y - inputs @ known.T) / (np.abs(inputs) @ np.abs(known).T)))
                        row |= {"error": worst, "right": worst < CLOSE}
    return out


def times(clock: Clock) -> list[dict[str, Any]]:
    """Two layers, and what corrections cost."""
    out = []
    for layer in ("Llama-3-8B gate and up", "Llama-3-70B q, o"):
        n, k = SHAPES[layer]
        peers = {
            "W4A16": [packed(n, k, s) for s in range(copies(n * k // 2))],
            "int2 g128": [packed(n, k, s, Int(2, group=128)) for s in range(copies(n * k // 4))],
        }
        theirs: dict[int, dict[str, float]] = {}
        for fmt in FORMATS:
            ours = [_drawn(fmt, n, k, s) for s in range(copies(n * k * 3 // 8))]
            for tokens in (1, 16, 256):
                if clock.left() <= 0:
                    return out
                x = jax.random.normal(jax.random.key(0), (tokens, k), jnp.bfloat16)
                row = {"kernel": f"{kernel(fmt)}, bfloat16", "layer": layer, "n": n, "k": k, "tokens": tokens}
                with checked(row, out, "us"):
                    row["us"] = clock.us(product, *[(x, w) for w in ours])
                    row |= {"bytes": ours[0].nbytes + tokens * (n + k) * 2, "flops": 2 * tokens * n * k}
                    row["ceiling_us"] = clock.ceiling_us(ours[0].nbytes, 2 * tokens * n * k)
                    if tokens not in theirs:
                        theirs[tokens] = {
                            name: clock.us(product, *[(x, w) for w in many]) for name, many in peers.items()
                        }
                    row["peers"] = {"bfloat16": clock.bfloat16_us(n, k, tokens), **theirs[tokens]}
    return out


def _drawn(fmt: MixedBits, n: int, k: int, seed: int) -> QArray:
    """A packed weight, quantized on the device."""
    draw = jax.jit(lambda key: ops.pack(quantize_array(jax.random.normal(key, (n, k)), fmt, in_axes=1)))
    return draw(jax.random.key(seed))
