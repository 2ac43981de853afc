"""The pytest fixture `parity`: asserts the parity rule and keeps every measured ratio.

In a conftest.py: `pytest_plugins = ["fastbert.pytest_plugin"]`. Headroom is reported: the terminal summary names the worst
ratio of each check and dtype, and all of them are kept in pytest's cache under "fastbert/parity" and, with
`--parity-json FILE`, in a file.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from fastbert.parity import Verdict, judge

_kept = pytest.StashKey[list[dict[str, Any]]]()


class Parity:
    """Judges tensors for one test. Every verdict is kept, passed or not."""

    def __init__(self, test: str, kept: list[dict[str, Any]]) -> None:
        self.test, self.kept = test, kept

    def __call__(self, ours: Tensor, ref: Tensor, base: Tensor, *, name: str, elementwise: bool = False) -> Verdict:
        """Judges `ours` (parity.judge) under a check's name ("linear/torch") and asserts that it passes."""
        verdict = judge(ours, ref, base, elementwise)
        self.keep(name, str(base.dtype).removeprefix("torch."), verdict)
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


def worst(kept: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The record with the largest ratio of each (check, dtype), and how many were judged, sorted by check."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for record in kept:
        key = record["check"], record["dtype"]
        count = found[key]["judged"] + 1 if key in found else 1
        if key not in found or _ratio(record) > _ratio(found[key]):
            found[key] = dict(record)
        found[key]["judged"] = count
    return [found[key] for key in sorted(found)]


def _ratio(record: dict[str, Any]) -> float:
    return float(max(record["max_ratio"], record["rms_ratio"]))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--parity-json", metavar="FILE", help="write every measured parity ratio to FILE")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    kept = config.stash.get(_kept, [])
    if not kept:
        return
    terminalreporter.section("parity: worst measured / allowed (1 is the limit)")
    for record in worst(kept):
        terminalreporter.write_line(
            f"{record['check']:<34} {record['dtype']:<9} max {record['max_ratio']:.3f}  rms {record['rms_ratio']:.3f}"
            f"  ({record['judged']} judged)"
        )
    if config.cache is not None:
        config.cache.set("fastbert/parity", kept)
    if path := config.getoption("--parity-json"):
        Path(path).write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
