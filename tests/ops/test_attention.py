from __future__ import annotations

import math

import pytest
import torch

from fastbert import ops
from fastbert.ops import builtins, cuda, reference
from tests.ops.cases import ATTENTION as SPEC
from tests.ops.cases import STEPS, cast, normal
from tests.ops.every_op import *  # noqa: F403
from tests.ops.gradients import gradients, ref_and_base, upstream


def test_dropout_by_hand(dtype, backend):
    """Two sequences and given keep bits against the formula written out, element by element."""
    lengths, heads, dim, p = (33, 2), 2, 8, 0.25
    tokens, longest = sum(lengths), max(lengths)
    qkv = normal(tokens, 3, heads, dim, like="dropout").to(dtype)
    keep = normal(heads, tokens, longest, like="bits") > -0.7
    bits = torch.zeros(heads, tokens, 2, dtype=torch.int64)
    for key in range(longest):
        bits[:, :, key // 32] |= keep[:, :, key].long() << (key % 32)
    bits = (bits + 2**31) % 2**32 - 2**31  # the same 32 bits as a signed integer
    expected = torch.zeros(tokens, heads, dim, dtype=torch.float64)
    rows, start = qkv.tolist(), 0
    for length in lengths:
        for head in range(heads):
            for i in range(start, start + length):
                query = rows[i][0][head]
                scores = [
                    sum(a * b for a, b in zip(query, rows[start + j][1][head], strict=True)) / 3 for j in range(length)
                ]
                total = sum(math.exp(s) for s in scores)
                for j, score in enumerate(scores):
                    if keep[head, i, j]:
                        value = torch.tensor(rows[start + j][2][head], dtype=torch.float64)
                        expected[i, head] += math.exp(score) / total / (1 - p) * value
        start += length
    arguments = cast(
        (qkv, torch.tensor([0, 33, 35], dtype=torch.int32), 33, 1 / 3, bits.int(), p), dtype, backend.device
    )
    out, _ = backend(SPEC, arguments)
    largest = expected.abs().max().item()
    torch.testing.assert_close(out.cpu().double(), expected, rtol=0, atol=8 * STEPS[str(dtype)[6:]] * largest)


def dropout_arguments(**changes):
    arguments = {"qkv": torch.ones(3, 3, 2, 8), "cu_seqlens": torch.tensor([0, 3], dtype=torch.int32), "max_seqlen": 3}
    return arguments | {"scale": 1.0, "keep_bits": torch.ones(2, 3, 1, dtype=torch.int32), "p": 0.5} | changes


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"qkv": torch.ones(3, 2, 2, 8)}, r"qkv has shape \[3, 2, 2, 8\], expected \[any, 3, any, any\]"),
        ({"cu_seqlens": torch.tensor([0, 3])}, "cu_seqlens is torch.int64, expected int32"),
        ({"keep_bits": torch.ones(2, 3, 2).int()}, r"keep_bits has shape \[2, 3, 2\], expected \[2, 3, 1\]"),
        ({"keep_bits": None}, "p = 0.5 and keep_bits missing: dropout needs both"),
        ({"p": 0.0}, "p = 0.0 and keep_bits given: dropout needs both"),
    ],
)
def test_wrong_arguments_are_named(changes, words):
    with pytest.raises(ValueError, match=words):
        ops.attention(*dropout_arguments(**changes).values())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, []),
        ({"qkv": torch.ones(3, 3, 2, 129)}, ["head_dim 129 is none of 1 to 128"]),
        ({"qkv": torch.ones(3, 3, 2, 8).double()}, ["qkv is torch.float64: it takes float32, float16 and bfloat16"]),
        ({"qkv": torch.ones(3, 3, 2, 0), "scale": 0.0}, ["head_dim 0 is none of 1 to 128", "scale 0.0 is not over 0"]),
        ({"scale": float("nan")}, ["scale nan is not over 0"]),
    ],
)
def test_what_the_cuda_kernels_refuse(changes, words):
    arguments = dropout_arguments(**changes)
    qkv = arguments["qkv"]
    assert cuda.attention_reasons(*arguments.values()) == words
    out = torch.ones(3, 2, 8).to(qkv.dtype)
    rest = out, torch.ones(2, 3), *list(arguments.values())[1:]
    assert cuda.attention_backward_reasons(out, qkv, *rest) == words
    assert cuda.attention_backward_reasons(out.half(), qkv, *rest) == [
        *words, f"grad is torch.float16 and qkv {qkv.dtype}",
    ]  # fmt: skip


def test_the_cuda_kernels_need_a_card_with_their_instructions(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert cuda.card_reasons(torch.device("cuda", 0)) == ["it needs sm_80, this is sm_75"]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (12, 0))
    assert cuda.card_reasons(torch.device("cuda", 0)) == []


def test_an_upper_bound_for_max_seqlen_is_enough(dtype, backend, parity):
    """max_seqlen may be larger than the longest sequence: a GPU caller does not read it back."""
    qkv = normal(20, 3, 2, 32, like="bound")
    cu_seqlens = torch.tensor([0, 17, 20], dtype=torch.int32)
    exact, bound = (qkv, cu_seqlens, 17, 0.2), (qkv, cu_seqlens, 64, 0.2)
    ours = backend(SPEC, cast(bound, dtype, backend.device))
    ref, base = (
        SPEC.reference(*cast(cast(exact, dtype), torch.float64)),
        SPEC.stock(*cast(exact, dtype, backend.device)),
    )
    for i, output in enumerate(SPEC.outputs):
        parity(ours[i].cpu(), ref[i], base[i].cpu(), name=f"attention/{backend}/{output}/bound")


def test_work_by_length_classes(dtype, backend, parity):
    """Longest first, each class of lengths for itself, forward and backward; the order is not the batch's."""
    lengths = backend.edges.lengths
    classes = [sum(sum(n > most for most in ops.LENGTH_CLASSES) == i for n in lengths) for i in range(5)]
    order = torch.argsort(torch.tensor(lengths), descending=True, stable=True).int()
    arguments = cast(next(SPEC.inputs(backend.edges, dtype))[1], dtype, backend.device)
    grad, ref, base = ref_and_base(SPEC, arguments, upstream(SPEC, arguments, dtype).to(backend.device))
    work = *arguments, None, 0.0, order.to(backend.device), classes
    found = gradients(SPEC, work, grad, backend)
    parity(
        found["qkv_grad"].cpu(), ref["qkv_grad"], base["qkv_grad"].cpu(), name=f"attention_backward/{backend}/classes"
    )
    ref, base = SPEC.reference(*cast(arguments, torch.float64)), SPEC.stock(*arguments)
    for i, ours in enumerate(backend(SPEC, work)):
        parity(ours.cpu(), ref[i], base[i].cpu(), name=f"attention/{backend}/{SPEC.outputs[i]}/classes")


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("lengths", [(17, 1, 65, 0, 33), (0, 0, 3)], ids=["empty row inside", "empty rows first"])
def test_padded_form_of_other_devices(lengths, p):
    """What devices other than a CPU run; NaN in one sequence, whose rows others gather as padding, stays there."""
    tokens, longest, scale = sum(lengths), max(lengths) + 3, 0.3
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    qkv, grad = normal(tokens, 3, 2, 8, like="padded"), normal(tokens, 2, 8, like="padded grad")
    bits = ops.dropout_bits(torch.tensor(3), 0, cu_seqlens, tokens, longest, 2, p) if p else None
    out, lse = reference.attention(qkv, cu_seqlens, longest, scale, bits, p)
    rest = cu_seqlens, longest, scale, bits, p, None, (), [True, False]
    expected, _ = reference.attention_backward(grad, qkv, out, lse, *rest)
    found = builtins.attention_padded(qkv, cu_seqlens, longest, scale, bits, p)
    torch.testing.assert_close(found, (out, lse), rtol=1e-10, atol=1e-10)
    found = builtins.attention_padded_backward(grad, qkv, cu_seqlens, longest, scale, bits, p)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    last = tokens - lengths[-1]
    qkv[last:] = torch.nan
    assert builtins.attention_padded(qkv, cu_seqlens, longest, scale, bits, p)[0][:last].isfinite().all()
    found = builtins.attention_padded_backward(grad, qkv, cu_seqlens, longest, scale, bits, p)
    torch.testing.assert_close(found[:last], expected[:last], rtol=1e-10, atol=1e-10)
