"""A process for `benchmarks.peers.served` without other tools: a quick case, a slow one, one that fails, a crash."""

from __future__ import annotations

import os
import time

from benchmarks.peers.served import serve


def prepare(given):
    if given.get("crash"):
        os._exit(3)
    print("what libraries say is no answer")
    cases = {"quick": lambda: None, "slow": lambda: time.sleep(given["seconds"])}
    return cases, {"quick": 0.0, "slow": 0.5}, {"other": "ValueError: not here"}


if __name__ == "__main__":
    serve(prepare, ["numpy", "no-such-distribution"])
