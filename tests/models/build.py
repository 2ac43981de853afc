"""Random models of the real configs, enlivened, and heads that share one trunk."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from torch import nn

from fastbert.models.families import FAMILIES
from fastbert.parity import enliven
from fastbert.parity_models import ragged_batch

ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
ERNIE = {"vocab_size": 40000, "max_position_embeddings": 2048, "type_vocab_size": 4, "use_task_id": True}
CONFIGS = {  # the fields in which the hub's configs differ from the classes' defaults, which are bert-base-uncased's
    "bert-base": transformers.BertConfig(),
    "bert-large, 2 layers": transformers.BertConfig(
        hidden_size=1024, num_attention_heads=16, intermediate_size=4096, num_hidden_layers=2
    ),
    "bert-base-chinese": transformers.BertConfig(vocab_size=21128),
    "bert-base-multilingual-cased": transformers.BertConfig(vocab_size=119547),
    "roberta-base": transformers.RobertaConfig(**ROBERTA),
    "distilroberta-base": transformers.RobertaConfig(**ROBERTA, num_hidden_layers=6),
    "distilbert-base": transformers.DistilBertConfig(),
    "electra-small-discriminator": transformers.ElectraConfig(),
    "ernie-3.0-base-zh, 2 layers": transformers.ErnieConfig(**ERNIE, num_hidden_layers=2),
}
LARGER = {  # families whose layers are BERT's, line by line
    "ernie-3.0-base-zh": transformers.ErnieConfig(**ERNIE),
    "xlm-roberta-base": transformers.XLMRobertaConfig(**ROBERTA | {"vocab_size": 250002}),
    "camembert-base": transformers.CamembertConfig(**ROBERTA | {"vocab_size": 32005}),
    "data2vec-text-base": transformers.Data2VecTextConfig(**ROBERTA),
}
HEADS = {family.name: family.heads for family in FAMILIES}


def build(config: Any, seed: int = 0) -> nn.Module:
    """An enlivened base model of a config, with its pooler where it has one."""
    torch.manual_seed(seed)
    return enliven(transformers.AutoModel.from_config(config), seed).eval()


def with_head(trunk: nn.Module, head: str, layers: int) -> nn.Module:
    """A model with a head over the first layers of `trunk`, whose memory it shares."""
    config = copy.deepcopy(trunk.config)
    config.num_hidden_layers = layers
    with torch.device("meta"):
        model = getattr(transformers, head)(config)
    prefix = model.base_model_prefix
    model.load_state_dict({f"{prefix}.{k}": v for k, v in trunk.state_dict().items()}, strict=False, assign=True)
    for name, buffer in dict(model.named_buffers()).items():
        owner, _, last = name.rpartition(".")
        model.get_submodule(owner).register_buffer(last, trunk.get_buffer(name.removeprefix(f"{prefix}.")), False)
        assert buffer.shape == model.get_buffer(name).shape
    model.tie_weights()
    own = nn.Module()  # the head's own parameters
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            owner, _, last = name.rpartition(".")
            module = model.get_submodule(owner)
            module._parameters[last] = nn.Parameter(torch.randn(parameter.shape) * 0.05)
            own.add_module(owner.replace(".", "_"), module)
    model.tie_weights()
    assert not any(p.is_meta for p in model.parameters())
    enliven(own)
    return model.eval()


def head_inputs(model: nn.Module, lengths: tuple[int, ...], choices: int = 2) -> dict[str, torch.Tensor]:
    """A ragged batch; for a multiple-choice model, its rows in pairs, each choice of its own length."""
    inputs = ragged_batch(model, lengths)
    if type(model).__name__.endswith("MultipleChoice"):
        inputs.pop("task_type_ids", None)  # which ErnieForMultipleChoice does not take apart
        return {name: x.unflatten(0, (-1, choices)) for name, x in inputs.items()}
    return inputs


def head_labels(model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Random labels of the kind that a head takes; -100 at masked positions."""
    config, head, ids = model.config, type(model).__name__, inputs["input_ids"]
    generator = torch.Generator().manual_seed(1)

    def draw(classes: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, classes, shape or (len(ids),), generator=generator)

    if head.endswith("QuestionAnswering"):
        return {"start_positions": draw(ids.shape[1]), "end_positions": draw(ids.shape[1])}
    if head.endswith("ForNextSentencePrediction"):
        return {"labels": draw(2)}
    if head.endswith("ForSequenceClassification"):
        return {"labels": draw(config.num_labels)}
    if head.endswith("ForMultipleChoice"):
        return {"labels": draw(ids.shape[1])}
    classes = config.num_labels if head.endswith("ForTokenClassification") else config.vocab_size
    if head == "ElectraForPreTraining":
        classes = 2  # was the token replaced
    labels = {"labels": draw(classes, *ids.shape).masked_fill(inputs["attention_mask"] == 0, -100)}
    if head.endswith("ForPreTraining") and head != "ElectraForPreTraining":
        labels["next_sentence_label"] = draw(2)
    return labels
