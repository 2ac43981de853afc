"""Random calls of every op: each backend that takes one gives the reference's numbers by the rule, or its bits."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastbert import ops
from fastbert.parity import Verdict, judge
from tests.ops import philox
from tests.ops.cases import DEVICES, DTYPES, SPECS, Arguments, Case, cast
from tests.ops.common import Backend, as_tuple, backends_of
from tests.poison import poisoned_memory

EDGES = (0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65)
DIMS = (16, 24, 32, 33, 64)  # of fewer channels rstd is now and then so large that one row decides
WIDTHS = (8, 16, 64, 131, 192, 193, 400)  # fewer columns than are packed; ranges of 192 that are added up
# What a call is judged by, or nearly: of fewer values, or rows of statistics, the rule's ratios are noise.
VALUES, ROWS, MOST_CONTENTS, AGAIN = 2048, 64, 16, 8
LAYOUTS = ("contiguous", "every second", "transposed", "sliced", "unaligned", "expanded", "reversed")
MASK_DTYPES = (
    torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.int32, torch.int64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
)  # fmt: skip
BY_NAME = {spec.op.name: spec for spec in SPECS}


@dataclass(frozen=True)
class Call:
    """A call of an op but for its values. variant: which of the spec's calls, roll: by how much values are moved."""

    op: str
    lengths: tuple[int, ...]
    heads: int
    dim: int
    intermediate: int
    dtype: torch.dtype
    layout: str
    variant: int
    roll: int


lengths = st.lists(st.sampled_from(EDGES) | st.integers(1, 70), min_size=1, max_size=4).map(tuple)
calls = st.builds(
    Call,
    op=st.sampled_from(sorted(BY_NAME)),
    lengths=lengths,
    heads=st.integers(1, 3),
    dim=st.sampled_from(DIMS),
    intermediate=st.sampled_from(WIDTHS),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(LAYOUTS),
    variant=st.integers(0, 9),
    roll=st.integers(0, 10**6),
)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values in another layout; memory around them is poisoned. "expanded": the first row stands for all."""
    if x.dim() == 0 or not x.numel():
        return x
    if layout == "every second":
        return x.new_empty(*x.shape, 2)[..., 0].copy_(x)
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced":
        return x.new_empty([n + 3 for n in x.shape])[tuple(slice(1, n + 1) for n in x.shape)].copy_(x)
    if layout == "unaligned":  # by one element: no vector load takes it
        return x.new_empty(x.numel() + 1)[1:].view(x.shape).copy_(x)
    if layout == "reversed":  # the first dimension is the fastest
        return x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))
    if layout == "expanded" and x.dim() > 1:
        return x[:1].expand(x.shape)
    return x


def moved(arguments: Arguments, by: int) -> Arguments:
    """Other values of the same sizes: floating tensors rolled in memory, with other signs."""
    generator = torch.Generator().manual_seed(by)

    def other(a: Tensor) -> Tensor:
        signs = torch.randint(0, 2, a.shape, generator=generator) * 2 - 1
        return a.flatten().roll(by).view(a.shape) * signs

    return tuple(other(a) if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments)


def check(call: Call, times: int = 1) -> list[tuple[str, Verdict]]:
    """What the rule says of each output of each backend that takes the call, made often enough to be judged."""
    spec = BY_NAME[call.op]
    case = Case(f"{call}", call.lengths, call.heads, call.dim, call.intermediate, "random")
    found = list(spec.inputs(case, call.dtype))
    exact = found[call.variant % len(found)][1]
    judged: dict[tuple[str, str], list[tuple[Tensor, Tensor, Tensor]]] = {}
    one_row = call.layout == "expanded"  # of x, and of nothing else: all outputs would be equal
    rows = min(case.tokens, 1) if one_row and spec.rows else case.tokens  # that differ
    contents = min(-(-VALUES // (rows * case.hidden)), MOST_CONTENTS) if rows else 1
    for content in range(contents * times):
        with poisoned_memory():
            rounded = cast(moved(exact, call.roll + 1009 * content), call.dtype)
            arguments = tuple(
                laid_out(a, call.layout) if isinstance(a, Tensor) and (i in spec.rows or not one_row) else a
                for i, a in enumerate(rounded)
            )
        ref = as_tuple(spec.reference(*cast(arguments, torch.float64)))
        for backend in backends_of(spec, DEVICES):
            given = on_backend(arguments, backend, spec.weights)
            if spec.op.backends[backend.name].reasons(*given):
                continue
            with poisoned_memory():
                ours, again = backend(spec, given), backend(spec, given)
            base = as_tuple(spec.stock(*cast(arguments, call.dtype, backend.device)))
            assert all(torch.equal(x, y) for x, y in zip(ours, again, strict=True))
            for i, output in enumerate(spec.outputs):
                if output in ("mean", "rstd", "lse") and rows * contents < ROWS:
                    continue
                flat = tuple(x.cpu().flatten() for x in (ours[i], ref[i], base[i]))
                judged.setdefault((str(backend), output), []).append(flat)
    verdicts = []
    for (backend, output), parts in judged.items():
        verdict = judge(*(torch.cat(x) for x in zip(*parts, strict=True)), spec.elementwise(output))
        verdicts.append((f"{backend}/{output}", verdict))
    return verdicts


def on_backend(arguments: Arguments, backend: Backend, weights: tuple[int, ...]) -> Arguments:
    """The arguments on the backend's device, matrices packed if it wants them so; layouts are kept."""
    found = [a.to(backend.device) if isinstance(a, Tensor) else a for a in arguments]
    for i in weights if backend.packed else ():
        found[i] = backend.pack(found[i])
    return tuple(found)


def failures(call: Call, times: int = 1) -> list[str]:
    return [f"{name}: {verdict}" for name, verdict in check(call, times) if not verdict.passed]


def assert_parity(call: Call) -> None:
    """Among thousands of small tensors a largest error is now and then a matter of luck: more values tell."""
    assert not failures(call) or failures(call, AGAIN) == []


SETTINGS = settings(deadline=None, database=None, derandomize=True)
pytestmark = pytest.mark.filterwarnings("ignore:var")  # of no rows


@settings(SETTINGS, max_examples=70)
@given(calls)
def test_random_calls(call):
    assert_parity(call)


@pytest.mark.slow
@settings(SETTINGS, max_examples=2500)
@given(calls)
def test_many_random_calls(call):
    assert_parity(call)


# unpad, pad, dropout_bits: no rounding, so their bits


@dataclass(frozen=True)
class Batch:
    """A mask [B, S] of random values, in a layout."""

    rows: int
    columns: int
    share: float
    dtype: torch.dtype
    layout: str
    seed: int


batches = st.builds(
    Batch,
    rows=st.integers(0, 9),
    columns=st.sampled_from((*EDGES, 128, 129)) | st.integers(0, 70),
    share=st.sampled_from((0.0, 0.1, 0.5, 0.9, 1.0)),
    dtype=st.sampled_from(MASK_DTYPES),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 2**31),
)


def mask_of(batch: Batch) -> Tensor:
    """Not zero where a token is: 2, -1, 0.25, NaN or an infinity; -0.0 is zero."""
    generator = torch.Generator().manual_seed(batch.seed)
    shape = batch.rows, batch.columns
    real = torch.rand(shape, generator=generator) < batch.share
    values = torch.randint(1, 100, shape, generator=generator)
    if batch.dtype.is_floating_point:
        some = torch.tensor([1.0, -1.0, 0.25, torch.nan, torch.inf])[values % 5]
        mask = torch.where(real, some, torch.tensor([0.0, -0.0])[values % 2]).to(batch.dtype)
    else:
        signs = torch.where(values % 2 == 0, -1, 1) if batch.dtype.is_signed else 1
        mask = torch.where(real, values * signs, 0).to(batch.dtype)
    return laid_out(mask, batch.layout)


def assert_bits(batch: Batch) -> None:
    """unpad as plain Python does it, pad as its inverse, dropout_bits as numpy does it."""
    mask = mask_of(batch)
    real = [[value != 0 for value in row] for row in mask.tolist()]
    indices = [i * batch.columns + j for i, row in enumerate(real) for j, one in enumerate(row) if one]
    starts = [0, *itertools.accumulate(map(sum, real))]
    x = torch.randn(len(indices), 3, generator=torch.Generator().manual_seed(batch.seed))
    expected = torch.zeros(batch.rows * batch.columns, 3)
    expected[indices] = x
    cu_seqlens = torch.tensor(starts, dtype=torch.int32)
    order = torch.tensor(sorted(range(len(real)), key=lambda i: -sum(real[i])), dtype=torch.int32)
    longest = max(map(sum, real), default=0)
    for device in DEVICES:
        for op, arguments, want in (
            (ops.unpad, (mask,), (torch.tensor(indices, dtype=torch.int64), cu_seqlens, order)),
            (ops.pad, (laid_out(x, batch.layout if batch.layout != "expanded" else ""), torch.tensor(indices).long(),
                       batch.rows, batch.columns), (expected.view(batch.rows, batch.columns, 3),)),
            (ops.dropout_bits, (torch.tensor(batch.seed), 5, cu_seqlens, len(indices), longest, 2, 0.3),
             (philox.bits(batch.seed, 5, cu_seqlens, longest, 2, 0.3),)),
        ):  # fmt: skip
            given = tuple(a.to(device) if isinstance(a, Tensor) else a for a in arguments)
            for backend in op.order(device):
                if backend.reasons(*given):
                    continue
                with ops.use_backend(backend.name), poisoned_memory():
                    found, again = as_tuple(op(*given)), as_tuple(op(*given))
                for ours, twice, theirs in zip(found, again, want, strict=True):
                    assert ours.dtype == theirs.dtype and torch.equal(ours.cpu(), theirs) and torch.equal(ours, twice)


@settings(SETTINGS, max_examples=30)
@given(batches)
def test_random_masks(batch):
    assert_bits(batch)


@pytest.mark.slow
@settings(SETTINGS, max_examples=1000)
@given(batches)
def test_many_random_masks(batch):
    assert_bits(batch)
