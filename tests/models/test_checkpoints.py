"""Real weights: all-MiniLM-L6-v2 on real text, AntiBERTy's MLM head through a pipeline."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers

import fastbert
from fastbert import checkpoint, ops, parity_models
from fastbert.parity_models import compare_models, ragged_batch
from tests.models.test_parity import DTYPES, LENGTHS, assert_parity

ANTIBERTY = Path(__file__).parents[2] / ".cache" / "antiberty"
HEAVY = (
    "EVQLVQSGPEVKKPGTSVKVSCKASGFTFMSSAVQWVRQARGQRLEWIGWIVIGSGNTNY"
    "AQKFQERVTITRDMSTSTAYMELSSLRSEDTAVYYCAAPYCSSISCNDGFDIWGQGTMVTVS"
)
LIGHT = (
    "DVVMTQTPFSLPVSLGDQASISCRSSQSLVHSNGNTYLHWYLQKPGQSPKLLIYKVSNRFSGVPDRFSGSGSGTDFTLKISRVEAEDLGVYFCSQSTHVPYTFGGGTKLEIK"
)


@pytest.fixture(scope="module")
def minilm():
    try:
        return checkpoint.resolve(None)
    except checkpoint.MissingModel as missing:
        pytest.fail(str(missing))


@pytest.fixture(scope="module")
def antiberty():
    """A stock BertForMaskedLM with AntiBERTy's weights, and its tokenizer; its other heads are left out."""
    if not (ANTIBERTY / "pytorch_model.bin").is_file():
        pytest.fail(f"{ANTIBERTY} holds no checkpoint: `make .cache/antiberty/done` fetches it")
    model = transformers.BertForMaskedLM(transformers.BertConfig.from_pretrained(ANTIBERTY))
    weights = torch.load(ANTIBERTY / "pytorch_model.bin", weights_only=True, map_location="cpu")
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert missing == []
    left_out = ("bert.embeddings.position_ids", "bert.pooler.", "cls.species.", "cls.chain.", "cls.graft.")
    assert all(name.startswith(left_out) for name in unexpected)
    return model.eval(), transformers.BertTokenizer(str(ANTIBERTY / "vocab.txt"), do_lower_case=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_minilm_on_real_text(minilm, dtype, parity):
    report = parity_models.run(minilm, [dtype])
    assert report.inputs.startswith("text") and max(report.lengths) == 512 and min(report.lengths) == 1
    (comparison,) = report.comparisons.values()
    assert_parity(comparison, parity, "MiniLM")
    assert report.passed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_antiberty(antiberty, dtype, parity):
    model, _ = antiberty
    assert_parity(compare_models(model, ragged_batch(model, LENGTHS), dtype), parity, "AntiBERTy")


def masked(sequence, at):
    return " ".join("[MASK]" if i == at else residue for i, residue in enumerate(sequence))


def scores(model, tokenizer, texts):
    """[texts, vocabulary] of the pipeline's scores by token id, and the tokens of each text by falling score."""
    pipe = transformers.pipeline(
        "fill-mask", model=model, tokenizer=tokenizer, top_k=len(tokenizer), batch_size=len(texts)
    )
    found = pipe(texts)
    by_token = [[row["score"] for row in sorted(rows, key=lambda row: row["token"])] for rows in found]
    return torch.tensor(by_token, dtype=torch.float64), [[row["token_str"] for row in rows] for rows in found]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_antiberty_fills_masks_through_a_pipeline(antiberty, dtype, parity):
    """The same tokens, and scores within the rule, for texts of different lengths in one batch."""
    stock, tokenizer = antiberty
    texts = (
        [masked(HEAVY, at) for at in (3, 40, 100)] + [masked(LIGHT, at) for at in (0, 60)] + [masked(HEAVY[:20], 10)]
    )
    base_model = copy.deepcopy(stock).to(dtype)
    base, base_tokens = scores(base_model, tokenizer, texts)
    with ops.record() as calls:
        ours, tokens = scores(fastbert.accelerate(copy.deepcopy(base_model)), tokenizer, texts)
    count = Counter(call.op for call in calls)
    assert count["encoder_forward"] == 1 or count["attention"] == stock.config.num_hidden_layers
    ref, ref_tokens = scores(base_model.double(), tokenizer, texts)
    parity(ours, ref, base.to(dtype), name="AntiBERTy/fill-mask scores")
    assert [row[0] for row in tokens] == [row[0] for row in ref_tokens] == [row[0] for row in base_tokens]
    if dtype == torch.float32:
        assert [row[:5] for row in tokens] == [row[:5] for row in base_tokens]


def test_parity_does_not_pass_on_the_stock_path(minilm):
    """A comparison of HuggingFace with itself is no parity: the report says that the fast path did not run, and why."""
    model = parity_models.load(minilm).requires_grad_(False)
    inputs = ragged_batch(model, (5, 3))
    inputs["attention_mask"] = inputs["attention_mask"].flip(1)  # left padding steps aside
    report = parity_models.run(model, ["fp32"], inputs=inputs)
    (comparison,) = report.comparisons.values()
    assert all(row.passed for row in report.rows)
    assert not comparison.fast and not comparison.passed and not report.passed
    assert "column 0 of a row is masked" in comparison.why
    assert report.as_dict()["passed"] is False
