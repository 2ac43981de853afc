"""The forward of a base model: padding dropped once, the layers on packed tokens, padding restored once.

Where a call or the model asks for something else, HuggingFace's own forward runs, and `explain` says why.
"""

from __future__ import annotations

import functools
import inspect
import logging
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from fastbert import hf, layers, ops, torch_private
from fastbert.layers import Packing
from fastbert.models.families import tables_of
from fastbert.models.inputs import add_faults, call_reasons, family_of, first_position, wanted_hidden_states
from fastbert.models.seen import Seen, see
from fastbert.models.structure import LayerModules, Structure, at, examine, model_reasons, seen_reasons
from fastbert.models.weights import (
    MatrixCache,
    Stack,
    is_stackable,
    rate,
    read_dropout,
    read_layer,
    read_product,
    read_stack,
    wants_graph,
)

logger = logging.getLogger("fastbert")

PAD_OUTPUTS = ("zeros", "exact")
MOST_REASONS = 64
MOST_LOSSES = 8  # of what was seen, in a row: the model changes at every forward, and looking ahead does not pay
ATTRIBUTE = "_fastbert"  # of an accelerated base model: its `State`

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
        self.calls: dict[str, int] = {}  # "" = fast, else the reason for the stock path
        self.structure: Structure | None = None
        self.seen: Seen | None = None
        self.losses = 0  # how often in a row what was seen did not hold at the next forward

    def __reduce__(self) -> tuple[type[State], tuple[str]]:
        return State, (self.pad_output,)

    def structure_of(self, model: nn.Module) -> Structure:
        """What the model is made of; looked at again if one of its modules, types or forwards has changed."""
        family, structure = family_of(model), self.structure
        if structure is None or not structure.fits(model, family):
            structure = self.structure = examine(model, family)
            self.cache = MatrixCache()  # or copies of the weights of removed layers would stay
        return structure

    def seen_of(self, model: nn.Module) -> Seen | None:
        """What an earlier forward has seen of the model, if all of it still holds and no gradients are asked for."""
        seen = self.seen  # read once: other threads and replicas put theirs in its place
        if torch.is_grad_enabled() or seen is None:
            return None
        holds = seen.holds(model)
        self.losses = 0 if holds else self.losses + 1
        if not holds:
            self.seen = None  # or it would keep what was replaced
        return seen if holds else None

    def see(self, model: nn.Module, structure: Structure, dtype: torch.dtype) -> Stack | None:
        """All layers for one call, and what there is to see for the next forward; None: they run one by one."""
        looks = not torch.is_grad_enabled() and self.losses < MOST_LOSSES
        self.seen = found = see(model, structure, self.cache, dtype, ATTRIBUTE) if looks else None
        return read_stack(structure.layers, self.cache, dtype)[0] if found is None else found.stack

    def count(self, reason: str) -> None:
        """Counts a forward under its reason for the stock path; some hold shapes, so they are kept from being many."""
        known = reason in self.calls or len(self.calls) < MOST_REASONS
        key = reason if known else "for more reasons than are kept"
        self.calls.setdefault(key, 0)
        self.calls[key] += 1  # no call of Python between its read and its write, so no other thread either


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


def stream_dtype(x: Tensor) -> torch.dtype:
    """The dtype of the residual stream: on a CPU float32 for 16-bit models too, which costs little there."""
    return torch.float32 if x.device.type == "cpu" and x.dtype.itemsize == 2 else x.dtype


def draw_seed(device: torch.device) -> Tensor:
    """The seed of this forward's dropout, [] int64 on the device, from torch's generator."""
    limits = torch.iinfo(torch.int64)
    return torch.randint(limits.min, limits.max, (), device=device)


def run_layer(
    modules: LayerModules, index: int, cache: MatrixCache, x: Tensor, packing: Packing, dtype: torch.dtype,
    dropout: tuple[float, ...], seed: Tensor | None,
) -> Tensor:  # fmt: skip
    """x [T, H] → the output [T, H] of one layer; under gradient checkpointing computed again in the backward."""

    graph = wants_graph(x, (*modules.linears(), *modules.norms()))  # not inside, where checkpoints turn it off

    def compute(x: Tensor) -> Tensor:
        return layers.layer(x, read_layer(modules, index, cache, dtype, dropout, graph), packing, dtype, seed)

    checkpoint = hf.checkpointing_of(modules.layer) if torch.is_grad_enabled() else None
    return compute(x) if checkpoint is None else checkpoint(compute, x)


def stack_of(
    model: Any, structure: Structure, seen: Seen | None, state: State, x: Tensor, dtype: torch.dtype
) -> Stack | None:
    """All layers for one call; None: they run one by one, as where gradients flow through them."""
    modules = (m for layer in structure.layers for m in (*layer.linears(), *layer.norms()))
    if not structure.layers or wants_graph(x, modules) or not is_stackable(structure.layers, dtype):
        return None
    return seen.stack if seen is not None and seen.dtype == dtype else state.see(model, structure, dtype)


def run(
    model: Any, structure: Structure, seen: Seen | None, state: State, inputs: dict[str, Any], packing: Packing
) -> Any:
    """The fast path: HuggingFace's output class from declared ops only; the pooler is HuggingFace's module."""
    p = rate(at(model, family_of(model).embeddings_dropout)) if seen is None else 0.0
    dropouts = [read_dropout(modules) if seen is None else () for modules in structure.layers]
    seed = draw_seed(packing.cu_seqlens.device) if p or any(dropouts) else None
    x = embed(model, inputs, packing, p, seed)
    stream, dtype = stream_dtype(x), compute_dtype(x)
    x = project(model, state.cache, x, dtype)
    if structure.is_int8 and dtype == torch.float32 and x.device.type == "cpu":
        dtype = torch.bfloat16  # of what stands between int8 products: rounded to 8 bits there anyway
    wanted = wanted_hidden_states(model, inputs) or set()
    asked = bool(inputs.get("output_hidden_states", getattr(model.config, "output_hidden_states", False)))
    # Under autocast a projection gives the low dtype, and on a CPU HuggingFace's LayerNorms keep what they are given.
    given = x.dtype if x.device.type == "cpu" else stream
    x, hidden, count = x.to(stream), list[Tensor | None](), len(structure.layers)
    stack = None if seed is not None else stack_of(model, structure, seen, state, x, dtype)
    for i, modules in enumerate(structure.layers):
        hidden.append(handed := packing.unpack(x.to(given)) if i in wanted else None)
        if handed is not None and handed.requires_grad:
            x = packing.pack(handed).to(stream)  # whoever changes its gradient changes the model's
        if stack is None:
            x = run_layer(modules, i, state.cache, x, packing, dtype, dropouts[i], seed)
        elif i == 0 or i in wanted:  # up to the next layer whose input is wanted
            end = next((j for j in range(i + 1, count) if j in wanted), count)
            x = ops.encoder_forward(x, packing.cu_seqlens, packing.max_seqlen, *stack.of_layers(i, end))
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
        state: State | None = self.__dict__.get(ATTRIBUTE)
        if state is None:  # a user's subclass of ours, after `restore`
            return stock.forward(self, *args, **kwargs)
        if torch_private.transforms_active():
            unseen = torch_private.module_fields_refusal()
            state.count(unseen or "a trace, an export, a transform or FakeTensorMode is at work")
            return stock.forward(self, *args, **kwargs)
        if len(args) > len(names) or any(name in kwargs for name in names[: len(args)]):
            return stock.forward(self, *args, **kwargs)  # which raises
        inputs = {**dict(zip(names, args, strict=False)), **kwargs}
        seen, packing = state.seen_of(self), None
        structure = state.structure_of(self) if seen is None else seen.structure
        reasons = model_reasons(self, structure, family_of(self)) if seen is None else seen_reasons(self)
        reasons = reasons or call_reasons(self, inputs)
        if not reasons:
            packing, reason = pack_inputs(inputs, state)
            reasons = [reason]
        state.count("; ".join(reasons))
        if packing is None:
            if torch.is_grad_enabled():
                state.cache = MatrixCache()  # a fused optimizer's step moves no version of a parameter
            try:
                return stock.forward(self, *args, **kwargs)
            except Exception as error:
                add_faults(error, self, inputs)
                raise
        output = run(self, structure, seen, state, inputs, packing)
        as_tuple = inputs.get("return_dict", getattr(self.config, "return_dict", True)) is False
        return output.to_tuple() if as_tuple else output

    forward.__signature__ = inspect.signature(stock.forward)  # type: ignore[attr-defined]
    del forward.__wrapped__  # whoever unwraps a forward that he replaced must stop at ours, not at the stock one
    return forward
