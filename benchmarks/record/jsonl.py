"""Records as JSON, a row a line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


def append(file: Path, line: dict[str, Any]) -> None:
    """Writes a row; it is in the file when this returns."""
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps(finite(line), default=str, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """A row as JSON knows it: infinities and NaN as words."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    return [finite(inner) for inner in value] if isinstance(value, (list, tuple)) else value
