"""The shapes that are timed, one list for every benchmark. Each says why it is there."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from benchmarks.stock import OPS, plain
from fastbert import ops, workloads
from fastbert.ops.sample_calls import Sizes, backward_arguments, outputs
from fastbert.parity import enliven


@dataclass(frozen=True)
class Case:
    """Packed sequences of one model's sizes: H = heads · dim, I = 4 · H; the workload's batch so many times."""

    name: str
    why: str
    heads: int
    dim: int
    workload: str
    vocabulary: int = 30522
    layers: int = 12
    times: int = 1

    @property
    def hidden(self) -> int:
        return self.heads * self.dim

    @property
    def lengths(self) -> tuple[int, ...]:
        return workloads.get(self.workload).rows * self.times


CPU_CASES = (
    Case("minilm-query", "one short query: overhead per call", 12, 32, "query-1x16"),
    Case("minilm-ragged", "head dim 32, ragged: the demo checkpoint's usual batch", 12, 32, "ragged-16x256"),
    Case("base-dense", "BERT-base without padding: nothing but the products", 12, 64, "dense-8x128"),
    Case("base-ragged", "BERT-base, ragged: what dropping padding is for", 12, 64, "ragged-16x256"),
)
CUDA_CASES = (
    Case("base-squad", "BERT-base at SQuAD's width, ragged", 12, 64, "squad-like-64x384"),
    Case(
        "large-uniform", "BERT-large at mean fill 0.6, ByteTransformer's setting", 16, 64, "uniform-16x512", layers=24
    ),
    Case("base-dense", "FasterTransformer's setting, for comparison with its figures", 12, 64, "dense-32x384"),
    Case("base-query", "one short query: launch overhead", 12, 64, "query-1x16"),
    Case("minilm-squad", "head dim 32, which exponentials limit", 12, 32, "squad-like-64x384", layers=6),
)
CUDA_MODEL_CASES = (
    *CUDA_CASES[:4],
    Case("base-256", "256 sequences: as many as a full queue gives", 12, 64, "squad-like-64x384", times=4),
    Case("base-short", "8 rows of 128, no padding: between launch overhead and throughput", 12, 64, "dense-8x128"),
    Case("large-dense", "BERT-large without padding: nothing but the products", 16, 64, "dense-32x384", layers=24),
    Case("large-squad", "BERT-large at SQuAD's width, ragged", 16, 64, "squad-like-64x384", layers=24),
    Case("large-query", "BERT-large, one short query: launch overhead of 24 layers", 16, 64, "query-1x16", layers=24),
)  # fmt: skip
TINY_CASES = (Case("tiny", "seconds on any machine, ragged: does the code run", 2, 32, "ragged-16x256", 2000, 1),)


def cases(device: str) -> tuple[Case, ...]:
    """The list for a device type."""
    return CUDA_CASES if device.startswith("cuda") else CPU_CASES


def op_cases(device: str, dry_run: bool = False) -> tuple[tuple[Case, str], ...]:
    """(case, dtype) in which a record times the ops, most valuable first."""
    if dry_run or not device.startswith("cuda"):
        return tuple((case, dtype) for case in (TINY_CASES if dry_run else CPU_CASES) for dtype in ("fp32", "bf16"))
    return *((case, "bf16") for case in CUDA_CASES), (CUDA_CASES[0], "fp16"), (CUDA_CASES[0], "fp32")


def model_cases(device: str, dry_run: bool = False) -> tuple[tuple[Case, str], ...]:
    """(case, dtype) in which a record times whole models, most valuable first."""
    if device.startswith("cuda") and not dry_run:
        return tuple((case, "bf16") for case in CUDA_MODEL_CASES)
    return op_cases(device, dry_run)


@dataclass(frozen=True)
class Checked:
    """Sizes with which a record checks our kernels beside the cases that are timed, in these dtypes."""

    name: str
    why: str
    sizes: Sizes
    dtypes: tuple[str, ...]


# One below, at and above the tile sizes and the bounds of the length classes; one token; an empty row; unsorted.
EDGES = (17, 1, 128, 0, 65, 512, 16, 64, 257, 127, 15, 63, 129, 255)
CHECKED = {
    "cuda": (
        Checked("base edges", "BERT-base at every edge of tiles", Sizes(EDGES, 12, 64, 3072), ("bf16", "fp16", "fp32")),
        Checked("large edges", "BERT-large's sizes have tiles of their own", Sizes(EDGES, 16, 64, 4096), ("bf16",)),
        Checked("minilm edges", "head dim 32 has tiles of its own", Sizes(EDGES, 12, 32, 1536), ("bf16", "fp32")),
        Checked(
            "odd", "sizes that no tile and no vector divides", Sizes((33, 0, 31, 70), 3, 72, 500), ("bf16", "fp32")
        ),
        Checked("base alone", "fewer tokens than any tile has rows", Sizes((7,), 12, 64, 3072), ("bf16",)),
    ),
    "cpu": (Checked("base edges", "every edge of tiles", Sizes(EDGES, 12, 64, 3072), ("fp32", "bf16")),),
    "dry run": (Checked("tiny edges", "does the code run", Sizes((17, 0, 5, 33), 2, 32, 64), ("fp32", "bf16")),),
}


@dataclass(frozen=True)
class OpCall:
    """One call of an op, with what it costs on paper."""

    op: str
    arguments: tuple[Any, ...]
    flops: int  # of its products; 0: it has none
    bytes_moved: int  # every argument and result once
    forward: OpCall | None = None  # of a backward op: the call whose gradients it computes

    def on(self, backend: str) -> OpCall:
        """The call with its weights as a backend takes them."""
        op = OPS[self.op]
        return dataclasses.replace(self, arguments=op.packed(op.backends[backend], self.arguments))

    def run(self) -> Any:
        """Calls the op on the backend that is chosen by itself, or by `use_backend`."""
        return OPS[self.op](*self.arguments)


TABLES = ("words", "type_table", "position_table")


@torch.no_grad()
def backward_call(forward: OpCall, flops: int, draw: Callable[[torch.Tensor], torch.Tensor]) -> OpCall:
    """The call of the backward op of a call, on plain weights; `draw` gives a gradient for the first output."""
    op, arguments = OPS[forward.op], plain(forward.arguments)
    assert op.gradient is not None
    with ops.use_backend("torch"):  # whatever a kernel of ours does
        found = outputs(op(*arguments))
    handed = backward_arguments(op, arguments, found, draw(found[0]))
    of = [arguments[op.arguments().index(name)] for name in op.gradient.of]
    read = [t for name, t in zip(op.gradient.op.arguments(), handed, strict=True) if name not in TABLES]
    if op.name == "embed_layer_norm":
        read += [found[0]] * len(TABLES)  # as many rows of each
    moved = sum(t.nbytes for t in (*read, *of) if isinstance(t, torch.Tensor))
    return OpCall(op.gradient.op.name, handed, flops, moved, forward)


def op_calls(case: Case, dtype: torch.dtype, device: str) -> dict[str, Callable[[], OpCall]]:
    """Op → a function that makes its call at this case's shapes (made late: large cases need memory only then)."""
    lengths, hidden, width = case.lengths, case.hidden, max(case.lengths)
    tokens, inner, size = sum(lengths), 4 * case.hidden, dtype.itemsize
    generator = torch.Generator(device).manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    def weight(n: int, k: int) -> torch.Tensor:
        return randn(n, k) * k**-0.5

    def mask() -> torch.Tensor:
        column = torch.arange(width, device=device)
        return (column < torch.tensor(lengths, device=device)[:, None]).long()

    def unpad() -> OpCall:
        return OpCall("unpad", (mask(),), 0, 8 * (len(lengths) * width + tokens))

    def pad() -> OpCall:
        indices = mask().flatten().nonzero().flatten()
        moved = tokens * (hidden * size + 8) + len(lengths) * width * hidden * size
        return OpCall("pad", (randn(tokens, hidden), indices, len(lengths), width), 0, moved)

    def embed_layer_norm() -> OpCall:
        ids = torch.randint(0, case.vocabulary, (tokens,), generator=generator, device=device)
        types = torch.zeros_like(ids)
        positions = torch.cat([torch.arange(n, device=device) for n in lengths])
        tables = randn(case.vocabulary, hidden), randn(2, hidden), randn(512, hidden)
        arguments = (ids, types, positions, *tables, randn(hidden), randn(hidden), 1e-12)
        return OpCall("embed_layer_norm", arguments, 0, tokens * (24 + 4 * hidden * size))

    def bounds() -> torch.Tensor:
        return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)

    def dropout_bits() -> OpCall:
        seed = torch.zeros((), dtype=torch.int64, device=device)
        arguments = (seed, 0, bounds(), tokens, width, case.heads, 0.1)
        return OpCall("dropout_bits", arguments, 0, case.heads * tokens * (width + 31) // 32 * 4)

    def attention() -> OpCall:
        arguments = (randn(tokens, 3, case.heads, case.dim), bounds(), width, case.dim**-0.5)
        flops = sum(4 * n * n * hidden for n in lengths)
        return OpCall("attention", arguments, flops, tokens * (4 * hidden * size + 4 * case.heads))

    def add_layer_norm() -> OpCall:
        gains = randn(hidden), randn(hidden)
        arguments = (randn(tokens, hidden), randn(hidden), randn(tokens, hidden), *gains, 1e-12)
        return OpCall("add_layer_norm", arguments, 0, tokens * (3 * hidden * size + 8))

    def linear() -> OpCall:
        arguments = (randn(tokens, hidden), weight(3 * hidden, hidden), randn(3 * hidden))
        moved = size * (4 * tokens * hidden + 3 * hidden * hidden)
        return OpCall("linear", arguments, 6 * tokens * hidden * hidden, moved)

    def linear_gelu() -> OpCall:
        arguments = (randn(tokens, hidden), weight(inner, hidden), randn(inner))
        moved = size * (tokens * (hidden + inner) + hidden * inner)
        return OpCall("linear_gelu", arguments, 2 * tokens * hidden * inner, moved)

    def feed_forward() -> OpCall:
        arguments = (randn(tokens, hidden), weight(inner, hidden), randn(inner), weight(hidden, inner), randn(hidden))
        moved = size * (2 * tokens * (hidden + inner) + 2 * hidden * inner)
        return OpCall("feed_forward", arguments, 4 * tokens * hidden * inner, moved)

    def bias_gelu() -> OpCall:
        return OpCall("bias_gelu", (randn(tokens, inner), randn(inner)), 0, 2 * tokens * inner * size)

    def encoder_forward() -> OpCall:
        none = randn(0)

        def product(n: int, k: int) -> tuple[torch.Tensor, ...]:
            return weight(n, k), *[none] * 4, randn(n)

        gains = randn(hidden), randn(hidden)
        layer = [
            *product(3 * hidden, hidden), *product(hidden, hidden), *gains, *product(inner, hidden),
            *product(hidden, inner), *gains,
        ]  # fmt: skip
        call = randn(tokens, hidden), bounds(), width, layer, case.heads, case.dim**-0.5, 1e-12
        products = 2 * tokens * (4 * hidden * hidden + 2 * hidden * inner)
        scores = 4 * sum(n * n for n in lengths) * hidden
        return OpCall("encoder_forward", call, products + scores, size * (12 * hidden * hidden + 2 * tokens * hidden))

    def quantized_linear() -> OpCall:
        weight = torch.randint(-127, 128, (inner, hidden), generator=generator, device=device, dtype=torch.int8)
        scales = torch.full((inner,), hidden**-0.5 / 127, device=device)
        x = torch.round(randn(tokens, hidden) * 64) / 64  # whose sums are exact in every order
        arguments = (x, weight, scales, randn(inner), None, None, math.gcd(hidden, 128), "none")
        moved = size * tokens * (hidden + inner) + hidden * inner
        return OpCall("quantized_linear", arguments, 2 * tokens * hidden * inner, moved)

    def backward(make: Callable[[], OpCall]) -> Callable[[], OpCall]:
        """The backward of a call: of each product two, of attention's two products five (scores are made again)."""

        def made() -> OpCall:
            call = make()
            if call.op in ("linear_gelu", "feed_forward"):
                call = dataclasses.replace(call, arguments=(*call.arguments, "none", True))
            if call.op == "attention":  # its bias gets a gradient too
                bias = randn(*call.arguments[0].shape[1:])
                call = dataclasses.replace(call, arguments=(*call.arguments, None, 0.0, None, (), bias))
            flops = call.flops * 5 // 2 if call.op == "attention" else 2 * call.flops
            return backward_call(call, flops, lambda y: randn(*y.shape))

        return made

    makers = (
        unpad, pad, embed_layer_norm, dropout_bits, attention, add_layer_norm, linear, linear_gelu, feed_forward,
        bias_gelu, encoder_forward, quantized_linear,
    )  # fmt: skip
    calls = {maker.__name__: maker for maker in makers}
    gradients = ((OPS[name].gradient, maker) for name, maker in calls.items())
    return calls | {gradient.op.name: backward(maker) for gradient, maker in gradients if gradient is not None}


def random_model(case: Case, layers: int, dtype: torch.dtype, device: str, **config: Any) -> Any:
    """A BertModel of the case's sizes with seeded random weights, enlivened: it is judged before it is timed.

    config: further entries of its config.
    """
    from transformers import BertConfig, BertModel  # processes that launch ops only need not wait for it

    torch.manual_seed(0)
    sizes = BertConfig(
        vocab_size=case.vocabulary,
        hidden_size=case.hidden,
        num_attention_heads=case.heads,
        intermediate_size=4 * case.hidden,
        num_hidden_layers=layers,
        **config,
    )
    with torch.device(device):  # a GPU draws the weights of a large model in no time
        model = BertModel(sizes, add_pooling_layer=False)
    return enliven(model).eval().to(device, dtype)


def batch_of(case: Case, device: str) -> workloads.Batch:
    """The padded batch of a case, of random ids."""
    once = workloads.batches(case.workload, vocab_size=case.vocabulary).batches[0]
    ids, mask, types = (x.repeat(case.times, 1) for x in (once.input_ids, once.attention_mask, once.token_type_ids))
    return workloads.Batch(ids, mask, types, once.lengths * case.times).to(device)
