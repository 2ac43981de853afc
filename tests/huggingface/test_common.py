"""HuggingFace's own common model tests on our classes, each beside a stock control: what stock does, ours does.

The tests come with the sdist of transformers (requirements/huggingface_tests.txt); testers.py gives them the families.
"""

from collections import Counter

import pytest
import transformers

import fastbert
from fastbert.models.families import FAMILIES
from tests.huggingface import upstream

if upstream.missing():
    pytest.skip(upstream.missing(), allow_module_level=True)

from tests.huggingface.testers import CLASSES, names_of_tests, run

EXCLUDED = {
    "test_generation_tester_mixin_inheritance": "asks for GenerationTesterMixin, which is not in the sdist",
}
QUICK = (
    "test_attention_outputs",
    "test_batching_equivalence",
    "test_can_capture_specific_layers_hidden_states",
    "test_determinism",
    "test_eager_matches_sdpa_inference_13_fp32_pad_right",
    "test_feed_forward_chunking",
    "test_hidden_states_output",
    "test_inputs_embeds_matches_input_ids",
    "test_model_outputs_equivalence",
    "test_resize_tokens_embeddings",
    "test_save_load",
    "test_tied_weights_keys",
    "test_training",
    "test_training_gradient_checkpointing_use_reentrant_false",
)
CASES = [
    pytest.param(family, name, marks=() if name in QUICK else pytest.mark.slow, id=f"{family}-{name}")
    for family in CLASSES
    for name in names_of_tests(family)
    if name not in EXCLUDED
]


@pytest.mark.parametrize("family, name", CASES)
def test_as_stock(family, name, record, count_forwards):
    stock = run(family, transformers, name)
    count_forwards(family)
    ours = run(family, fastbert, name)
    outcomes = record.outcomes.setdefault(family, {"stock": Counter(), "fastbert": Counter()})
    outcomes["stock"][stock.kind] += 1
    outcomes["fastbert"][ours.kind] += 1
    if ours.kind == "failed" and stock.kind != "failed":
        raise ours.raised
    assert stock.kind != "failed", f"stock fails here too; EXCLUDED must say why: {stock.raised!r}"
    assert ours.kind == stock.kind, ours.raised
    if stock.kind == "skipped":
        pytest.skip(str(stock.raised))


@pytest.mark.parametrize("family", [family.name for family in FAMILIES if not family.refusal])
def test_eligible_forwards_were_fast(family, record):
    """At least 95% of those of the tests above, whichever ran."""
    if family not in record.forwards:
        pytest.skip("none of its tests ran")
    eligible = record.eligible(family)
    assert eligible[""] >= 0.95 * eligible.total() > 0, eligible
