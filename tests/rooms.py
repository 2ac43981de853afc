"""pytest plugin of `make test`: runs the rooms of tests/ in the order of the package and prints the time of each."""

import re
from collections import Counter
from pathlib import PurePath

import pytest

ORDER = ["build", "ops", "kernels", "models", "huggingface", "ecosystem", "cli"]  # rooms not named here come last
seconds: Counter[str] = Counter()
outcomes: dict[str, Counter[str]] = {}


def room_of(nodeid: str) -> str:
    parts = PurePath(nodeid.split("::")[0]).parts
    return parts[1] if len(parts) > 2 else "."


def share_of(nodeid: str) -> str:
    """The room, and apart from it the tests of tests/ops that run Triton's kernels."""
    room = room_of(nodeid)
    is_triton = room == "ops" and re.search(r"\btriton\b", nodeid.partition("[")[2])
    return "ops, triton" if is_triton else room


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rooms = {room_of(item.nodeid) for item in items}
    order = [*ORDER, *sorted(rooms.difference(ORDER))]
    items.sort(key=lambda item: order.index(room_of(item.nodeid)))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    room = share_of(report.nodeid)
    seconds[room] += report.duration
    if report.when == "call" or report.outcome != "passed":
        outcomes.setdefault(room, Counter())[report.outcome] += 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section("time per room")
    for room, counts in outcomes.items():
        results = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
        terminalreporter.write_line(f"tests/{room:<12} {seconds[room]:7.1f} s   {results}")
    terminalreporter.write_line(f"{'all':<18} {sum(seconds.values()):7.1f} s")
