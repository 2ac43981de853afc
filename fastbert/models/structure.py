"""What a base model is made of, and why it cannot run the fast path as it is, in words. No reason: it can."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from itertools import repeat
from operator import is_
from typing import Any

import torch
from torch import nn

from fastbert import devices, hf, torch_private
from fastbert.models.families import Family, tables_of
from fastbert.models.quantized import QuantizedLinear
from fastbert.torch_private import parameter

# What may stand at the place of an nn.Linear: a row of its output depends on that row of its input alone, so that it
# can be called on packed tokens.
TOKENWISE = ("peft.tuners.lora.layer.Linear",)
HOMES = ("transformers", "torch", "peft", "fastbert")  # the packages whose code the fast path knows


@dataclass(frozen=True, slots=True)
class LayerModules:
    """A layer and its modules that the fast path reads, named as their paths in `Family`."""

    layer: Any
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
    attention_dropout: nn.Dropout
    out_dropout: nn.Dropout | None
    ffn_dropout: nn.Dropout

    def linears(self) -> tuple[nn.Linear, ...]:
        return self.query, self.key, self.value, self.out, self.w1, self.w2

    def norms(self) -> tuple[nn.LayerNorm, ...]:
        return self.norm1, self.norm2


@dataclass(frozen=True, slots=True)
class Structure:
    """What `examine` found in a model. One object, made whole and then published: threads share it.

    Args:
        modules: all modules below the model (not itself: a cycle would keep its memory), with their `types`.
        methods: what each type, and the stock model, computes by (hf.METHODS): classes, names, functions.
        fixed: those of `modules` that the fast path stands in for; the pooler's and `tokenwise` ones are called.
        tokenwise: the modules of a user that stand at the place of an nn.Linear.
        layers: empty if there are `reasons`.
        reasons: what the fast path does not compute.
        other_pooler: the pooler is not the stock model's, and may read every row.
        is_int8: all linears of the layers are `quantize`'s.
    """

    modules: tuple[nn.Module, ...]
    types: tuple[type, ...]
    methods: tuple[tuple[Any, ...], tuple[str, ...], tuple[Any, ...]]
    fixed: tuple[nn.Module, ...]
    tokenwise: tuple[nn.Module, ...]
    layers: tuple[LayerModules, ...]
    reasons: tuple[str, ...]
    other_pooler: bool = False
    is_int8: bool = False

    def fits(self, model: nn.Module, family: Family) -> bool:
        """Whether the model still has these modules, of these types, with these methods."""
        return inner_modules(model) == self.modules and self.has_types() and self.has_methods()

    def has_types(self) -> bool:
        """Whether the modules are of the same types."""
        return tuple(map(type, self.modules)) == self.types

    def has_methods(self) -> bool:
        """Whether the classes have the same methods."""
        kinds, names, functions = self.methods
        return all(map(is_, map(getattr, kinds, names, repeat(None)), functions))


def inner_modules(model: nn.Module) -> tuple[nn.Module, ...]:
    """All modules below the model."""
    return tuple(torch_private.submodules(model)[1:])


def methods_of(types: Iterable[type], family: Family) -> tuple[tuple[Any, ...], tuple[str, ...], tuple[Any, ...]]:
    """Classes, names and functions of what the stock model and these types compute by."""
    kinds = dict.fromkeys((hf.stock_class(family.model), *types))
    found = [(kind, name) for kind in kinds for name in hf.METHODS if hasattr(kind, name)]
    return tuple(k for k, _ in found), tuple(n for _, n in found), tuple(getattr(k, n) for k, n in found)


def at(module: Any, path: str) -> Any:
    """The submodule at an attribute path such as "attention.self.query"."""
    for name in path.split("."):
        module = getattr(module, name)
    return module


def layer_modules(layer: Any, family: Family) -> LayerModules:
    """A layer's modules by the paths of its family."""
    paths = {field.name: getattr(family, field.name) for field in fields(LayerModules)[1:]}
    return LayerModules(layer, **{name: path and at(layer, path) for name, path in paths.items()})


def examine(model: Any, family: Family) -> Structure:
    """Looks at everything in a model that does not change from call to call."""
    modules = inner_modules(model)
    types = tuple(type(m) for m in modules)
    if family.refusal:
        return Structure(modules, types, methods_of(types, family), modules, (), (), (family.refusal,))
    called = called_modules(model, family)
    reasons = [f"transformers lacks {name}" for name in hf.missing()]
    reasons += [reason] if (reason := torch_private.module_fields_refusal()) else []
    reasons += override_reasons(model, family)
    reasons += patch_reasons(tuple(type(m) for m in modules if m not in called or kind_of(m) in TOKENWISE), family)
    reasons += some(role_reasons(model, family))
    layers = () if reasons else tuple(layer_modules(layer, family) for layer in at(model, family.layers))
    if not reasons and family.positions == "after_padding" and model.embeddings.padding_idx is None:
        reasons.append("the embeddings have no padding_idx to count positions from")
    fixed = tuple(m for m in modules if m not in called)
    tokenwise = tuple(m for m in modules if kind_of(m) in TOKENWISE)
    pooler = getattr(model, "pooler", None) if family.pooler else None
    other = pooler is not None and type(pooler).__module__ != hf.stock_class(family.model).__module__
    kinds: set[type] = {type(linear) for layer in layers for linear in layer.linears()}
    methods = methods_of(types, family)
    return Structure(
        modules, types, methods, fixed, tokenwise, layers, tuple(reasons), other, kinds == {QuantizedLinear}
    )


def some(reasons: list[str], most: int = 3) -> list[str]:
    """The first of many reasons, and how many more there are."""
    rest = len(reasons) - most
    return reasons[:most] + ([f"{rest} more modules are not the stock model's"] if rest > 0 else [])


def kind_of(module: nn.Module) -> str:
    """The full name of a module's class."""
    return f"{type(module).__module__}.{type(module).__qualname__}"


def called_modules(model: Any, family: Family) -> set[nn.Module]:
    """The modules that the fast path calls rather than stands in for: the pooler, TOKENWISE ones, and all inside."""
    pooler = getattr(model, "pooler", None) if family.pooler else None
    called = [pooler] if isinstance(pooler, nn.Module) else []
    called += [module for module in model.modules() if kind_of(module) in TOKENWISE]
    return {inner for module in called for inner in module.modules()}


def override_reasons(model: Any, family: Family) -> list[str]:
    """Which methods of the stock model a user's subclass has changed; its `forward` may call ours."""
    stock = hf.stock_class(family.model)
    own = type(model).__mro__[: type(model).__mro__.index(stock)]
    users = [cls for cls in own if "fastbert_family" not in cls.__dict__]
    changed = {name for cls in users for name, value in cls.__dict__.items() if callable(value)}
    changed -= {"forward", "config_class"}
    methods = sorted(n for n in changed if not n.startswith("__") and callable(getattr(stock, n, None)))
    return [f"{type(model).__name__} changes {', '.join(methods)}"] if methods else []


def patch_reasons(types: Iterable[type], family: Family) -> list[str]:
    """Which stock classes have a method whose code stands elsewhere, whatever it calls itself."""
    found = methods_of(types, family)
    return [
        f"the {name} of {kind.__name__} was replaced"
        for kind, name, function in zip(*found, strict=True)
        if not at_home(function)
    ]


def at_home(function: Any) -> bool:
    """Whether the code of a method, and of whatever decorates it, belongs to one of HOMES."""
    while function is not None:
        if getattr(function, "__globals__", {}).get("__name__", "").split(".")[0] not in HOMES:
            return False
        function = getattr(function, "__wrapped__", None)
    return True


def role_reasons(model: Any, family: Family) -> list[str]:
    """Which modules are not what the stock model has at their place."""
    roles: dict[str, type] = {f"embeddings.{name}": nn.Embedding for name in tables_of(family, model.embeddings)}
    roles["embeddings.LayerNorm"] = nn.LayerNorm
    roles[family.embeddings_dropout] = nn.Dropout
    if hasattr(model, family.projection or ""):
        roles[f"{family.projection}"] = nn.Linear
    activations = []
    for index in range(len(at(model, family.layers))):
        prefix = f"{family.layers}.{index}"
        roles |= {f"{prefix}.{path}": nn.Linear for path in family.linears()}
        roles |= {f"{prefix}.{path}": nn.LayerNorm for path in (family.norm1, family.norm2)}
        roles |= {f"{prefix}.{path}": nn.Dropout for path in family.dropouts()}
        activations.append(f"{prefix}.{family.activation}")
    home, reasons = hf.stock_class(family.model).__module__, []
    called = called_modules(model, family)
    for name, module in model.named_modules():
        if not name or name in activations or (module in called and name not in roles):
            continue
        kind = kind_of(module)
        if name in roles and type(module) is not roles[name]:
            if roles[name] is not nn.Linear or (kind not in TOKENWISE and type(module) is not QuantizedLinear):
                reasons.append(f"{name} is {kind}, not torch.nn.{roles[name].__name__}")
        elif name not in roles and type(module) not in (nn.Dropout, nn.ModuleList) and type(module).__module__ != home:
            reasons.append(f"{name} is {kind}, not a module of the stock model")
    names = {name for name, _ in model.named_modules()}
    return reasons + [f"{name} is missing" for name in roles if name not in names]


def model_reasons(model: Any, structure: Structure, family: Family) -> list[str]:
    """Why the model, as it is now, runs the stock path whatever it is called with."""
    if family.refusal:
        return [family.refusal]
    reasons = [*structure.reasons, *config_reasons(model)]
    if not structure.reasons:
        reasons += own_reasons(model) or state_reasons(structure, model) or parameter_reasons(structure, model, family)
    return reasons


def seen_reasons(model: Any) -> list[str]:
    """`model_reasons` of a model whose modules are as they were when there were none."""
    return [*config_reasons(model), *own_reasons(model)]


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
    reasons += position_reasons(config)
    if not hf.missing():
        reasons += hf.attention_reasons(model)
    return reasons


def position_reasons(config: Any) -> list[str]:
    """Whether the config asks for positions that transformers 5 no longer computes and runs as absolute ones."""
    position = getattr(config, "position_embedding_type", None) or "absolute"
    return [] if position == "absolute" else [f"position_embedding_type is {position!r}, not 'absolute'"]


def forward_reasons(model: Any) -> list[str]:
    """Why calling the model does not reach its class's forward: an instance's own that does not wrap it."""
    found = model.__dict__.get("forward")
    while found is not None:
        if getattr(found, "__func__", found) is type(model).forward:
            return []
        found = getattr(found, "__wrapped__", None) or getattr(found, "__func__", None)
    return ["the forward of the model was replaced on the instance"] if "forward" in model.__dict__ else []


def replaced_reasons(module: nn.Module, model: Any, methods: frozenset[str]) -> list[str]:
    """Which of these methods a module has as an attribute of its own, where its class's should stand."""
    return [f"the {name} of {name_of(module, model)} was replaced" for name in sorted(methods & module.__dict__.keys())]


def own_reasons(model: Any) -> list[str]:
    """What may change from call to call outside of a model's modules: hooks on every module, its own methods."""
    if torch_private.global_hooks():
        return ["a hook on every module is set"]
    return replaced_reasons(model, model, hf.METHODS - {"forward"})  # see forward_reasons


def state_reasons(structure: Structure, model: Any) -> list[str]:
    """What may change from call to call in the modules: hooks, offloading, a replaced forward."""
    for module in structure.tokenwise:
        if any(torch_private.hooks_of(inner) for inner in module.modules()):
            return [f"a hook is set on or inside {name_of(module, model)}"]
    for module in torch_private.unusual(structure.fixed, hf.MARKS):
        if hf.is_offloaded(module):
            return [f"{name_of(module, model)} is offloaded (it has an {hf.OFFLOADED})"]
        if replaced := replaced_reasons(module, model, hf.METHODS):
            return replaced
        words = module is model.embeddings.word_embeddings
        hooks = [h for h in torch_private.hooks_of(module) if not (words and hf.is_gradient_hook(h))]
        if any(not hf.is_capturing_hook(hook) for hook in hooks):
            return [f"a hook is set on {name_of(module, model)}"]
    return []


def parameter_reasons(structure: Structure, model: Any, family: Family) -> list[str]:
    """Which parameters are not what the fast path takes them for: real parameters, of one dtype, on one device."""
    tables = [getattr(model.embeddings, name) for name in tables_of(family, model.embeddings)]
    if any(table.max_norm is not None or table.sparse or table.scale_grad_by_freq for table in tables):
        return ["an embedding has a max_norm, sparse gradients, or gradients scaled by frequency"]
    dtype, device = tables[0].weight.dtype, tables[0].weight.device
    if refusals := devices.refusals(device):
        return [f"the model is on {refusal}" for refusal in refusals]
    found = [table.weight for table in tables]
    norms = [model.embeddings.LayerNorm]
    projection = getattr(model, family.projection or "", None)
    linears = [] if projection is None else [projection]
    for layer in structure.layers:
        if hf.gelu_of(layer.activation) is None:
            name = getattr(layer.activation, "__name__", type(layer.activation).__name__)
            return [f"the activation is {name}, not an erf or tanh GELU"]
        if getattr(layer.attention, "is_causal", False):
            return [f"{name_of(layer.attention, model)} is causal"]
        query_key_value = layer.query, layer.key, layer.value
        without = [parameter(linear, "bias") is None for linear in query_key_value if type(linear) is nn.Linear]
        if any(without) and not all(without):
            return ["of query, key and value some have a bias and some have not"]
        linears += layer.linears()
        norms += layer.norms()
    for linear in linears:
        if type(linear) is nn.Linear:
            weight, bias = parameter(linear, "weight"), parameter(linear, "bias")
            found += [weight] if bias is None else [weight, bias]
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
    return []


def name_of(module: nn.Module, model: nn.Module) -> str:
    """The attribute path of a module inside the model."""
    return next((name for name, m in model.named_modules() if m is module), "") or "the model"
