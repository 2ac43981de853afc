"""What a base model is made of, and why it cannot run the fast path as it is, in words. No reason: it can."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

from fastbert import hf, torch_private
from fastbert.models.families import Family
from fastbert.torch_private import parameter

DEVICES = ("cpu", "cuda")


@dataclass(frozen=True, slots=True)
class LayerModules:
    """The modules of one layer that the fast path reads, named as their paths in `Family`."""

    attention: Any
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    out: nn.Linear
    norm1: nn.LayerNorm
    w1: nn.Linear
    activation: Any
    w2: nn.Linear
    norm2: nn.LayerNorm

    def linears(self) -> tuple[nn.Linear, ...]:
        return self.query, self.key, self.value, self.out, self.w1, self.w2

    def norms(self) -> tuple[nn.LayerNorm, ...]:
        return self.norm1, self.norm2


@dataclass(frozen=True, slots=True)
class Structure:
    """What `examine` found in a model. One object, made whole and then published: threads share it.

    Args:
        modules: all modules below the model (not itself: a cycle would keep its memory), with their `types`.
        forwards: the forward of each type, and of the stock model.
        fixed: those of `modules` that the fast path stands in for; the pooler's are called instead.
        layers: empty if there are `reasons`.
        reasons: what the fast path does not compute.
    """

    modules: tuple[nn.Module, ...]
    types: tuple[type, ...]
    forwards: tuple[Any, ...]
    fixed: tuple[nn.Module, ...]
    layers: tuple[LayerModules, ...]
    reasons: tuple[str, ...]

    def fits(self, model: nn.Module, family: Family) -> bool:
        """Whether the model still has these modules, of these types, with these forwards."""
        modules = inner_modules(model)
        if modules != self.modules or tuple(type(m) for m in modules) != self.types:
            return False
        return forwards_of(self.types, family) == self.forwards


def inner_modules(model: nn.Module) -> tuple[nn.Module, ...]:
    """All modules below the model."""
    return tuple(torch_private.submodules(model)[1:])


def forwards_of(types: tuple[type, ...], family: Family) -> tuple[Any, ...]:
    """The forward of the stock model and of each of these types."""
    kinds: Any = (hf.stock_class(family.model), *dict.fromkeys(types))
    return tuple(kind.forward for kind in kinds)


def at(module: Any, path: str) -> Any:
    """The submodule at an attribute path such as "attention.self.query"."""
    for name in path.split("."):
        module = getattr(module, name)
    return module


def layer_modules(layer: Any, family: Family) -> LayerModules:
    """A layer's modules by the paths of its family."""
    return LayerModules(*(at(layer, getattr(family, field.name)) for field in fields(LayerModules)))


def examine(model: Any, family: Family) -> Structure:
    """Looks at everything in a model that does not change from call to call."""
    modules = inner_modules(model)
    types = tuple(type(m) for m in modules)
    pooler = getattr(model, "pooler", None) if family.pooler else None
    called = set(pooler.modules()) if isinstance(pooler, nn.Module) else set()
    reasons = [f"transformers lacks {name}" for name in hf.missing()]
    reasons += [reason] if (reason := torch_private.module_fields_refusal()) else []
    reasons += override_reasons(model, family) + patch_reasons(types, family)
    reasons += role_reasons(model, family)
    layers = () if reasons else tuple(layer_modules(layer, family) for layer in at(model, family.layers))
    if not reasons and family.positions == "after_padding" and model.embeddings.padding_idx is None:
        reasons.append("the embeddings have no padding_idx to count positions from")
    fixed = tuple(m for m in modules if m not in called)
    return Structure(modules, types, forwards_of(types, family), fixed, layers, tuple(reasons))


def override_reasons(model: Any, family: Family) -> list[str]:
    """Which methods of the stock model a user's subclass has changed; its `forward` may call ours."""
    stock = hf.stock_class(family.model)
    own = type(model).__mro__[: type(model).__mro__.index(stock)]
    users = [cls for cls in own if "fastbert_family" not in cls.__dict__]
    changed = {name for cls in users for name, value in cls.__dict__.items() if callable(value)}
    changed -= {"forward", "config_class"}
    methods = sorted(n for n in changed if not n.startswith("__") and callable(getattr(stock, n, None)))
    return [f"{type(model).__name__} changes {', '.join(methods)}"] if methods else []


def patch_reasons(types: tuple[type, ...], family: Family) -> list[str]:
    """Which stock classes have a forward that was defined elsewhere."""
    kinds: Any = (hf.stock_class(family.model), *dict.fromkeys(types))
    stock = [kind for kind in kinds if kind is nn.ModuleList or kind.forward.__module__ == kind.__module__]
    return [f"the forward of {kind.__name__} was replaced" for kind in kinds if kind not in stock]


def role_reasons(model: Any, family: Family) -> list[str]:
    """Which modules are not what the stock model has at their place."""
    roles: dict[str, type] = {f"embeddings.{name}": nn.Embedding for name in family.tables}
    roles["embeddings.LayerNorm"] = nn.LayerNorm
    activations = []
    for index in range(len(at(model, family.layers))):
        prefix = f"{family.layers}.{index}"
        roles |= {f"{prefix}.{path}": nn.Linear for path in family.linears()}
        roles |= {f"{prefix}.{path}": nn.LayerNorm for path in (family.norm1, family.norm2)}
        activations.append(f"{prefix}.{family.activation}")
    home, reasons = hf.stock_class(family.model).__module__, []
    for name, module in model.named_modules():
        if not name or name.split(".")[0] == "pooler" or name in activations:
            continue
        kind = f"{type(module).__module__}.{type(module).__qualname__}"
        if name in roles and type(module) is not roles[name]:
            reasons.append(f"{name} is {kind}, not torch.nn.{roles[name].__name__}")
        elif name not in roles and type(module) not in (nn.Dropout, nn.ModuleList) and type(module).__module__ != home:
            reasons.append(f"{name} is {kind}, not a module of the stock model")
    names = {name for name, _ in model.named_modules()}
    return reasons + [f"{name} is missing" for name in roles if name not in names]


def model_reasons(model: Any, structure: Structure, family: Family) -> list[str]:
    """Why the model, as it is now, runs the stock path whatever it is called with."""
    reasons = [*structure.reasons, *config_reasons(model)]
    if not structure.reasons:
        reasons += state_reasons(structure, model) or parameter_reasons(structure, model, family)
    return reasons


def config_reasons(model: Any) -> list[str]:
    """What in the config asks for maths that the fast path does not compute."""
    config = model.config
    reasons = []
    if getattr(config, "is_decoder", False):
        reasons.append("the model is a decoder")
    if getattr(config, "add_cross_attention", False):
        reasons.append("the model has cross-attention")
    if getattr(config, "is_causal", False):
        reasons.append("the config asks for causal attention")
    if getattr(config, "chunk_size_feed_forward", 0):
        reasons.append(f"chunk_size_feed_forward is {config.chunk_size_feed_forward}")
    position = getattr(config, "position_embedding_type", None) or "absolute"
    if position != "absolute":
        reasons.append(f"position_embedding_type is {position!r}, not 'absolute'")
    if not hf.missing():
        reasons += hf.attention_reasons(model)
    return reasons


def state_reasons(structure: Structure, model: Any) -> list[str]:
    """What may change from call to call in the modules: training mode, hooks, offloading, a replaced forward."""
    if torch_private.global_forward_hooks():
        return ["a hook on the forward of every module is set"]
    if model.training:
        return ["the model is in training mode"]
    if any(name in model.__dict__ for name in hf.FORWARD_METHODS):
        return ["a method of the model was replaced on the instance"]
    for module in torch_private.unusual(structure.fixed, hf.OFFLOADED):
        if module.training:
            return [f"{name_of(module, model)} is in training mode"]
        if hf.is_offloaded(module):
            return [f"{name_of(module, model)} is offloaded (it has an {hf.OFFLOADED})"]
        if "forward" in module.__dict__:
            return [f"the forward of {name_of(module, model)} was replaced"]
        if any(not hf.is_capturing_hook(hook) for hook in torch_private.forward_hooks(module)):
            return [f"a forward hook is set on {name_of(module, model)}"]
    return []


def parameter_reasons(structure: Structure, model: Any, family: Family) -> list[str]:
    """Which parameters are not what the fast path takes them for: real parameters, of one dtype, on one device."""
    tables = [getattr(model.embeddings, name) for name in family.tables]
    if any(table.max_norm is not None for table in tables):
        return ["an embedding has a max_norm"]
    dtype, device = tables[0].weight.dtype, tables[0].weight.device
    if device.type not in DEVICES:
        return [f"the model is on {device.type}; the fast path runs on {' and '.join(DEVICES)}"]
    found = [table.weight for table in tables]
    norms = [model.embeddings.LayerNorm]
    for layer in structure.layers:
        if hf.gelu_of(layer.activation) is None:
            name = getattr(layer.activation, "__name__", type(layer.activation).__name__)
            return [f"the activation is {name}, not an erf or tanh GELU"]
        without = [parameter(linear, "bias") is None for linear in (layer.query, layer.key, layer.value)]
        if any(without) and not all(without):
            return ["of query, key and value some have a bias and some have not"]
        for linear in layer.linears():
            weight, bias = parameter(linear, "weight"), parameter(linear, "bias")
            found += [weight] if bias is None else [weight, bias]
        norms += layer.norms()
    for norm in norms:
        gamma, beta = parameter(norm, "weight"), parameter(norm, "bias")
        if gamma is None or beta is None or len(norm.normalized_shape) != 1:
            return ["a LayerNorm has no gain, no bias or more than one dimension"]
        found += [gamma, beta]
    for tensor in found:
        if type(tensor) is not nn.Parameter:
            return [f"a weight is {type(tensor).__name__}, not torch.nn.Parameter"]
        if tensor.layout != torch.strided:
            return [f"a weight is laid out as {tensor.layout}"]
        if tensor.dtype != dtype or tensor.device != device:
            return [f"the parameters are not all {dtype} on {device}"]
    if torch.is_grad_enabled() and any(p.requires_grad for p in found):
        return ["gradients are wanted, which the fast path has not yet: use torch.no_grad()"]
    return []


def name_of(module: nn.Module, model: nn.Module) -> str:
    """The attribute path of a module inside the model."""
    return next((name for name, m in model.named_modules() if m is module), "") or "the model"
