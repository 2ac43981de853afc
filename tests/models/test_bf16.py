"""bf16 on CPUs is nearer to fp32 than HuggingFace's: an fp32 residual stream, fp32 statistics."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

import fastbert
from tests.models.docstrings import minilm, on_docstrings, relative_error

MOST = 0.6e-2  # relative error of the last hidden state at real tokens


def base():
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig()).eval()


@pytest.mark.parametrize(("make", "rounded", "texts"), [(minilm, True, 16), (base, False, 4)], ids=["minilm", "base"])
def test_bf16_is_nearer_than_huggingface(make, rounded, texts):
    """MiniLM's weights alone, rounded, are 0.7e-2 away from the checkpoint: it is judged against a model of them."""
    stock = make()
    low = copy.deepcopy(stock).bfloat16()
    reference = copy.deepcopy(low).float() if rounded else stock
    found = [x for _, x in on_docstrings([fastbert.accelerate(copy.deepcopy(low)), low, reference], texts, 128)]
    ours, theirs = (relative_error((x[i], x[2]) for x in found) for i in range(2))
    print(f"fastbert {ours:.4f}, HuggingFace {theirs:.4f}")
    assert ours <= MOST < theirs
