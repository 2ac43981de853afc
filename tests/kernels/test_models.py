"""Whole models by Triton's kernels alone, in the interpreter: real weights on real text, and texts beside others."""

from __future__ import annotations

import copy

import pytest
import torch

import fastbert
from fastbert import checkpoint, ops, parity_models
from tests.models import small
from tests.models.test_parity import assert_parity

LENGTHS = (64, 1, 33, 17)  # at, below and above the tile sizes 16, 32 and 64; one token


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str
)
def test_minilm_on_real_text(dtype, parity):
    """All its layers, every op of the fast path."""
    with ops.use_backend("triton"):  # or nothing: no other backend takes its place
        report = parity_models.run(checkpoint.resolve(None), [dtype], lengths=LENGTHS)
    assert report.inputs.startswith("text") and report.lengths == LENGTHS
    (comparison,) = report.comparisons.values()
    assert_parity(comparison, parity, "MiniLM by triton")


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_training_by_triton_alone(dropout):
    """A step's gradients, dropout drawn from the same seed, near those of the torch backend."""
    sizes = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    _, model = small.pair("BertForSequenceClassification", "bert", **sizes)
    inputs, labels = small.batch("bert"), torch.tensor([0, 2, 1, 0])
    found = {}
    for backend in ("torch", "triton"):
        trained = copy.deepcopy(model).train()
        torch.manual_seed(5)
        with ops.use_backend(backend), ops.record() as calls:
            trained(**inputs, labels=labels).loss.backward()
        assert {call.backend for call in calls} == {backend}
        found[backend] = {name: p.grad for name, p in trained.named_parameters()}
    for name, grad in found["torch"].items():
        torch.testing.assert_close(found["triton"][name], grad, rtol=2e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def texts(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(5, small.VOCABULARY, (1 + 11 * i % 41,), generator=generator) for i in range(count)]


def padded(chosen: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(t) for t in chosen], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(2, 7), pytest.param(range(2, 34), marks=pytest.mark.slow)], ids=["few", "2 to 33"])
def test_a_text_does_not_depend_on_those_beside_it(sizes, dtype):
    """Each text alone and inside batches in any order: bitwise equal, hidden states and the head's logits."""
    _, model = small.pair("BertForSequenceClassification", "bert")
    model, known = model.to(dtype), texts(max(sizes))
    with torch.no_grad(), fastbert.use_batch_invariant():
        alone = [model(**padded([text]), output_hidden_states=True) for text in known]
        for size in sizes:
            order = torch.randperm(len(known), generator=torch.Generator().manual_seed(size))[:size].tolist()
            together = model(**padded([known[i] for i in order]), output_hidden_states=True)
            for row, i in enumerate(order):
                length = len(known[i])
                assert torch.equal(together.logits[row], alone[i].logits[0])
                for ours, single in zip(together.hidden_states, alone[i].hidden_states, strict=True):
                    assert torch.equal(ours[row, :length], single[0, :length])


def test_the_mode_is_needed(monkeypatch):
    """On a device without Triton's kernels it is refused in words, and nothing falls back in silence."""
    from fastbert.kernels import cards

    _, model = small.pair("BertModel", "bert")
    monkeypatch.setattr(cards, "is_interpreted", lambda: False)
    with fastbert.use_batch_invariant(), pytest.raises(ops.BackendRefused, match="device cpu is not cuda"):
        model(**small.batch("bert"))
