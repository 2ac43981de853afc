"""Gradients of whole models against HuggingFace by the parity rule: what the tests of training share."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from unittest import mock

import torch
from torch import Tensor, nn

import fastbert
from fastbert.parity import BINADE_ELEMENTS, Verdict, judge
from tests.models.small import LABELS

Gradients = dict[str, Tensor]
Loss = Callable[[nn.Module], Tensor]
ZERO = 2.0**-40  # of the largest gradient: in float64, nothing but rounding


def labels_of(name: str, inputs: Mapping[str, Tensor], vocabulary: int, seed: int = 7) -> dict[str, Tensor]:
    """Random labels for a class with a head; of tokens, -100 where padding is."""
    generator = torch.Generator().manual_seed(seed)
    mask = inputs["attention_mask"]

    def drawn(below: int, *shape: int) -> Tensor:
        return torch.randint(0, below, shape or mask.shape[:1], generator=generator)

    def of_tokens(below: int) -> Tensor:
        return drawn(below, *mask.shape).masked_fill(mask == 0, -100)

    if name == "ElectraForPreTraining":
        return {"labels": of_tokens(2)}
    if name.endswith("ForPreTraining"):
        return {"labels": of_tokens(vocabulary), "next_sentence_label": drawn(2)}
    if name.endswith(("ForMaskedLM", "ForCausalLM", "LMHeadModel")):
        return {"labels": of_tokens(vocabulary)}
    if name.endswith("ForTokenClassification"):
        return {"labels": of_tokens(LABELS)}
    if name.endswith("ForQuestionAnswering"):
        shortest = int(mask.sum(1).min())
        return {"start_positions": drawn(shortest), "end_positions": drawn(shortest)}
    classes = mask.shape[1] if mask.dim() == 3 else 2 if name.endswith("ForNextSentencePrediction") else LABELS
    return {"labels": drawn(classes)}


def gradients_of(model: nn.Module, loss: Loss, scale: float = 1.0) -> Gradients:
    """The gradient of every parameter that gets one, from a loss times `scale`, divided by it.

    A float64 model's loss is float64, where some of HuggingFace's losses would round by `logits.float()`.
    """
    model.zero_grad()
    to_float = Tensor.float
    with mock.patch.object(Tensor, "float", lambda x: x if x.dtype == torch.float64 else to_float(x)):
        value = loss(model)
    (value * scale).backward()
    return {name: p.grad / scale for name, p in model.named_parameters() if p.grad is not None}


def joined(gradients: Gradients, ref: Gradients) -> Gradients:
    """Gradients by parameter, but by module where one of its parameters cannot be judged alone.

    That is one of few elements, and one whose gradient is zero by the formula, so that there is only noise: a softmax
    does not see a bias of the keys, nor one that all positions (question answering) or choices share.
    """
    largest = max(float(g.abs().max()) for g in ref.values())
    alone = {n: g.numel() >= BINADE_ELEMENTS and float(g.abs().max()) > ZERO * largest for n, g in ref.items()}
    whole = {name.rpartition(".")[0] for name, single in alone.items() if not single}
    found: dict[str, list[Tensor]] = {}
    for name, gradient in gradients.items():
        module = name.rpartition(".")[0]
        found.setdefault(module if module in whole else name, []).append(gradient.flatten())
    return {name: torch.cat(parts) for name, parts in found.items()}


def verdicts(ours: Gradients, ref: Gradients, base: Gradients) -> Iterator[tuple[str, Verdict]]:
    """(parameter or module, verdict) of every gradient; small ones are multiplied by a power of two, all three alike.

    The rule allows what adding 0.3 rounds away, which is all of a gradient of 1e-8: the largest is made 1/16 or more.
    """
    assert ours.keys() == ref.keys() == base.keys(), set(ours) ^ set(ref) | set(base) ^ set(ref)
    assert all(ours[name].dtype == base[name].dtype for name in base)
    ours, base, ref = (joined(g, ref) for g in (ours, base, ref))
    for name, expected in ref.items():
        size = 2.0 ** max(0, -4 - math.floor(math.log2(float(expected.abs().max()))))
        rounded = (base[name].double() * size).to(base[name].dtype)  # exact
        yield name, judge(ours[name].double() * size, expected * size, rounded)


def of_losses(model: nn.Module, losses: Sequence[Loss], scale: float = 1.0) -> Gradients:
    """The gradients of several losses, stacked, to be judged together.

    What one batch gives has few independent errors (those of its rows' logits), so that twice the error of one run
    would be no rare draw.
    """
    found = [gradients_of(model, loss, scale) for loss in losses]
    return {name: torch.stack([gradients[name] for gradients in found]) for name in found[0]}


def compare(
    stock: nn.Module, dtype: torch.dtype, losses: Sequence[Loss], scale: float = 1.0
) -> tuple[dict[str, Verdict], nn.Module]:
    """The verdict of every gradient of an accelerated copy of `stock` in `dtype`, and that copy."""
    base = copy.deepcopy(stock).to(dtype)
    ours = fastbert.accelerate(copy.deepcopy(base))
    ref = copy.deepcopy(base).double()
    found = of_losses(ours, losses, scale), of_losses(ref, losses), of_losses(base, losses, scale)
    return dict(verdicts(*found)), ours
