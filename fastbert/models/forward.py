"""The forward of a base model: padding dropped once, the layers on packed tokens, padding restored once.

Where a call or the model asks for something else, HuggingFace's own forward runs, and `explain` says why.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from fastbert import hf, layers, ops, torch_private
from fastbert.layers import Packing
from fastbert.models.families import Family
from fastbert.models.structure import state_reasons, structure_reasons
from fastbert.models.weights import LayerModules, MatrixCache, at, layer_modules, read_layer

logger = logging.getLogger("fastbert")

PAD_OUTPUTS = ("zeros", "exact")
FLATTENED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
STEP_ASIDE_ARGUMENTS = (
    "encoder_hidden_states", "encoder_attention_mask", "past_key_values", "is_causal", "softcap", "position_bias",
    "cache", "debug_io", "head_mask",
)  # fmt: skip


class State:
    """What fastbert keeps on an accelerated base model. Copying or pickling a model keeps `pad_output` alone.

    Args:
        pad_output: "zeros": pad rows of the output are zero; "exact": they are HuggingFace's.
    """

    def __init__(self, pad_output: str) -> None:
        self.pad_output = pad_output
        self.cache = MatrixCache()
        self.calls: Counter[str] = Counter()  # "" = fast, else the reason for the stock path
        self.modules: list[nn.Module] = []
        self.types: list[type] = []
        self.pooler: set[nn.Module] = set()
        self.layers: list[tuple[LayerModules, int, float, str]] = []
        self.structure: list[str] = []

    def __reduce__(self) -> tuple[type[State], tuple[str]]:
        return State, (self.pad_output,)


def family_of(model: Any) -> Family:
    """The family of an accelerated base model."""
    family: Family = type(model).fastbert_family
    return family


def refresh(model: Any, state: State) -> None:
    """Looks at the modules again if one of them was replaced or has changed its class."""
    modules = torch_private.submodules(model)
    types = [type(m) for m in modules]
    if modules == state.modules and types == state.types:
        return
    family = family_of(model)
    state.structure = structure_reasons(model, family)
    state.layers = []
    if not state.structure:
        for layer in at(model, family.layers):
            found = layer_modules(layer, family)
            heads = int(getattr(found.attention, family.heads_name))
            scale = float(getattr(found.attention, "scaling", (found.query.out_features // heads) ** -0.5))
            state.layers.append((found, heads, scale, hf.gelu_of(found.activation) or ""))
    pooler = getattr(model, "pooler", None)
    state.pooler = set(pooler.modules()) if isinstance(pooler, nn.Module) else set()
    state.modules, state.types = modules, types


def model_reasons(model: Any, state: State) -> list[str]:
    """Why the model, as it is now, runs the stock path whatever it is called with."""
    refresh(model, state)
    reasons = state.structure + state_reasons(state.modules, model, state.pooler)
    if (implementation := hf.attention_implementation(model) if not hf.missing() else "sdpa") != "sdpa":
        reasons = [*reasons, f"{implementation} attention was asked for, not sdpa"]
    if torch.is_grad_enabled() and any(p.requires_grad for p in model.parameters()):
        reasons = [*reasons, "gradients are wanted, which the fast path has not yet: use torch.no_grad()"]
    return reasons


def call_reasons(model: Any, inputs: dict[str, Any]) -> list[str]:
    """Why this call runs the stock path."""
    reasons = [f"{name} was given" for name in STEP_ASIDE_ARGUMENTS if inputs.get(name) is not None]
    if hf.output_collector():
        reasons.append("an outer model captures outputs")
    if inputs.get("output_attentions", getattr(model.config, "output_attentions", False)):
        reasons.append("attentions were asked for")
    hidden = inputs.get("output_hidden_states", getattr(model.config, "output_hidden_states", False))
    if hidden is not None and not isinstance(hidden, bool):
        reasons.append("only some hidden states were asked for")
    return reasons + shape_reasons(model, inputs)


def shape_reasons(model: Any, inputs: dict[str, Any]) -> list[str]:
    """Which inputs have shapes that the fast path does not take; HuggingFace's own path broadcasts or rejects them."""
    ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
    given = ids if embeds is None else embeds
    dimensions = 2 if embeds is None else 3
    if not isinstance(given, Tensor) or (ids is None) == (embeds is None) or given.dim() != dimensions:
        return ["not exactly one of input_ids [B, S] and inputs_embeds [B, S, H] was given"]
    shape = tuple(given.shape[:2])
    if 0 in shape:
        return [f"the batch is empty: {list(shape)}"]
    reasons = []
    if embeds is not None and torch.is_grad_enabled() and embeds.requires_grad:
        reasons.append("gradients are wanted of inputs_embeds")
    if embeds is not None and embeds.dtype != model.embeddings.word_embeddings.weight.dtype:
        reasons.append(f"inputs_embeds is {embeds.dtype}, the model is not")
    mask, types, positions = (inputs.get(n) for n in ("attention_mask", "token_type_ids", "position_ids"))
    flattened = inputs.get("cu_seq_lens_q") is not None
    if mask is not None and (not isinstance(mask, Tensor) or tuple(mask.shape) != shape):
        reasons.append(f"attention_mask is not a tensor [{shape[0]}, {shape[1]}]")
    if types is not None and tuple(types.shape) != shape:
        reasons.append(f"token_type_ids has shape {list(types.shape)}, not {list(shape)}")
    if positions is not None and tuple(positions.shape) not in (shape, (1, shape[1])):
        reasons.append(f"position_ids has shape {list(positions.shape)}, not {list(shape)}")
    if flattened and (shape[0] != 1 or mask is not None):
        reasons.append("cu_seq_lens_q was given with a mask or with more than one row")
    table = model.embeddings.position_embeddings.num_embeddings
    if positions is not None and positions.device.type == "cpu" and int(positions.max()) >= table:
        reasons.append(f"position_ids reach past the table of {table}")
    if not flattened and positions is None and shape[1] > table - first_position(model):
        reasons.append(f"sequences of {shape[1]} tokens are longer than the position table allows")
    return reasons


def first_position(model: Any) -> int:
    """The position of a sequence's first token."""
    return model.config.pad_token_id + 1 if family_of(model).positions == "after_padding" else 0


def pack_inputs(inputs: dict[str, Any], state: State) -> tuple[Packing | None, str]:
    """The packing of a call, or None and the reason why its padding cannot be dropped."""
    ids = inputs.get("input_ids")
    given = inputs["inputs_embeds"] if ids is None else ids
    batch, length = given.shape[:2]
    if inputs.get("cu_seq_lens_q") is not None:
        cu_seqlens = inputs["cu_seq_lens_q"].to(torch.int32)
        longest = inputs.get("max_length_q") or length
        return Packing(cu_seqlens, int(longest), batch, length), ""
    mask = inputs.get("attention_mask")
    if mask is None:
        return layers.pack_dense(batch, length, given.device), ""
    mask = mask.to(given.device)
    if not bool((mask[:, 0] != 0).all()):
        return None, "column 0 of a row is masked (left padding or an empty row), and pad rows are read there"
    packing = layers.pack_mask(mask)
    if packing.indices is not None and state.pad_output == "exact":
        return None, 'pad_output="exact" and the batch has padding'
    return packing, ""


def position_ids(model: Any, inputs: dict[str, Any], packing: Packing) -> Tensor:
    """The positions [T] that HuggingFace's embeddings would use."""
    given, ids = inputs.get("position_ids"), inputs.get("input_ids")
    device = packing.cu_seqlens.device
    batch, length = packing.batch, packing.length
    if given is not None:
        return packing.pack(given.expand(batch, length))
    first = first_position(model)
    if inputs.get("cu_seq_lens_q") is not None:
        starts = torch.repeat_interleave(packing.cu_seqlens[:-1], packing.cu_seqlens.diff(), output_size=length)
        return torch.arange(length, device=device) - starts + first
    if first and ids is not None:
        real = ids != model.config.pad_token_id
        return packing.pack(real.cumsum(1) * real + model.config.pad_token_id)
    return packing.pack(torch.arange(first, first + length, device=device).expand(batch, length))


def embed(model: Any, inputs: dict[str, Any], packing: Packing) -> Tensor:
    """The embeddings' output [T, H]. inputs_embeds stand in for the table of words, indexed by token."""
    tables: Any = model.embeddings
    words, ids = tables.word_embeddings.weight, inputs.get("input_ids")
    if ids is not None:
        ids = packing.pack(ids)
    else:
        words = inputs["inputs_embeds"].flatten(0, 1)
        ids = packing.indices if packing.indices is not None else torch.arange(words.shape[0], device=words.device)
    types = type_table = None
    if family_of(model).token_types:
        types, type_table = inputs.get("token_type_ids"), tables.token_type_embeddings.weight.detach()
        types = torch.zeros_like(ids) if types is None else packing.pack(types)
    positions = position_ids(model, inputs, packing)
    norm = tables.LayerNorm
    x: Tensor = ops.embed_layer_norm(
        ids, types, positions, words.detach(), type_table, tables.position_embeddings.weight.detach(),
        norm.weight.detach(), norm.bias.detach(), norm.eps,
    )  # fmt: skip
    return x


def compute_dtype(model: Any, device: str) -> torch.dtype:
    """The dtype of the products: autocast's, if it is on, else the model's."""
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    dtype: torch.dtype = model.embeddings.word_embeddings.weight.dtype
    return dtype


def run(model: Any, state: State, inputs: dict[str, Any], packing: Packing) -> Any:
    """The fast path: HuggingFace's output class from declared ops only; the pooler is HuggingFace's module."""
    with torch.no_grad():
        x = embed(model, inputs, packing)
        dtype = compute_dtype(model, x.device.type)
        stack = (read_layer(*found, f"layer.{i}", state.cache, dtype) for i, found in enumerate(state.layers))
        wanted = inputs.get("output_hidden_states", getattr(model.config, "output_hidden_states", False))
        hidden = [packing.unpack(x)] if wanted else []
        for output in layers.encode(x, stack, packing, dtype):
            hidden += [packing.unpack(output)] if wanted else []
            x = output
        last = hidden[-1] if wanted else packing.unpack(x)
    return build_output(model, last, tuple(hidden) if wanted else None)


def build_output(model: Any, last: Tensor, hidden: tuple[Tensor, ...] | None) -> Any:
    """The output class of the family, as HuggingFace's own forward fills it."""
    outputs = hf.stock_module("modeling_outputs")
    if not family_of(model).pooler:
        return outputs.BaseModelOutput(last_hidden_state=last, hidden_states=hidden)
    pooler = getattr(model, "pooler", None)
    return outputs.BaseModelOutputWithPoolingAndCrossAttentions(
        last_hidden_state=last,
        pooler_output=None if pooler is None else pooler(last),
        hidden_states=hidden,
    )


def positional_parameters(function: Any) -> tuple[str, ...]:
    """The names of a method's positional parameters, self left out."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(n for n, p in inspect.signature(function).parameters.items() if p.kind in kinds)[1:]


def make_forward(stock: type[Any]) -> Any:
    """The forward of the accelerated class of a stock base class."""
    names = positional_parameters(stock.forward)

    @functools.wraps(stock.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or torch_private.transforms_active():
            return stock.forward(self, *args, **kwargs)
        state: State = self._fastbert
        inputs = {**dict(zip(names, args, strict=False)), **kwargs}
        packing, reasons = None, model_reasons(self, state) or call_reasons(self, inputs)
        if not reasons:
            packing, reason = pack_inputs(inputs, state)
            reasons = [reason]
        state.calls["; ".join(reasons)] += 1
        if packing is None:
            warn_once(reasons)
            return stock.forward(self, *args, **kwargs)
        output = run(self, state, inputs, packing)
        as_tuple = inputs.get("return_dict", getattr(self.config, "return_dict", True)) is False
        return output.to_tuple() if as_tuple else output

    return forward


@functools.cache
def _warn(message: str) -> None:
    logger.warning(message)


def warn_once(reasons: list[str]) -> None:
    """One warning in the life of the process if a private name of transformers is missing."""
    if hf.missing():
        _warn(f"fastbert runs HuggingFace's own path: {'; '.join(r for r in reasons if 'lacks' in r)}")
