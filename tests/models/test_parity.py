"""Models against HuggingFace by the parity rule: every real config, every head with its loss, ragged batches."""

from __future__ import annotations

import functools

import pytest
import torch

from fastbert.models.families import position_limit
from fastbert.parity_models import LENGTHS, compare_models
from tests.models import small
from tests.models.build import CONFIGS, HEADS, LARGER, build, head_inputs, head_labels, with_head

DTYPES = [torch.float32, torch.bfloat16]
# One row a sequence needs rows to be judged by; logits over a vocabulary need few tokens.
ROWS = (65, 64, 17, 16, 15, 1, *range(2, 15), *range(2, 15))
CHOICES = (*ROWS, *range(2, 15), *range(2, 15))  # two rows a question
TOKENS = (65, 64, 17, 16, 15, 1)
VOCABULARY = (33, 17, 1)
SMALL = (33, 17, 16, 15, 1, *range(2, 15), *range(2, 10))
LENGTHS_OF = {
    "ForSequenceClassification": ROWS, "ForNextSentencePrediction": ROWS, "ForMultipleChoice": CHOICES,
    "ForTokenClassification": TOKENS, "ForQuestionAnswering": TOKENS,
    "ForMaskedLM": VOCABULARY, "LMHeadModel": VOCABULARY, "ForCausalLM": VOCABULARY,
    "ForPreTraining": (*VOCABULARY, *range(2, 15)),
}  # fmt: skip
# Below a head the layers are those of the base model, which is judged at its full depth; a head is judged over two.
HEAD_LAYERS = 2
PAIRS = [(name, head) for name, config in CONFIGS.items() for head in HEADS[config.model_type]]
LARGER_PAIRS = [(name, head) for name, config in LARGER.items() for head in HEADS[config.model_type]]
# Their loss reads pad rows, which the fast path does not compute: it is judged on many rows without padding. One
# number a row are few to be judged by: of 16 the largest error of base is luck, of 64 it hardly is.
DENSE_LOSS = {"ForQuestionAnswering": (9,) * 64, "ForCausalLM": (9,) * 16, "LMHeadModel": (9,) * 16}
# Like another one that is quick: roberta-base is distilroberta-base with more layers, the others are bert-base
# with another vocabulary, which shows below this head.
ALIKE = {
    "roberta-base": (),
    "bert-base-chinese": ("BertForMaskedLM",),
    "bert-base-multilingual-cased": ("BertForMaskedLM",),
}


def quick_or_slow(name, *head):
    """A config, or a config and a head, as a parameter of a test; slow where another shows what it would show."""
    is_slow = name in ALIKE and not set(head) & set(ALIKE[name])
    return pytest.param(name, *head, marks=[pytest.mark.slow] * is_slow)


@functools.lru_cache(maxsize=1)  # tests come config by config
def trunk(name):
    return build({**CONFIGS, **LARGER}[name])


def headed(name, head, layers):
    """A config's model with a head, whose weights do not depend on which tests ran before, and made the trunk."""
    base = trunk(name)
    torch.manual_seed(0)
    return with_head(base, head, layers)


def compare_head(model, lengths, dtype):
    """Every output of a model with a head on a ragged batch, and its loss."""
    inputs = head_inputs(model, lengths)
    found = [lengths for suffix, lengths in DENSE_LOSS.items() if type(model).__name__.endswith(suffix)]
    if not found:
        return [compare_models(model, inputs, dtype, labels=head_labels(model, inputs))]
    dense = head_inputs(model, found[0])
    return [
        compare_models(model, inputs, dtype),
        compare_models(model, dense, dtype, labels=head_labels(model, dense)),
    ]


def assert_head_parity(model, lengths, dtype, parity, name):
    comparisons = compare_head(model, lengths, dtype)
    for comparison in comparisons:
        assert_parity(comparison, parity, name)
    tensors = {row.tensor for row in comparisons[-1].rows}
    assert "loss" in tensors and any("logits" in tensor for tensor in tensors)


def assert_parity(comparison, parity, name):
    assert comparison.fast, comparison.why
    failed = []
    for row in comparison.rows:
        kind = "hidden_states" if row.layer is not None else row.tensor
        parity.keep(f"model/{name}/{kind}", row.dtype, row)
        failed += [] if row.passed else [f"{row.tensor}: max {row.max_ratio:.3g}, rms {row.rms_ratio:.3g}, {row.note}"]
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [quick_or_slow(name) for name in CONFIGS])
def test_every_hidden_state(name, dtype, parity):
    """The base model at its full depth, on one ragged batch of lengths from 1 to 512 tokens."""
    model = trunk(name)
    assert position_limit(model.config) >= 512
    comparison = compare_models(model, head_inputs(model, LENGTHS), dtype)
    assert_parity(comparison, parity, name)
    depth = model.config.num_hidden_layers
    expected = [f"hidden_states.{i}" for i in range(depth + 1)] + ["last_hidden_state"]
    assert [row.tensor for row in comparison.rows] == expected + ["pooler_output"] * hasattr(model, "pooler")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "head"), [quick_or_slow(*pair) for pair in PAIRS])
def test_every_head(name, head, dtype, parity):
    model = headed(name, head, HEAD_LAYERS)
    lengths = next(lengths for suffix, lengths in LENGTHS_OF.items() if head.endswith(suffix))
    assert_head_parity(model, lengths, dtype, parity, head)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("family", "head"), small.HEADS)
def test_every_head_of_every_family(family, head, dtype, parity):
    """Small: the families that share their layers' source with another differ in names and in heads."""
    assert_head_parity(small.stock(head, family), SMALL, dtype, parity, f"{head}, small")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "head"), PAIRS + LARGER_PAIRS)
def test_every_head_at_full_depth(name, head, dtype, parity):
    """The whole product: every layer below every head, every length. About half an hour on two cores."""
    model = headed(name, head, trunk(name).config.num_hidden_layers)
    lengths = next(lengths for suffix, lengths in LENGTHS_OF.items() if head.endswith(suffix))
    assert_head_parity(model, (512, 511, *lengths, 128, 127), dtype, parity, f"{head}, full depth")
