"""The dtypes that parity is judged in and speed is measured in, and the one name of each."""

from __future__ import annotations

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def dtype_name(dtype: str | torch.dtype) -> str:
    """ "fp32", "bf16" or "fp16", of torch's spelling too ("bfloat16", torch.bfloat16).

    Raises:
        ValueError: another dtype.
    """
    given = str(dtype).removeprefix("torch.")
    for short, known in DTYPES.items():
        if given in (short, str(known).removeprefix("torch.")):
            return short
    raise ValueError(f"unknown dtype {dtype}; there are: {', '.join(DTYPES)}")
