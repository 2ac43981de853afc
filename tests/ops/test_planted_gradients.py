"""The checks of gradients are themselves tested: an error planted in a backward must fail one, in every dtype.

`python -m tests.ops.test_planted_gradients` prints the table of docs/numerics.md.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from fastbert import ops
from fastbert.ops import reference
from fastbert.ops.dropout import keep_scale
from fastbert.parity import judge
from tests.ops import test_pad
from tests.ops.cases import CASES, DTYPES, SPECS
from tests.ops.common import EDGES, Backend
from tests.ops.gradients import gelu_slopes, gradient_verdicts

TORCH = Backend("torch", "cpu")
CHECKED = [case for case in CASES if case.name in ("edges", "odd")]  # 496 rows, and 64: of sums over rows
Named = dict[str, object]
# Calls a backward: what it was called with, and what it gives for that or for other arguments.
Run = Callable[..., dict[str, Tensor]]
Plant = Callable[[Named, Run], dict[str, Tensor]]


def with_arguments(**changes: Callable[[Named], object]) -> Plant:
    """The backward computes with other arguments."""
    return lambda given, run: run(**{name: change(given) for name, change in changes.items()})


def with_gradients(**changes: Callable[[Named, Tensor], Tensor]) -> Plant:
    """The backward computes as it should, and gives others of its gradients."""

    def plant(given: Named, run: Run) -> dict[str, Tensor]:
        found = run()
        return found | {f"{name}_grad": change(given, found[f"{name}_grad"]) for name, change in changes.items()}

    return plant


def zeroed(*names: str) -> Plant:
    return with_gradients(**dict.fromkeys(names, lambda given, gradient: torch.zeros_like(gradient)))


def of_qkv(part: int, change: Callable[[Named], Tensor]) -> Plant:
    """Another gradient of queries (0), keys (1) or values (2)."""

    def plant(given: Named, run: Run) -> dict[str, Tensor]:
        found = run()
        gradient = found["qkv_grad"].clone()
        gradient[:, part] = change(given)[:, part]
        return found | {"qkv_grad": gradient}

    return plant


def attention_by_formula(given: Named, **changes: Tensor) -> Tensor:
    """dqkv as FlashAttention writes it: by `out` and `lse`, which a backend need not use."""
    return reference.attention_backward(*(given | changes).values())[0]


def normalized(given: Named) -> Tensor:
    """What LayerNorm was taken of, without dropout, normalized [T, H] in float64."""
    x = sum(given[name].double() for name in ("x", "bias", "residual") if given[name] is not None)
    return (x - given["mean"].double()[:, None]) * given["rstd"].double()[:, None]


def without_terms(mean: bool, projection: bool) -> Plant:
    """LayerNorm's backward without the mean of the gradient, or without its projection on the normalized input."""

    def change(given: Named, gradient: Tensor) -> Tensor:
        scaled, rstd = given["grad"].double() * given["gamma"].double(), given["rstd"].double()[:, None]
        y = normalized(given)
        dx = gradient.double() + rstd * scaled.mean(1, keepdim=True) * mean
        return (dx + rstd * y * (scaled * y).mean(1, keepdim=True) * projection).to(gradient.dtype)

    plant = with_gradients(x=change, residual=change)
    return lambda given, run: run() if given["p"] else plant(given, run)


def other_eps(given: Named) -> Tensor:
    rstd = given["rstd"].double()
    return (rstd**-2 + 1e-5).rsqrt().to(given["rstd"].dtype)


def mask_off(given: Named) -> Tensor | None:
    return None if given["keep_bits"] is None else torch.full_like(given["keep_bits"], -1)


def moved(x: Tensor | None) -> Tensor | None:
    """The rows one further."""
    return None if x is None else x.roll(1, 0)


def seed_moved(given: Named) -> Tensor | None:
    return None if given["seed"] is None else given["seed"] + 1


def last_row_missing(given: Named, gradient: Tensor) -> Tensor:
    return gradient - given["grad"][-1].to(gradient.dtype)


PLANTS: dict[str, dict[str, Plant]] = {
    "dGELU by tanh": {
        "linear_gelu": with_arguments(approximate=lambda given: "tanh"),
        "feed_forward": with_arguments(approximate=lambda given: "tanh"),
        "bias_gelu": with_arguments(approximate=lambda given: "tanh"),
    },
    "dGELU of x·Φ(x) without its second term": {
        "linear_gelu": lambda given, run: run(grad=given["grad"] * slope_share(given)),
    },
    "pre-activation recomputed without its bias": {
        "linear_gelu": with_arguments(bias=lambda given: None),
        "feed_forward": with_arguments(b1=lambda given: None),
        "bias_gelu": with_arguments(bias=lambda given: None if given["bias"] is None else given["bias"] * 0),
    },
    "db1 missing": {"linear_gelu": zeroed("bias"), "feed_forward": zeroed("b1"), "bias_gelu": zeroed("bias")},
    "db2 of the wrong tensor": {"feed_forward": with_gradients(b2=lambda given, g: given["x"].sum(0))},
    "dW2 of x of other rows": {"feed_forward": with_arguments(x=lambda given: moved(given["x"]))},
    "db missing": {"linear": zeroed("bias")},
    "dW of x of other rows": {
        "linear": lambda given, run: run() | {"weight_grad": run(x=moved(given["x"]))["weight_grad"]}
    },
    "dW without its last row": {
        "linear": with_gradients(
            weight=lambda given, g: g - (given["grad"][-1:].T @ given["x"][-1:])
        )
    },
    "dx by the forward's weight of other columns": {
        "linear": lambda given, run: run() | {"x_grad": run(weight=moved(given["weight"]))["x_grad"]}
    },
    "scale missing in dq": {
        "attention": of_qkv(0, lambda given: attention_by_formula(given) / given["scale"])
    },
    "dk of wrong probabilities": {
        "attention": of_qkv(1, lambda given: attention_by_formula(given, lse=given["lse"] + 0.05))
    },
    "dv of wrong probabilities": {
        "attention": of_qkv(2, lambda given: attention_by_formula(given, lse=given["lse"] + 0.05))
    },
    "delta (rows of dO·O) missing": {
        "attention": lambda given, run: run() | {
            "qkv_grad": attention_by_formula(given, out=torch.zeros_like(given["out"]))
        }
    },
    "attention dropout: mask not applied": {"attention": with_arguments(keep_bits=mask_off)},
    "attention dropout: mask of other rows": {
        "attention": with_arguments(
            keep_bits=lambda given: None if given["keep_bits"] is None else given["keep_bits"].roll(1, 1)
        )
    },
    "attention dropout: scale missing": {
        "attention": lambda given, run: run(p=2**-20) if given["keep_bits"] is not None else run()
    },
    "hidden dropout: mask not applied": {
        "add_layer_norm": lambda given, run: run() | {"x_grad": run(needed=[True] * 5)["residual_grad"]},
        "embed_layer_norm": with_arguments(p=lambda given: 0.0, seed=lambda given: None),
    },
    "hidden dropout: another site, another seed": {
        "add_layer_norm": with_arguments(site=lambda given: given["site"] + 1),
        "embed_layer_norm": with_arguments(seed=seed_moved),
    },
    "hidden dropout: scale missing": {
        "add_layer_norm": with_gradients(x=lambda given, g: g / keep_scale(given["p"])),
        "embed_layer_norm": lambda given, run: run(grad=given["grad"] / keep_scale(given["p"])),
    },
    "LayerNorm: mean of the gradient missing": {"add_layer_norm": without_terms(True, False)},
    "LayerNorm: projection missing": {"add_layer_norm": without_terms(False, True)},
    "LayerNorm: eps 1e-5 for 1e-12 in rstd": {
        "add_layer_norm": with_arguments(rstd=other_eps),
        "embed_layer_norm": with_arguments(rstd=other_eps),
    },
    "LayerNorm: gain missing in dx": {
        "add_layer_norm": with_arguments(gamma=lambda given: torch.ones_like(given["gamma"])),
        "embed_layer_norm": with_arguments(gamma=lambda given: torch.ones_like(given["gamma"])),
    },
    "dgamma without normalization": {
        "add_layer_norm": with_gradients(gamma=lambda given, g: (given["grad"] * given["residual"]).sum(0).to(g.dtype))
    },
    "dgamma of the mean missing": {
        "embed_layer_norm": lambda given, run: run() | {
            "gamma_grad": run(mean=torch.zeros_like(given["mean"]))["gamma_grad"]
        }
    },
    "dbeta without its last row": {
        "add_layer_norm": with_gradients(beta=last_row_missing),
        "embed_layer_norm": with_gradients(beta=last_row_missing),
    },
    "dbias missing": {"add_layer_norm": zeroed("bias"), "attention": zeroed("bias")},
    "dresidual missing": {"add_layer_norm": zeroed("residual")},
    "words: the padding row gets its gradient": {"embed_layer_norm": with_arguments(word_padding=lambda given: -1)},
    "positions: the padding row gets its gradient": {
        "embed_layer_norm": with_arguments(position_padding=lambda given: -1)
    },
    "words: rows overwritten, not added": {
        "embed_layer_norm": with_gradients(words=lambda given, g: g / 2)
    },
    "token types dropped": {"embed_layer_norm": zeroed("type_table")},
    "positions + 1": {
        "embed_layer_norm": lambda given, run: run() | {"position_table_grad": moved(run()["position_table_grad"])}
    },
}  # fmt: skip


def slope_share(given: Named) -> Tensor:
    """Φ(x) / GELU'(x) at the pre-activations: as if x·φ(x) were missing."""
    pre = given["x"].double() @ given["weight"].double().T + (0 if given["bias"] is None else given["bias"].double())
    phi = torch.special.ndtr(pre)
    slope = phi + pre * torch.exp(-(pre**2) / 2) / math.sqrt(2 * math.pi)
    return (phi / slope).clamp(-2, 2).to(given["grad"].dtype)


@contextlib.contextmanager
def planted(name: str) -> Iterator[None]:
    """The backend "torch" of the backwards computes with the error."""
    with pytest.MonkeyPatch.context() as patch:
        for forward, plant in PLANTS[name].items():
            op = getattr(ops, forward).gradient.op
            backend = op.backends["torch"]

            def wrong(*arguments, op=op, right=backend.run, plant=plant):
                given = dict(zip(op.arguments(), arguments, strict=True))

                def run(**changes):
                    found = right(*(given | changes).values())
                    return dict(zip(op.returns(), found if isinstance(found, tuple) else (found,), strict=True))

                found = tuple(plant(given, run).values())
                return found if len(found) > 1 else found[0]

            patch.setitem(op.backends, "torch", dataclasses.replace(backend, run=wrong))
            patch.setattr(op, "_order", {})
        yield


def verdicts(forward: str, dtype: torch.dtype) -> Iterator[tuple[str, float]]:
    spec = next(s for s in SPECS if s.op.name == forward)
    for case in CHECKED:
        for check, ratio in gradient_verdicts(spec, case, dtype, TORCH):
            yield check.replace("_backward/torch", ""), ratio
    if forward in ("linear_gelu", "feed_forward", "bias_gelu"):
        yield f"{forward}, GELU's slope", judge(*gelu_slopes(spec, dtype, "none", TORCH), elementwise=True).ratio


def finding(name: str, dtype: torch.dtype) -> tuple[str, float]:
    """The check with the largest ratio, of the op in whose checks the error is least visible."""
    with planted(name):
        found = [max(verdicts(forward, dtype), key=lambda check: check[1]) for forward in PLANTS[name]]
    return min(found, key=lambda check: check[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_planted_nothing_found(dtype):
    for spec in SPECS:
        for check, ratio in verdicts(spec.op.name, dtype):
            assert ratio <= 1, check


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_error_is_found(name, dtype):
    """By a check of every op that it is planted in."""
    check, ratio = finding(name, dtype)
    assert ratio > 1, f"{check} {ratio:.2f}"


def test_every_backward_has_a_planted_error():
    """But pad's, whose test asks for equal bits: see below."""
    assert {op for plants in PLANTS.values() for op in plants} == {spec.op.name for spec in SPECS}


def test_a_pad_that_reads_other_rows_is_found(monkeypatch):
    backend = ops.pad.gradient.op.backends["torch"]
    wrong = dataclasses.replace(backend, run=lambda grad, indices: backend.run(grad, indices.roll(1)))
    monkeypatch.setitem(ops.pad.gradient.op.backends, "torch", wrong)
    with pytest.raises(AssertionError):
        test_pad.test_the_gradient_is_that_of_the_real_rows(EDGES, torch.float32, ("torch", "cpu"))


def table() -> str:
    """Markdown: by planted error, the check that finds it best and its ratio in each dtype; over 1: found."""
    lines = ["| planted error | check | fp32 | bf16 | fp16 |", "|---|---|---|---|---|"]
    for name in PLANTS:
        found = [finding(name, dtype) for dtype in DTYPES]
        checks = dict.fromkeys("/".join(check.split("/")[:2]) for check, _ in found)
        lines.append(f"| {name} | {', '.join(checks)} | {' | '.join(number(ratio) for _, ratio in found)} |")
    return "\n".join(lines)


def number(ratio: float) -> str:
    text = "wrong" if math.isinf(ratio) else f"{ratio:.2g}" if ratio < 100 or ratio > 1e9 else f"{ratio:.0f}"
    return f"**{text}**" if ratio > 1 else text


if __name__ == "__main__":
    print(table())
