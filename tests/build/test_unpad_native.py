import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fastbert import native
from tests.build.conftest import ROOT
from tests.build.masks import CASES, DTYPES, expected_unpad, random_mask

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    reasons = native.refuse(request.param)
    if reasons:
        pytest.skip(", ".join(reasons))
    return str(request.param)


@pytest.fixture
def cpu() -> None:
    if native.refuse("cpu"):
        pytest.skip(native.load().reason)


def check(mask: torch.Tensor) -> None:
    found = native.unpad(mask)
    assert [x.dtype for x in found] == [torch.int64, torch.int32, torch.int32]
    assert {x.device for x in found} == {mask.device}
    for ours, expected in zip(found, expected_unpad(mask), strict=True):
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


def resized(bytes_left: int) -> torch.Tensor:
    mask = torch.ones(2, 3)
    mask.untyped_storage().resize_(bytes_left)
    return mask


REFUSED = {  # what, the kind of error, its words
    "no dimension": (lambda: torch.ones(()), RuntimeError, "must be 2-D"),
    "complex, conjugated by a bit": (
        lambda: torch.ones(2, 2, dtype=torch.complex64).conj(),
        RuntimeError,
        "must be bool, uint8",
    ),
    "unsigned": (lambda: torch.ones(2, 2, dtype=torch.uint16), RuntimeError, "must be bool, uint8"),
    "too many rows": (lambda: torch.empty(2**31, 0), RuntimeError, "more than 2147483647 rows"),
    "as many rows as there are": (
        lambda: torch.empty(0).as_strided((2**63 - 1, 0), (1, 1)),
        RuntimeError,
        "more than 2147483647 rows",
    ),
    "memory given back": (lambda: resized(0), RuntimeError, "reaches beyond its storage, which was resized"),
    "some memory given back": (lambda: resized(20), RuntimeError, "reaches beyond its storage, which was resized"),
    "sparse": (lambda: torch.ones(2, 2).to_sparse(), NotImplementedError, "SparseCPU"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2)], layout=torch.jagged), NotImplementedError, "Nested"),
    "meta": (lambda: torch.ones(2, 2, device="meta"), NotImplementedError, "Meta"),
    "no tensor": (lambda: [[1, 1]], RuntimeError, "Expected a value of type 'Tensor'"),
}


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize("what", REFUSED)
def test_refuses_strange_masks_in_words(what: str) -> None:
    mask, error, words = REFUSED[what]
    with pytest.raises(error, match=words):
        native.unpad(mask())


def unaligned() -> torch.Tensor:
    memory = bytearray(1 + 4 * 8)
    mask = torch.frombuffer(memory, dtype=torch.float32, offset=1).view(2, 4)
    assert mask.data_ptr() % 4 != 0
    return mask.copy_(torch.tensor([[1.0, 0.0, -0.0, 2.0], [0.0, 0.0, 3.0, 0.0]]))


ODD = {
    "needs a gradient": lambda: random_mask(3, 5).float().requires_grad_(),
    "negated by a bit of the tensor": lambda: torch.complex(torch.zeros(3, 5), random_mask(3, 5).float()).conj().imag,
    "not aligned": unaligned,
    "one element, any stride": lambda: torch.ones(1, 1).as_strided((1, 1), (2**62, 2**62)),
    "one row, any stride": lambda: random_mask(1, 9).as_strided((1, 9), (2**62, 1)),
    "no columns, any stride": lambda: torch.ones(4).as_strided((4, 0), (2**62, 2**62)),
    "no columns, rows far apart": lambda: torch.ones(4).as_strided((4, 0), (100, 1)),
    "no rows, any stride": lambda: torch.ones(4).as_strided((0, 4), (2**62, 2**62)),
    "the last elements of a storage": lambda: random_mask(9, 7)[5:, 3:],
    "columns that overlap": lambda: random_mask(1, 20).flatten().unfold(0, 5, 1),
    "true in many ways": lambda: torch.tensor([[0, 1, 2, 255]], dtype=torch.uint8).view(torch.bool),
}


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize("what", ODD)
def test_takes_odd_masks(what: str) -> None:
    mask = ODD[what]()
    if what == "true in many ways":  # of which torch's own nonzero takes any
        assert native.unpad(mask)[0].tolist() == [1, 2, 3]
    else:
        check(mask)
    assert not native.unpad(mask)[0].requires_grad


@pytest.mark.usefixtures("cpu")
def test_under_inference_mode() -> None:
    with torch.inference_mode():
        check(random_mask(5, 6))


@pytest.mark.usefixtures("cpu")
def test_eight_threads_at_once() -> None:
    masks = [random_mask(600 + i, 300) for i in range(8)]  # each more than one task
    serial = [native.unpad(mask) for mask in masks]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(20):
            together = list(pool.map(native.unpad, masks))
            for ours, expected in zip(together, serial, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


FIRST_CALLS = """
import threading, torch
from fastbert import native
mask, results, start = torch.ones(3, 4), [], threading.Barrier(8)

def call():
    start.wait()
    results.append(native.unpad(mask)[0].tolist())

threads = [threading.Thread(target=call) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert results == [list(range(12))] * 8, results
"""


@pytest.mark.usefixtures("cpu")
def test_eight_threads_load_the_library_at_once() -> None:
    run = subprocess.run([sys.executable, "-c", FIRST_CALLS], cwd=ROOT, capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")


LITTLE_MEMORY = """
import resource, torch
from fastbert import native
native.unpad(torch.ones(1, 1))
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 2**30,) * 2)
try:
    native.unpad(torch.empty(2**30, 0))  # cu_seqlens of 4 GB
except RuntimeError as error:
    print(error)
"""


@pytest.mark.usefixtures("cpu")
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux how much memory is taken")
def test_no_memory_in_words() -> None:
    run = subprocess.run([sys.executable, "-c", LITTLE_MEMORY], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout == "unpad: out of memory: torch could not allocate 1073741825 elements\n", run.stderr


@pytest.mark.slow
def test_indices_beyond_32_bits(device: str) -> None:
    mask = torch.zeros(1, 4096, dtype=torch.bool, device=device)
    mask[0, -1] = True
    indices, cu_seqlens, order = native.unpad(mask.expand(2**20 + 1, 4096))
    assert torch.equal(order, torch.arange(2**20 + 1, dtype=torch.int32, device=device))
    rows = torch.arange(2**20 + 2, device=device)
    assert torch.equal(indices, rows[:-1] * 4096 + 4095)
    assert torch.equal(cu_seqlens, rows.int())


@pytest.mark.slow
def test_refuses_more_tokens_than_cu_seqlens_can_count(device: str) -> None:
    with pytest.raises(RuntimeError, match="more than 2147483647 real tokens"):
        native.unpad(torch.ones(1, 1, dtype=torch.bool, device=device).expand(2, 2**30))
