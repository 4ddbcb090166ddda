"""Unknown factors that equations tie together: a union-find over signed unknowns, vectorized.

An array of *codes* says what each element is multiplied by: code 0 is the factor one, code ``+i`` the unknown factor
``f_i``, code ``-i`` its reciprocal. Requiring two codes to be equal (`Ties.equal`) merges the unknowns behind them, or
fixes one of them at one. What is fixed remembers why.

Arrays of codes are compact: a dimension along which all codes are equal has size one, whatever the size of the value.
"""

from __future__ import annotations

import numpy as np


class Ties:
    """The unknowns of one program.

    Attributes:
        parent: for each unknown the unknown it was merged into, or itself. Number 0 is no unknown.
        sign: +1 or -1: the unknown is that power of its parent.
        fixed: 0, or for a root that has to be one the number of the reason.
    """

    def __init__(self) -> None:
        self.count = 1
        self.parent = np.zeros(1024, np.int32)
        self.sign = np.ones(1024, np.int32)
        self.fixed = np.zeros(1024, np.int32)

    def fresh(self, shape: tuple[int, ...]) -> np.ndarray:
        """Codes of new unknowns, one for each element."""
        size = int(np.prod(shape, dtype=np.int64))
        start, self.count = self.count, self.count + size
        if self.count > len(self.parent):
            more = max(self.count, 2 * len(self.parent)) - len(self.parent)
            self.parent = np.concatenate([self.parent, np.zeros(more, np.int32)])
            self.sign = np.concatenate([self.sign, np.ones(more, np.int32)])
            self.fixed = np.concatenate([self.fixed, np.zeros(more, np.int32)])
        made = np.arange(start, self.count, dtype=np.int32)
        self.parent[start : self.count] = made
        return made.reshape(shape)

    def roots(self, codes: np.ndarray) -> np.ndarray:
        """The codes in terms of roots, fixed ones included."""
        at, sign = np.abs(codes), np.sign(codes).astype(np.int32)
        while True:
            up = self.parent[at]
            if np.array_equal(up, at):
                break
            sign = sign * self.sign[at]
            at = up
        unknown = np.abs(codes)
        self.parent[unknown] = at  # paths stay short
        self.sign[unknown] = np.where(codes < 0, -sign, sign) + (codes == 0)
        return at * sign

    def resolve(self, codes: np.ndarray) -> np.ndarray:
        """The codes in terms of roots; 0 where the factor is one."""
        roots = self.roots(codes)
        return np.where(self.fixed[np.abs(roots)] > 0, 0, roots)

    def why(self, codes: np.ndarray) -> int:
        """Number of the reason why the first fixed unknown among the codes is fixed; 0 if none is."""
        reasons = self.fixed[np.abs(self.roots(codes))].ravel()
        found = np.flatnonzero(reasons)
        return int(reasons[found[0]]) if len(found) else 0

    def fix(self, codes: np.ndarray, reason: int) -> None:
        """Require the codes to be one."""
        at = np.unique(np.abs(self.roots(codes)))
        at = at[(at > 0) & (self.fixed[at] == 0)]
        self.fixed[at] = reason

    def equal(self, a: np.ndarray, b: np.ndarray, reason: int) -> None:
        """Require codes that broadcast against one another to be equal; ``reason`` is why, where that fixes some."""
        a, b = np.broadcast_arrays(a, b)
        a, b = a.ravel(), b.ravel()
        while True:
            ra, rb = self.roots(a), self.roots(b)
            na, nb = np.abs(ra), np.abs(rb)
            one = (na == 0) | (nb == 0)
            self.fix(np.where(na == 0, rb, ra)[one], reason)
            inverse = (na == nb) & (ra != rb)  # f = 1 / f
            self.fix(ra[inverse], reason)
            fixed_a, fixed_b = self.fixed[na], self.fixed[nb]
            for there, here, at in ((fixed_a, fixed_b, nb), (fixed_b, fixed_a, na)):
                inherits = (there > 0) & (here == 0) & (at > 0)
                self.fixed[at[inherits]] = there[inherits]
            fixed_a, fixed_b = self.fixed[na] > 0, self.fixed[nb] > 0
            apart = (na != nb) & ~one & ~fixed_a & ~fixed_b
            again = apart | (fixed_a != fixed_b) & ~one
            if not again.any():
                return
            a, b = a[again], b[again]
            ra, rb, na, nb = ra[apart], rb[apart], na[apart], nb[apart]
            high, low = np.maximum(na, nb), np.minimum(na, nb)
            # of several new parents of one root the last one written stays; the other pairs come again
            self.parent[high] = low
            won = self.parent[high] == low
            self.sign[high[won]] = (np.sign(ra) * np.sign(rb))[won]
