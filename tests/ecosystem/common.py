"""What every test of this room does: the same work on a stock model, on its float64 twin and on an accelerated copy."""

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fastbert
from fastbert.parity import judge

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def assert_output(ours: Tensor, run: Callable[[Any], Tensor], expected: Any) -> None:
    """The parity rule on `ours` against run(expected); the reference is run of `expected` in float64."""
    verdict = judge(ours, run(copy.deepcopy(expected).double()).double(), run(expected))
    assert verdict.passed, verdict


def assert_same(run: Callable[[Any], Tensor], expected: Any, model: Any) -> None:
    """The parity rule on run(model) against run(expected)."""
    assert_output(run(model), run, expected)


def assert_trains_alike(train: Callable[[Any], list[float]], expected: Any, model: Any, reason: str = "") -> None:
    """The parity rule on every weight after train(model) against train(expected), which return their losses.

    Let them train with SGD: where a gradient is 0 but for rounding, Adam's first steps are of full length.
    Each forward of `model` must be fast, or take the stock path for `reason`, if one is given.
    """
    wide = copy.deepcopy(expected).double()
    losses = torch.tensor([train(model), train(wide), train(expected)])
    assert losses.isfinite().all() and losses[0, -2:].mean() < 0.9 * losses[0, :2].mean(), losses
    verdict = judge(weights(model), weights(wide), weights(expected))
    assert verdict.passed, verdict
    assert all((reason in why) if reason else not why for why in calls(model)), calls(model)


def calls(model: nn.Module) -> Counter[str]:
    """How many forwards so far were fast ("") or took the stock path, by reason, over all base models inside."""
    counts: Counter[str] = Counter()
    for base in fastbert.explain(model).models:
        counts.update(base.calls)
    return counts


def gradients(model: nn.Module) -> Tensor:
    """Every gradient of a model in one row."""
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def weights(model: nn.Module) -> Tensor:
    """Every parameter of a model in one row."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@torch.no_grad()
def logits_and_calls(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, int]]:
    """What a worker process sends back."""
    torch.set_num_threads(1)
    return model(**inputs).logits, dict(calls(model))
