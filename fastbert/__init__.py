"""fastbert makes BERT-family encoders fast without changing them.

import fastbert
fastbert.accelerate(model)              # any HuggingFace BERT, RoBERTa, DistilBERT, ELECTRA …, in place
print(fastbert.explain(model))          # which path runs, and in words why not the other
from fastbert import BertModel          # or by import: stock names, stock checkpoints
"""

from typing import TYPE_CHECKING, Any

from fastbert._imports import register_quantizer
from fastbert._paths import register_kernels

register_kernels()
register_quantizer()

__version__ = "0.1.0"

if TYPE_CHECKING:
    from transformers import (
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        AutoModelForMultipleChoice,
        AutoModelForNextSentencePrediction,
        AutoModelForPreTraining,
        AutoModelForQuestionAnswering,
        AutoModelForSeq2SeqLM,
        AutoModelForSequenceClassification,
        AutoModelForTextEncoding,
        AutoModelForTokenClassification,
        BertForMaskedLM,
        BertForMultipleChoice,
        BertForNextSentencePrediction,
        BertForPreTraining,
        BertForQuestionAnswering,
        BertForSequenceClassification,
        BertForTokenClassification,
        BertLMHeadModel,
        BertModel,
        CamembertForCausalLM,
        CamembertForMaskedLM,
        CamembertForMultipleChoice,
        CamembertForQuestionAnswering,
        CamembertForSequenceClassification,
        CamembertForTokenClassification,
        CamembertModel,
        Data2VecTextForCausalLM,
        Data2VecTextForMaskedLM,
        Data2VecTextForMultipleChoice,
        Data2VecTextForQuestionAnswering,
        Data2VecTextForSequenceClassification,
        Data2VecTextForTokenClassification,
        Data2VecTextModel,
        DistilBertForMaskedLM,
        DistilBertForMultipleChoice,
        DistilBertForQuestionAnswering,
        DistilBertForSequenceClassification,
        DistilBertForTokenClassification,
        DistilBertModel,
        ElectraForCausalLM,
        ElectraForMaskedLM,
        ElectraForMultipleChoice,
        ElectraForPreTraining,
        ElectraForQuestionAnswering,
        ElectraForSequenceClassification,
        ElectraForTokenClassification,
        ElectraModel,
        ErnieForCausalLM,
        ErnieForMaskedLM,
        ErnieForMultipleChoice,
        ErnieForNextSentencePrediction,
        ErnieForPreTraining,
        ErnieForQuestionAnswering,
        ErnieForSequenceClassification,
        ErnieForTokenClassification,
        ErnieModel,
        MPNetForMaskedLM,
        MPNetForMultipleChoice,
        MPNetForQuestionAnswering,
        MPNetForSequenceClassification,
        MPNetForTokenClassification,
        MPNetModel,
        RobertaForCausalLM,
        RobertaForMaskedLM,
        RobertaForMultipleChoice,
        RobertaForQuestionAnswering,
        RobertaForSequenceClassification,
        RobertaForTokenClassification,
        RobertaModel,
        XLMRobertaForCausalLM,
        XLMRobertaForMaskedLM,
        XLMRobertaForMultipleChoice,
        XLMRobertaForQuestionAnswering,
        XLMRobertaForSequenceClassification,
        XLMRobertaForTokenClassification,
        XLMRobertaModel,
    )

    from fastbert.models.accelerate import accelerate as accelerate
    from fastbert.models.accelerate import explain, restore
    from fastbert.models.quantize import quantize
    from fastbert.ops import use_backend, use_batch_invariant
    from fastbert.pooling import pool

# `accelerate` is left out on purpose: a star import must not hide HuggingFace's package of that name.
__all__ = [
    "AutoModel", "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForMultipleChoice",
    "AutoModelForNextSentencePrediction", "AutoModelForPreTraining", "AutoModelForQuestionAnswering",
    "AutoModelForSeq2SeqLM", "AutoModelForSequenceClassification", "AutoModelForTextEncoding",
    "AutoModelForTokenClassification", "BertForMaskedLM", "BertForMultipleChoice", "BertForNextSentencePrediction",
    "BertForPreTraining", "BertForQuestionAnswering", "BertForSequenceClassification", "BertForTokenClassification",
    "BertLMHeadModel", "BertModel", "CamembertForCausalLM", "CamembertForMaskedLM", "CamembertForMultipleChoice",
    "CamembertForQuestionAnswering", "CamembertForSequenceClassification", "CamembertForTokenClassification",
    "CamembertModel", "Data2VecTextForCausalLM", "Data2VecTextForMaskedLM", "Data2VecTextForMultipleChoice",
    "Data2VecTextForQuestionAnswering", "Data2VecTextForSequenceClassification",
    "Data2VecTextForTokenClassification", "Data2VecTextModel", "DistilBertForMaskedLM",
    "DistilBertForMultipleChoice", "DistilBertForQuestionAnswering", "DistilBertForSequenceClassification",
    "DistilBertForTokenClassification", "DistilBertModel", "ElectraForCausalLM", "ElectraForMaskedLM",
    "ElectraForMultipleChoice", "ElectraForPreTraining", "ElectraForQuestionAnswering",
    "ElectraForSequenceClassification", "ElectraForTokenClassification", "ElectraModel", "ErnieForCausalLM",
    "ErnieForMaskedLM", "ErnieForMultipleChoice", "ErnieForNextSentencePrediction", "ErnieForPreTraining",
    "ErnieForQuestionAnswering", "ErnieForSequenceClassification", "ErnieForTokenClassification", "ErnieModel",
    "MPNetForMaskedLM", "MPNetForMultipleChoice", "MPNetForQuestionAnswering", "MPNetForSequenceClassification",
    "MPNetForTokenClassification", "MPNetModel", "RobertaForCausalLM", "RobertaForMaskedLM",
    "RobertaForMultipleChoice", "RobertaForQuestionAnswering", "RobertaForSequenceClassification",
    "RobertaForTokenClassification", "RobertaModel", "XLMRobertaForCausalLM", "XLMRobertaForMaskedLM",
    "XLMRobertaForMultipleChoice", "XLMRobertaForQuestionAnswering", "XLMRobertaForSequenceClassification",
    "XLMRobertaForTokenClassification", "XLMRobertaModel", "explain", "pool", "quantize", "restore",
    "use_backend", "use_batch_invariant",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Loads torch and transformers at the first use of a public name, not at import."""
    if name in ("accelerate", "restore", "explain"):
        from fastbert.models import accelerate as module

        return getattr(module, name)
    if name == "quantize":
        from fastbert.models.quantize import quantize

        return quantize
    if name in ("use_backend", "use_batch_invariant"):
        from fastbert import ops

        return getattr(ops, name)
    if name == "pool":
        from fastbert.pooling import pool

        return pool
    if name in __all__:
        from fastbert.models.accelerate import public_class

        return public_class(name)
    raise AttributeError(f"module 'fastbert' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, "accelerate"])
