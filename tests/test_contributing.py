"""The examples of CONTRIBUTING and of the docs run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest


# The second example of evaluation.md is that of an extra, and reads tasks from the network.
@pytest.mark.every(2)
@pytest.mark.parametrize(("page", "count", "run_first"), [("CONTRIBUTING.md", 3, 3), ("docs/evaluation.md", 2, 1)])
def test_the_examples_run(root, page, count, run_first):
    blocks = re.findall(r"^```python\n(.*?)^```", (root / page).read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == count
    command = [sys.executable, "-c", "\n".join(blocks[:run_first])]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
