"""What nvidia-smi says of the card; nothing is set."""

from __future__ import annotations

import subprocess

import torch

from benchmarks.record.setting import Line

IDENTITY = ("name", "uuid", "driver_version", "vbios_version", "pstate", "power.limit", "clocks.max.sm",
            "clocks.max.mem", "persistence_mode", "compute_mode", "mig.mode.current", "ecc.mode.current")  # fmt: skip
STATE = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "utilization.gpu", "memory.used")
FIELDS = {"identity": IDENTITY, "state": STATE}


def asked(fields: tuple[str, ...], place: torch.device) -> Line:
    """Field → what nvidia-smi says; "note": in words, why it says nothing."""
    if place.type != "cuda":
        return {"note": f"nvidia-smi is not asked about {place.type}"}
    found: Line = {}
    try:
        for name in names(place):
            found = answer(fields, name)
            if "note" not in found:
                break
    except RuntimeError as error:  # a device that is lost to this process
        found = {"note": f"torch cannot name the card: {error}"}
    return found


def answer(fields: tuple[str, ...], name: str) -> Line:
    """What nvidia-smi says of the card that it knows by this name."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "-i", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=15, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return {"note": f"nvidia-smi cannot be asked: {type(error).__name__}: {error}"}
    values = [value.strip() for value in done.stdout.strip().split(",")]
    if done.returncode or len(values) != len(fields):
        said = " ".join((done.stdout + done.stderr).split())
        return {"note": f"nvidia-smi ended with {done.returncode}: {said[:300]}"}
    return dict(zip(fields, values, strict=True))


def names(place: torch.device) -> list[str]:
    """The card's UUID as nvidia-smi writes it, whatever CUDA_VISIBLE_DEVICES hides, and its index."""
    uuid = getattr(torch.cuda.get_device_properties(place), "uuid", None)
    return [*([] if uuid is None else [f"GPU-{uuid}"]), str(place.index or 0)]
