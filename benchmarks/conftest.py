from typing import Any

from fastbert.provenance import provenance


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    """What --benchmark-json says of the machine: versions, commit, threads, load too."""
    machine_info["fastbert"] = provenance()
