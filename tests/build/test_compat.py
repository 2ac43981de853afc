"""noxfile.py, which `make test-compat` runs: a row that cannot run has failed."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.build.conftest import ROOT


@pytest.mark.slow
def test_a_row_whose_python_is_absent_has_failed(source: Path, tmp_path: Path) -> None:
    rows = (ROOT / "noxfile.py").read_text()
    assert '"3.10"' in rows and rows.count('requires=["wheel"]') == 1
    without_wheel = rows.replace('requires=["wheel"]', "")  # which takes minutes, and sources that are not copied
    (source / "noxfile.py").write_text(without_wheel.replace('"3.10"', '"3.99"'))
    command = [sys.executable, "-m", "nox", "-f", str(source / "noxfile.py"), "-s", "compat(oldest)"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 1 and "compat(oldest) failed: Python interpreter 3.99 not found" in run.stderr, run.stderr
