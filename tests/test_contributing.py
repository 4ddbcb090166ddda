"""The examples of CONTRIBUTING and of the docs run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest


@pytest.mark.parametrize(("page", "count"), [("CONTRIBUTING.md", 3), ("docs/evaluation.md", 1)])
def test_the_examples_run(root, page, count):
    blocks = re.findall(r"^```python\n(.*?)^```", (root / page).read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == count
    command = [sys.executable, "-c", "\n".join(blocks)]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
