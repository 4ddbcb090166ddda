"""Running a function over several devices and counting what they say to one another."""

from __future__ import annotations

import re

import jax

SUM = {"all-reduce": 1}


def compiled(function, *arguments):
    """Run a function; return its result and how many collectives of each kind it takes."""
    program = jax.jit(function).lower(*arguments).compile()
    found = re.findall(
        r"= \S+ (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)\(", program.as_text()
    )
    return program(*arguments), {kind: found.count(kind) for kind in found}
