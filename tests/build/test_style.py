import subprocess
import sys

import pytest

from tests.build.conftest import ROOT


@pytest.mark.parametrize("tool", ["ruff check --quiet", "ruff format --check --quiet", "mypy"])
def test_style_and_types(tool: str) -> None:
    run = subprocess.run([sys.executable, "-m", *tool.split()], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, f"{tool}\n{run.stdout}{run.stderr}"
