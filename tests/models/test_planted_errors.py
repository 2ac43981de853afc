"""The parity tests are themselves tested: an error planted in a backend must fail one of them, in every dtype.

`python -m tests.models.test_planted_errors` prints the table of docs/numerics.md.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
import transformers
from torch import Tensor

from fastbert import ops
from fastbert.parity import judge
from fastbert.parity_models import compare_models, ragged_batch
from tests.models.build import build
from tests.ops.cases import (
    ADD_LAYER_NORM,
    ATTENTION,
    CASES,
    EMBED_LAYER_NORM,
    FEED_FORWARD,
    LINEAR,
    LINEAR_GELU,
    Spec,
    cast,
    gelu_inputs,
)  # fmt: skip
from tests.ops.common import Backend, verdicts
from tests.ops.test_unpad import by_hand

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SPECS = {
    spec.op.name: spec for spec in (ADD_LAYER_NORM, ATTENTION, EMBED_LAYER_NORM, FEED_FORWARD, LINEAR, LINEAR_GELU)
}
EDGES = CASES[0]
LENGTHS = (33, 64, 17, 5, 1, 16)
Change = Callable[..., tuple]  # an op's arguments → what the planted backend computes with instead


@dataclass(frozen=True)
class Plant:
    """An error: for each op that has it, how its backends' arguments are changed."""

    changes: dict[str, Change]
    visible_in_a_model: bool = True


def rows_zeroed(part: int) -> Change:
    """The bias of query, key or value: a third of the one bias of the QKV product."""

    def change(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple:
        if bias is not None and bias.shape[0] == 3 * x.shape[1]:
            bias = bias.clone()
            bias.view(3, -1)[part] = 0
        return x, weight, bias

    return change


def out_zeroed(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple:
    """The bias of the attention's output projection, the one square product."""
    return x, weight, None if bias is not None and bias.shape[0] == x.shape[1] else bias


def of_layer_norm(change: Callable[[Tensor, Tensor, float], tuple], turn: int | None = None) -> Change:
    """Changes gamma, beta and eps of add_layer_norm: of every second call from `turn` on (a layer calls it twice)."""
    calls = 0

    def planted(x, bias, residual, gamma, beta, eps, *dropout) -> tuple:
        nonlocal calls
        calls += 1
        mine = turn is None or calls % 2 == turn
        return (x, bias, residual, *(change(gamma, beta, eps) if mine else (gamma, beta, eps)), *dropout)

    return planted


def of_embeddings(change: Callable[[Tensor, Tensor, float], tuple]) -> Change:
    return lambda ids, types, positions, words, kinds, places, gamma, beta, eps, *rest: (
        ids, types, positions, words, kinds, places, *change(gamma, beta, eps), *rest
    )  # fmt: skip


def positions_moved(by: int) -> Change:
    return lambda ids, types, positions, words, kinds, places, *rest: (
        ids, types, (positions + by).clamp(0, places.shape[0] - 1), words, kinds, places, *rest
    )  # fmt: skip


def loose(gamma: Tensor, beta: Tensor, eps: float) -> tuple:
    return gamma, beta, 1e-5


def tight(gamma: Tensor, beta: Tensor, eps: float) -> tuple:
    return gamma, beta, 1e-12


def no_beta(gamma: Tensor, beta: Tensor, eps: float) -> tuple:
    return gamma, torch.zeros_like(beta), eps


def no_gain(gamma: Tensor, beta: Tensor, eps: float) -> tuple:
    return torch.ones_like(gamma), beta, eps


def plants() -> dict[str, Plant]:
    return {
        "tanh for erf GELU": Plant({
            "linear_gelu": lambda x, w, b=None, approximate="none", *save: (x, w, b, "tanh", *save),
            "feed_forward": lambda x, w1, b1, w2, b2, approximate="none", *save: (x, w1, b1, w2, b2, "tanh", *save),
        }),
        "eps 1e-5 for 1e-12, layers": Plant({"add_layer_norm": of_layer_norm(loose)}),
        "eps 1e-5 for 1e-12, embeddings": Plant({"embed_layer_norm": of_embeddings(loose)}),
        "eps 1e-12 for 1e-5, layers": Plant({"add_layer_norm": of_layer_norm(tight)}, visible_in_a_model=False),
        "attention scale × 1.05": Plant({
            "attention": lambda qkv, cu_seqlens, longest, scale, *rest: (qkv, cu_seqlens, longest, scale * 1.05, *rest)
        }),
        "query bias zeroed": Plant({"linear": rows_zeroed(0)}),
        "key bias zeroed": Plant({"linear": rows_zeroed(1)}, visible_in_a_model=False),
        "value bias zeroed": Plant({"linear": rows_zeroed(2)}),
        "attention output bias zeroed": Plant({"linear": out_zeroed}),
        "FFN1 bias zeroed": Plant({
            "linear_gelu": lambda x, w, b=None, *rest: (x, w, None, *rest),
            "feed_forward": lambda x, w1, b1, w2, b2, *rest: (x, w1, None, w2, b2, *rest),
        }),
        "FFN2 bias zeroed": Plant({
            "feed_forward": lambda x, w1, b1, w2, b2, *rest: (x, w1, b1, w2, None, *rest)
        }),
        "LayerNorm beta zeroed, after attention": Plant({"add_layer_norm": of_layer_norm(no_beta, turn=1)}),
        "LayerNorm beta zeroed, after FFN": Plant({"add_layer_norm": of_layer_norm(no_beta, turn=0)}),
        "LayerNorm beta zeroed, embeddings": Plant({"embed_layer_norm": of_embeddings(no_beta)}),
        "LayerNorm gain 1, after attention": Plant({"add_layer_norm": of_layer_norm(no_gain, turn=1)}),
        "LayerNorm gain 1, after FFN": Plant({"add_layer_norm": of_layer_norm(no_gain, turn=0)}),
        "LayerNorm gain 1, embeddings": Plant({"embed_layer_norm": of_embeddings(no_gain)}),
        "mask dropped": Plant({"unpad": lambda mask: (torch.ones_like(mask),)}),
        "token types swapped": Plant({
            "embed_layer_norm": lambda ids, types, *rest: (ids, None if types is None else 1 - types, *rest)
        }),
        "positions + 1": Plant({"embed_layer_norm": positions_moved(1)}),
        "positions - 1": Plant({"embed_layer_norm": positions_moved(-1)}),
    }  # fmt: skip


@contextlib.contextmanager
def planted(plant: Plant) -> Iterator[None]:
    """Every backend of the plant's ops computes with changed arguments; shapes and refusals stay."""
    ops_by_name = {op.name: op for op in ops.ALL}
    with pytest.MonkeyPatch.context() as patch:
        for name, change in plant.changes.items():
            op = ops_by_name[name]
            for backend in list(op.backends.values()):
                run = functools.partial(lambda run, change, *args: run(*change(*args)), backend.run, change)
                patch.setitem(
                    op.backends, backend.name, ops.Backend(backend.name, run, backend.refuse, backend.devices)
                )
            patch.setattr(op, "_order", {})
        yield


@functools.cache
def model() -> torch.nn.Module:
    """Small, with initial weights so much larger that products are of bert-base's size: 0.02 · √768 = 0.049 · √128."""
    sizes = {"hidden_size": 128, "num_attention_heads": 2, "intermediate_size": 512, "num_hidden_layers": 2}
    return build(transformers.BertConfig(vocab_size=500, initializer_range=0.049, **sizes))


def op_checks(name: str, dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    """(check, ratio) of what tests/ops asserts of the backend "torch" of an op."""
    backend = Backend("torch", "cpu")
    if name == "unpad":
        mask = torch.arange(9) < torch.tensor([[3], [9], [0]])
        found = ops.unpad(mask)
        same = tuple(x.tolist() for x in found) == by_hand(mask)
        yield "ops: unpad, against plain Python", 0.0 if same else math.inf
        return
    spec: Spec = SPECS[name]
    if name == "linear_gelu":
        exact = gelu_inputs(dtype, "none")
        rounded = cast(exact, dtype)
        ours, ref, base = backend(spec, rounded), spec.reference(*cast(rounded, torch.float64)), spec.stock(*rounded)
        yield "ops: GELU, full range", judge(ours[0], ref[0], base[0], elementwise=True).ratio
    if name == "linear":  # the square product of the attention output, which the op's own cases lack
        exact = tuple(a[: EDGES.hidden] if i else a for i, a in enumerate(next(iter(spec.inputs(EDGES, dtype)))[1]))
        rounded = cast(exact, dtype)
        (ours,) = backend(spec, rounded)
        yield (
            "ops: linear, square",
            judge(ours, spec.reference(*cast(rounded, torch.float64)), spec.stock(*rounded)).ratio,
        )
    for check, ratio in verdicts(spec, EDGES, dtype, backend):
        yield f"ops: {check.replace('/torch', '')}", ratio


def findings(name: str, dtype: torch.dtype) -> tuple[tuple[str, float], tuple[str, float]]:
    """The op check and the model check with the largest ratio, when the error is planted."""
    with planted(plants()[name]):
        by_op = max((c for op in plants()[name].changes for c in op_checks(op, dtype)), key=lambda check: check[1])
    with planted(plants()[name]):
        comparison = compare_models(model(), ragged_batch(model(), LENGTHS), dtype)
    assert comparison.fast, comparison.why
    worst = comparison.worst
    return by_op, (f"model: {worst.tensor}", worst.ratio)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_planted_nothing_found(dtype, parity):
    """The checks pass as they stand: what they find below is the planted error."""
    assert compare_models(model(), ragged_batch(model(), LENGTHS), dtype).passed
    for name in ("unpad", *SPECS):
        for check, ratio in op_checks(name, dtype):
            assert ratio <= 1, check


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", plants())
def test_a_planted_error_is_found(name, dtype):
    (op_check, op_ratio), (model_check, model_ratio) = findings(name, dtype)
    assert max(op_ratio, model_ratio) > 1, f"{op_check} {op_ratio:.2f}, {model_check} {model_ratio:.2f}"
    assert op_ratio > 1 or plants()[name].visible_in_a_model


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_key_bias_cannot_be_seen_in_a_model(dtype):
    """q·(k + b) = q·k + q·b adds one number to all scores of a row, which softmax removes; the product shows it."""
    with planted(plants()["key bias zeroed"]):
        assert compare_models(model(), ragged_batch(model(), LENGTHS), dtype).passed


@pytest.mark.parametrize("name", ["tanh for erf GELU", "query bias zeroed", "LayerNorm gain 1, embeddings"])
def test_initial_weights_would_hide_it(name):
    """Why models are enlivened: HuggingFace's initial weights have no biases and no gains, and bf16 hides the GELU."""
    torch.manual_seed(0)
    initial = transformers.BertModel(model().config).eval()
    with planted(plants()[name]):
        dtype = torch.bfloat16 if name == "tanh for erf GELU" else torch.float32
        assert compare_models(initial, ragged_batch(initial, LENGTHS), dtype).passed


def table() -> str:
    """Markdown: by planted error and dtype, the op and the model check with the largest ratio; over 1: found."""
    lines = ["| planted error | dtype | op check | ratio | model check | ratio |", "|---|---|---|---|---|---|"]
    for name in plants():
        for dtype in DTYPES:
            (op_check, op_ratio), (model_check, model_ratio) = findings(name, dtype)
            cells = [name, str(dtype).removeprefix("torch."), op_check.removeprefix("ops: "), number(op_ratio)]
            cells += [model_check.removeprefix("model: "), number(model_ratio)]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def number(ratio: float) -> str:
    text = "wrong" if math.isinf(ratio) else f"{ratio:.2g}" if ratio < 100 else f"{ratio:.0f}"
    return f"**{text}**" if ratio > 1 else text


if __name__ == "__main__":
    print(table())
