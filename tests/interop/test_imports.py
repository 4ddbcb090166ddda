"""What adapters import, and what they say where their tool is missing."""

from __future__ import annotations

import subprocess
import sys


def python(root, code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=120)


def test_qjax_imports_no_tool_of_others(root):
    code = "import sys, qjax, qjax.interop, qjax.evaluate, qjax.folders, qjax.search\n"
    code += "print({'lm_eval', 'optuna', 'torch'} & {*sys.modules})"
    run = python(root, code)
    assert run.stdout.strip() == "set()", run.stderr


def test_a_missing_harness_is_named_with_its_extra(root):
    run = python(root, "import sys; sys.modules['lm_eval'] = None; import qjax.interop.lm_eval")
    assert run.returncode == 1 and "pip install 'qjax[lm-eval]'" in run.stderr.splitlines()[-1]


def test_a_missing_optuna_is_named_with_its_extra(root):
    run = python(root, "import sys; sys.modules['optuna'] = None; import qjax.interop.optuna")
    assert run.returncode == 1 and "pip install 'qjax[optuna]'" in run.stderr.splitlines()[-1]
