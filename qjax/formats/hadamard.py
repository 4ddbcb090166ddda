"""Orthonormal matrices that spread one number over all: Hadamard matrices where there are some, and their relatives.

A Hadamard matrix has entries ±1 and orthogonal rows, so each row of H/√n has the same weight everywhere: multiplied
with it, one large number becomes n equal small ones. They are made here and not looked up:

    order 1, 2, 4, 8, ..       Sylvester: H_2 = [[1, 1], [1, -1]] and its Kronecker powers
    order q + 1                Paley's first construction, q = 3 mod 4 a prime power (12, 20, 24, 28, 44, 344, ..)
    order 2 (q + 1)            Paley's second, q = 1 mod 4 a prime power (36, 52, 76, 100, 148, ..)

both from the quadratic character of the field of q elements (Paley 1933, "On orthogonal matrices"). A length is cut
into factors, whose Kronecker product is the matrix: 2^p times the smallest of the orders above that holds the odd part.
Where the powers of two do not suffice for one (172 = 4 · 43, or any odd number), the odd part gets the matrix of the
Hartley transform, (cos + sin)(2π jk / n) / √n, whose entries are no larger than √(2/n); and where the odd part is
longer than `LONGEST`, equal blocks of the largest length that can be had stand along the diagonal.
"""

from __future__ import annotations

import functools
import math

import numpy as np

LONGEST = 512
"""The largest matrix that is no power of two: it is applied as a product, at n operations a number."""

_CHUNK = 6
"""Powers of two are applied as factors of up to 2**6: few products, each of few operations."""


def factors(length: int) -> tuple[int, ...]:
    """The orders of the matrices whose Kronecker product has this order.

    Args:
        length: 1 or more.

    Returns:
        Orders, outermost first, that multiply to ``length``; () for 1.

    Raises:
        ValueError: the odd part is longer than `LONGEST`; see `blocked`.
    """
    if length < 1:
        raise ValueError(f"a rotation of {length} numbers; 1 or more")
    odd, twos = length, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    if odd == 1:
        return _powers(twos)
    order = next((odd << n for n in range(2, twos + 1) if odd << n <= LONGEST and is_order(odd << n)), None)
    if order is None:
        if odd > LONGEST:
            raise ValueError(f"the odd part of {length} is {odd}, above {LONGEST}")
        order = odd
    return (*_powers(twos - (order // odd).bit_length() + 1), order)


def _powers(twos: int) -> tuple[int, ...]:
    """2**twos in equal parts of up to 2**`_CHUNK`."""
    parts = -(-twos // _CHUNK)
    return tuple(1 << (twos // parts + (n < twos % parts)) for n in range(parts))


@functools.lru_cache(maxsize=1024)
def blocked(length: int) -> int:
    """The length of the equal blocks in which a row of this length is rotated: its largest divisor with `factors`."""
    for parts in range(1, length + 1):
        if length % parts == 0:
            odd = length // parts
            odd //= odd & -odd
            if odd <= LONGEST:
                return length // parts
    raise ValueError(f"a rotation of {length} numbers; 1 or more")


@functools.lru_cache(maxsize=256)
def spreads(length: int) -> bool:
    """Whether a row of this length is rotated by one Hadamard matrix, every entry of which has the same magnitude."""
    return blocked(length) == length and all(is_order(n) for n in factors(length))


@functools.lru_cache(maxsize=1024)
def is_order(n: int) -> bool:
    """Whether a Hadamard matrix of this order is made here without a Kronecker product of two others."""
    if n in (1, 2) or (n > 2 and n & (n - 1) == 0):
        return True
    first, second = n - 1, n // 2 - 1
    return n % 4 == 0 and (
        (first % 4 == 3 and _prime_power(first) is not None) or (second % 4 == 1 and _prime_power(second) is not None)
    )


@functools.lru_cache(maxsize=64)
def orthonormal(n: int) -> np.ndarray:
    """The matrix of one factor, float32 [n, n]: a Hadamard matrix over √n, or else Hartley's.

    float32 holds it to 6e-8; `exact` is the same in float64.
    """
    matrix = exact(n).astype(np.float32)
    matrix.setflags(write=False)
    return matrix


def exact(n: int) -> np.ndarray:
    """`orthonormal` in float64."""
    if is_order(n):
        return hadamard(n) / math.sqrt(n)
    angle = 2 * np.pi * (np.outer(np.arange(n), np.arange(n)) % n) / n
    return (np.cos(angle) + np.sin(angle)) / math.sqrt(n)


def hadamard(n: int) -> np.ndarray:
    """A Hadamard matrix: float64 [n, n] of ±1 with orthogonal rows.

    Raises:
        ValueError: none is made here of that order.
    """
    if not is_order(n):
        raise ValueError(f"no Hadamard matrix of order {n} is constructed here; see qjax.formats.hadamard")
    if n & (n - 1) == 0:
        h = np.ones((1, 1))
        while len(h) < n:
            h = np.block([[h, h], [h, -h]])
        return h
    q = n - 1
    if q % 4 == 3 and _prime_power(q) is not None:
        # I + S, S the skew matrix of the quadratic character bordered by ones: S Sᵀ = q I
        s = np.zeros((n, n))
        s[0, 1:], s[1:, 0] = 1, -1
        s[1:, 1:] = _character(q)
        return s + np.eye(n)
    q = n // 2 - 1
    # C the symmetric conference matrix of order q + 1; its zeros become one 2 x 2 matrix, its ±1 another
    c = np.zeros((q + 1, q + 1))
    c[0, 1:], c[1:, 0] = 1, 1
    c[1:, 1:] = _character(q)
    return np.kron(c, np.array([[1, 1], [1, -1]])) + np.kron(np.eye(q + 1), np.array([[1, -1], [-1, -1]]))


def _prime_power(q: int) -> tuple[int, int] | None:
    """(p, k) with q = p**k, p an odd prime and k at most 3; None if there is none."""
    if q < 3 or q % 2 == 0:
        return None
    for k in (1, 2, 3):
        p = round(q ** (1 / k))
        if p**k == q and all(p % d for d in range(2, math.isqrt(p) + 1)):
            return p, k
    return None


def _character(q: int) -> np.ndarray:
    """[q, q] of χ(a - b) over the field of q elements: 0 for 0, 1 for squares, -1 for the rest."""
    found = _prime_power(q)
    assert found is not None
    p, k = found
    digits = np.stack([np.arange(q) // p**i % p for i in range(k)], axis=-1)  # element -> coefficients, lowest first
    modulus = _irreducible(p, k)
    weights = p ** np.arange(k)
    squares = {int(_product(d, d, modulus, p) @ weights) for d in digits[1:]}
    value = np.array([0, *(1 if a in squares else -1 for a in range(1, q))], np.float64)
    difference = (digits[:, None] - digits[None, :]) % p @ weights
    return value[difference]


def _irreducible(p: int, k: int) -> np.ndarray:
    """Coefficients [k], lowest first, of r with x**k = r modulo an irreducible polynomial of degree k, at most 3."""
    if k == 1:
        return np.zeros(1, np.int64)
    x = np.arange(p)
    for number in range(p**k):
        r = np.array([number // p**i % p for i in range(k)])
        values = (x**k - sum(int(c) * x**i for i, c in enumerate(r))) % p
        if values.all():  # of degree 2 or 3: irreducible if it has no root
            return r
    raise AssertionError(f"an irreducible polynomial of degree {k} over {p} exists")


def _product(a: np.ndarray, b: np.ndarray, modulus: np.ndarray, p: int) -> np.ndarray:
    """The product of two field elements."""
    k = len(a)
    if k == 1:
        return a * b % p
    long = np.convolve(a, b)
    for top in range(2 * k - 2, k - 1, -1):  # x**top = x**(top - k) * r
        long[top - k : top] += long[top] * modulus
        long[top] = 0
    return long[:k] % p
