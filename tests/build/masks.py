"""The masks that every build of unpad is tested on, and what unpad has to make of them."""

import mmap
import tempfile

import torch
from torch import Tensor

DTYPES = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
DTYPES += [torch.float16, torch.bfloat16, torch.float32, torch.float64]
LENGTHS = [1, 15, 16, 17, 63, 64, 65, 127, 128, 511, 512, 0]  # around the tiles of kernels to come, and an empty row


def expected_unpad(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """indices [T] int64, cu_seqlens [B + 1] int32, order [B] int32 of mask [B, S]"""
    lengths = mask.ne(0).sum(1)
    bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
    return mask.flatten().nonzero().flatten(), bounds, lengths.argsort(descending=True, stable=True).int()


def random_mask(rows: int, columns: int) -> Tensor:
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(rows * 1000 + columns)) < 0.6


def far_rows() -> Tensor:
    """Rows 2**31 + 5 elements apart, in a sparse file: only the pages that are touched exist."""
    stride = 2**31 + 5
    with tempfile.TemporaryFile() as file:
        file.truncate(2 * stride + 4096)
        memory = mmap.mmap(file.fileno(), 0)
    mask = torch.frombuffer(memory, dtype=torch.uint8).as_strided((3, 40), (stride, 1))
    return mask.copy_(random_mask(3, 40))


def values(dtype: torch.dtype) -> Tensor:
    """[4, 8]: every kind of zero and nonzero that the type has."""
    numbers = [0.0, 1.0] if dtype == torch.bool else [0.0, 1.0, 2.0, 127.0]
    if dtype.is_signed:
        numbers += [-1.0]
    if dtype.is_floating_point:
        info = torch.finfo(dtype)
        numbers += [-0.0, 0.5, float("nan"), float("inf"), -float("inf"), info.tiny, -info.smallest_normal]
        subnormal = torch.tensor([0.0], dtype=dtype).nextafter(torch.ones(1, dtype=dtype)).item()
        numbers += [subnormal, -subnormal]
    mask = torch.tensor(numbers, dtype=dtype)
    if dtype == torch.int64:
        mask = torch.cat([mask, torch.tensor([2**32, -(2**63)])])  # the low half is zero
    if dtype == torch.int16:
        mask = torch.cat([mask, torch.tensor([256, -(2**15)], dtype=dtype)])  # the low byte is zero
    return mask.repeat(32)[:32].view(4, 8)


CASES = {
    "one token": torch.ones(1, 1),
    "no rows": torch.ones(0, 7),
    "no columns": torch.ones(3, 0),
    "all masked": torch.zeros(4, 9),
    "all real": torch.ones(4, 33, dtype=torch.int64),
    "one lane short of a warp": random_mask(3, 31),
    "a warp": random_mask(3, 32),
    "one lane more than a warp": random_mask(3, 33),
    "a block of rows": random_mask(8, 40),
    "one row more than a block": random_mask(9, 40),
    "one row less than scan threads": random_mask(1023, 5),
    "one row more than scan threads": random_mask(1025, 5),
    "shares of three rows, the last short": random_mask(2500, 3),
    "right padding": torch.arange(512) < torch.tensor(LENGTHS)[:, None],
    "left padding": torch.arange(512) >= 512 - torch.tensor(LENGTHS)[:, None],
    "one long row": random_mask(1, 5000),
    "transposed": random_mask(50, 20).t(),
    "every second column": random_mask(6, 80)[:, ::2],
    "every third row from the second": random_mask(40, 35)[1::3],
    "one row for all": random_mask(1, 40).expand(12, 40),
    "one column for all": random_mask(12, 1).expand(12, 40),
    "rows beyond 32-bit offsets": far_rows(),
    **{f"values of {dtype}": values(dtype) for dtype in DTYPES},
}
