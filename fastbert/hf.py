"""Every private name of transformers that fastbert uses, each probed, with HuggingFace's own path behind it.

If the installed version lacks one of PROBES, `missing()` names it, every model runs HuggingFace's own forward, and one
warning says so. The other names here may be absent; what is done then stands where they are used.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Container, Mapping
from typing import Any

import torch
import transformers
from torch import nn

from fastbert.once import warn_once

CREATE_MASKS = "_create_attention_masks"  # what the stock forward of a base model makes its masks by
# The methods that a model and its layers compute by: the chunks are what apply_chunking_to_forward calls.
METHODS = frozenset({"__call__", "forward", "feed_forward_chunk", "ff_chunk", CREATE_MASKS})
OFFLOADED = "_hf_hook"  # the attribute by which the library accelerate marks a module that it moves between devices
CAPTURING = "transformers.utils.output_capturing"  # where HuggingFace's output capture has its code
MARKS = METHODS | {OFFLOADED}  # attributes that a module of the stock model has of its class only, or not at all


@functools.cache
def missing() -> Mapping[str, str]:
    """The private names of transformers that this version lacks or has changed → how that showed; empty: none.

    If there are any, the first call warns of it.
    """
    lacks: dict[str, str] = {}
    for name, probe in PROBES.items():
        try:
            probe()
        except Exception as error:  # whatever a changed name raises, stock models must go on
            lacks[name] = cause(error)
    if lacks:
        named = ", ".join(f"{name} ({why})" for name, why in lacks.items())
        problem = f"transformers {transformers.__version__} lacks or has changed {named}"
        remedy = "Install another version of transformers, or a newer fastbert"
        if broken := unusable():
            problem, remedy = broken, "Install again what cannot be imported"
        warn_once(
            f"fastbert runs HuggingFace's own forward for every model, and gains no speed: {problem}. "
            f"Results are right. {remedy}."
        )
    return lacks


def unusable() -> str:
    """Why no model can be imported of transformers, as where a package that it needs is broken; "": they can."""
    try:
        transformers.BertModel  # noqa: B018 - transformers imports at the first use of a name
    except Exception as error:  # whatever a package that transformers needs raises at its import
        return f"models of transformers {transformers.__version__} cannot be imported: {cause(error)}"
    return ""


def cause(error: BaseException) -> str:
    """What an exception came from, in one line: "ImportError: no such file"."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"


def stock_class(name: str) -> type[Any]:
    """A class of transformers by its name, e.g. "BertModel"."""
    found: type[Any] = getattr(transformers, name)
    return found


def is_stock(kind: type, names: Container[str]) -> bool:
    """Whether a class is one of transformers, itself and no subclass, with one of these names."""
    return kind.__name__ in names and kind is getattr(transformers, kind.__name__, None)


def output_collector() -> object:
    """What HuggingFace's output capture is collecting now in this context (truthy: something)."""
    from transformers.utils.output_capturing import _active_collector

    return _active_collector.get()


def hidden_state_indices(wanted: Any, count: int) -> set[int] | None:
    """Which of `count` hidden states an `output_hidden_states` asks for; None: this version takes no such value."""
    if wanted is None or isinstance(wanted, bool):
        return set(range(count)) if wanted else set()
    chosen = list(wanted) if isinstance(wanted, (list, tuple, set)) else [wanted]
    if not all(type(index) is int for index in chosen):
        return None
    try:  # since transformers 5.20 or so
        from transformers.utils.output_capturing import resolve_hidden_states_indices

        return set(resolve_hidden_states_indices(None, chosen, count)) if wanted else set()
    except Exception:  # the name is absent, or takes other arguments
        return None


def is_capturing_hook(hook: Any) -> bool:
    """Whether a forward hook is HuggingFace's own, which captures hidden states, rather than a user's."""
    return getattr(hook, "__module__", "") == CAPTURING


def is_gradient_hook(hook: Any) -> bool:
    """Whether a forward hook is the one of HuggingFace or PEFT that makes the embeddings' output require a gradient.

    Set by `enable_input_require_grads`, and with gradient checkpointing; the fast path does what it does.
    """
    return getattr(hook, "__name__", "") in ("make_inputs_require_grads", "make_inputs_require_grad")


def register_capture_of(kind: type[Any]) -> None:
    """Tells HuggingFace's output capture, which knows models by the name of their class, of a class that is new."""
    from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

    dict.__setitem__(_CAN_RECORD_REGISTRY, str(kind), kind._can_record_outputs)


def attention_reasons(model: Any) -> list[str]:
    """Why the attention that the model's config asks for is not the stock sdpa."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    implementation = model.config._attn_implementation
    if implementation != "sdpa":
        return [f"{implementation} attention was asked for, not sdpa"]
    if ALL_ATTENTION_FUNCTIONS["sdpa"] is not sdpa_attention_forward:
        return ["another attention is registered under the name sdpa"]
    return []


def is_offloaded(module: nn.Module) -> bool:
    """Whether the library accelerate has hooked this module, to move its weights or inputs between devices."""
    return OFFLOADED in module.__dict__


def checkpointing_of(layer: Any) -> Callable[..., Any] | None:
    """The function by which HuggingFace calls a layer under gradient checkpointing now; None: it calls the layer."""
    if not (getattr(layer, "gradient_checkpointing", False) and layer.training):
        return None
    function: Callable[..., Any] = layer._gradient_checkpointing_func
    return function


def gelu_of(activation: Any) -> str | None:
    """How an activation is named by `feed_forward`: "none" (erf), "tanh", or None: no GELU that it knows."""
    from transformers import activations

    if type(activation) is activations.GELUActivation:
        own = getattr(activation.act, "__func__", None) is activations.GELUActivation._gelu_python
        return "none" if own or activation.act is torch.nn.functional.gelu else None
    if activation is torch.nn.functional.gelu:
        return "none"
    if type(activation) is nn.GELU:
        return str(activation.approximate)
    if type(activation) in (activations.NewGELUActivation, getattr(activations, "GELUTanh", None)):
        return "tanh"
    return None


def stock_module(name: str) -> Any:
    """A submodule of transformers by its name, e.g. "modeling_outputs"."""
    return importlib.import_module(f"transformers.{name}")


def _probe_registry() -> None:
    from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

    if not isinstance(_CAN_RECORD_REGISTRY, dict) or any(
        type(key) is not str for key in dict.keys(_CAN_RECORD_REGISTRY)
    ):
        raise TypeError("it is no dict of strings")


def _probe_checkpointing() -> None:
    layer = stock_module("modeling_layers").GradientCheckpointingLayer()
    transformers.PreTrainedModel._set_gradient_checkpointing(nn.ModuleList([layer]), True, print)
    if not layer.gradient_checkpointing or checkpointing_of(layer) is not print:
        raise TypeError("a layer does not keep the function")


PROBES: dict[str, Callable[[], object]] = {
    f"{CAPTURING}._active_collector": output_collector,
    f"{CAPTURING}._CAN_RECORD_REGISTRY": _probe_registry,
    "PreTrainedModel._can_record_outputs": lambda: transformers.BertModel._can_record_outputs,
    f"PreTrainedModel.{CREATE_MASKS}": lambda: getattr(transformers.BertModel, CREATE_MASKS),
    "PreTrainedModel._set_gradient_checkpointing and GradientCheckpointingLayer._gradient_checkpointing_func": (
        _probe_checkpointing
    ),
    "PreTrainedConfig._attn_implementation": lambda: transformers.BertConfig()._attn_implementation,
    "transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS": lambda: stock_module(
        "modeling_utils"
    ).ALL_ATTENTION_FUNCTIONS["sdpa"],
    "transformers.integrations.sdpa_attention.sdpa_attention_forward": lambda: (
        stock_module("integrations.sdpa_attention").sdpa_attention_forward
    ),
    "transformers.activations.GELUActivation and NewGELUActivation": lambda: gelu_of(None),
    "transformers.activations.GELUActivation._gelu_python": lambda: gelu_of(
        stock_module("activations").GELUActivation(use_gelu_python=True)
    ),
}
