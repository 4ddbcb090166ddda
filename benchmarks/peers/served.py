"""A process that measures when it is asked, so that its cases take turns with those of another process.

The asking side is `Peer`, the other `serve`: a line of JSON each way, on standard input and output. Standard library
only; what libraries print to standard output goes to standard error instead.

    {"ask": "versions"}               -> {"versions": {name: version}}
    {"ask": "prepare", "given": ...}  -> {"errors": {case: relative error of its result}, "failed": {case: why}}
    {"ask": "run", "case": name}      -> {"seconds": what one call took}
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).parents[2]


class Peer:
    """A process of another Python that serves.

    Args:
        python: the interpreter.
        module: what it runs, as ``python -m`` has it, from this repository.
        given: arguments of its command.

    Raises:
        RuntimeError: from any request, where the process has ended; the message has its last words.
    """

    def __init__(self, python: str, module: str, *given: str):
        self.command = [python, "-m", module, *given]
        self.name = " ".join(self.command[:3])
        self.begin()

    def begin(self) -> None:
        """Start the process, a new one where it has ended."""
        if hasattr(self, "process"):
            self.end()
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT
        )

    def ask(self, what: str, **more: Any) -> Any:
        """One request and its answer."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({"ask": what, **more}) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} has ended with {self.process.wait()} when asked to {what}")
        return json.loads(line)

    def prepare(self, given: dict[str, Any], instead: Mapping[str, dict[str, Any]] | None = None) -> dict[str, Any]:
        """Prepare cases; where the process crashes, in a new one with some of what is given replaced.

        Args:
            given: what the other side is given.
            instead: what is lost -> what is replaced then, tried in this order.

        Returns:
            ``errors`` and ``failed``, which names what was lost too.

        Raises:
            RuntimeError: it crashes however it is asked.
        """
        failed: dict[str, str] = {}
        ways = [*(instead or {}).items(), ("everything", {})]
        asked = given
        for lost, replaced in ways:
            try:
                found = self.ask("prepare", given=asked)
            except RuntimeError as e:
                failed[lost] = str(e).removeprefix(f"{self.name} ")
                self.begin()
                asked = {**given, **replaced}
                continue
            return {"errors": found["errors"], "failed": failed | found["failed"]}
        raise RuntimeError("; ".join(f"{self.name}, {lost}: {why}" for lost, why in failed.items()))

    def run(self, case: str) -> float:
        """Seconds of one call of a case."""
        return float(self.ask("run", case=case)["seconds"])

    def end(self) -> None:
        """Let the process end."""
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.end()


def serve(
    prepare: Callable[[Any], tuple[Mapping[str, Callable[[], Any]], Mapping[str, float], Mapping[str, str]]],
    packages: Iterable[str],
) -> None:
    """Answer until standard input ends.

    Args:
        prepare: of what was given, (case -> what to run, case -> error of its result, case -> why there is none).
        packages: distributions whose versions are told.
    """
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    cases: Mapping[str, Callable[[], Any]] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["ask"] == "versions":
            answer: dict[str, Any] = {"versions": {name: _version(name) for name in packages}}
        elif asked["ask"] == "prepare":
            cases = {}  # what was there is freed first
            cases, errors, failed = prepare(asked["given"])
            answer = {"errors": {n: errors[n] for n in cases}, "failed": dict(failed)}
        else:
            begun = time.perf_counter()
            cases[asked["case"]]()
            answer = {"seconds": time.perf_counter() - begun}
        out.write(json.dumps(answer) + "\n")
        out.flush()


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
