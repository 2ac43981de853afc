"""The model families, one entry each: where a HuggingFace model keeps what the fast path reads."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

# The heads that every family has, as the ends of their names.
COMMON_HEADS = (
    "ForMaskedLM", "ForSequenceClassification", "ForMultipleChoice", "ForTokenClassification", "ForQuestionAnswering",
)  # fmt: skip


@dataclass(frozen=True)
class Family:
    """Where a family's modules stand. Paths are attribute paths from the base model, or from a layer.

    Args:
        name: `config.model_type`.
        model: name of the base class in transformers.
        more_heads: ends of the names of its classes with a head, beyond COMMON_HEADS.
        layers: path of the list of layers.
        attention … norm2: paths inside a layer; `attention` holds `attention_head_size`.
        attention_dropout: the nn.Dropout in a layer whose `p` is that of the attention probabilities; HuggingFace asks
            `attention.training` whether it is on.
        out_dropout: the nn.Dropout of a layer after `out`; None: the family has none.
        ffn_dropout: the nn.Dropout of a layer after `w2`.
        embeddings_dropout: the nn.Dropout after the LayerNorm of the embeddings, from the base model.
        projection: the nn.Linear from the width of the embeddings to that of the layers, from the base model; a model
            whose two widths are equal has none. None: the family never has.
        positions: "arange" (0, 1, …) or "after_padding" (pad_token_id + 1, … counted over ids that are no pad).
        tables: names of its embeddings' tables.
        pooler: whether the base model may have a pooler.
        output: name of the class of the base model's output.
        loss_of_mask: heads, by the end of their name, whose loss over tokens leaves masked positions out by itself.
        refusal: why no model of the family can run fast; empty: it can.
    """

    name: str
    model: str
    more_heads: tuple[str, ...] = ()
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
    attention_dropout: str = "attention.self.dropout"
    out_dropout: str | None = "attention.output.dropout"
    ffn_dropout: str = "output.dropout"
    embeddings_dropout: str = "embeddings.dropout"
    projection: str | None = None
    positions: str = "arange"
    tables: tuple[str, ...] = ("word_embeddings", "position_embeddings", "token_type_embeddings")
    pooler: bool = True
    output: str = "BaseModelOutputWithPoolingAndCrossAttentions"
    loss_of_mask: tuple[str, ...] = ()
    refusal: str = ""

    @property
    def heads(self) -> tuple[str, ...]:
        """Names of the classes that put a head on the base model."""
        return tuple(self.model.removesuffix("Model") + head for head in COMMON_HEADS + self.more_heads)

    @property
    def token_heads(self) -> tuple[str, ...]:
        """Those of `heads` whose loss is over all tokens whose label is not -100, masked ones included."""
        ends = tuple({*TOKEN_HEADS} - {*self.loss_of_mask})
        return () if self.refusal else tuple(head for head in self.heads if head.endswith(ends))

    def dropouts(self) -> tuple[str, ...]:
        """The paths of a layer's nn.Dropout modules."""
        return tuple(path for path in (self.attention_dropout, self.out_dropout, self.ffn_dropout) if path)

    def linears(self) -> tuple[str, ...]:
        """The paths of a layer's nn.Linear modules."""
        return self.query, self.key, self.value, self.out, self.w1, self.w2


CAUSAL_HEADS = ("ForCausalLM", "LMHeadModel")
TOKEN_HEADS = ("ForTokenClassification", "ForMaskedLM", "ForPreTraining", *CAUSAL_HEADS)

BERT = Family("bert", "BertModel", ("LMHeadModel", "ForPreTraining", "ForNextSentencePrediction"))
ROBERTA = Family("roberta", "RobertaModel", ("ForCausalLM",), positions="after_padding")
XLM_ROBERTA = replace(ROBERTA, name="xlm-roberta", model="XLMRobertaModel")
CAMEMBERT = replace(ROBERTA, name="camembert", model="CamembertModel")
DATA2VEC_TEXT = replace(ROBERTA, name="data2vec-text", model="Data2VecTextModel")
# Its embeddings may add a fourth table, task_type_embeddings: see `tables_of`.
ERNIE = Family("ernie", "ErnieModel", ("ForCausalLM", "ForPreTraining", "ForNextSentencePrediction"))
ELECTRA = Family(
    "electra",
    "ElectraModel",
    ("ForCausalLM", "ForPreTraining"),
    projection="embeddings_project",
    pooler=False,
    output="BaseModelOutputWithPastAndCrossAttentions",
    loss_of_mask=("ForPreTraining",),
)
DISTILBERT = Family(
    "distilbert",
    "DistilBertModel",
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
    attention_dropout="attention.dropout",
    out_dropout=None,
    ffn_dropout="ffn.dropout",
    tables=("word_embeddings", "position_embeddings"),
    pooler=False,
    output="BaseModelOutput",
)
MPNET = Family(
    "mpnet",
    "MPNetModel",
    positions="after_padding",
    refusal="MPNet adds a bias by relative position to its attention scores, which no op takes",
)

FAMILIES: tuple[Family, ...] = (
    BERT, ROBERTA, XLM_ROBERTA, CAMEMBERT, DISTILBERT, ELECTRA, ERNIE, DATA2VEC_TEXT, MPNET,
)  # fmt: skip


def tables_of(family: Family, embeddings: Any) -> tuple[str, ...]:
    """The names of the tables that an embeddings module adds: those of its family, and ERNIE's task types if used."""
    return (*family.tables, "task_type_embeddings") if getattr(embeddings, "use_task_id", False) else family.tables


def position_limit(config: Any) -> int:
    """The longest sequence, in tokens, that a model of this config takes."""
    after_padding = any(f.name == config.model_type and f.positions == "after_padding" for f in FAMILIES)
    return int(config.max_position_embeddings) - (config.pad_token_id + 1 if after_padding else 0)


AUTO_CLASSES = (
    "AutoModel", "AutoModelForPreTraining", "AutoModelForMaskedLM", "AutoModelForCausalLM",
    "AutoModelForNextSentencePrediction", "AutoModelForSequenceClassification", "AutoModelForMultipleChoice",
    "AutoModelForTokenClassification", "AutoModelForQuestionAnswering", "AutoModelForTextEncoding",
    "AutoModelForSeq2SeqLM",
)  # fmt: skip
