"""Arrays that are read when they are needed: parameters of a model that is larger than memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


class Lazy:
    """A parameter leaf that is read from somewhere each time it is needed, and not kept.

    `qjax.plan` and `qjax.trace` look at its shape; `qjax.quantize` reads it when its turn comes. A leaf that stacks
    layers is read layer by layer where ``read_slice`` says how.

    Args:
        shape: of the array.
        dtype: of the array.
        read: returns the whole array; called once for each use. An array on a device stays there.
        read_slice: returns slice i of the leading axis; without it the whole array is read and sliced.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dtype: Any,
        read: Callable[[], Any],
        read_slice: Callable[[int], Any] | None = None,
    ):
        self.shape, self.dtype = tuple(int(n) for n in shape), np.dtype(dtype)
        self._read, self._read_slice = read, read_slice

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the array when it is read."""
        return self.size * self.dtype.itemsize

    def __repr__(self) -> str:
        """Show shape and dtype; nothing is read."""
        return f"Lazy({self.dtype.name}[{','.join(map(str, self.shape))}])"

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Read the array, to the host."""
        return np.asarray(self._checked(self._read(), self.shape, dtype))

    def __jax_array__(self) -> jax.Array:
        """Read the array, to the default device."""
        return jnp.asarray(self._checked(self._read(), self.shape))

    def __getitem__(self, index: int) -> np.ndarray | jax.Array:
        """Read one slice of the leading axis."""
        if self._read_slice is None:
            return self._checked(self._read(), self.shape)[index]
        return self._checked(self._read_slice(int(index)), self.shape[1:])

    def _checked(self, found: Any, shape: tuple[int, ...], dtype: Any = None) -> np.ndarray | jax.Array:
        found = found if isinstance(found, jax.Array) else np.asarray(found)
        if found.shape != shape:
            raise ValueError(f"{self!r}: what was read has shape {found.shape} and not {shape}")
        wanted = np.dtype(self.dtype if dtype is None else dtype)
        return found if found.dtype == wanted else found.astype(wanted)
