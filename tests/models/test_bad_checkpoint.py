"""Checkpoints that are broken, or are pickles: HuggingFace's exceptions and messages, and no code of a file runs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import fastbert
from tests.models.small import batch, reasons, stock

WEIGHTS, CONFIG = "model.safetensors", "config.json"
CLASSES = ["BertModel", "BertForMaskedLM", "AutoModel", "AutoModelForMaskedLM"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of a small BERT."""
    stock("BertForMaskedLM", "bert").save_pretrained(tmp_path)
    return tmp_path


def truncated(folder):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def only_a_header(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:20])


def empty_weights(folder):
    (folder / WEIGHTS).write_bytes(b"")


def edited(folder, change):
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, {"format": "pt"})


def wrong_shape(folder):
    edited(folder, lambda w: w.update({"bert.embeddings.word_embeddings.weight": torch.zeros(98, 64)}))


def garbage_config(folder):
    (folder / CONFIG).write_text("{ this is no JSON")


def binary_config(folder):
    (folder / CONFIG).write_bytes(b"\xff\xfe\x00\x01" * 10)


def config_with(folder, **changes):
    (folder / CONFIG).write_text(json.dumps(json.loads((folder / CONFIG).read_text()) | changes))


BROKEN = {
    "weights cut in half": truncated,
    "weights cut in the header": only_a_header,
    "an empty file of weights": empty_weights,
    "a matrix of another shape": wrong_shape,
    "a config that is no JSON": garbage_config,
    "a config of bytes": binary_config,
    "a config of another size": lambda folder: config_with(folder, hidden_size=32),
    "a config of heads that do not divide": lambda folder: config_with(folder, num_attention_heads=5),
    "a config of an unknown kind": lambda folder: config_with(folder, model_type="no_such_model"),
    "a folder without config": lambda folder: (folder / CONFIG).unlink(),
    "a folder without weights": lambda folder: (folder / WEIGHTS).unlink(),
    "an empty folder": lambda folder: [path.unlink() for path in folder.iterdir()],
    "no folder": lambda folder: [*[path.unlink() for path in folder.iterdir()], folder.rmdir()],
}


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_checkpoint_is_huggingfaces_affair(case, name, folder):
    """The same exception with the same words; where HuggingFace loads it all the same, the same weights."""
    BROKEN[case](folder)
    outcomes = []
    for library in (transformers, fastbert):
        torch.manual_seed(0)
        try:
            outcomes.append(getattr(library, name).from_pretrained(folder).state_dict())
        except Exception as error:
            outcomes.append((type(error), str(error)))
    theirs, ours = outcomes
    if isinstance(theirs, dict):
        assert theirs.keys() == ours.keys() and all(torch.equal(theirs[key], ours[key]) for key in theirs)
    else:
        assert theirs == ours
    unknown_to_one_class = case == "a config of an unknown kind" and name.startswith("Bert")
    assert isinstance(theirs, dict) == unknown_to_one_class, theirs


@pytest.mark.parametrize("name", ["BertForMaskedLM", "AutoModelForMaskedLM"])
@torch.no_grad()
def test_missing_weights_are_drawn_and_named_as_by_huggingface(name, folder, caplog):
    key = "bert.encoder.layer.1.output.dense.weight"
    edited(folder, lambda weights: weights.pop(key))
    said, models = [], []
    for library in (transformers, fastbert):
        caplog.clear()
        torch.manual_seed(0)
        model, report = getattr(library, name).from_pretrained(folder, output_loading_info=True)
        assert report["missing_keys"] == {key}
        said.append([record.message for record in caplog.records if record.name.startswith("transformers")])
        models.append(model.eval())
    assert said[0] == said[1]
    theirs, ours = (model.state_dict() for model in models)
    assert all(torch.equal(theirs[k], ours[k]) for k in theirs)
    models[1](**batch("bert"))
    assert reasons(models[1]) == [""]


class Malicious:
    """What unpickles by creating a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", CLASSES)
def test_a_pickle_that_runs_code_is_not_run(name, folder, tmp_path):
    (folder / WEIGHTS).unlink()
    made = tmp_path / "made_by_a_pickle"
    torch.save({"bert.pooler.dense.weight": Malicious(made)}, folder / "pytorch_model.bin")
    outcomes = []
    for library in (transformers, fastbert):
        with pytest.raises(Exception) as error:
            getattr(library, name).from_pretrained(folder)
        outcomes.append((error.type, str(error.value)))
        assert not made.exists()
    assert outcomes[0] == outcomes[1] and "weights_only" in outcomes[1][1].lower().replace(" ", "_")
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert made.exists()  # it would have


@pytest.mark.parametrize("name", ["BertModel", "AutoModel"])
@torch.no_grad()
def test_a_pickle_of_weights_loads_as_by_huggingface(name, folder):
    """`weights_only=True` reads tensors and runs nothing; the command line refuses pickles unless asked."""
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    models = []
    for library in (transformers, fastbert):
        torch.manual_seed(0)  # for the pooler, which the file does not hold
        models.append(getattr(library, name).from_pretrained(folder).eval())
    theirs, ours = models
    assert all(torch.equal(x, y) for x, y in zip(theirs.parameters(), ours.parameters(), strict=True))
    assert torch.equal(ours.encoder.layer[0].output.dense.weight, weights["bert.encoder.layer.0.output.dense.weight"])
    ours(**batch("bert"))
    assert reasons(ours) == [""]
