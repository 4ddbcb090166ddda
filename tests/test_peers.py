"""Processes that measure when they are asked, and rounds in which they take turns with us."""

from __future__ import annotations

import functools
import importlib.metadata
import sys

import pytest

from benchmarks import cpu_peers
from benchmarks.peers.served import Peer
from benchmarks.rounds import interleaved


@pytest.fixture
def peer():
    with Peer(sys.executable, "tests.helpers.fake_peer") as made:
        yield made


@pytest.mark.slow
def test_a_process_tells_its_own_seconds(peer):
    assert peer.ask("versions") == {
        "versions": {"numpy": importlib.metadata.version("numpy"), "no-such-distribution": None}
    }
    found = peer.prepare({"seconds": 0.05})
    assert found == {"errors": {"quick": 0.0, "slow": 0.5}, "failed": {"other": "ValueError: not here"}}
    assert peer.run("quick") < 0.05 <= peer.run("slow")
    cases = {name: functools.partial(peer.run, name) for name in ("quick", "slow")}
    # A clock that stands still: what is told counts, not what the call took here.
    times = interleaved(cases, rounds=3, least_rounds=3, told=cases, clock=lambda: 0.0)
    assert len(times["slow"].seconds) == 3 and times["slow"].least >= 0.05 > times["quick"].least
    here = interleaved({"ours": lambda: None, **cases}, rounds=3, least_rounds=3, told=list(cases))
    assert here["slow"].over(here["ours"]) > 1


def test_a_crash_is_told_and_another_way_is_tried(peer):
    found = peer.prepare({"seconds": 0, "crash": True}, {"what crashes": {"crash": False}})
    assert found["errors"] == {"quick": 0.0, "slow": 0.5}
    assert found["failed"]["what crashes"] == "has ended with 3 when asked to prepare"
    with pytest.raises(RuntimeError, match="everything: has ended with 3"):
        peer.prepare({"crash": True})


def test_a_wrong_product_is_not_timed():
    cpu_peers.checked({"qjax float32": 1e-7, "torch linear_dynamic": 0.02, "ggml Q4_0 CPU": 0.09})
    with pytest.raises(SystemExit, match=r"ggml Q8_0 CPU: its result is wrong by 0.09"):
        cpu_peers.checked({"ggml Q8_0 CPU": 0.09})
    with pytest.raises(SystemExit, match="wrong by nan"):
        cpu_peers.checked({"qjax W4A8 g128": float("nan")})


def test_tables_say_what_was_not_measured():
    times = {"qjax float32": 2.0, "qjax W4A8 g128": 0.5, "ggml Q4_0": 1.0}
    row = {"shape": [8, 16], "tokens": 4, "ms": times, "over float32": {n: 2.0 / t for n, t in times.items()}}
    lost = {"torch int4pack_mm": "has no such kernel"}
    text = cpu_peers.written([{**row, "failed": lost}, {**row, "tokens": 64, "failed": lost}])
    assert "| 8 x 16 | 4 | 2 | 4.00 | 2.00 |" in text
    assert "torch int4pack_mm, which has no such kernel: 4 tokens of 8 x 16, 64 tokens of 8 x 16." in text
