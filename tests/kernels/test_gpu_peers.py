"""Peers of the GPU benchmark: the process, what it says when something fails, and where its times are put."""

from __future__ import annotations

import sys
import types

import jax
import jax.numpy as jnp
import pytest

from benchmarks.gpu_parts import peers, ragged
from benchmarks.peers import gpu_products, tokamax_ragged


def test_times_stand_beside_the_kernels_that_compute_the_same():
    shape = {"n": 256, "k": 128, "tokens": 16}
    parts = {
        "a": {"times": [{"kernel": "W4A16 int4 g128, bfloat16", **shape, "peers": {"bfloat16": 2.0}}]},
        "b": {"times": [{"kernel": "Triton W8A8 int8 per channel, bfloat16, sm_90a", **shape}]},
        "c": {"times": [{"kernel": "W4A16 int4 g128, bfloat16", **shape, "tokens": 1}], "checks": []},
        "peers": {
            "times": [
                {"peer": "int4", "beside": "W4A16 int4 g128, bfloat16", **shape, "us": 3.0},
                {"peer": "int8", "beside": "W8A8 int8", **shape, "us": 4.0},
                {"peer": "none", "beside": "W8A8 int8", **shape, "failure": "no"},
            ]
        },
    }
    peers.merged(parts)
    assert parts["a"]["times"][0]["peers"] == {"bfloat16": 2.0, "int4": 3.0}
    assert parts["b"]["times"][0]["peers"] == {"int8": 4.0}
    assert "peers" not in parts["c"]["times"][0]
    peers.merged({"a": {"checks": []}})


@pytest.mark.torch
def test_what_fails_is_a_row_with_the_reason():
    pytest.importorskip("torch")
    assert peers.by_process([], [1], 0) == []
    rows = peers.by_process([["a layer", 256, 256]], [1, 17], 60, "--device", "cpu")
    by = {(r["kernel"], r["tokens"]): r for r in rows}
    assert by["torch bfloat16", 17]["us"] > 0 and by["torch _int_mm", 17]["us"] > 0
    assert ("torch _int_mm", 1) not in by  # it takes 17 tokens at least
    assert all(r.get("us", 0) > 0 or r["failure"] for r in rows)
    assert {r["kernel"] for r in rows} == set(gpu_products.PEERS)


def test_a_process_that_dies_says_how():
    (row,) = peers.by_process([["a layer"]], ["no number"], 60)
    assert "ended with 2" in row["failure"]


def test_the_fastest_configuration_of_tokamax_that_is_right_counts(monkeypatch):
    def honest(x, w, sizes):
        return jax.lax.ragged_dot(x, jnp.swapaxes(w[0].astype(x.dtype) * 0.01, 1, 2), sizes)

    def broken(x, w, sizes):
        raise NotImplementedError("no room")

    found = {"xla": honest, "slow": lambda *a: honest(*a), "fast": lambda *a: honest(*a) * 1.001}
    found |= {"wrong": lambda *a: honest(*a) * 1.1, "broken": broken}
    measured = []

    def us(program, *sets):
        assert isinstance(program, jax.stages.Compiled) and len(sets) == 2
        measured.append(program)
        return (3.0, 2.0)[len(measured) - 1]

    clock = types.SimpleNamespace(us=us)
    x, sizes = jnp.ones((8, 128), jnp.float32), [jnp.asarray([3, 0, 2, 0, 0, 1, 0, 0]) for _ in range(2)]
    monkeypatch.setattr(tokamax_ragged, "products", lambda tokens: dict(found))
    assert ragged.tokamax_us(clock, x, sizes, 128, 128) == {"us": 2.0, "config": "fast"}
    monkeypatch.setattr(tokamax_ragged, "products", lambda tokens: {"xla": honest, "broken": broken})
    assert ragged.tokamax_us(clock, x, sizes, 128, 128) == {"failure": "no configuration of tokamax runs"}


def test_without_tokamax_there_is_a_reason(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokamax", None)
    why = ragged.tokamax_us(None, jnp.ones((8, 128)), [], 128, 128)["failure"]
    assert why.startswith("tokamax cannot be imported (")
