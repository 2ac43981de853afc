"""Models against HuggingFace by the parity rule: every real config, every head, fp32 and bf16, ragged batches."""

from __future__ import annotations

import functools

import pytest
import torch

from fastbert.models.families import position_limit
from fastbert.parity_models import LENGTHS, compare_models
from tests.models.build import CONFIGS, HEADS, build, head_inputs, with_head

DTYPES = [torch.float32, torch.bfloat16]
# One row a sequence needs rows to be judged by; logits over a vocabulary need few tokens.
ROWS = (65, 64, 17, 16, 15, 1, *range(2, 15), *range(2, 15))
TOKENS = (65, 64, 17, 16, 15, 1)
VOCABULARY = (33, 17, 1)
LENGTHS_OF = {
    "ForSequenceClassification": ROWS, "ForNextSentencePrediction": ROWS, "ForMultipleChoice": ROWS,
    "ForTokenClassification": TOKENS, "ForQuestionAnswering": TOKENS,
    "ForMaskedLM": VOCABULARY, "LMHeadModel": VOCABULARY, "ForCausalLM": VOCABULARY,
    "ForPreTraining": (*VOCABULARY, *range(2, 15)),
}  # fmt: skip
# Below a head the layers are those of the base model, which is judged at its full depth; a head is judged over two.
HEAD_LAYERS = 2
PAIRS = [(name, head) for name, config in CONFIGS.items() for head in HEADS[config.model_type]]


@functools.lru_cache(maxsize=1)  # tests come config by config
def trunk(name):
    return build(CONFIGS[name])


def assert_parity(comparison, parity, name):
    assert comparison.fast, comparison.why
    failed = []
    for row in comparison.rows:
        kind = "hidden_states" if row.layer is not None else row.tensor
        parity.keep(f"model/{name}/{kind}", row.dtype, row)
        failed += [] if row.passed else [f"{row.tensor}: max {row.max_ratio:.3g}, rms {row.rms_ratio:.3g}, {row.note}"]
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_hidden_state(name, dtype, parity):
    """The base model at its full depth, on one ragged batch of lengths from 1 to 512 tokens."""
    model = trunk(name)
    assert position_limit(model.config) == 512
    comparison = compare_models(model, head_inputs(model, LENGTHS), dtype)
    assert_parity(comparison, parity, name)
    depth = model.config.num_hidden_layers
    expected = [f"hidden_states.{i}" for i in range(depth + 1)] + ["last_hidden_state"]
    assert [row.tensor for row in comparison.rows] == expected + ["pooler_output"] * (
        model.config.model_type != "distilbert"
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "head"), PAIRS)
def test_every_head(name, head, dtype, parity):
    torch.manual_seed(0)
    model = with_head(trunk(name), head, HEAD_LAYERS)
    lengths = next(lengths for suffix, lengths in LENGTHS_OF.items() if head.endswith(suffix))
    comparison = compare_models(model, head_inputs(model, lengths), dtype)
    assert_parity(comparison, parity, head)
    assert any("logits" in row.tensor for row in comparison.rows)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "head"), PAIRS)
def test_every_head_at_full_depth(name, head, dtype, parity):
    """The whole product: every layer below every head, every length. About half an hour on two cores."""
    torch.manual_seed(0)
    model = with_head(trunk(name), head, CONFIGS[name].num_hidden_layers)
    lengths = next(lengths for suffix, lengths in LENGTHS_OF.items() if head.endswith(suffix))
    comparison = compare_models(model, head_inputs(model, (512, 511, *lengths, 128, 127)), dtype)
    assert_parity(comparison, parity, f"{head}, full depth")
