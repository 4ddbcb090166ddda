"""The examples of CONTRIBUTING run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys


def test_the_examples_run(root):
    blocks = re.findall(r"^```python\n(.*?)^```", (root / "CONTRIBUTING.md").read_text(), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3  # a format, a prepare pass, a lowering
    command = [sys.executable, "-c", "\n".join(blocks)]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
