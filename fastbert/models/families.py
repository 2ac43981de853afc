"""The model families, one entry each: where a HuggingFace model keeps what the fast path reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Family:
    """Where a family's modules stand. Paths are attribute paths from the base model, or from a layer.

    Args:
        name: `config.model_type`.
        model: name of the base class in transformers.
        heads: names of the classes that put a head on it.
        layers: path of the list of layers.
        attention … norm2: paths inside a layer; `attention` holds `attention_head_size`.
        positions: "arange" (0, 1, …) or "after_padding" (pad_token_id + 1, … counted over ids that are no pad).
        tables: names of its embeddings' tables.
        pooler: whether the base model may have a pooler.
    """

    name: str
    model: str
    heads: tuple[str, ...]
    layers: str = "encoder.layer"
    attention: str = "attention.self"
    query: str = "attention.self.query"
    key: str = "attention.self.key"
    value: str = "attention.self.value"
    out: str = "attention.output.dense"
    norm1: str = "attention.output.LayerNorm"
    w1: str = "intermediate.dense"
    activation: str = "intermediate.intermediate_act_fn"
    w2: str = "output.dense"
    norm2: str = "output.LayerNorm"
    positions: str = "arange"
    tables: tuple[str, ...] = ("word_embeddings", "position_embeddings", "token_type_embeddings")
    pooler: bool = True

    def linears(self) -> tuple[str, ...]:
        """The paths of a layer's nn.Linear modules."""
        return self.query, self.key, self.value, self.out, self.w1, self.w2


BERT = Family(
    name="bert",
    model="BertModel",
    heads=(
        "BertForPreTraining", "BertLMHeadModel", "BertForMaskedLM", "BertForNextSentencePrediction",
        "BertForSequenceClassification", "BertForMultipleChoice", "BertForTokenClassification",
        "BertForQuestionAnswering",
    ),
)  # fmt: skip

ROBERTA = Family(
    name="roberta",
    model="RobertaModel",
    heads=(
        "RobertaForCausalLM", "RobertaForMaskedLM", "RobertaForSequenceClassification", "RobertaForMultipleChoice",
        "RobertaForTokenClassification", "RobertaForQuestionAnswering",
    ),
    positions="after_padding",
)  # fmt: skip

DISTILBERT = Family(
    name="distilbert",
    model="DistilBertModel",
    heads=(
        "DistilBertForMaskedLM", "DistilBertForSequenceClassification", "DistilBertForQuestionAnswering",
        "DistilBertForTokenClassification", "DistilBertForMultipleChoice",
    ),
    layers="transformer.layer",
    attention="attention",
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    out="attention.out_lin",
    norm1="sa_layer_norm",
    w1="ffn.lin1",
    activation="ffn.activation",
    w2="ffn.lin2",
    norm2="output_layer_norm",
    tables=("word_embeddings", "position_embeddings"),
    pooler=False,
)  # fmt: skip

FAMILIES: tuple[Family, ...] = (BERT, ROBERTA, DISTILBERT)


def position_limit(config: Any) -> int:
    """The longest sequence, in tokens, that a model of this config takes."""
    after_padding = any(f.name == config.model_type and f.positions == "after_padding" for f in FAMILIES)
    return int(config.max_position_embeddings) - (config.pad_token_id + 1 if after_padding else 0)


AUTO_CLASSES = (
    "AutoModel", "AutoModelForPreTraining", "AutoModelForMaskedLM", "AutoModelForCausalLM",
    "AutoModelForNextSentencePrediction", "AutoModelForSequenceClassification", "AutoModelForMultipleChoice",
    "AutoModelForTokenClassification", "AutoModelForQuestionAnswering",
)  # fmt: skip
