"""linear: tiles, the path of sm_90, sums over shares of the tokens, independence of the batch, planted errors."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from fastbert.parity import judge
from tests import interpreter

if not interpreter.is_here():
    pytest.skip("Triton's interpreter is not here", allow_module_level=True)

from fastbert.kernels import cards, linear

from tests.ops.cases import DTYPES, normal

ARCHS = (80, 86, 89, 90, 100, 120)
EVERY = [*DTYPES[:2], pytest.param(DTYPES[2], marks=pytest.mark.slow)]  # fp16 is computed as bf16 is
OLD, NEW = cards.Card(80, 2), cards.Card(90, 2)  # few multiprocessors: several tiles a program
# of the families: hidden and intermediate sizes, QKV, the vocabulary; odd ones, narrow ones
SIZES = (1, 2, 8, 33, 100, 128, 312, 384, 768, 1024, 1152, 1536, 2304, 3072, 4096, 30522)


def planted(name: str, old: str, new: str, folder: Path) -> ModuleType:
    """The kernels' module `name` with one piece of its source replaced, everywhere in it."""
    source = Path(importlib.util.find_spec(f"fastbert.kernels.{name}").origin).read_text()
    assert old in source
    path = folder / f"planted_{name}.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(f"fastbert.kernels.planted_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules[spec.name]
    return module


def operands(tokens: int, columns: int, depth: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """x [T, K], weight [N, K], bias [N], a gradient [T, N]; behind each stand values that must not be read."""
    shapes = (tokens, depth), (columns, depth), (columns,), (tokens, columns)
    scales = 1, depth**-0.5, 1, 1
    found = []
    for i, (shape, scale) in enumerate(zip(shapes, scales, strict=True)):
        flat = torch.full((torch.Size(shape).numel() + 4096,), 1e4).to(dtype)
        out = flat[: torch.Size(shape).numel()].view(shape)
        out.copy_(normal(*shape, like=f"operand {i}", scale=scale))
        found.append(out)
    return tuple(found)


def ratios(module: ModuleType, tokens: int, columns: int, depth: int, dtype: torch.dtype) -> dict[str, float]:
    """How each result of the module's forward and backward is judged."""
    x, weight, bias, grad = operands(tokens, columns, depth, dtype)
    ours = module.linear(x, weight, bias), *module.linear_backward(grad, x, weight, [True] * 3)

    def results(x, weight, bias, grad):
        return F.linear(x, weight, bias), grad @ weight, grad.T @ x, grad.sum(0)

    ref, base = results(*(t.double() for t in (x, weight, bias, grad))), results(x, weight, bias, grad)
    names = "y", "x_grad", "weight_grad", "bias_grad"
    return {n: judge(*tensors).ratio for n, *tensors in zip(names, ours, ref, base, strict=True)}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_fit_every_card(arch, dtype):
    card = cards.Card(arch, 100)
    for columns, depth, by_rows in itertools.product(SIZES, SIZES, (False, True)):
        tiles = linear.choose_tiles(columns, depth, dtype, card, by_rows)
        stage = (tiles.rows + tiles.columns) * tiles.depth * dtype.itemsize
        assert tiles.num_stages * stage <= card.shared_memory
        assert all(n >= 16 and n & (n - 1) == 0 for n in (tiles.rows, tiles.columns, tiles.depth))
        assert tiles.columns < 2 * max(columns, 16) and tiles.depth < 2 * max(depth, 16)
        lines = (depth, columns) if by_rows else (depth,)
        aligned = all(n * dtype.itemsize % 16 == 0 for n in lines)
        assert tiles.described == (arch >= 90 and dtype != torch.float32 and aligned)
        assert tiles.chunk % tiles.depth == 0
        assert bool(tiles.chunk) == (dtype == torch.float32)


@pytest.mark.parametrize("card", [OLD, NEW], ids=str)
@pytest.mark.parametrize("dtype", EVERY, ids=str)
@pytest.mark.parametrize(
    ("tokens", "columns", "depth"),
    [
        pytest.param(140, 264, 200, id="rest of each size behind whole tiles, more tiles than programs"),
        pytest.param(70, 35, 33, id="rows that wide loads cannot read"),
        pytest.param(5, 2, 72, id="a classifier's two columns"),
        pytest.param(1, 16, 1, id="one token, one column of x"),
    ],
)
def test_products(card, dtype, tokens, columns, depth, poisoned, parity):
    with cards.imitate(card):
        tiles = linear.choose_tiles(columns, depth, dtype, card)
        assert tokens < 140 or card is OLD or linear.programs_of(tokens, columns, tiles, card) <= 6
        for name, ratio in ratios(linear, tokens, columns, depth, dtype).items():
            assert ratio <= 1, f"{name}: {ratio}"


@pytest.mark.parametrize("card", [OLD, NEW], ids=str)
@pytest.mark.parametrize("dtype", EVERY, ids=str)
def test_a_gradient_in_shares_of_the_tokens(card, dtype, poisoned):
    """Few tiles, many tokens: partial sums, the last of a rest; bitwise the same again."""
    x, _, _, grad = operands(1111, 24, 40, dtype)
    with cards.imitate(card):
        ours, again = linear.weight_grad(grad, x), linear.weight_grad(grad, x)
    assert torch.equal(ours, again)
    assert judge(ours, grad.double().T @ x.double(), grad.T @ x).ratio <= 1


def test_many_rows_are_summed_in_shares(poisoned):
    x = normal(2000, 70, like="rows").float() + 1
    for card in (cards.Card(80, 1), cards.Card(80, 100)):
        with cards.imitate(card):
            assert judge(linear.sum_of_rows(x), x.double().sum(0), x.sum(0)).ratio <= 1


@pytest.mark.parametrize("card", [OLD, NEW], ids=str)
@pytest.mark.parametrize("dtype", EVERY, ids=str)
@pytest.mark.parametrize(("columns", "depth"), [(136, 96), (33, 50)], ids=str)
def test_rows_do_not_depend_on_their_batch(card, dtype, columns, depth):
    """Each text alone and inside batches of 2 to 33 in any order: bitwise equal."""
    lengths = torch.randint(1, 13, (33,)).tolist()
    _, weight, bias, _ = operands(1, columns, depth, dtype)
    texts = [normal(n, depth, like=f"text {i}").to(dtype) for i, n in enumerate(lengths)]
    with cards.imitate(card):
        alone = [linear.linear(text, weight, bias) for text in texts]
        for size in (2, 3, 8, 17, 33):
            batch = torch.randperm(33)[:size].tolist()
            together = linear.linear(torch.cat([texts[i] for i in batch]), weight, bias)
            for i, rows in zip(batch, together.split([lengths[i] for i in batch]), strict=True):
                assert torch.equal(rows, alone[i])


def test_tiles_do_not_depend_on_the_tokens(monkeypatch):
    """What a row's sum depends on: the constants of a launch."""
    seen = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **constants: seen.append((grid, constants))

    monkeypatch.setattr(linear, "linear_kernel", Kernel())
    _, weight, bias, _ = operands(1, 768, 64, torch.float32)
    for card in (OLD, NEW):
        with cards.imitate(card):
            for tokens in (1, 64, 65, 5000):
                linear.linear(torch.zeros(tokens, 64), weight, bias)
    assert len({str(constants) for _, constants in seen[:4]}) == len({str(constants) for _, constants in seen[4:]}) == 1
    assert seen[3][0][0] > 100 > seen[7][0][0]  # a program for each tile; as many as the card holds


def test_tf32_only_where_torch_allows_it():
    x, weight, bias, _ = operands(16, 32, 64, torch.float32)
    exact = linear.linear(x, weight, bias)
    assert linear.precision_of(torch.float32) == "ieee"
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert linear.precision_of(torch.float32) == "tf32"
        assert linear.precision_of(torch.bfloat16) == "ieee"
        cut = linear.linear(x, weight, bias)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    ref = F.linear(*(t.double() for t in (x, weight, bias)))
    assert (exact - ref).abs().max() < 1e-5 < 1e-4 < (cut - ref).abs().max()


@pytest.mark.parametrize("card", [OLD, NEW], ids=str)
def test_a_matrix_that_stands_askew(card):
    """Rows that do not start at a multiple of 16 bytes, and rows that are not contiguous, give the same bits."""
    x, weight, bias, _ = operands(20, 24, 40, torch.bfloat16)
    askew = torch.empty(20 * 40 + 1, dtype=torch.bfloat16)[1:].view(20, 40).copy_(x)
    assert askew.data_ptr() % 16
    wide = torch.stack([x, x], 2)[..., 0]
    with cards.imitate(card):
        expected = linear.linear(x, weight, bias)
        for same in (askew, wide):
            assert torch.equal(linear.linear(same, weight, bias), expected)


def test_no_launch_without_tokens(monkeypatch):
    for name in ("linear_kernel", "weight_grad_kernel", "column_sums_kernel"):
        monkeypatch.setattr(linear, name, None)
    x, weight, grad = torch.empty(0, 8), torch.empty(16, 8), torch.empty(0, 16)
    assert linear.linear(x, weight).shape == (0, 16)
    dx, dweight, dbias = linear.linear_backward(grad, x, weight, [True] * 3)
    assert (dx.shape, dweight.shape, dbias.shape) == ((0, 8), (16, 8), (16,))
    assert not dweight.any() and not dbias.any()


def test_refusals_in_words():
    x, weight, bias, grad = operands(3, 16, 8, torch.float32)
    assert linear.linear_reasons(x, weight, bias) == linear.linear_backward_reasons(grad, x, weight, [True] * 3) == []
    assert linear.linear_reasons(x, object()) == ["the weight is packed for a CPU"]
    assert "x is torch.float64" in linear.linear_reasons(x.double(), weight)[0]
    assert "grad is torch.float64" in linear.linear_backward_reasons(grad.double(), x, weight, [True] * 3)[0]


SMALL, LONG = (70, 136, 296), (1100, 24, 40)  # tokens, columns, depth
PLANTED = {
    "the right half gets the left half's bias": (
        "with_bias(right, BIAS, columns, N)", "with_bias(right, BIAS, columns - BLOCK_N // 2, N)", "y", SMALL
    ),
    "no bias": ("x += tl.load(BIAS", "x += 0 * tl.load(BIAS", "y", SMALL),
    "the rest of the depth is not masked": ("inside = steps < K - depth", "inside = steps < BLOCK_K", "y", SMALL),
    "the rest of the depth is left out": ("range(start, end, BLOCK_K)", "range(start, end - 31, BLOCK_K)", "y", SMALL),
    "a chunk of fp32's sum is left out": ("        total += added(", "        total = added(", "y", SMALL),
    "a gradient by the weight transposed": (
        "K, 0, K, K, 1, 1, N, BLOCK_M", "K, 0, K, K, 1, K, 1, BLOCK_M", "x_grad", SMALL
    ),
    "a partial sum of the weight's gradient is left out": (
        "count, count, size, ROWS", "count - 1, count - 1, size, ROWS", "weight_grad", LONG
    ),
    "a partial sum of the bias's gradient is left out": (
        "count, count, size, ROWS", "count - 1, count - 1, size, ROWS", "bias_grad", LONG
    ),
    "shares that overlap": ("end = min(start + share, rows)", "end = min(start + share + 1, rows)", "bias_grad", LONG),
}  # fmt: skip


@pytest.mark.parametrize("error", PLANTED)
def test_planted_errors_are_found(error, tmp_path):
    old, new, shown, size = PLANTED[error]
    dtype = torch.bfloat16 if "half" in error else torch.float32  # fp32's tiles are stored whole
    with cards.imitate(cards.Card(80, 4)):
        assert ratios(planted("linear", old, new, tmp_path), *size, dtype)[shown] > 1
