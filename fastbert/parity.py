"""Numbers against HuggingFace: the parity rule, and whole models judged by it (docs/numerics.md).

The API, for commands and benchmarks:

    verdict = parity.judge(ours, ref, base)                  # one tensor
    parity.enliven(model, seed=0)                            # random weights under which no error hides

Whole models: `parity_models.run(model, dtypes)`. In pytest: the fixture `parity` of pytest_plugin.py.

`ref` is the formula in float64 on the same rounded inputs, `base` is stock PyTorch or HuggingFace in the tested dtype:

    max|ours - ref| <= 2   * max|base - ref| + 2 * max|(base + 0.3 - 0.3) - base|
    rms(ours - ref) <= 1.5 * rms(base - ref) + one rounding step of rms(ref)
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

MAX_FACTOR = 2.0
RMS_FACTOR = 1.5
ROUNDING_FACTOR = 2.0
ROUNDING_OFFSET = 0.3  # adding and subtracting it rounds base once more
BINADE_ELEMENTS = 64  # a binade with fewer is judged together with the next larger one


@dataclass(frozen=True)
class Verdict:
    """What the rule says of one tensor. A ratio is measured / allowed: up to 1 passes.

    Args:
        max_ratio, rms_ratio: the worst of each over all binades judged.
        max_error: max|ours - ref|.
        index: where in the tensor the worst element stands: the element that breaks a finiteness or lies furthest off.
        binade: the exponent e of the worst binade, 2^e <= |ref| < 2^(e+1); None: the tensor was judged whole.
        note: in words, what is wrong beyond a ratio ("nan where ref is finite"); empty: nothing.
        binades: (e, elements, max_ratio, rms_ratio) of each binade, smallest first; empty: judged whole.
    """

    max_ratio: float
    rms_ratio: float
    max_error: float
    index: tuple[int, ...]
    binade: int | None = None
    note: str = ""
    binades: tuple[tuple[int, int, float, float], ...] = ()

    @property
    def ratio(self) -> float:
        """The larger of both ratios."""
        return max(self.max_ratio, self.rms_ratio)

    @property
    def passed(self) -> bool:
        return self.ratio <= 1.0

    def __str__(self) -> str:
        where = f" in binade 2^{self.binade}" if self.binade is not None else ""
        words = f"max ratio {self.max_ratio:.3g}, rms ratio {self.rms_ratio:.3g}{where}, worst at {list(self.index)}"
        return f"{words}: {self.note}" if self.note else words


def judge(ours: Tensor, ref: Tensor, base: Tensor, elementwise: bool = False) -> Verdict:
    """Judges `ours` by the parity rule.

    Args:
        ours: the tensor under test, any dtype, any shape.
        ref: the reference, float64, the same shape.
        base: stock PyTorch or HuggingFace in the tested dtype: its dtype is the one that rounding steps are taken of.
        elementwise: judge each binade of |ref| on its own; a whole tensor hides an error in its small elements.

    A NaN or an infinity in `ours` where `ref` is finite fails, whatever `base` has there; where `ref` is not finite
    `ours` must hold the same. Elements where `base` is not finite do not count in what is allowed.

    Raises:
        ValueError: shapes differ, or ref is not float64.
    """
    if ref.dtype != torch.float64 or not ours.shape == ref.shape == base.shape:
        raise ValueError(
            f"ours {list(ours.shape)}, ref {list(ref.shape)} {ref.dtype}, base {list(base.shape)}: "
            "expected one shape, and ref in float64"
        )
    shape = tuple(ours.shape)
    wide, ref, base = (x.detach().cpu().flatten() for x in (ours.double(), ref, base))
    finite = ref.isfinite()
    if not (wide.isfinite().all() and finite.all()):
        wrong = torch.where(finite, ~wide.isfinite(), ~torch.isclose(wide, ref, rtol=0, atol=0, equal_nan=True))
        if wrong.any():
            at = int(wrong.nonzero()[0])
            note = f"{wide[at].item()} where ref is {ref[at].item():.6g} ({int(wrong.sum())} such elements)"
            return Verdict(math.inf, math.inf, math.inf, _place(at, shape), None, note)
        finite_at = finite.nonzero().flatten()
        part = judge(wide[finite_at], ref[finite_at], base[finite_at], elementwise)
        return dataclasses.replace(part, index=_place(int(finite_at[part.index[0]]), shape) if part.index else ())
    if not ref.numel():
        return Verdict(0.0, 0.0, 0.0, ())
    error = (wide - ref).abs()
    if not elementwise:
        max_ratio, rms_ratio = _ratios(error, ref, base)
        return Verdict(max_ratio, rms_ratio, _most(error), _place(int(error.argmax()), shape))
    judged = [(e, part, *_ratios(error[part], ref[part], base[part])) for e, part in _binades(ref, base.dtype)]
    binade, worst, *_ = max(judged, key=lambda j: max(j[2], j[3]))
    return Verdict(
        max(j[2] for j in judged),
        max(j[3] for j in judged),
        _most(error),
        _place(int(worst[error[worst].argmax()]), shape),
        binade,
        "",
        tuple((e, len(part), big, rms) for e, part, big, rms in judged),
    )


def _ratios(error: Tensor, ref: Tensor, base: Tensor) -> tuple[float, float]:
    """(max ratio, rms ratio) of flat tensors; error is |ours - ref|."""
    limits = torch.finfo(base.dtype)
    step = max(limits.eps / 2 * _rms(ref), limits.tiny * limits.eps)
    usable = base.isfinite()
    if not usable.all():
        ref, base = ref[usable], base[usable]
    base_error = (base.double() - ref).abs()
    rounding = ((base + ROUNDING_OFFSET - ROUNDING_OFFSET) - base).abs()
    allowed_max = MAX_FACTOR * _most(base_error) + ROUNDING_FACTOR * _most(rounding)
    allowed_rms = RMS_FACTOR * _rms(base_error) + step
    return _share(_most(error), allowed_max), _share(_rms(error), allowed_rms)


def _share(measured: float, allowed: float) -> float:
    return measured / allowed if allowed else math.inf if measured else 0.0


def _binades(ref: Tensor, dtype: torch.dtype) -> list[tuple[int, Tensor]]:
    """(exponent, indices) of each binade of |ref|, smallest first; all below the dtype's normal range is one."""
    lowest = math.frexp(torch.finfo(dtype).tiny)[1] - 1
    exponent = (ref.abs().frexp().exponent - 1).clamp(min=lowest).masked_fill(ref == 0, lowest)
    parts: list[tuple[int, Tensor]] = []
    carried = ref.new_empty(0, dtype=torch.int64)
    for e in sorted(set(exponent.tolist())):
        carried = torch.cat([carried, (exponent == e).nonzero().flatten()])
        if len(carried) >= BINADE_ELEMENTS:
            parts.append((e, carried))
            carried = carried[:0]
    if len(carried):
        e, rest = parts.pop() if parts else (int(exponent.max()), carried[:0])
        parts.append((e, torch.cat([rest, carried])))
    return parts


def _most(x: Tensor) -> float:
    return float(x.max()) if x.numel() else 0.0


def _rms(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x)) / math.sqrt(x.numel()) if x.numel() else 0.0


def _place(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    place: list[int] = []
    for size in reversed(shape):
        place.append(flat % size)
        flat //= size
    return tuple(reversed(place))


def enliven(model: nn.Module, seed: int = 0) -> nn.Module:
    """Gives random weights under which no error hides, in place; returns the model.

    Every bias is drawn from N(0, 0.1), LayerNorm gains evenly from 1 ± 0.2, q and k weights are multiplied by 4 (with
    a model's initial weights all biases are 0, gains 1, and attention is nearly flat).
    """
    generator = torch.Generator().manual_seed(seed)
    gains = {id(m.weight) for m in model.modules() if isinstance(m, nn.LayerNorm)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if id(parameter) in gains:
                parameter.copy_(0.8 + 0.4 * torch.rand(parameter.shape, generator=generator))
            elif name.split(".")[-1] == "bias":
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
            elif re.search(r"\b(query|key|q_lin|k_lin)\.weight$", name):
                parameter.mul_(4)
    return model
