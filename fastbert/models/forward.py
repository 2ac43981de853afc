"""The forward of a base model: padding dropped once, the layers on packed tokens, padding restored once.

Where a call or the model asks for something else, HuggingFace's own forward runs, and `explain` says why.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections import Counter
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from fastbert import hf, layers, ops, torch_private
from fastbert.layers import Packing
from fastbert.models.families import Family, tables_of
from fastbert.models.structure import LayerModules, Structure, at, examine, model_reasons
from fastbert.models.weights import MatrixCache, rate, read_dropout, read_layer, read_product, wants_graph

logger = logging.getLogger("fastbert")

INDICES = ("input_ids", "position_ids", "token_type_ids", "task_type_ids")  # in the order of tables_of
PAD_OUTPUTS = ("zeros", "exact")
MOST_REASONS = 64
STEP_ASIDE_ARGUMENTS = (
    "encoder_hidden_states", "encoder_attention_mask", "past_key_values", "is_causal", "softcap", "position_bias",
    "cache", "debug_io", "head_mask",
    # names of HuggingFace's inner functions, which raise when they are given twice
    "module", "hidden_states", "query", "key", "value", "dropout", "scaling",
)  # fmt: skip

# Why the base model must keep HuggingFace's pad rows in this call, in words: a head that has seen its labels says so.
exact_call: ContextVar[str] = ContextVar("fastbert_exact_call", default="")


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
            self.cache = MatrixCache()  # or copies of the weights of removed layers would stay
        return structure

    def count(self, reason: str) -> None:
        """Counts a forward under its reason for the stock path; some hold shapes, so they are kept from being many."""
        known = reason in self.calls or len(self.calls) < MOST_REASONS
        self.calls[reason if known else "for more reasons than are kept"] += 1


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
    if wanted_hidden_states(model, inputs) is None:
        reasons.append("output_hidden_states is no flag, and this version of transformers takes no indices")
    return reasons + input_reasons(model, inputs)


def wanted_hidden_states(model: Any, inputs: dict[str, Any]) -> set[int] | None:
    """The indices of the hidden states that a call asks for, 0 the embeddings' output; None: it asks strangely."""
    wanted = inputs.get("output_hidden_states", getattr(model.config, "output_hidden_states", False))
    return hf.hidden_state_indices(wanted, len(at(model, family_of(model).layers)) + 1)


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
    if type(given) is not Tensor:
        return [f"the input is {type(given).__name__}, not a plain tensor"]
    reasons = []
    chunk = getattr(model.config, "chunk_size_feed_forward", 0)  # chunks change the memory used, not the numbers
    if chunk and shape[1] % chunk:
        reasons.append(f"{shape[1]} tokens are no multiple of chunk_size_feed_forward {chunk}")
    if given.device != model.embeddings.word_embeddings.weight.device:
        reasons.append(f"the input is on {given.device}, the model is not")
    if embeds is not None and embeds.dtype != model.embeddings.word_embeddings.weight.dtype:
        reasons.append(f"inputs_embeds is {embeds.dtype}, the model is not")
    width = model.embeddings.word_embeddings.embedding_dim
    if embeds is not None and embeds.shape[2] != width:
        reasons.append(f"inputs_embeds has {embeds.shape[2]} channels, the tables have {width}")
    tables = tables_of(family_of(model), model.embeddings)
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    flattened = inputs.get("cu_seq_lens_q") is not None
    if mask is not None and (not isinstance(mask, Tensor) or tuple(mask.shape) != shape):
        reasons.append(f"attention_mask is not a tensor [{shape[0]}, {shape[1]}]")
    for name, _ in list(zip(INDICES, tables, strict=False))[2:]:
        if inputs.get(name) is not None and tuple(inputs[name].shape) != shape:
            reasons.append(f"{name} has shape {list(inputs[name].shape)}, not {list(shape)}")
    if positions is not None and tuple(positions.shape) not in (shape, (1, shape[1])):
        reasons.append(f"position_ids has shape {list(positions.shape)}, not {list(shape)}")
    reasons += flattened_reasons(inputs, shape)
    table = model.embeddings.position_embeddings.num_embeddings
    for name, rows_of in zip(INDICES, tables, strict=False):
        reasons += index_reasons(name, inputs.get(name), getattr(model.embeddings, rows_of).num_embeddings)
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
    packing, first = layers.pack_mask(mask.to(given.device))
    if not first:
        return None, "column 0 of a row is masked (left padding or an empty row), and pad rows are read there"
    if packing.indices is not None and (reason := exact_call.get()):
        return None, reason
    if packing.indices is not None and state.structure is not None and state.structure.other_pooler:
        return None, "the pooler is not the stock model's, and may read pad rows"
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


def embed(model: Any, inputs: dict[str, Any], packing: Packing, p: float, seed: Tensor | None) -> Tensor:
    """The embeddings' output [T, H]. inputs_embeds stand in for the table of words, indexed by token."""
    tables: Any = model.embeddings
    words, ids, word_padding = tables.word_embeddings.weight, inputs.get("input_ids"), -1
    hooks = [] if ids is None else torch_private.hooks_of(tables.word_embeddings)
    if ids is not None:
        ids, word_padding = packing.pack(ids), padding_row(tables.word_embeddings)
    else:
        words = inputs["inputs_embeds"].flatten(0, 1)
        ids = packing.indices if packing.indices is not None else torch.arange(words.shape[0], device=words.device)
    positions = position_ids(model, inputs, packing)
    types = type_table = None
    names = tables_of(family_of(model), tables)
    if "token_type_embeddings" in names:
        types, type_table = inputs.get("token_type_ids"), tables.token_type_embeddings.weight
        types = tables.token_type_ids[0].index_select(0, positions) if types is None else packing.pack(types)
        if "task_type_embeddings" in names:
            types, type_table = with_task_types(types, tables, inputs.get("task_type_ids"), packing)
    norm = tables.LayerNorm
    x: Tensor = ops.embed_layer_norm(
        ids, types, positions, words, type_table, tables.position_embeddings.weight,
        norm.weight, norm.bias, norm.eps, p, seed if p else None,
        word_padding, padding_row(tables.position_embeddings), wants_graph(words, (tables,)),
    )[0]  # fmt: skip
    if torch.is_grad_enabled() and any(map(hf.is_gradient_hook, hooks)):
        x.requires_grad_()
    return x


def padding_row(table: nn.Embedding) -> int:
    """The row of a table that gets no gradient; -1: every row gets its own."""
    return -1 if table.padding_idx is None else table.padding_idx


def with_task_types(types: Tensor, tables: Any, given: Tensor | None, packing: Packing) -> tuple[Tensor, Tensor]:
    """types [T] and task types → indices [T] into one table of all their sums. No task types: all are 0."""
    kinds, tasks = tables.token_type_embeddings.weight, tables.task_type_embeddings.weight
    table = (kinds[:, None] + tasks).flatten(0, 1)  # [types·tasks, H]
    indices = types * tasks.shape[0]
    return (indices if given is None else indices + packing.pack(given)), table


def project(model: Any, cache: MatrixCache, x: Tensor, dtype: torch.dtype) -> Tensor:
    """x [T, E], the embeddings → [T, H], what the layers read: ELECTRA's two widths may differ."""
    linear = getattr(model, family_of(model).projection or "", None)
    if linear is None:
        return x
    return read_product((linear,), "projection", cache, dtype, wants_graph(x, (linear,)))(x.to(dtype))


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the products on x: autocast's, if it is on, else x's. Autocast leaves float64 alone."""
    if x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def draw_seed(device: torch.device) -> Tensor:
    """The seed of this forward's dropout, [] int64 on the device, from torch's generator."""
    limits = torch.iinfo(torch.int64)
    return torch.randint(limits.min, limits.max, (), device=device)


def run_layer(
    modules: LayerModules, index: int, cache: MatrixCache, x: Tensor, packing: Packing, dtype: torch.dtype,
    dropout: tuple[float, ...], seed: Tensor | None,
) -> Tensor:  # fmt: skip
    """x [T, H] → the output [T, H] of one layer; under gradient checkpointing computed again in the backward."""

    def compute(x: Tensor) -> Tensor:
        graph = wants_graph(x, (*modules.linears(), *modules.norms()))
        return layers.layer(x, read_layer(modules, index, cache, dtype, dropout, graph), packing, dtype, seed)

    checkpoint = hf.checkpointing_of(modules.layer) if torch.is_grad_enabled() else None
    return compute(x) if checkpoint is None else checkpoint(compute, x)


def run(model: Any, structure: Structure, cache: MatrixCache, inputs: dict[str, Any], packing: Packing) -> Any:
    """The fast path: HuggingFace's output class from declared ops only; the pooler is HuggingFace's module."""
    p = rate(at(model, family_of(model).embeddings_dropout))
    dropouts = [read_dropout(modules) for modules in structure.layers]
    seed = draw_seed(packing.cu_seqlens.device) if p or any(dropouts) else None
    x = embed(model, inputs, packing, p, seed)
    stream, dtype = x.dtype, compute_dtype(x)
    x = project(model, cache, x, dtype)
    wanted = wanted_hidden_states(model, inputs) or set()
    asked = bool(inputs.get("output_hidden_states", getattr(model.config, "output_hidden_states", False)))
    # Under autocast a projection gives the low dtype, and on a CPU HuggingFace's LayerNorms keep what they are given.
    given = x.dtype if x.device.type == "cpu" else stream
    x, hidden = x.to(stream), list[Tensor | None]()
    for i, modules in enumerate(structure.layers):
        hidden.append(handed := packing.unpack(x.to(given)) if i in wanted else None)
        if handed is not None and handed.requires_grad:
            x = packing.pack(handed).to(stream)  # whoever changes its gradient changes the model's
        x = run_layer(modules, i, cache, x, packing, dtype, dropouts[i], seed)
    last = packing.unpack(x.to(given))
    hidden.append(last if len(structure.layers) in wanted else None)
    return build_output(model, last, tuple(hidden) if asked else None)


def build_output(model: Any, last: Tensor, hidden: tuple[Tensor | None, ...] | None) -> Any:
    """The output class of the family, as HuggingFace's own forward fills it."""
    family = family_of(model)
    kind = getattr(hf.stock_module("modeling_outputs"), family.output)
    if not family.pooler:
        return kind(last_hidden_state=last, hidden_states=hidden)
    pooler = getattr(model, "pooler", None)
    return kind(last_hidden_state=last, pooler_output=None if pooler is None else pooler(last), hidden_states=hidden)


def positional_parameters(function: Any) -> tuple[str, ...]:
    """The names of a method's positional parameters, self left out."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(n for n, p in inspect.signature(function).parameters.items() if p.kind in kinds)[1:]


def make_forward(stock: type[Any]) -> Any:
    """The forward of the accelerated class of a stock base class."""
    names = positional_parameters(stock.forward)

    @functools.wraps(stock.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return stock.forward(self, *args, **kwargs)
        state: State | None = self.__dict__.get("_fastbert")
        if state is None:  # a user's subclass of ours, after `restore`
            return stock.forward(self, *args, **kwargs)
        if torch_private.transforms_active():
            state.count("a trace, an export, a transform or FakeTensorMode is at work")
            return stock.forward(self, *args, **kwargs)
        if len(args) > len(names) or any(name in kwargs for name in names[: len(args)]):
            return stock.forward(self, *args, **kwargs)  # which raises
        inputs = {**dict(zip(names, args, strict=False)), **kwargs}
        structure = state.structure_of(self)
        packing, reasons = None, model_reasons(self, structure, family_of(self)) or call_reasons(self, inputs)
        if not reasons:
            packing, reason = pack_inputs(inputs, state)
            reasons = [reason]
        state.count("; ".join(reasons))
        if packing is None:
            warn_once(reasons)
            if torch.is_grad_enabled():
                state.cache = MatrixCache()  # a fused optimizer's step moves no version of a parameter
            return stock.forward(self, *args, **kwargs)
        output = run(self, structure, state.cache, inputs, packing)
        as_tuple = inputs.get("return_dict", getattr(self.config, "return_dict", True)) is False
        return output.to_tuple() if as_tuple else output

    forward.__signature__ = inspect.signature(stock.forward)  # type: ignore[attr-defined]
    del forward.__wrapped__  # whoever unwraps a forward that he replaced must stop at ours, not at the stock one
    return forward


@functools.cache
def _warn(message: str) -> None:
    logger.warning(message)


def warn_once(reasons: list[str]) -> None:
    """One warning in the life of the process if a private name of transformers is missing."""
    if hf.missing():
        _warn(f"fastbert runs HuggingFace's own path: {'; '.join(r for r in reasons if 'lacks' in r)}")
