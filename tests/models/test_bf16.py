"""bf16 on CPUs is nearer to fp32 than HuggingFace's: an fp32 residual stream, fp32 statistics."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

import fastbert
from fastbert import checkpoint, workloads

MOST = 0.6e-2  # relative error of the last hidden state at real tokens


def minilm():
    return transformers.AutoModel.from_pretrained(checkpoint.demo_folder()).eval()


def base():
    torch.manual_seed(0)
    return transformers.BertModel(transformers.BertConfig()).eval()


def errors(reference, models, texts):
    """The relative errors of models on docstrings of at most 128 tokens."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint.demo_folder())
    made = workloads.batches("docstrings", vocab_size=30522, tokenizer=tokenizer, max_length=128, max_texts=texts)
    wrong, size = [0.0] * len(models), 0.0
    for part in made.batches:
        real = part.attention_mask[..., None]
        with torch.no_grad():
            expected, *found = (m(**part.inputs())[0].double() * real for m in (reference, *models))
        size += float(expected.square().sum())
        wrong = [w + float((x - expected).square().sum()) for w, x in zip(wrong, found, strict=True)]
    return [(w / size) ** 0.5 for w in wrong]


@pytest.mark.parametrize(("make", "rounded", "texts"), [(minilm, True, 16), (base, False, 4)], ids=["minilm", "base"])
def test_bf16_is_nearer_than_huggingface(make, rounded, texts):
    """MiniLM's weights alone, rounded, are 0.7e-2 away from the checkpoint: it is judged against a model of them."""
    stock = make()
    low = copy.deepcopy(stock).bfloat16()
    reference = copy.deepcopy(low).float() if rounded else stock
    ours, theirs = errors(reference, [fastbert.accelerate(copy.deepcopy(low)), low], texts)
    print(f"fastbert {ours:.4f}, HuggingFace {theirs:.4f}")
    assert ours <= MOST < theirs
