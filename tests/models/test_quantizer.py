"""int8 checkpoints: what `save_pretrained` writes, what `from_pretrained` makes of it, what it refuses in words."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import fastbert
from fastbert.models.quantized import QuantizedLinear
from fastbert.models.quantizer import Int8Config
from tests.models.small import BASES, batch, config, stock

OF = "encoder.layer.1.output.dense."


@pytest.fixture
def saved(tmp_path):
    """A folder with a small BERT in int8, and that model."""
    model = fastbert.quantize(stock("BertModel", "bert"))
    model.save_pretrained(tmp_path)
    return tmp_path, model


def outputs(model):
    with torch.no_grad():
        return model(**batch("bert"))[0]


def assert_same_tensors(a, b):
    for (name, x), (other, y) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
        assert name == other and x.dtype == y.dtype and torch.equal(x, y), name


@pytest.mark.parametrize(("family", "name"), BASES)
@pytest.mark.parametrize("library", [transformers, fastbert], ids=lambda library: library.__name__)
def test_the_loaded_model_is_the_same_bits(family, name, library, tmp_path):
    """Stock class or drop-in one; nothing missing, nothing left over, nothing newly made."""
    model = fastbert.quantize(stock(name, family))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"] == {"quant_method": "fastbert", "outlier_share": 16, "rotated": 128}
    loaded, report = getattr(library, name).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert not loaded.training
    assert_same_tensors(model, loaded)
    if library is fastbert:
        assert fastbert.explain(loaded).models[0].quantized
        fastbert.accelerate(model)
    with torch.no_grad():
        assert torch.equal(*(m(**batch(family)).last_hidden_state for m in (model, loaded)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scales_are_loaded_unrounded(saved, dtype):
    folder, model = saved
    loaded = transformers.AutoModel.from_pretrained(folder, dtype=dtype)
    assert_same_tensors(model.to(dtype), loaded)
    assert loaded.encoder.layer[0].output.dense.scales.dtype == torch.float32


def test_below_a_head_and_back(tmp_path):
    """A base model's checkpoint below a new head, and a head's without it."""
    fastbert.quantize(stock("BertModel", "bert")).save_pretrained(tmp_path / "base")
    headed = fastbert.BertForSequenceClassification.from_pretrained(tmp_path / "base")
    assert headed.bert.encoder.layer[0].output.dense.int8_weight.any()
    headed.save_pretrained(tmp_path / "head")
    for model in (
        transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "head"),
        transformers.AutoModel.from_pretrained(tmp_path / "head"),
    ):
        assert_same_tensors(headed.bert.encoder, model.base_model.encoder)


def test_made_here_or_loaded_it_is_one_thing_to_transformers(saved):
    folder, model = saved
    loaded = transformers.BertModel.from_pretrained(folder)
    for made in (model, loaded):
        assert made.is_quantized and made.quantization_method == "fastbert"
        assert not made.get_parameter(f"{OF}bias").requires_grad
        assert made.get_buffer("encoder.layer.1.attention.self.query.columns").shape == (4,)  # of 64: one in 16
        with pytest.raises(ValueError, match="it is quantized already"):
            fastbert.quantize(made)
    with pytest.raises(NotImplementedError, match="load the checkpoint that it was made from"):
        loaded.dequantize()
    loaded.save_pretrained(folder / "again")
    assert_same_tensors(model, transformers.BertModel.from_pretrained(folder / "again"))


def test_the_trainer_refuses_it(saved):
    pytest.importorskip("accelerate")
    folder, model = saved
    for made in (model, transformers.BertModel.from_pretrained(folder)):
        with pytest.raises(ValueError, match="You cannot perform fine-tuning on purely quantized models"):
            transformers.Trainer(made, transformers.TrainingArguments(str(folder), report_to=[], use_cpu=True))


def edit(folder, change):
    """Changes the tensors of a checkpoint by their names."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("columns", lambda x: x + 1000, "columns does not rise below"),
        ("columns", lambda x: x - 1000, "columns does not rise below"),
        ("columns", lambda x: x.flip(0), "columns does not rise below"),
        ("scales", lambda x: x * float("nan"), "scales are not all finite and above 0"),
        ("scales", torch.zeros_like, "scales are not all finite and above 0"),
    ],
)
def test_a_damaged_checkpoint(saved, name, value, words):
    """Columns are indices that kernels follow."""
    folder, _ = saved
    edit(folder, lambda tensors: tensors.update({OF + name: value(tensors[OF + name])}))
    with pytest.raises(ValueError, match=f"the checkpoint is damaged: {OF}{words}"):
        transformers.BertModel.from_pretrained(folder)


@pytest.mark.parametrize("name", ["int8_weight", "scales", "columns", "outliers", "bias"])
def test_a_checkpoint_that_lacks_a_tensor(saved, name):
    """HuggingFace would make it anew, from what memory holds."""
    folder, _ = saved
    edit(folder, lambda tensors: tensors.pop(OF + name))
    with pytest.raises(ValueError, match=f"lacks 1 tensors of its products, the first {OF}{name}"):
        transformers.BertModel.from_pretrained(folder)


@pytest.mark.parametrize(
    "asked", [{"outlier_share": 0}, {"outlier_share": "x"}, {"rotated": 64}, {"outlier_share": None}]
)
def test_a_config_of_other_products(saved, asked):
    folder, _ = saved
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= asked
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="computes int8 products with outlier_share 1 or more and rotated 128"):
        transformers.BertModel.from_pretrained(folder)


def test_from_pretrained_does_not_quantize(tmp_path):
    stock("BertModel", "bert").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"load the model, then call fastbert\.quantize\(model\)"):
        transformers.BertModel.from_pretrained(tmp_path, quantization_config=Int8Config(24, 128))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (
            transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=9),
            "GPT2Model holds no model that fastbert",
        ),
        (config("mpnet"), "fastbert has no int8 products for MPNetModel: MPNet adds a bias by relative position"),
    ],
)
def test_a_model_of_another_kind(saved, other, words):
    folder, _ = saved
    other.quantization_config = Int8Config(24, 128)
    other.save_pretrained(folder)
    with pytest.raises(ValueError, match=words):
        transformers.AutoModel.from_pretrained(folder)


def test_scales_that_were_rounded():
    """As a version of transformers might that does not ask a module for its dtypes."""
    product = QuantizedLinear(48, 8, bias=True, columns=2)
    product.after_loading("dense")
    product.scales = product.scales.bfloat16()
    with pytest.raises(ValueError, match=r"dense\.scales was loaded in torch\.bfloat16 and not in torch\.float32"):
        product.after_loading("dense")


def process(code, *arguments):
    """What a new process printed and logged."""
    run = subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout, run.stderr


@pytest.mark.parametrize("first", ["fastbert", "transformers", "transformers.quantizers"])
def test_whatever_is_imported_first(saved, first):
    """And fastbert's import alone brings neither torch nor transformers."""
    code = f"""
import sys, {first}
import fastbert
if {first == "fastbert"}:
    assert not {{"torch", "transformers"}} & {{*sys.modules}}
import transformers
_, report = transformers.AutoModel.from_pretrained(sys.argv[1], output_loading_info=True)
print(any(report.values()), any("_Finder" in type(finder).__name__ for finder in sys.meta_path))
"""
    out, logged = process(code, saved[0])
    assert out == "False False\n" and "fastbert" not in logged


def test_loaded_without_fastbert_it_is_not_accelerated(saved):
    """HuggingFace warns of random weights; they are not made fast."""
    code = """
import sys, transformers
model = transformers.AutoModel.from_pretrained(sys.argv[1])
import fastbert
try:
    fastbert.accelerate(model)
except ValueError as error:
    print(error)
"""
    out, logged = process(code, saved[0])
    assert "Unknown quantization type, got fastbert" in logged
    assert out.startswith("the config of this BertModel says that fastbert has quantized it, and its products are not")
    assert "Then its weights are random: import fastbert first." in out


@pytest.mark.parametrize("make", [fastbert.AutoModel.from_config, fastbert.BertModel], ids=["auto", "class"])
def test_a_config_alone_makes_a_model_that_is_not_int8(saved, make):
    """As HuggingFace's classes do, to train one; `accelerate` cannot tell, and asks."""
    config = transformers.AutoConfig.from_pretrained(saved[0])
    model = make(config)
    assert fastbert.explain(model).models[0].reasons == [] and not fastbert.explain(model).models[0].quantized
    with pytest.raises(ValueError, match="Was it made from the config alone"):
        fastbert.accelerate(transformers.BertModel(config))


def test_where_the_interface_has_changed_transformers_goes_on():
    code = """
import sys
sys.modules["fastbert.models.quantized"] = None  # whatever fails
import fastbert, transformers
print(transformers.BertModel.__name__)
"""
    out, logged = process(code)
    assert out == "BertModel\n"
    assert "models that fastbert.quantize made cannot be loaded: ModuleNotFoundError" in logged
