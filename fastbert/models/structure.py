"""Why a model as it is now cannot run the fast path, in words. Empty: it can."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastbert import hf, torch_private
from fastbert.models.families import Family
from fastbert.models.weights import LayerModules, at, layer_modules

LEAVES = (nn.Linear, nn.LayerNorm, nn.Embedding, nn.Dropout, nn.ModuleList)


def structure_reasons(model: Any, family: Family) -> list[str]:
    """What in the modules of a base model the fast path does not compute; all reasons."""
    reasons = [f"transformers lacks {name}" for name in hf.missing()]
    reasons += ["the model's forward was replaced on the instance"] if "forward" in model.__dict__ else []
    reasons += config_reasons(model)
    foreign = [r for name, module in named_inner_modules(model) if (r := module_reason(name, module, family))]
    reasons += foreign
    if not foreign:
        embeddings = (model.embeddings.word_embeddings, model.embeddings.position_embeddings)
        reasons += [f"an embedding has max_norm = {e.max_norm}" for e in embeddings if e.max_norm is not None]
        for index, layer in enumerate(at(model, family.layers)):
            reasons += [f"layer {index}: {reason}" for reason in layer_reasons(layer_modules(layer, family))]
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
    return reasons


def named_inner_modules(model: Any) -> list[tuple[str, nn.Module]]:
    """The modules below a base model that the fast path replaces; the pooler, which it calls, is not among them."""
    return [(n, m) for n, m in model.named_modules() if n and n.split(".")[0] != "pooler"]


def module_reason(name: str, module: nn.Module, family: Family) -> str | None:
    """Why one inner module is not what the fast path takes it for."""
    if type(module) in LEAVES or type(module).__module__ == hf.stock_class(family.model).__module__:
        return None
    if name.endswith(family.activation.split(".")[-1]):
        return None if hf.gelu_of(module) else f"{name} is {type(module).__name__}, not an erf or tanh GELU"
    kind = f"{type(module).__module__}.{type(module).__qualname__}"
    return f"{name} is {kind}, not a module of torch or of the stock model"


def layer_reasons(modules: LayerModules) -> list[str]:
    """What in one layer differs from the layer that the fast path computes."""
    reasons = []
    if hf.gelu_of(modules.activation) is None:
        reasons.append(f"the activation is {getattr(modules.activation, '__name__', modules.activation)}, not a GELU")
    biases = {m.bias is None for m in (modules.query, modules.key, modules.value)}
    if len(biases) > 1:
        reasons.append("of query, key and value some have a bias and some have not")
    for norm in (modules.norm1, modules.norm2):
        if norm.weight is None or norm.bias is None or len(norm.normalized_shape) != 1:
            reasons.append("a LayerNorm has no gain, no bias or more than one dimension")
    return reasons


def state_reasons(modules: list[nn.Module], model: Any, pooler: set[nn.Module]) -> list[str]:
    """What may change from call to call in the modules: training mode, hooks, offloading, a replaced forward."""
    if torch_private.global_forward_hooks():
        return ["a hook on the forward of every module is set"]
    for module in modules:
        if torch_private.is_plain(module) and not hf.is_offloaded(module):
            continue
        if module.training:
            return ["the model is in training mode" if model.training else "a part of the model is in training mode"]
        if hf.is_offloaded(module):
            return [f"{name_of(module, model)} is offloaded (it has an _hf_hook)"]
        if module is model or module in pooler:
            continue
        if "forward" in module.__dict__:
            return [f"the forward of {name_of(module, model)} was replaced"]
        if any(not hf.is_capturing_hook(hook) for hook in torch_private.forward_hooks(module)):
            return [f"a forward hook is set on {name_of(module, model)}"]
    return []


def name_of(module: nn.Module, model: Any) -> str:
    """The attribute path of a module inside the model."""
    return next((name for name, m in model.named_modules() if m is module), "") or "the model"
