"""Pipelines of five tasks, a batch of ragged texts each (transformers 5 has no question-answering pipeline)."""

import copy

import numpy as np
import pytest
import torch
import transformers

import fastbert
from tests.ecosystem.common import assert_same, calls

TEXTS = ["w5 w6 w7", "w8", "w9 " * 30, "w10 w11 nonsense", "w12 w13 w14 w15 w16"]
MASKED = ["w5 [MASK] w7", "[MASK]", "w9 " * 30 + "[MASK]"]
ZERO_SHOT = {"candidate_labels": ["w60 w61", "w62"], "hypothesis_template": "w70 {} w71"}
LABELS = ["entailment", "neutral", "contradiction"]
NAMED = {"id2label": dict(enumerate(LABELS)), "label2id": {label: i for i, label in enumerate(LABELS)}}

TASKS = {
    "feature-extraction": ("BertModel", TEXTS, {}),
    "fill-mask": ("BertForMaskedLM", MASKED, {"top_k": 4}),
    "text-classification": ("BertForSequenceClassification", TEXTS, {"top_k": None}),
    "token-classification": ("BertForTokenClassification", TEXTS, {"aggregation_strategy": "simple"}),
    "zero-shot-classification": ("BertForSequenceClassification", TEXTS, ZERO_SHOT),
}


def split(answer):
    """A pipeline's nested answer → its numbers in order, and the words, places and ids in order."""
    numbers, rest, ahead = [], [], [answer]
    while ahead:
        item = ahead.pop(0)
        if isinstance(item, list | dict):
            ahead = [*(item.values() if isinstance(item, dict) else item), *ahead]
        elif isinstance(item, float | np.floating):
            numbers.append(float(item))
        else:
            rest.append(item)
    return numbers, rest


@pytest.mark.parametrize("task", TASKS)
def test_pipeline(task, saved):
    name, texts, options = TASKS[task]
    pipe = transformers.pipeline(task, saved(name, "bert", **NAMED), device="cpu")
    expected, model = pipe.model, copy.deepcopy(pipe.model)
    fastbert.accelerate(model)

    def run(model):
        pipe.model = model
        answers = pipe(texts, batch_size=3, **options)
        if task == "feature-extraction":  # pad rows come back too: ours are zeros
            lengths = [len(ids) for ids in pipe.tokenizer(texts).input_ids]
            answers = [rows[0][:n] for rows, n in zip(answers, lengths, strict=True)]
        return split(answers)

    assert run(model)[1] == run(expected)[1]
    assert_same(lambda m: torch.tensor(run(m)[0], dtype=next(m.parameters()).dtype), expected, model)
    assert set(calls(model)) == {""} and calls(model).total() >= 2
