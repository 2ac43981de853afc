"""The inputs of a call: which the fast path does not take, and what is wrong where HuggingFace's forward raises."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from fastbert import hf
from fastbert.models.families import FAMILIES, Family, tables_of
from fastbert.models.structure import at

INDICES = ("input_ids", "position_ids", "token_type_ids", "task_type_ids")  # in the order of tables_of
BY_MODEL = {family.model: family for family in FAMILIES}
STEP_ASIDE_ARGUMENTS = (
    "encoder_hidden_states", "encoder_attention_mask", "past_key_values", "is_causal", "softcap", "position_bias",
    "cache", "debug_io", "head_mask",
    # names of HuggingFace's inner functions, which raise when they are given twice
    "module", "hidden_states", "query", "key", "value", "dropout", "scaling",
)  # fmt: skip


def family_of(model: Any) -> Family:
    """The family of an accelerated base model; another thread may have restored its class under a forward."""
    family: Family | None = getattr(type(model), "fastbert_family", None)
    return family or BY_MODEL[type(model).__name__]


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
    if (ids is None) == (embeds is None) or not isinstance(given, Tensor):
        return ["not exactly one of input_ids [B, S] and inputs_embeds [B, S, H] was given"]
    if not is_plain(given):
        return [f"the input is {type(given).__name__} {given.layout}, not a plain tensor"]
    if given.dim() != (2 if embeds is None else 3):
        return [f"the input has shape {list(given.shape)}, not [B, S] of ids or [B, S, H] of embeddings"]
    shape = tuple(given.shape[:2])
    if 0 in shape:
        return [f"the batch is empty: {list(shape)}"]
    reasons = []
    chunk = getattr(model.config, "chunk_size_feed_forward", 0)  # chunks change the memory used, not the numbers
    if chunk and shape[1] % chunk:
        reasons.append(f"{shape[1]} tokens are no multiple of chunk_size_feed_forward {chunk}")
    words = model.embeddings.word_embeddings.weight
    if embeds is not None:
        reasons += embeds_reasons(embeds, words)
    mask, positions = inputs.get("attention_mask"), inputs.get("position_ids")
    if mask is not None and (not is_plain(mask) or tuple(mask.shape) != shape or mask.is_meta):
        reasons.append(f"attention_mask is not a tensor [{shape[0]}, {shape[1]}]")
    limit = model.embeddings.position_embeddings.num_embeddings - first_position(model)
    reasons += flattened_reasons(inputs, shape, limit)
    for name, table in zip(INDICES, tables_of(family_of(model), model.embeddings), strict=False):
        shapes = (shape, (1, shape[1])) if name == "position_ids" else (shape,)
        size = getattr(model.embeddings, table).num_embeddings
        reasons += index_reasons(name, inputs.get(name), shapes, size, words.device)
    flattened = inputs.get("cu_seq_lens_q") is not None
    if not flattened and positions is None and shape[1] > limit:
        reasons.append(f"sequences of {shape[1]} tokens are longer than the position table allows")
    return reasons


def is_dense(x: Tensor) -> bool:
    """Whether a tensor has a shape, and every element of it in memory: it is not sparse, and not nested."""
    return x.layout == torch.strided and not x.is_nested


def is_plain(x: Any) -> TypeGuard[Tensor]:
    """Whether x is a dense tensor of torch's own class, whose values can be looked at."""
    return type(x) is Tensor and is_dense(x)


def embeds_reasons(embeds: Tensor, words: Tensor) -> list[str]:
    """Why inputs_embeds cannot stand in for rows of the table of words."""
    reasons = []
    if embeds.dtype != words.dtype:
        reasons.append(f"inputs_embeds is {embeds.dtype}, the model is not")
    if embeds.device != words.device:
        reasons.append(f"inputs_embeds is on {embeds.device}, the model is not")
    if embeds.shape[2] != words.shape[1]:
        reasons.append(f"inputs_embeds has {embeds.shape[2]} channels, the tables have {words.shape[1]}")
    return reasons


def index_reasons(
    name: str, rows: Any, shapes: tuple[tuple[int, ...], ...], size: int, device: torch.device
) -> list[str]:
    """Why something cannot index a table of `size` rows; values are looked at on a CPU only."""
    if rows is None:
        return []
    if not is_plain(rows):
        return [f"{name} is not a plain tensor"]
    if tuple(rows.shape) not in shapes:
        return [f"{name} has shape {list(rows.shape)}, not {list(shapes[0])}"]
    if rows.dtype not in (torch.int64, torch.int32):
        return [f"{name} is {rows.dtype}, not int64 or int32"]
    if rows.device != device:
        return [f"{name} is on {rows.device}, the model is not"]
    if rows.device.type == "cpu":
        low, high = rows.aminmax()
        if int(low) < 0 or int(high) >= size:
            return [f"{name} reaches outside its table of {size} rows"]
    return []


def flattened_reasons(inputs: dict[str, Any], shape: tuple[int, ...], limit: int) -> list[str]:
    """Why flattened input [1, T] with cu_seq_lens_q cannot be taken as packed sequences of up to `limit` tokens."""
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
        if inputs.get("position_ids") is None and lengths.max() > limit:
            return [f"a sequence of {int(lengths.max())} tokens is longer than the position table allows"]
    return []


def first_position(model: Any) -> int:
    """The position of a sequence's first token."""
    return int(model.embeddings.padding_idx) + 1 if family_of(model).positions == "after_padding" else 0


def add_faults(error: Exception, model: Any, inputs: dict[str, Any]) -> None:
    """Adds to the message of an error of HuggingFace's forward what is wrong with the inputs, if anything is."""
    if type(error).__module__ != "builtins":  # no memory, or a user's own error, which need not take other words
        return
    text, *rest = error.args or ("",)
    found = faults(model, inputs)
    if found and isinstance(text, str):
        error.args = (f"{text} (fastbert: {'; '.join(found)})".lstrip(), *rest)


def faults(model: Any, inputs: dict[str, Any]) -> list[str]:
    """What is wrong with the inputs of a call, with values, places and limits, in words that a user can act on."""
    ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
    if (ids is None) == (embeds is None):
        return [f"{'neither' if ids is None else 'both'} of input_ids and inputs_embeds given: give one of them"]
    name, given, wanted, dim = ("input_ids", ids, "[B, S]", 2)
    if embeds is not None:
        name, given, wanted, dim = ("inputs_embeds", embeds, "[B, S, H]", 3)
    if not isinstance(given, Tensor):
        return [f"{name} is a {type(given).__name__}, not a tensor {wanted}{hint_of(given)}"]
    if not is_dense(given):
        return [layout_fault(name, given)]
    if given.dim() != dim:
        alone = f": for one text give {name}[None]" if given.dim() == dim - 1 else ""
        return [f"{name} has shape {list(given.shape)}, not {wanted}{alone}"]
    shape = tuple(given.shape[:2])
    if 0 in shape:
        return [f"the batch is empty: {name} has shape {list(given.shape)}"]
    found = []
    if inputs.get("past_key_values") is None:  # or the mask covers what is in the cache too
        found += mask_faults(inputs.get("attention_mask"), shape, model.config)
    if embeds is not None:
        found += embeds_faults(embeds, table_of(model, "word_embeddings"))
    for index, rows in zip(INDICES, tables_of(family_of(model), model.embeddings), strict=False):
        if inputs.get(index) is not None and (table := table_of(model, rows)) is not None:
            what = "the vocabulary" if index == "input_ids" else "its table"
            found += index_faults(index, inputs[index], shape, table, what)
    return found + length_faults(model, inputs, shape)


def hint_of(given: Any) -> str:
    """How what was given instead of a tensor becomes one."""
    if hasattr(given, "keys"):
        return ": give what is in it by name, model(**inputs)"
    return ': a tokenizer gives tensors with return_tensors="pt"' if isinstance(given, (list, tuple)) else ""


def table_of(model: Any, name: str) -> nn.Embedding | None:
    """A table of the embeddings; None: the model has no such table, or something else at its place."""
    table = getattr(model.embeddings, name, None)
    return table if isinstance(table, nn.Embedding) else None


def layout_fault(name: str, x: Tensor) -> str:
    """What is wrong with a sparse or a nested tensor."""
    if x.is_nested:
        return f"{name} is a nested tensor: pad it"
    return f"{name} is laid out as {x.layout}: give it {name}.to_dense()"


def mask_faults(mask: Any, shape: tuple[int, ...], config: Any) -> list[str]:
    """What is wrong with an attention mask for inputs of shape [B, S]."""
    if mask is None:
        return []
    if not isinstance(mask, Tensor):
        return [f"attention_mask is a {type(mask).__name__}, not a tensor [B, S]{hint_of(mask)}"]
    if not is_dense(mask):
        return [layout_fault("attention_mask", mask)]
    if mask.is_meta:
        return ["attention_mask is on meta, where a tensor has no values"]
    name, to = "the input", shape
    if mask.dim() == 4:
        name, to = "the scores", (shape[0], config.num_attention_heads, shape[1], shape[1])
        fits = broadcasts(tuple(mask.shape), to)
    else:  # HuggingFace leaves a mask that masks nothing unread
        fits = tuple(mask.shape) in (shape, (shape[0], 1)) or (mask.device.type == "cpu" and bool(mask.all()))
    return [] if fits else [f"attention_mask has shape {list(mask.shape)}, {name} {list(to)}"]


def broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    """Whether a tensor of this shape expands to another."""
    padded = (1,) * (len(to) - len(shape)) + tuple(shape)
    return len(padded) == len(to) and all(n in (1, m) for n, m in zip(padded, to, strict=True))


def embeds_faults(embeds: Tensor, words: nn.Embedding | None) -> list[str]:
    """What is wrong with inputs_embeds, which stand in for rows of the table of words."""
    if words is None:
        return []
    found = device_faults("inputs_embeds", embeds, words)
    dtype = words.weight.dtype
    wider = embeds.is_floating_point() and torch.promote_types(embeds.dtype, dtype) != dtype
    if wider and not torch.is_autocast_enabled(embeds.device.type):
        found.append(f"inputs_embeds is {embeds.dtype}, the model is {dtype}: give it inputs_embeds.to({dtype})")
    if embeds.shape[2] not in (1, words.embedding_dim):
        found.append(f"inputs_embeds has {embeds.shape[2]} channels, the model's embeddings have {words.embedding_dim}")
    return found


def device_faults(name: str, x: Tensor, table: nn.Embedding) -> list[str]:
    """Whether an input is on another device than the model; offloaded weights, on meta, are on none."""
    device = table.weight.device
    if x.device == device or device.type == "meta":
        return []
    return [f"{name} is on {x.device}, the model is on {device}: give it {name}.to({str(device)!r})"]


def index_faults(name: str, rows: Any, shape: tuple[int, ...], table: nn.Embedding, what: str) -> list[str]:
    """Why something cannot index a table for inputs of shape [B, S]; values are looked at on a CPU only."""
    if not isinstance(rows, Tensor):
        return [f"{name} is a {type(rows).__name__}, not a tensor [B, S]{hint_of(rows)}"]
    if not is_dense(rows):
        return [layout_fault(name, rows)]
    found = device_faults(name, rows, table)
    if not broadcasts(tuple(rows.shape), shape):
        found.append(f"{name} has shape {list(rows.shape)}, not {list(shape)}")
    if rows.dtype not in (torch.int64, torch.int32):
        return [*found, f"{name} is {rows.dtype}, not int64 or int32: give it {name}.long()"]
    if is_plain(rows) and rows.device.type == "cpu":
        outside = ((rows < 0) | (rows >= table.num_embeddings)).nonzero()
        if len(outside):
            place, more = outside[0].tolist(), f" (and {len(outside) - 1} more)" if len(outside) > 1 else ""
            value, limit = int(rows[tuple(place)]), f"{what} of {table.num_embeddings} rows"
            found.append(f"{name} holds {value} at {place}{more}, outside {limit}")
    return found


def length_faults(model: Any, inputs: dict[str, Any], shape: tuple[int, ...]) -> list[str]:
    """Whether a sequence is longer than the table of positions. RoBERTa's positions leave tokens of the pad id out."""
    table = table_of(model, "position_embeddings")
    if inputs.get("position_ids") is not None or table is None:
        return []
    ids, first, longest, counted = inputs.get("input_ids"), 0, shape[1], ""
    if family_of(model).positions == "after_padding":
        pad = getattr(model.embeddings, "padding_idx", None)
        if pad is None or not (ids is None or (is_plain(ids) and ids.device.type == "cpu")):
            return []
        first = pad + 1
        if ids is not None:
            longest, counted = int((ids != pad).sum(1).max()), ", pad tokens left out"
    limit = table.num_embeddings - first
    if longest <= limit:
        return []
    return [f"the model has positions for {limit} tokens, the batch is {longest} long{counted}: truncate it"]
