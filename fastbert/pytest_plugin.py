"""The pytest fixture `parity`: asserts the parity rule and keeps every measured ratio.

In a conftest.py: `pytest_plugins = ["fastbert.pytest_plugin"]`. Headroom is reported: the terminal summary
names the worst ratio of each op and backend, or model, in each dtype; every one is kept in pytest's cache under
"fastbert/parity" and, with `--parity-json FILE`, in a file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from fastbert.dtypes import dtype_name
from fastbert.parity import Verdict, judge

_kept = pytest.StashKey[list[dict[str, Any]]]()


class Parity:
    """Judges tensors for one test. Every verdict is kept, passed or not."""

    def __init__(self, test: str, kept: list[dict[str, Any]]) -> None:
        self.test, self.kept = test, kept

    def __call__(self, ours: Tensor, ref: Tensor, base: Tensor, *, name: str, elementwise: bool = False) -> Verdict:
        """Judges `ours` (parity.judge) under a check's name ("linear/torch") and asserts that it passes."""
        verdict = judge(ours, ref, base, elementwise)
        self.keep(name, dtype_name(base.dtype), verdict)
        assert verdict.passed, f"{name}: {verdict}"
        return verdict

    def keep(self, name: str, dtype: str, verdict: Any) -> None:
        """Keeps a verdict (or anything with its ratios) that was made elsewhere."""
        ratios = {"max_ratio": verdict.max_ratio, "rms_ratio": verdict.rms_ratio}
        self.kept.append({"check": name, "dtype": dtype, **ratios, "test": self.test})


@pytest.fixture
def parity(request: pytest.FixtureRequest) -> Parity:
    """Call it as parity(ours, ref, base, name=..., elementwise=False)."""
    return Parity(request.node.nodeid, request.config.stash.setdefault(_kept, []))


def worst(kept: Iterable[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The largest ratio by check and dtype; a check is the first two parts of a name: "linear/torch"."""
    found: dict[str, dict[str, float]] = {}
    for record in kept:
        dtypes = found.setdefault("/".join(record["check"].split("/")[:2]), {})
        dtypes[record["dtype"]] = max(_ratio(record), dtypes.get(record["dtype"], 0.0))
    return dict(sorted(found.items()))


def _ratio(record: dict[str, Any]) -> float:
    return float(max(record["max_ratio"], record["rms_ratio"]))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--parity-json", metavar="FILE", help="write every measured parity ratio to FILE")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    kept = config.stash.get(_kept, [])
    if not kept:
        return
    terminalreporter.section(f"parity: worst of {len(kept)} measured ratios (1 is the limit)")
    dtypes = sorted({record["dtype"] for record in kept})
    terminalreporter.write_line(" " * 44 + "".join(f"{dtype:>10}" for dtype in dtypes))
    for check, ratios in worst(kept).items():
        cells = "".join(f"{ratios[dtype]:>10.3f}" if dtype in ratios else " " * 10 for dtype in dtypes)
        terminalreporter.write_line(f"{check:<44}{cells}")
    if cache := getattr(config, "cache", None):  # pytest -p no:cacheprovider has none
        cache.set("fastbert/parity", kept)
    if path := config.getoption("--parity-json"):
        Path(path).write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
