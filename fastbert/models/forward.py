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
from fastbert.models.structure import Structure, examine, model_reasons
from fastbert.models.weights import MatrixCache, read_layer

logger = logging.getLogger("fastbert")

INDICES = ("input_ids", "position_ids", "token_type_ids")  # in the order of Family.tables
PAD_OUTPUTS = ("zeros", "exact")
STEP_ASIDE_ARGUMENTS = (
    "encoder_hidden_states", "encoder_attention_mask", "past_key_values", "is_causal", "softcap", "position_bias",
    "cache", "debug_io", "head_mask",
    # names of HuggingFace's inner functions, which raise when they are given twice
    "module", "hidden_states", "query", "key", "value", "dropout", "scaling",
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
        self.structure: Structure | None = None

    def __reduce__(self) -> tuple[type[State], tuple[str]]:
        return State, (self.pad_output,)

    def structure_of(self, model: nn.Module) -> Structure:
        """What the model is made of; looked at again if one of its modules, types or forwards has changed."""
        family, structure = family_of(model), self.structure
        if structure is None or not structure.fits(model, family):
            structure = self.structure = examine(model, family)
        return structure


def family_of(model: Any) -> Family:
    """The family of an accelerated base model."""
    family: Family = type(model).fastbert_family
    return family


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
    return reasons + input_reasons(model, inputs)


def input_reasons(model: Any, inputs: dict[str, Any]) -> list[str]:
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
    if type(given) is not Tensor:
        reasons.append(f"the input is {type(given).__name__}, not a plain tensor")
    if given.device != model.embeddings.word_embeddings.weight.device:
        reasons.append(f"the input is on {given.device}, the model is not")
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
    reasons += flattened_reasons(inputs, shape)
    table = model.embeddings.position_embeddings.num_embeddings
    for name, rows, rows_of in zip(INDICES, (ids, positions, types), family_of(model).tables, strict=False):
        reasons += index_reasons(name, rows, getattr(model.embeddings, rows_of).num_embeddings)
    if not flattened and positions is None and shape[1] > table - first_position(model):
        reasons.append(f"sequences of {shape[1]} tokens are longer than the position table allows")
    return reasons


def index_reasons(name: str, rows: Tensor | None, size: int) -> list[str]:
    """Why a tensor cannot index a table of `size` rows; values are looked at on a CPU only."""
    if rows is None:
        return []
    if rows.dtype not in (torch.int64, torch.int32):
        return [f"{name} is {rows.dtype}, not int64 or int32"]
    if rows.device.type == "cpu":
        low, high = rows.aminmax()
        if int(low) < 0 or int(high) >= size:
            return [f"{name} reaches outside its table of {size} rows"]
    return []


def flattened_reasons(inputs: dict[str, Any], shape: tuple[int, ...]) -> list[str]:
    """Why flattened input [1, T] with cu_seq_lens_q cannot be taken as packed sequences."""
    bounds, longest = inputs.get("cu_seq_lens_q"), inputs.get("max_length_q")
    if bounds is None:
        return []
    if shape[0] != 1 or inputs.get("attention_mask") is not None:
        return ["cu_seq_lens_q was given with a mask or with more than one row"]
    if not isinstance(bounds, Tensor) or bounds.dim() != 1 or bounds.numel() < 2 or bounds.is_floating_point():
        return ["cu_seq_lens_q is not a tensor [B+1] of integers"]
    if bounds.device.type == "cpu":
        lengths = bounds.diff()
        if bounds[0] != 0 or bounds[-1] != shape[1] or lengths.min() < 0 or (longest and lengths.max() > int(longest)):
            return ["cu_seq_lens_q does not cut the row from its start to its end"]
    return []


def first_position(model: Any) -> int:
    """The position of a sequence's first token."""
    return int(model.embeddings.padding_idx) + 1 if family_of(model).positions == "after_padding" else 0


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
    if not bool(mask[:, 0].to(torch.bool).all()):
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
        real = ids != first - 1
        return packing.pack(real.cumsum(1) * real + first - 1)
    row = torch.arange(first, first + length, device=device) if first else model.embeddings.position_ids[0, :length]
    return packing.pack(row.expand(batch, length))


def embed(model: Any, inputs: dict[str, Any], packing: Packing) -> Tensor:
    """The embeddings' output [T, H]. inputs_embeds stand in for the table of words, indexed by token."""
    tables: Any = model.embeddings
    words, ids = tables.word_embeddings.weight, inputs.get("input_ids")
    if ids is not None:
        ids = packing.pack(ids)
    else:
        words = inputs["inputs_embeds"].flatten(0, 1)
        ids = packing.indices if packing.indices is not None else torch.arange(words.shape[0], device=words.device)
    positions = position_ids(model, inputs, packing)
    types = type_table = None
    if "token_type_embeddings" in family_of(model).tables:
        types, type_table = inputs.get("token_type_ids"), tables.token_type_embeddings.weight
        types = tables.token_type_ids[0].index_select(0, positions) if types is None else packing.pack(types)
    norm = tables.LayerNorm
    x: Tensor = ops.embed_layer_norm(
        ids, types, positions, words, type_table, tables.position_embeddings.weight,
        norm.weight, norm.bias, norm.eps,
    )  # fmt: skip
    return x


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the products on x: autocast's, if it is on, else x's. Autocast leaves float64 alone."""
    if x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def run(model: Any, structure: Structure, cache: MatrixCache, inputs: dict[str, Any], packing: Packing) -> Any:
    """The fast path: HuggingFace's output class from declared ops only; the pooler is HuggingFace's module."""
    with torch.no_grad():
        x = embed(model, inputs, packing)
        dtype = compute_dtype(x)
        stack = (read_layer(layer, f"layer.{i}", cache, dtype) for i, layer in enumerate(structure.layers))
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
        state: State | None = self.__dict__.get("_fastbert")
        if state is None:  # a user's subclass of ours, after `restore`
            return stock.forward(self, *args, **kwargs)
        if len(args) > len(names) or any(name in kwargs for name in names[: len(args)]):
            return stock.forward(self, *args, **kwargs)  # which raises
        inputs = {**dict(zip(names, args, strict=False)), **kwargs}
        structure = state.structure_of(self)
        packing, reasons = None, model_reasons(self, structure, family_of(self)) or call_reasons(self, inputs)
        if not reasons:
            packing, reason = pack_inputs(inputs, state)
            reasons = [reason]
        state.calls["; ".join(reasons)] += 1
        if packing is None:
            warn_once(reasons)
            return stock.forward(self, *args, **kwargs)
        output = run(self, structure, state.cache, inputs, packing)
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
