"""Words of codes widened in the registers of a kernel for Hopper: `qjax.formats.words` below the level of Pallas.

What a thread has loaded, as `qjax.formats.word_tiles` orders it, are exactly its own numbers of the left operand of
`wgmma`: nothing moves between threads.
"""

from __future__ import annotations

import importlib
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from qjax.formats.tiles import ROWS
from qjax.formats.word_tiles import WORDS_OF_A_ROW, matrix_of
from qjax.formats.words import BFLOAT16, Decoder


def widened(plgpu: Any, words: Array, decoder: Decoder, dtype: Any, columns: int, at: int, interpret: bool) -> Array:
    """Return the numbers of some columns of a tile, [64, columns] in the order of columns, as ``WGMMA``.

    Args:
        plgpu: the module.
        words: int32 [bits, 256] of a tile, in registers as ``WG_STRIDED`` with vectors of 4.
        decoder: of its codes.
        dtype: bfloat16 or float16.
        columns: how many, 16, 32 or 64.
        at: which: those from ``at * columns`` on.
        interpret: whether the interpreter runs it, which knows no registers.
    """
    if interpret:
        pairs = decoder.numbers(lax.bitcast_convert_type(words, jnp.uint32), dtype)
        halves = jnp.stack([jnp.stack([p, p >> np.uint32(16)], axis=-1) for p in pairs], axis=-2)
        numbers = lax.bitcast_convert_type(halves.astype(jnp.uint16), dtype)
        whole = matrix_of(numbers.reshape(-1, *numbers.shape[-2:]))
        return whole[:, at * columns : (at + 1) * columns]
    layouts = plgpu.Layout
    out = plgpu.ShapeDtypeStruct((ROWS, columns), dtype, layout=layouts.WGMMA)

    @plgpu.inline_mgpu(arg_types=(layouts.WG_STRIDED((decoder.bits, WORDS_OF_A_ROW), vec_size=4),), return_type=out)
    def inline(_: Any, registers: Any) -> Any:
        return _operand(registers, decoder, dtype, columns, at)

    return inline(words)


def _operand(words: Any, decoder: Decoder, dtype: Any, columns: int, at: int) -> Any:
    """The registers of `widened`."""
    ir: Any = importlib.import_module("jaxlib.mlir.ir")
    vector: Any = importlib.import_module("jaxlib.mlir.dialects.vector")
    mgpu: Any = importlib.import_module("jax.experimental.mosaic.gpu")
    utils: Any = importlib.import_module("jax.experimental.mosaic.gpu.utils")
    kind = ir.BF16Type if np.dtype(dtype) == BFLOAT16 else ir.F16Type
    pair = ir.VectorType.get((2,), kind.get())
    tiles = columns // 8
    # [tile of rows, tile of columns, warp, 1, half of 16 rows, 1, lanes, vector]: what is spread over threads counts 1.
    out = np.empty((1, tiles, 1, 1, 2, 1, 1, 1, 1), dtype=object)
    for i in range(2 * decoder.bits):  # word of the thread: cell of columns, then half of 16 rows
        first = i // 2 * decoder.pairs - at * tiles  # tile of 8 columns where the word begins
        if not -decoder.pairs < first < tiles:
            continue
        loaded = words.registers[i // 4]
        word = Register(vector.extract(loaded, dynamic_position=[], static_position=[i % 4]))
        for t, number in enumerate(decoder.numbers(word, dtype), first):
            if 0 <= t < tiles:
                out[0, t, 0, 0, i % 2, 0, 0, 0, 0] = utils.bitcast(number.value, pair)
    return mgpu.FragmentedArray(_registers=out, _layout=mgpu.WGMMA_LAYOUT, _is_signed=None)


class Register:
    """A register of 32 bits below the level of Pallas, with the operators of unsigned words."""

    def __init__(self, value: Any):
        self.value = value

    @staticmethod
    def _modules() -> tuple[Any, Any, Any]:
        names = ("jaxlib.mlir.ir", "jaxlib.mlir.dialects.arith", "jaxlib.mlir.dialects.llvm")
        return tuple(map(importlib.import_module, names))  # pyright: ignore[reportReturnType]

    @staticmethod
    def _value(other: Any) -> Any:
        if isinstance(other, Register):
            return other.value
        ir, arith, _ = Register._modules()
        word = ir.IntegerType.get_signless(32)
        signed = int(other) - (1 << 32) if int(other) >> 31 else int(other)
        return arith.constant(word, ir.IntegerAttr.get(word, signed))

    def _by(self, name: str, other: Any) -> Register:
        return Register(getattr(Register._modules()[1], name)(self.value, Register._value(other)))

    def __and__(self, other: Any) -> Register:
        return self._by("andi", other)

    def __or__(self, other: Any) -> Register:
        return self._by("ori", other)

    def __xor__(self, other: Any) -> Register:
        return self._by("xori", other)

    def __lshift__(self, other: Any) -> Register:
        return self._by("shli", other)

    def __rshift__(self, other: Any) -> Register:
        return self._by("shrui", other)

    @staticmethod
    def permuted(low: Any, high: Any, selector: Any) -> Register:
        """As `qjax.formats.words.permuted`."""
        return Register.assembled("prmt.b32 $0, $1, $2, $3;", low, high, selector)

    def masked(self, mask: int, rest: Any) -> Register:
        """As `qjax.formats.words.masked`."""
        if isinstance(rest, int) and not rest:
            return self & mask
        return Register.assembled("lop3.b32 $0, $1, $2, $3, (0xf0 & 0xcc) | 0xaa;", self, mask, rest)

    def fma(self, factor: float, added: Any, dtype: Any) -> Register:
        """As `qjax.formats.words.fma`."""
        kind = "bf16x2" if np.dtype(dtype) == BFLOAT16 else "f16x2"
        twice = lambda a: int(np.asarray(a, dtype).view(np.uint16)) * 0x10001  # noqa: E731
        added = added if isinstance(added, Register) else twice(added or -0.0)
        return Register.assembled(f"fma.rn.{kind} $0, $1, $2, $3;", self, twice(factor), added)

    @staticmethod
    def assembled(text: str, *operands: Any) -> Register:
        """One instruction of PTX with a 32-bit result ``$0``."""
        ir, _, llvm = Register._modules()
        word = ir.IntegerType.get_signless(32)
        values = [Register._value(a) for a in operands]
        return Register(llvm.inline_asm(word, values, text, ",".join(["=r"] + ["r"] * len(values))))
