"""What HuggingFace's common tests ask of a family: its classes, stock or ours, a small config, a batch."""

import functools
import inspect
import unittest
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import transformers

from fastbert.models.families import FAMILIES
from tests.huggingface import upstream

CLASSES = {family.name: (family.model, *family.heads) for family in FAMILIES}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37}
OTHER_SIZES = {
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 37},
    "electra": {**SIZES, "embedding_size": 16},  # its embeddings are projected
}
VOCABULARY = 99
FIRST_ID = 5  # no pad ids: RoBERTa's positions depend on them, which inputs_embeds cannot show


class ModelTester:
    """The `model_tester` that HuggingFace's mixins ask for sizes, configs and inputs."""

    batch_size, seq_length, num_choices = 13, 7, 4
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4
    is_training = True

    def __init__(self, family: str, package: ModuleType) -> None:
        self.family = family
        # the class that TrainingTesterMixin trains, on labels that are the ids
        self.causal_lm_class = next(getattr(package, c) for c in CLASSES[family] if c.endswith("ForMaskedLM"))

    def get_config(self) -> transformers.PreTrainedConfig:
        sizes = OTHER_SIZES.get(self.family, SIZES)
        return transformers.AutoConfig.for_model(self.family, vocab_size=VOCABULARY, **sizes)

    def prepare_config_and_inputs_for_common(self) -> tuple[transformers.PreTrainedConfig, dict[str, torch.Tensor]]:
        common, config = upstream.load("test_modeling_common"), self.get_config()
        shape = [self.batch_size, self.seq_length]
        ids = common.ids_tensor(shape, VOCABULARY - FIRST_ID) + FIRST_ID
        inputs = {"input_ids": ids, "attention_mask": common.random_attention_mask(shape)}  # a mask with holes
        if hasattr(config, "type_vocab_size"):
            inputs["token_type_ids"] = common.ids_tensor(shape, config.type_vocab_size)
        return config, inputs


@functools.cache
def family_test(family: str, package: ModuleType) -> type[Any]:
    """HuggingFace's tests of a family's classes as `package` has them: transformers or fastbert."""
    common, training = upstream.load("test_modeling_common"), upstream.load("test_training_mixin")

    class FamilyTest(common.ModelTesterMixin, training.TrainingTesterMixin, unittest.TestCase):
        all_model_classes = tuple(getattr(package, name) for name in CLASSES[family])
        model_tester = ModelTester(family, package)
        # stock ELECTRA, 16 wide at its embeddings, does not get there in 300 steps at the default 1e-3
        training_overfit_learning_rate = 3e-3 if family == "electra" else 1e-3

        def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
            inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels=return_labels)
            if return_labels and model_class.__name__.endswith("ForPreTraining"):
                inputs["labels"] = torch.zeros_like(inputs["input_ids"])
                if "next_sentence_label" in inspect.signature(model_class.forward).parameters:
                    inputs["next_sentence_label"] = inputs["labels"][:, 0]
            return inputs

    return FamilyTest


def names_of_tests(family: str) -> list[str]:
    """The names of HuggingFace's tests of a family."""
    return unittest.defaultTestLoader.getTestCaseNames(family_test(family, transformers))


@dataclass(frozen=True)
class Outcome:
    """How a test went: "passed", "skipped" or "failed", and what it raised."""

    kind: str
    raised: BaseException | None = None


def run(family: str, package: ModuleType, name: str) -> Outcome:
    """One test of HuggingFace's, from the same seeds for every package."""
    transformers.set_seed(0)
    upstream.load("test_modeling_common").global_rng.seed(0)  # of ids_tensor
    try:
        family_test(family, package)(name).debug()
    except unittest.SkipTest as skipped:
        return Outcome("skipped", skipped)
    except Exception as failed:
        return Outcome("failed", failed)
    return Outcome("passed")
