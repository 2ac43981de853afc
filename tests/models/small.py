"""Small random models of every family, enlivened, and ragged batches, for tests of behaviour."""

import copy

import torch
import transformers
from torch import nn

import fastbert
from fastbert.models.families import FAMILIES
from fastbert.parity import enliven, judge

SIZES = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96}
CONFIGS = {family.name: SIZES for family in FAMILIES} | {
    "distilbert": {"n_layers": 2, "dim": 64, "n_heads": 4, "hidden_dim": 96},
    "electra": {**SIZES, "embedding_size": 32},
    "ernie": {**SIZES, "use_task_id": True, "task_type_vocab_size": 3},
}
VOCABULARY, LONGEST, LABELS = 99, 48, 3
ALL_HEADS = [(family.name, head) for family in FAMILIES for head in family.heads]
ALL_BASES = [(family.name, family.model) for family in FAMILIES]
REFUSED = ["mpnet"]  # what no op computes
HEADS = [(family, head) for family, head in ALL_HEADS if family not in REFUSED]
BASES = [(family, base) for family, base in ALL_BASES if family not in REFUSED]


def config(family: str, **changes: object) -> transformers.PreTrainedConfig:
    # pad_token_id 1 for RoBERTa shifts its positions by two, so its table is longer
    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": LONGEST + 2, "num_labels": LABELS}
    return transformers.AutoConfig.for_model(family, **{**CONFIGS[family], **sizes, **changes})


def config_for(name: str, family: str, **changes: object) -> transformers.PreTrainedConfig:
    """The config of a class: a head that marks the start and the end of an answer has two labels."""
    return config(family, **({"num_labels": 2} if "QuestionAnswering" in name else {}), **changes)


def stock(name: str, family: str, **changes: object) -> nn.Module:
    """A stock model in eval mode."""
    torch.manual_seed(0)
    model = getattr(transformers, name)(config_for(name, family, **changes)).eval()
    enliven(model, seed=1)
    return model


def pair(name: str, family: str, **changes: object) -> tuple[nn.Module, nn.Module]:
    """A stock model and an accelerated copy of it."""
    model = stock(name, family, **changes)
    return model, fastbert.accelerate(copy.deepcopy(model))


def batch(family: str, lengths: tuple[int, ...] = (33, 1, 16, 7), width: int | None = None) -> dict[str, torch.Tensor]:
    """A right-padded batch of random ids: [len(lengths), width]."""
    generator = torch.Generator().manual_seed(len(lengths))
    pad = config(family).pad_token_id
    mask = (torch.arange(width or max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(5, VOCABULARY, mask.shape, generator=generator)
    inputs = {"input_ids": torch.where(mask == 1, ids, pad), "attention_mask": mask}
    if family in ("bert", "electra", "ernie"):
        inputs["token_type_ids"] = torch.randint(0, 2, mask.shape, generator=generator) * mask
    if family == "ernie":
        inputs["task_type_ids"] = torch.randint(0, 3, mask.shape, generator=generator) * mask
    return inputs


def head_batch(name: str, family: str, lengths: tuple[int, ...] = (33, 1, 16, 7)) -> dict[str, torch.Tensor]:
    """`batch` for a class with a head: multiple choice takes its rows as the choices of one question."""
    inputs = batch(family, lengths)
    if "MultipleChoice" not in name:
        return inputs
    inputs.pop("task_type_ids", None)  # which ErnieForMultipleChoice does not take apart
    return {k: v.unsqueeze(0) for k, v in inputs.items()}


def assert_parity(expected: nn.Module, model: nn.Module, **inputs: torch.Tensor) -> None:
    """Judges the outputs of two base models by the parity rule; both run in the caller's context (autocast).

    `expected` gives the stock result, and in float64 the reference.
    """
    base, ours = expected(**inputs), model(**inputs)
    mask = inputs.get("attention_mask")
    real = torch.ones(base[0].shape[:2], dtype=torch.bool) if mask is None else mask.to(torch.bool)
    wide = {k: v.double() if v.is_floating_point() and k == "inputs_embeds" else v for k, v in inputs.items()}
    with torch.autocast("cpu", enabled=False):
        ref = copy.deepcopy(expected).double()(**wide)
    verdict = judge(ours[0][real], ref[0][real], base[0][real])
    assert verdict.passed, verdict
    if base.get("pooler_output") is not None:
        verdict = judge(ours.pooler_output, ref.pooler_output, base.pooler_output)
        assert verdict.passed, f"pooled: {verdict}"


def reasons(model: nn.Module) -> list[str]:
    """Why each forward so far took the stock path; "" stands for a fast one."""
    return list(fastbert.explain(model).models[0].calls)


def last_reason(model: nn.Module) -> str:
    """The reason that `explain` met last. One that came before keeps its place."""
    return reasons(model)[-1]


def same_as_stock(expected: nn.Module, model: nn.Module, **inputs: object) -> None:
    """Both give bitwise the same: the stock path ran."""
    for x, y in zip(expected(**inputs).to_tuple(), model(**inputs).to_tuple(), strict=True):
        if isinstance(x, torch.Tensor):
            torch.testing.assert_close(y, x, rtol=0, atol=0)
