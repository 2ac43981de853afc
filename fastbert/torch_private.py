"""Every private name of torch that fastbert uses, each probed once, with a public or the stock path behind it."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastbert.once import warn_once

Probe = TypeVar("Probe", bound=Callable[..., "str | None"])


def probe(what: str, instead: str, device: str = "cpu") -> Callable[[Probe], Probe]:
    """A cached probe that does not see the caller's inference mode, autocast, default device or default dtype.

    The function returns why `what` cannot be used here, or None; whatever it raises is such a reason too. Where a name
    of torch is gone or has changed, rather than that this machine cannot, one warning says what runs `instead`.
    """

    def decorate(function: Probe) -> Probe:
        @functools.cache
        def run(*args: Any) -> str | None:
            try:
                with (
                    torch.inference_mode(False), torch.no_grad(), torch.device("cpu"),
                    torch.autocast("cpu", enabled=False),
                ):  # fmt: skip
                    return function(*args)
            except Exception as error:  # whatever a changed name raises, the way behind it must go on
                problem = str(error).splitlines()[0] if str(error) else type(error).__name__
                if is_changed(error) and (device == "cpu" or torch.cuda.is_available()):
                    warn_once(
                        f"fastbert cannot use {what} of torch {torch.__version__}: {problem}. Results are right, but "
                        f"{instead}. Install another version of torch, or a newer fastbert."
                    )
                return f"{what} of torch cannot be used{''.join(f' in {a}' for a in args)}: {problem}"

        return functools.wraps(function)(run)  # type: ignore[return-value]  # wraps does not keep the TypeVar

    return decorate


def is_changed(error: Exception) -> bool:
    """Whether an error says that a name is gone, takes other arguments or gives other values; else it is the machine.

    Ops raise a RuntimeError for both; where the arguments are wrong they cite their schema.
    """
    return not isinstance(error, RuntimeError) or "Declaration:" in str(error) or "Schema:" in str(error)


@probe("packed matrix products (oneDNN)", "products run on plain weights, more slowly")
def packed_linear_refusal(dtype: torch.dtype) -> str | None:
    """Why oneDNN's packed linear cannot be used on this CPU for this dtype, in words; None: it can.

    Runs a small product, with erf GELU and a sum as its post-op, against the plain one.
    """
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return "this torch was built without oneDNN"
    x, weight = (
        torch.linspace(-3, 3, 5 * 64, dtype=torch.float32).view(5, 64).to(dtype),
        torch.eye(64).to(dtype)[:48] * 0.5,
    )
    packed, add = pack_linear_weight(weight), torch.ones(5, 48, dtype=dtype)
    got = tuple(
        y.double()
        for y in (
            packed_linear(x, packed, None),
            packed_linear_gelu(x, packed, None),
            packed_linear_add(x, packed, add),
        )
    )
    plain = x.double() @ weight.double().T
    expected = plain, torch.nn.functional.gelu(plain), plain + 1
    if not all(torch.allclose(g, e, rtol=2e-2, atol=2e-3) for g, e in zip(got, expected, strict=True)):
        raise ArithmeticError("it gives wrong numbers")
    return None


def pack_linear_weight(weight: Tensor) -> Tensor:
    """weight [N, K] → the same in oneDNN's blocked layout (a copy)."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())  # type: ignore[no-any-return]


def packed_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [T, K], packed weight [N, K], bias [N] contiguous → x·weightᵀ + bias."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]


def packed_linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As packed_linear, with erf GELU as its post-op."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], "none")  # type: ignore[no-any-return]


def packed_linear_add(x: Tensor, weight: Tensor, other: Tensor) -> Tensor:
    """x [T, K], packed weight [N, K], other [T, N] → other + x·weightᵀ."""
    return torch.ops.mkldnn._linear_pointwise.binary(x, other, weight, None, "add")  # type: ignore[no-any-return]


@probe("integer products (_int_mm)", "they run in fp32, more slowly")
def integer_product_refusal() -> str | None:
    """Why torch's int8 product cannot be used on this CPU, in words; None: it can.

    Without VNNI some libraries add products up in 16 bits, where the largest saturate.
    """
    x = torch.tensor([127, -128, 1, 0], dtype=torch.int8).repeat_interleave(64).view(4, 64)
    weight = torch.tensor([127, -127, 1], dtype=torch.int8).repeat_interleave(64).view(3, 64)
    if integer_product(x, weight).tolist() != (x.double() @ weight.double().T).tolist():
        return "it is not exact here"
    return None


def integer_product(x: Tensor, weight: Tensor) -> Tensor:
    """x [T, K], weight [N, K], both int8 on a CPU → x·weightᵀ [T, N] int32."""
    return torch._int_mm(x, weight.T)


@probe("flash attention on CPUs", "attention runs by plain products and a softmax, more slowly")
def cpu_flash_refusal(dtype: torch.dtype) -> str | None:
    """Why torch's CPU flash attention cannot be used for this dtype, in words; None: it can."""
    query, key, value = torch.linspace(-1, 1, 3 * 2 * 5 * 8, dtype=torch.float32).view(3, 1, 2, 5, 8).to(dtype)
    out, lse = cpu_flash_attention(query, key, value, 0.5)
    gradients = cpu_flash_attention_backward(value, query, key, value, out, lse, 0.5)
    scores = query.double() @ key.double().transpose(-1, -2) * 0.5
    near = functools.partial(torch.allclose, rtol=2e-2, atol=4e-3)
    probabilities, wide = scores.softmax(-1), value.double()
    wanted = probabilities @ wide, scores.logsumexp(-1), probabilities.mT @ wide
    if not all(near(x.double(), y) for x, y in zip((out, lse, gradients[2]), wanted, strict=True)):
        raise ArithmeticError("it gives wrong numbers")
    return None


def cpu_flash_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """query, key, value [B, N, L, D] on a CPU → out [B, N, L, D], lse [B, N, L] (natural logarithm)."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(  # type: ignore[no-any-return]
        query, key, value, 0.0, False, scale=scale
    )


def cpu_flash_attention_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """grad, query, key, value, out [B, N, L, D], lse [B, N, L] → the gradients [B, N, L, D] of query, key, value."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(  # type: ignore[no-any-return]
        grad, query, key, value, out, lse, 0.0, False, scale=scale
    )


@probe("attention over packed sequences (torch.nn.attention.varlen)", "sequences are padded for attention", "cuda")
def varlen_attention_refusal() -> str | None:
    """Why torch.nn.attention.varlen (new in torch 2.10) cannot be used, in words; None: it can."""
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    AuxRequest(lse=True)
    if lacks := sorted({"scale", "return_aux"} - set(inspect.signature(varlen_attn).parameters)):
        raise TypeError(f"it takes no {', '.join(lacks)}")
    return None


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, max_seqlen: int, scale: float
) -> tuple[Tensor, Tensor]:
    """query, key, value [T, N, D] on CUDA, 16-bit → out [T, N, D], lse [N, T]."""
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    return varlen_attn(  # type: ignore[return-value]
        query, key, value, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=scale, return_aux=AuxRequest(lse=True)
    )


def transforms_active() -> bool:
    """Whether a torch.func transform, a trace or an export is running, under which values are not plain tensors.

    True too where nobody can tell: then `module_fields_refusal` says why.
    """
    try:
        active = functorch_active() or tracing() or symbolic() or forward_mode_active()
    except Exception:  # a name is gone or has changed
        return True
    return active or torch.compiler.is_exporting()


def functorch_active() -> bool:
    """Whether a torch.func transform is running."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def tracing() -> bool:
    """Whether torch.jit.trace is at work."""
    return bool(torch.jit.is_tracing())  # type: ignore[attr-defined, no-untyped-call]


def symbolic() -> bool:
    """Whether tensors are traced by make_fx or stand for shapes alone (FakeTensorMode)."""
    keys = torch._C._TorchDispatchModeKey
    return any(torch._C._get_dispatch_mode(key) is not None for key in (keys.PROXY, keys.FAKE))


def forward_mode_active() -> bool:
    """Whether forward-mode differentiation (torch.autograd.forward_ad.dual_level) is on."""
    return torch.autograd.forward_ad._current_level >= 0


@probe("the inner state of modules", "HuggingFace's own forward runs for every model, and no speed is gained")
def module_fields_refusal() -> str | None:
    """Why it cannot be seen whether the fast path may run, in words; None: it can.

    Looks at all names that the functions around this one read.
    """
    module = nn.Identity()  # one with parameters would draw from the generator
    names = "_modules", "_parameters", "_buffers", *HOOKS
    lacks = [f"nn.Module.{name}" for name in names if name not in module.__dict__]
    inner = torch.nn.modules.module
    lacks += [f"torch.nn.modules.module.{name}" for name in GLOBAL_HOOKS if not hasattr(inner, name)]
    looks: dict[str, Callable[[], object]] = {
        "Tensor._version": lambda: Tensor._version,
        "torch._C._functorch.peek_interpreter_stack": functorch_active,
        "torch.jit.is_tracing": tracing,
        "torch._C._TorchDispatchModeKey or _get_dispatch_mode": symbolic,
        "torch.autograd.forward_ad._current_level": forward_mode_active,
    }
    for name, look in looks.items():
        try:
            look()
        except Exception:  # a name is gone or has changed
            lacks.append(name)
    if lacks:
        raise LookupError(f"it lacks or has changed {', '.join(lacks)}")
    return None


def submodules(module: nn.Module) -> list[nn.Module]:
    """All modules below `module`, itself first, in a fixed order; faster than `module.modules()`."""
    if module_fields_refusal() is not None:
        return list(module.modules())
    found = [module]
    for parent in found:
        found += [child for child in parent._modules.values() if child is not None]
    return found


HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
GLOBAL_HOOKS = (
    "_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks",
)  # fmt: skip


def hooks_of(module: nn.Module) -> list[Any]:
    """The hooks on the forward and on the backward of one module."""
    return [hook for name in HOOKS for hook in module.__dict__[name].values()]


def unusual(modules: tuple[nn.Module, ...], marks: frozenset[str]) -> list[nn.Module]:
    """Those modules that have hooks, or an attribute of their own with one of these names."""
    found = []
    for module in modules:
        fields = module.__dict__
        if (
            fields.get("_forward_hooks", True)
            or fields.get("_forward_pre_hooks", True)
            or fields.get("_backward_hooks", True)
            or fields.get("_backward_pre_hooks", True)
            or not marks.isdisjoint(fields)
        ):
            found.append(module)
    return found


class Contents:
    """What a model and the modules below it consist of now, object by object.

    Every look at it is one call for all modules, not a loop over them: a short forward pays for each.

    Args:
        left_out: an attribute of the model that is not looked at, as it holds what is made here.

    Attributes:
        tensors: the parameters and buffers.

    Raises:
        LookupError: a module has a hook.
    """

    __slots__ = "attributes", "fields", "held", "hooks", "inside", "left_out", "modules", "tensors", "types"

    def __init__(self, model: nn.Module, left_out: str) -> None:
        self.left_out = left_out
        self.modules = tuple(submodules(model)[1:])  # not the model: a cycle would keep its memory
        self.types = tuple(map(type, self.modules))
        self.fields = tuple(map(vars, self.modules))
        self.attributes = self.attributes_of(model)
        owners = model, *self.modules
        self.inside = tuple(vars(m)[name] for m in owners for name in ("_modules", "_parameters", "_buffers"))
        self.hooks = tuple(vars(m)[name] for m in owners for name in HOOKS)
        self.held = values_of(self.inside)
        self.tensors = tuple(x for x in self.held if isinstance(x, Tensor))
        if any(self.hooks):
            raise LookupError("a module has a hook")

    def attributes_of(self, model: nn.Module) -> list[Any]:
        own = vars(model).copy()  # in one step: another thread may change it
        own.pop(self.left_out, None)
        return [*own.values(), *values_of(self.fields)]

    def are_in(self, model: nn.Module) -> bool:
        """Whether the model still consists of these objects, and no module has a hook."""
        return (
            not any(self.hooks)
            and tuple(map(type, self.modules)) == self.types
            and identical(self.attributes_of(model), self.attributes)
            and identical(values_of(self.inside), self.held)
        )


def values_of(dicts: tuple[dict[str, Any], ...]) -> list[Any]:
    """The values of all these, one dict's after the other's."""
    return list(chain.from_iterable(map(dict.values, dicts)))


def identical(ours: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether two sequences hold the same objects."""
    return len(ours) == len(others) and all(map(operator.is_, ours, others))


def parameter(module: nn.Module, name: str) -> Any:
    """An attribute of a module, a parameter most likely; faster than getattr."""
    return module._parameters[name] if name in module._parameters else getattr(module, name)


def own_parameters(module: nn.Module) -> Iterable[nn.Parameter | None]:
    """The parameters of a module itself, without those of its submodules; None where one is left out."""
    return module._parameters.values()


def own_buffers(module: nn.Module) -> Iterable[Tensor | None]:
    """The buffers of a module itself."""
    return module._buffers.values()


def global_hooks() -> bool:
    """Whether a hook on every module is set (torch.nn.modules.module.register_module_forward_hook and its like)."""
    return any(getattr(torch.nn.modules.module, name) for name in GLOBAL_HOOKS)


@probe("_unsafe_view", "the output is copied once more")
def unsafe_view_refusal() -> str | None:
    """Why torch's _unsafe_view cannot be used, in words; None: it can."""
    if unsafe_view(torch.zeros(6), (2, 3)).shape != (2, 3):
        raise ArithmeticError("it gives another shape")
    return None


def unsafe_view(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The memory of x in another shape, as a tensor that is no view to autograd."""
    return torch.ops.aten._unsafe_view(x, shape)  # type: ignore[no-any-return]


def reshaped(x: Tensor, *shape: int) -> Tensor:
    """x contiguous, which nobody else holds → the same memory in another shape, as a tensor of its own.

    A view would not be: a view made under no_grad cannot be edited in place afterwards.
    """
    return unsafe_view(x, shape) if unsafe_view_refusal() is None else x.reshape(shape).clone()


def versions(tensors: tuple[Tensor, ...]) -> tuple[int, ...]:
    """Numbers that grow with each in-place change autograd sees; always 0 for inference tensors, which have none."""
    try:
        return tuple(map(VERSION, tensors))
    except RuntimeError:  # one is an inference tensor
        return tuple(0 if t.is_inference() else VERSION(t) for t in tensors)


VERSION = operator.attrgetter("_version")


PROBES: dict[str, Callable[[], str | None]] = {
    "oneDNN packed linear, float32": lambda: packed_linear_refusal(torch.float32),
    "oneDNN packed linear, bfloat16": lambda: packed_linear_refusal(torch.bfloat16),
    "oneDNN packed linear, float16": lambda: packed_linear_refusal(torch.float16),
    "integer products": integer_product_refusal,
    "CPU flash attention, float32": lambda: cpu_flash_refusal(torch.float32),
    "CPU flash attention, bfloat16": lambda: cpu_flash_refusal(torch.bfloat16),
    "modules, hooks, versions, tracing": module_fields_refusal,
    "_unsafe_view": unsafe_view_refusal,
    "varlen attention (CUDA)": varlen_attention_refusal,
}
