"""The README's first example is run, and its output compared with what the README shows."""

from __future__ import annotations

import contextlib
import io
import re

import numpy as np
import pytest

NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")


def blocks(text: str) -> tuple[str, str]:
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    output = re.search(r"```text\n(.*?)```", text, re.DOTALL)
    assert code and output
    return code.group(1), output.group(1)


def run_example(root, monkeypatch) -> tuple[str, str]:
    monkeypatch.chdir(root)
    code, shown = blocks((root / "README.md").read_text(encoding="utf-8"))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    return printed.getvalue(), shown


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_first_example_prints_what_the_readme_shows(root, monkeypatch):
    printed, shown = run_example(root, monkeypatch)
    words = [re.sub(r"[\s─]+", " ", NUMBER.sub("#", text)).strip() for text in (printed, shown)]
    assert words[0] == words[1]
    numbers = [[float(n.replace(",", "")) for n in NUMBER.findall(text)] for text in (printed, shown)]
    np.testing.assert_allclose(numbers[0], numbers[1], rtol=0.03)  # rounding of sums differs between processors


def test_the_example_is_as_short_as_promised(root):
    code, _ = blocks((root / "README.md").read_text(encoding="utf-8"))
    assert len([line for line in code.splitlines() if line.strip()]) <= 8
