"""Dropout inside a model: HuggingFace's own modules with the documented masks give the same outputs and gradients.

The masks come from the numpy twin of docs/numerics.md, "Dropout", spread over the padded layout; so these tests hold
which site, row, column and head each element has, and where in the layers dropout stands.
"""

import contextlib
import copy
import itertools
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

import fastbert
from fastbert.dtypes import dtype_name
from tests.models.gradients import gradients_of, labels_of, verdicts
from tests.models.small import VOCABULARY, batch, stock
from tests.ops import philox

HIDDEN, ATTENTION = 0.25, 0.125  # unlike, so that one in the place of the other is seen
RATES = {"hidden_dropout_prob": HIDDEN, "attention_probs_dropout_prob": ATTENTION, "classifier_dropout": 0.0}
BERT_SITES = {"encoder.layer.{}.attention.output.dropout": 1, "encoder.layer.{}.output.dropout": 2}
MODELS = {  # class → family, config, the modules of a layer that drop and their site; the embeddings' is site 3
    "BertForMaskedLM": ("bert", RATES, BERT_SITES),
    "BertForSequenceClassification": ("bert", RATES, BERT_SITES),
    "RobertaForMaskedLM": ("roberta", RATES, BERT_SITES),
    "ElectraForMaskedLM": ("electra", RATES, BERT_SITES),
    "ErnieForMaskedLM": ("ernie", RATES, BERT_SITES),
    "DistilBertForMaskedLM": (
        "distilbert", {"dropout": HIDDEN, "attention_dropout": ATTENTION}, {"transformer.layer.{}.ffn.dropout": 2},
    ),
}  # fmt: skip
LAYERS, HEADS, LENGTHS = 2, 4, (33, 1, 16, 7) * 3


class Kept(nn.Module):
    """Dropout whose mask [B, S, H] is given."""

    def __init__(self, factors):
        super().__init__()
        self.factors = factors

    def forward(self, x):
        return x * self.factors.to(x.dtype)


def padded_factors(mask, seed, site, width):
    """What dropout multiplies hidden states [B, S, width] with; rows are numbered over the real tokens."""
    keep, scale = philox.hidden(seed, site, int(mask.sum()), width, HIDDEN)
    factors = torch.ones(*mask.shape, width, dtype=torch.float64)
    factors[mask] = keep.double() * scale
    return factors


def padded_attention_factors(mask, seed, site):
    """The same of attention probabilities [B, N, S, S]; columns are numbered over the real tokens of a sequence."""
    lengths, width = mask.sum(1), mask.shape[1]
    keep = philox.keep(seed, site, int(mask.sum()), int(lengths.max()), HEADS, ATTENTION)  # [N, T, longest]
    factors = torch.ones(mask.shape[0], HEADS, width, width, dtype=torch.float64)
    for b, start in enumerate([0, *lengths.cumsum(0).tolist()[:-1]]):
        real = mask[b].nonzero().flatten().numpy()
        mine = keep[:, start : start + len(real), : len(real)] * philox.scale(ATTENTION)
        factors[b].numpy()[np.ix_(range(HEADS), real, real)] = mine
    return factors


@contextlib.contextmanager
def the_same_masks(model, sites, mask, seed):
    """A stock model in training mode that drops what the documented definition drops, in its own padded layout."""
    base = model.base_model
    base.embeddings.dropout = Kept(padded_factors(mask, seed, 3, base.embeddings.word_embeddings.embedding_dim))
    for layer, (path, site) in itertools.product(range(LAYERS), sites.items()):
        base.set_submodule(path.format(layer), Kept(padded_factors(mask, seed, 4 * layer + site, 64)))
    layers = itertools.cycle(range(LAYERS))

    def attention(query, key, value, attn_mask=None, dropout_p=0.0, scale=None, is_causal=False):
        assert dropout_p == ATTENTION and not is_causal
        scores = query @ key.mT * scale
        if attn_mask is not None:
            scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
        factors = padded_attention_factors(mask, seed, 4 * next(layers))
        return scores.softmax(3) * factors.to(scores.dtype) @ value

    with mock.patch.object(nn.functional, "scaled_dot_product_attention", attention):
        yield


def seed_drawn_after(manual_seed):
    """The one number that a forward draws from torch's generator."""
    torch.manual_seed(manual_seed)
    limits = torch.iinfo(torch.int64)
    return int(torch.randint(limits.min, limits.max, ()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_huggingface_with_the_same_masks(name, dtype, parity):
    family, rates, sites = MODELS[name]
    inputs = batch(family, LENGTHS)
    inputs["attention_mask"][0, 5:9] = 0  # a hole: rows and columns are those of real tokens
    mask = inputs["attention_mask"] == 1
    labels = labels_of(name, inputs, VOCABULARY)
    base = stock(name, family, **rates).to(dtype).train()
    ours, ref = fastbert.accelerate(copy.deepcopy(base)), copy.deepcopy(base).double()
    logits = {}

    def loss(model):
        out = model(**inputs, **labels)
        logits[model] = (out.logits[mask] if out.logits.dim() == 3 else out.logits).detach()
        return out.loss

    for manual_seed in (0, 1):  # of the seeds drawn, one is negative
        seed = seed_drawn_after(manual_seed)
        torch.manual_seed(manual_seed)
        found = [gradients_of(ours, loss)]
        for model in (ref, base):
            with the_same_masks(model, sites, mask, seed):
                found.append(gradients_of(model, loss))
        parity(logits[ours], logits[ref], logits[base], name=f"dropout/{name}/logits")
        for parameter, verdict in verdicts(*found):
            parity.keep(f"dropout/{name}/{parameter}", dtype_name(dtype), verdict)
            assert verdict.passed, f"{parameter}: {verdict}"
    assert dict(fastbert.explain(ours).models[0].calls) == {"": 2}


def test_one_of_the_seeds_is_negative():
    assert sorted(seed_drawn_after(s) < 0 for s in (0, 1)) == [False, True]
