import pytest
import torch

from fastbert import native
from tests.build.masks import CASES, DTYPES, expected_unpad, random_mask

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    reasons = native.refuse(request.param)
    if reasons:
        pytest.skip(", ".join(reasons))
    return str(request.param)


def check(mask: torch.Tensor) -> None:
    indices, cu_seqlens = native.unpad(mask)
    assert (indices.dtype, cu_seqlens.dtype) == (torch.int64, torch.int32)
    assert indices.device == cu_seqlens.device == mask.device
    for ours, expected in zip((indices, cu_seqlens), expected_unpad(mask), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("case", CASES)
def test_cases(case: str, device: str) -> None:
    if device == "cuda" and "beyond" in case:
        pytest.skip("4 GB to copy")
    check(CASES[case].to(device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_on_a_ragged_batch_with_strides(dtype: torch.dtype, device: str) -> None:
    ragged = CASES["right padding"].to(device, dtype)
    for mask in (ragged, ragged.t(), ragged[::2, 1::3]):
        check(mask)


def test_the_same_on_any_number_of_threads(device: str) -> None:
    mask = random_mask(4096, 300).to(device)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = native.unpad(mask)
        torch.set_num_threads(4)
        check(mask)
        assert all(torch.equal(a, b) for a, b in zip(alone, native.unpad(mask), strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (torch.ones(3), "must be 2-D"),
        (torch.ones(1, 1, 3, 3), "must be 2-D"),  # what transformers hands to attention
        (torch.ones(2, 2, dtype=torch.complex64), "must be bool, uint8"),
        (torch.ones(2, 2).to(torch.float8_e4m3fn), "must be bool, uint8"),
        (torch.ones(1, 1).expand(1, 2**31), "rows of more than 2147483647"),
    ],
)
def test_refuses_in_words(mask: torch.Tensor, words: str, device: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        native.unpad(mask.to(device) if mask.numel() < 100 else mask[:, :1].to(device).expand(1, 2**31))


@pytest.mark.slow
def test_indices_beyond_32_bits(device: str) -> None:
    mask = torch.zeros(1, 4096, dtype=torch.bool, device=device)
    mask[0, -1] = True
    indices, cu_seqlens = native.unpad(mask.expand(2**20 + 1, 4096))
    rows = torch.arange(2**20 + 2, device=device)
    assert torch.equal(indices, rows[:-1] * 4096 + 4095)
    assert torch.equal(cu_seqlens, rows.int())


@pytest.mark.slow
def test_refuses_more_tokens_than_cu_seqlens_can_count(device: str) -> None:
    with pytest.raises(RuntimeError, match="more than 2147483647 real tokens"):
        native.unpad(torch.ones(1, 1, dtype=torch.bool, device=device).expand(2, 2**30))
