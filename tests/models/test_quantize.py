"""int8: how near MiniLM's outputs stay, copies, packing, what is refused in words."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers
from torch import nn

import fastbert
from fastbert import ops
from fastbert.models.quantized import QuantizedLinear
from tests.models.docstrings import minilm, on_docstrings, relative_error
from tests.models.small import stock

ERROR, COSINE = 3e-2, 0.999  # relative, of the last hidden state; of mean-pooled embeddings


def small(kind: str = "BertModel", **more):
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=120, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
        max_position_embeddings=40, **more,
    )  # fmt: skip
    return getattr(transformers, kind)(config).eval()


def batch(lengths: tuple[int, ...] = (7, 3, 12)) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 120, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask}


def outputs(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs)[0]


def minilm_errors(texts: int, length: int) -> tuple[float, float]:
    """The relative error of the last hidden state at real tokens, and the least cosine of a text's embedding."""
    stock = minilm()
    ours = fastbert.accelerate(fastbert.quantize(copy.deepcopy(stock)))
    pairs, least = [], 1.0
    for real, (a, b) in on_docstrings([ours, stock], texts, length):
        pairs.append((a, b))
        pooled = (x.sum(1) / real.sum(1) for x in (a, b))
        least = min(least, float(torch.cosine_similarity(*pooled).min()))
    assert set(ours._fastbert.calls) == {""}
    return relative_error(pairs), least


def test_minilm_stays_near_on_real_texts():
    error, cosine = minilm_errors(16, 128)
    print(f"relative error {error:.4f}, least cosine {cosine:.5f}")
    assert error <= ERROR and cosine >= COSINE


@pytest.mark.slow
def test_minilm_stays_near_on_2000_texts():
    error, cosine = minilm_errors(2000, 256)
    print(f"relative error {error:.4f}, least cosine {cosine:.5f}")
    assert error <= ERROR and cosine >= COSINE


def test_bf16_stands_between_int8_products_only():
    """Of a float32 model on a CPU; where one linear is not int8, its model stays in float32."""
    model = fastbert.accelerate(fastbert.quantize(small()))
    assert outputs(model, batch()).dtype == torch.float32
    assert model._fastbert.seen.dtype == torch.bfloat16
    stock, mixed = small(), fastbert.quantize(small())
    mixed.encoder.layer[1].intermediate.dense = stock.encoder.layer[1].intermediate.dense
    with ops.record() as calls:
        outputs(fastbert.accelerate(mixed), batch())
    assert mixed._fastbert.calls == {"": 1} and "attention" in [call.op for call in calls]
    assert not mixed._fastbert.structure.is_int8


def test_copies_and_pickles_carry_int8():
    model = fastbert.quantize(small())
    before = outputs(model, batch())
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert made.encoder.layer[0].output.dense.int8_weight.dtype == torch.int8
        assert torch.equal(outputs(made, batch()), before)


def test_an_accelerated_model_runs_its_products_in_int8():
    """Query, key and value as one; GELU in the first product's op; the numbers are the modules' own."""
    model = fastbert.quantize(small())
    alone = outputs(model, batch())
    fastbert.accelerate(model)
    with ops.record() as calls, ops.use_backend("torch"):
        fast = outputs(model, batch())
    assert [call.shapes[1] for call in calls if call.op == "quantized_linear"] == [
        (144, 48), (48, 48), (96, 48), (48, 96)
    ] * 2  # fmt: skip
    assert not {"linear", "feed_forward", "linear_gelu"} & {call.op for call in calls}
    real = batch()["attention_mask"].bool()
    torch.testing.assert_close(fast[real], alone[real], rtol=0.05, atol=0.05)  # a step of int8 may flip
    if ops.encodes(torch.device("cpu"), torch.float32, quantized=True):
        with ops.record() as calls:
            whole = outputs(model, batch())
        assert "encoder_forward" in {call.op for call in calls}
        torch.testing.assert_close(whole[real], alone[real], rtol=0.05, atol=0.05)
    assert "quantized: the layers' products run in int8" in str(fastbert.explain(model))
    assert model._fastbert.cache.nbytes() > 0
    assert torch.equal(outputs(fastbert.restore(model), batch()), alone)


def test_a_text_does_not_depend_on_its_neighbours():
    model = fastbert.accelerate(fastbert.quantize(small()))
    together = outputs(model, batch((7, 3, 12, 1)))
    for row, length in enumerate((7, 3, 12, 1)):
        ids = batch((7, 3, 12, 1))["input_ids"][row : row + 1, :length]
        assert torch.equal(outputs(model, {"input_ids": ids})[0], together[row, :length])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_scales_and_outliers_stay_as_they_are(dtype):
    model = fastbert.quantize(small())
    before = model.encoder.layer[0].output.dense.state_dict()
    dense = model.to(dtype).encoder.layer[0].output.dense
    assert dense.bias.dtype == dtype and dense.scales.dtype == torch.float32
    assert all(torch.equal(before[name], dense.get_buffer(name)) for name in ("scales", "outliers"))
    assert outputs(fastbert.accelerate(model), batch()).dtype == dtype


def test_a_column_of_outliers_costs_the_others_nothing():
    """It is a thousand times larger, and rounded to bf16; beside it the others would keep no bit of int8."""
    torch.manual_seed(0)
    linear, x = nn.Linear(48, 10), torch.randn(20, 48)
    x[:, 5] *= 1000
    rest = x.index_fill(1, torch.tensor([5]), 0.0)
    outlier = x[:, 5:6].bfloat16().float() @ linear.weight[:, 5:6].bfloat16().float().T
    expected = linear(rest) + outlier
    near, far = (QuantizedLinear.of(linear, torch.tensor(columns))(x) - expected for columns in ([5], [6]))
    assert near.norm() < 0.02 * linear(rest).norm() and near.abs().max() < 0.1
    assert far.norm() > 10 * near.norm()


def test_training_is_refused_in_words():
    model = fastbert.accelerate(fastbert.quantize(small().train()))
    with pytest.raises(NotImplementedError, match=r"train the model before fastbert\.quantize"):
        model(**batch()).last_hidden_state.sum().backward()


class Int8Linear(nn.Linear):
    """As another library would put it there."""


def by_others(model):
    model.encoder.layer[0].output.dense = Int8Linear(96, 48)
    return model


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: "bert", TypeError, "fastbert.quantize takes a torch.nn.Module, not str"),
        (lambda: nn.Linear(2, 2), ValueError, "holds no model that fastbert accelerates; it knows BertModel"),
        (lambda: fastbert.quantize(small()), ValueError, "it is quantized already"),
        (lambda: by_others(small()), ValueError, "Int8Linear on a Parameter, not a plain torch.nn.Linear"),
        (lambda: stock("MPNetModel", "mpnet"), ValueError, "cannot take MPNetModel: MPNet adds a bias by relative"),
        (lambda: small().to("meta"), ValueError, "its weights are on the meta device: load them first"),
    ],
)
def test_what_cannot_be_quantized_is_said(make, error, words):
    model = make()
    with pytest.raises(error, match=words):
        fastbert.quantize(model)


def test_lora_is_to_be_merged_first():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(small(), peft.LoraConfig(target_modules=["query"]))
    with pytest.raises(ValueError, match="query holds a LoRA adapter: merge it first"):
        fastbert.quantize(model)
    fastbert.quantize(model.merge_and_unload())


@pytest.mark.parametrize("name", ["int8_weight", "scales", "outliers", "columns", "bias"])
def test_an_edit_of_what_is_quantized_is_seen(name):
    """Also through `.data`, which changes no version."""
    model = fastbert.accelerate(fastbert.quantize(small()))
    before = outputs(model, batch())
    linear = model.encoder.layer[1].output.dense
    edited = getattr(linear, name).data
    edited.copy_(edited.flip(0) if name == "columns" else torch.ones_like(edited))
    after = outputs(model, batch())
    assert not torch.equal(after, before)
    with ops.use_backend("torch"):
        torch.testing.assert_close(after, outputs(model, batch()), rtol=0.05, atol=0.05)  # a step of int8 may flip


def test_inference_tensors_are_looked_at_every_time():
    """They have no version that would tell of a change."""
    with torch.inference_mode():
        model = fastbert.accelerate(fastbert.quantize(small()))
        before = model(**batch())[0]
        model.encoder.layer[0].output.dense.int8_weight[3, 5] += 64
        assert not torch.equal(model(**batch())[0], before)
