"""Random calls of small models: HuggingFace's exception, or its numbers by the parity rule.

What must hold of every call stands in `check`. Which path a call takes is foreseen by `is_fast`, so that nothing is
judged by a stock path that ran in the fast one's place.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fastbert
from fastbert import ops
from fastbert.models.families import FAMILIES
from fastbert.parity import Verdict, judge
from tests.models.gradients import verdicts
from tests.models.small import ALL_BASES, LONGEST, REFUSED, VOCABULARY, stock
from tests.poison import poisoned_memory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = dict(ALL_BASES)
COUNTED = [family.name for family in FAMILIES if family.positions == "after_padding"]  # positions leave pad ids out
EDGES = (0, 1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 47, LONGEST)  # lengths at and around tiles
MASKS = ("none", "right", "right", "right", "left", "holes", "holes", "any")
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
STRIDES = ("contiguous", "every second", "transposed", "sliced", "expanded")
# How many calls that differ in their values are judged together: one of few tokens has few independent errors.
CONTENTS_OF_GRADIENTS, CONTENTS_OF_FEW, FEW = 8, 4, 8


@dataclass(frozen=True)
class Call:
    """A call but for its values: B rows of `lengths` real tokens, padded to `width` columns."""

    family: str
    dtype: str
    lengths: tuple[int, ...]
    width: int
    mask: str
    mask_dtype: torch.dtype
    id_dtype: torch.dtype
    strides: str
    embeds: bool
    types: bool
    positions: str
    hidden_states: bool
    return_dict: bool
    pad_output: str
    gradients: bool
    fault: str
    seed: int


def an_id(place: int, value: int) -> Any:
    def change(call: dict[str, Tensor]) -> None:
        call["input_ids"] = call["input_ids"].clone()
        call["input_ids"][place:, place:] = value

    return change


def type_past_its_table(call: dict[str, Tensor]) -> None:
    call["token_type_ids"] = torch.full(shape_of(call), 2)


def position_past_its_table(call: dict[str, Tensor]) -> None:
    call["position_ids"] = torch.full(shape_of(call), LONGEST + 2)


def too_long(call: dict[str, Tensor]) -> None:
    call.clear()
    call["input_ids"] = torch.full((2, LONGEST + 3), 7)


def ids_of(dtype: torch.dtype) -> Any:
    return lambda call: call.update(input_ids=call["input_ids"].to(dtype))


def shape_of(call: dict[str, Tensor]) -> tuple[int, int]:
    given = call.get("input_ids", call.get("inputs_embeds"))
    return tuple(given.shape[:2])


# What makes a call a bad one; not all of them do in every family, and HuggingFace says which.
FAULTS = {
    "": lambda call: None,
    "no rows": lambda call: call.update({name: x[:0] for name, x in call.items()}),
    "no columns": lambda call: call.update({name: x[:, :0] for name, x in call.items()}),
    "an id past the vocabulary": an_id(-1, VOCABULARY),
    "a negative id": an_id(-1, -100),
    "ids of floats": ids_of(torch.float32),
    "ids of int16": ids_of(torch.int16),
    "ids of bool": ids_of(torch.bool),
    "one dimension": lambda call: call.update(input_ids=call["input_ids"].flatten()),
    "three dimensions": lambda call: call.update(input_ids=call["input_ids"][None]),
    "a token type past its table": type_past_its_table,
    "token types of fewer columns": lambda call: call.update(token_type_ids=torch.zeros(1, 2, dtype=torch.long)),
    "token types of one row": lambda call: call.update(token_type_ids=torch.zeros(1, shape_of(call)[1]).long()),
    "a position past its table": position_past_its_table,
    "positions of other rows": lambda call: call.update(position_ids=torch.zeros(9, shape_of(call)[1]).long()),
    "positions of one dimension": lambda call: call.update(position_ids=torch.zeros(shape_of(call)[1]).long()),
    "longer than the model": too_long,
    "a mask of fewer columns": lambda call: call.update(attention_mask=torch.ones(shape_of(call))[:, :-1]),
    "a mask of more columns": lambda call: call.update(attention_mask=torch.ones(len(call["input_ids"]), 60)),
    "a mask of one row": lambda call: call.update(attention_mask=torch.ones(1, shape_of(call)[1])),
    "a mask of no row": lambda call: call.update(attention_mask=torch.ones(0, shape_of(call)[1])),
    "a mask of three dimensions": lambda call: call.update(attention_mask=torch.ones(*shape_of(call), 1)),
    "a mask of four dimensions": lambda call: call.update(
        attention_mask=torch.ones(shape_of(call), dtype=torch.bool)[:, None, None]
    ),
    "ids and embeddings": lambda call: call.update(inputs_embeds=torch.zeros(*shape_of(call), 64)),
    "neither": lambda call: call.pop("input_ids"),
    "embeddings of another width": lambda call: call.update(
        input_ids=None, inputs_embeds=torch.zeros(*shape_of(call), 5)
    ),
    "embeddings of another dtype": lambda call: call.update(
        input_ids=None, inputs_embeds=torch.zeros(*shape_of(call), 64, dtype=torch.float64)
    ),
}


@st.composite
def calls(draw: st.DrawFn) -> Call:
    count = draw(st.integers(1, 4))
    lengths = tuple(draw(st.sampled_from(EDGES) | st.integers(1, LONGEST)) for _ in range(count))
    width = min(max(lengths) + draw(st.sampled_from((0, 0, 1, 5))), LONGEST)
    fault = draw(st.sampled_from([""] * 4 * len(FAULTS) + list(FAULTS)))
    call = Call(
        family=draw(st.sampled_from(list(NAMES))),
        dtype=draw(st.sampled_from(list(DTYPES))),
        lengths=lengths,
        width=width,
        mask=draw(st.sampled_from(MASKS)),
        mask_dtype=draw(st.sampled_from((torch.bool, *INTEGERS, *FLOATS))),
        id_dtype=draw(st.sampled_from((torch.int64, torch.int32))),
        strides=draw(st.sampled_from(STRIDES)),
        embeds=not fault and draw(st.integers(0, 3)) == 1,
        types=draw(st.booleans()),
        positions=draw(st.sampled_from(("none", "none", "a row", "rows"))),
        hidden_states=draw(st.booleans()),
        return_dict=draw(st.booleans()),
        pad_output=draw(st.sampled_from(("zeros",) * 4 + ("exact",))),
        gradients=not fault and draw(st.integers(0, 31)) == 21,
        fault=fault,
        seed=draw(st.integers(0, 2**31)),
    )
    if call.mask == "none":
        call = dataclasses.replace(call, lengths=(width,) * count)
    if call.strides == "expanded":
        call = dataclasses.replace(call, lengths=call.lengths[:1] * count)
    return call


@functools.cache
def models(family: str, dtype: str) -> tuple[nn.Module, nn.Module, nn.Module]:
    """A stock model in the dtype, an accelerated copy of it, and a stock copy of the same weights in float64."""
    base = stock(NAMES[family], family, **{"n_layers" if family == "distilbert" else "num_hidden_layers": 1})
    base = base.to(DTYPES[dtype])
    return base, fastbert.accelerate(copy.deepcopy(base)), copy.deepcopy(base).double()


def laid_out(x: Tensor, strides: str) -> Tensor:
    """x [B, S, ...] with the same values in another layout; where memory lies between them, it is poisoned."""
    if strides == "every second":
        return x.new_empty(*x.shape, 2)[..., 0].copy_(x)
    if strides == "transposed":
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if strides == "sliced":
        return x.new_empty(x.shape[0] + 2, x.shape[1] + 3, *x.shape[2:])[1:-1, 2:-1].copy_(x)
    return x[:1].expand(x.shape) if strides == "expanded" else x


def real_tokens(call: Call, generator: torch.Generator) -> Tensor:
    """Which tokens there are [B, S]."""
    shape = len(call.lengths), call.width
    real = torch.arange(call.width) < torch.tensor(call.lengths, dtype=torch.long)[:, None]
    if call.mask == "left":
        return real.flip(1)
    if call.mask in ("holes", "any"):
        some = torch.rand(shape, generator=generator) < 0.7
        some[:, :1] |= call.mask == "holes"
        return real & (some[:1] if call.strides == "expanded" else some)
    return real


def mask_of(real: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """A mask that is not zero at real tokens, but seldom 1."""
    values = torch.randint(1, 128, real.shape, generator=generator)
    if dtype.is_signed and dtype != torch.uint8:
        values = values * torch.where(torch.rand(real.shape, generator=generator) < 0.5, -1, 1)
    return torch.where(real, values / 4 if dtype.is_floating_point else values, 0).to(dtype)


def inputs_of(call: Call, content: int) -> tuple[dict[str, Any], Tensor]:
    """What the model is called with, and which tokens there are [B, S], the same for every content."""
    shape, (base, _, _) = (len(call.lengths), call.width), models(call.family, call.dtype)
    real = real_tokens(call, torch.Generator().manual_seed(call.seed))
    generator = torch.Generator().manual_seed(call.seed + content)

    def drawn(below: int, rows: int = shape[0]) -> Tensor:
        return torch.randint(0, below, (rows, shape[1]), generator=generator).to(call.id_dtype)

    ids, found = drawn(VOCABULARY), dict[str, Any]()
    if call.embeds:
        width = base.embeddings.word_embeddings.embedding_dim
        found["inputs_embeds"] = torch.randn(*shape, width, generator=generator).to(DTYPES[call.dtype])
    else:
        found["input_ids"] = torch.where(real, ids, base.config.pad_token_id) if content % 2 else ids
    if call.mask != "none":
        found["attention_mask"] = mask_of(real, call.mask_dtype, generator)
    if call.types:
        found["token_type_ids"] = drawn(2)
        found |= {"task_type_ids": drawn(3)} if call.family == "ernie" else {}
    if call.positions != "none":
        found["position_ids"] = drawn(LONGEST + 2, shape[0] if call.positions == "rows" else 1)
    found = {name: laid_out(x, call.strides) for name, x in found.items()}
    if call.fault:
        found.setdefault("input_ids", found.pop("inputs_embeds", None))
        FAULTS[call.fault](found)
        if isinstance(mask := found.get("attention_mask"), Tensor) and mask.shape == shape:
            real = mask != 0
    return found, real


def with_other_padding(call: Call, inputs: dict[str, Any], real: Tensor) -> dict[str, Any]:
    """The same call with other values where there are no tokens, NaN in embeddings.

    RoBERTa counts positions over ids that are no pad, so those stay pads or none.
    """
    changed, pad = dict(inputs), models(call.family, call.dtype)[0].config.pad_token_id
    if call.embeds:
        changed["inputs_embeds"] = inputs["inputs_embeds"].masked_fill(~real[:, :, None], torch.nan)
        return changed
    ids = inputs["input_ids"]
    other = (ids + 7) % VOCABULARY
    if call.family in COUNTED:
        other = torch.where((ids == pad) | (other == pad), ids, other)
    changed["input_ids"] = torch.where(real, ids, other)
    if "token_type_ids" in inputs and not call.fault:
        changed["token_type_ids"] = torch.where(real, inputs["token_type_ids"], 1 - inputs["token_type_ids"])
    return changed


def is_fast(call: Call, real: Tensor) -> bool:
    """Whether the fast path takes a call without a fault."""
    if call.family in REFUSED or not real.numel() or not real[:, 0].all():
        return False
    return call.pad_output == "zeros" or bool(real.all())


def outputs(model: nn.Module, call: Call, inputs: dict[str, Any], wide: bool = False) -> list[Tensor | Any]:
    """The output as a flat list: last hidden state, pooled, hidden states."""
    if wide:
        inputs = {k: v.double() if k == "inputs_embeds" and v is not None else v for k, v in inputs.items()}
    found = model(**inputs, output_hidden_states=call.hidden_states, return_dict=call.return_dict)
    assert isinstance(found, tuple) is not call.return_dict
    flat = list(found if isinstance(found, tuple) else found.to_tuple())
    return [x for part in flat for x in (part if isinstance(part, tuple) else (part,)) if x is not None]


def attempt(model: nn.Module, call: Call, inputs: dict[str, Any]) -> Any:
    """The outputs, or the exception."""
    try:
        return outputs(model, call, inputs)
    except Exception as error:
        return error


def rows(x: Tensor, real: Tensor) -> Tensor:
    """What of an output is judged: the rows of real tokens; a pooled output whole."""
    return x[real] if x.dim() == 3 else x


def found_gradients(model: nn.Module, call: Call, contents: list[tuple[dict[str, Any], Tensor]]) -> dict[str, Tensor]:
    """The gradients of every parameter, of every content, stacked."""
    found = []
    for inputs, real in contents:
        model.zero_grad()
        x = rows(outputs(model, call, inputs, next(model.parameters()).dtype == torch.float64)[0], real)
        weights = torch.randn(x.shape, generator=torch.Generator().manual_seed(call.seed)).to(x.dtype)
        (x * weights).sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    return {name: torch.stack([gradients[name] for gradients in found]) for name in found[0]}


def check(call: Call) -> list[tuple[str, Verdict]]:
    """Asserts what holds of every call; returns what the rule says of a fast one's numbers."""
    base, model, ref = models(call.family, call.dtype)
    model._fastbert.pad_output = call.pad_output
    count = CONTENTS_OF_GRADIENTS if call.gradients else CONTENTS_OF_FEW if sum(call.lengths) <= FEW else 1
    contents = [inputs_of(call, content) for content in range(count)]
    judged: list[list[tuple[Tensor, ...]]] = []
    with torch.no_grad():
        for inputs, real in contents:
            theirs = attempt(base, call, inputs)
            with poisoned_memory(), ops.record() as recorded:
                ours = attempt(model, call, inputs)
            if isinstance(theirs, Exception):
                assert type(ours) is type(theirs) and str(ours).startswith(str(theirs)), (theirs, ours)
                return []
            assert isinstance(ours, list), ours
            assert [(x.dtype, x.shape) for x in ours] == [(x.dtype, x.shape) for x in theirs]
            fast = any(op.op in ("attention", "encoder_forward") for op in recorded)
            assert call.fault or fast == is_fast(call, real)
            if not fast:
                assert all(torch.equal(x, y) for x, y in zip(ours, theirs, strict=True))
                continue
            wide = outputs(ref, call, inputs, wide=True)
            judged.append([tuple(rows(x, real) for x in xs) for xs in zip(ours, wide, theirs, strict=True)])
            assert all(x.dim() < 3 or (x[~real] == 0).all() for x in ours)
            with poisoned_memory():
                again = outputs(model, call, with_other_padding(call, inputs, real))
            assert all(torch.equal(x, y) for x, y in zip(ours, again, strict=True))
    found = []
    for i, parts in enumerate(zip(*judged, strict=True)):
        found.append((f"output {i}", judge(*(torch.cat(x) for x in zip(*parts, strict=True)))))
    # A softmax of one score has no gradient: rounding alone would be judged.
    if call.gradients and judged and contents[0][1].sum(1).max() > 1:
        with poisoned_memory():
            ours = found_gradients(model, call, contents)
        found += verdicts(ours, found_gradients(ref, call, contents), found_gradients(base, call, contents))
    return found


SETTINGS = settings(deadline=None, database=None, derandomize=True)  # the same calls each time


def assert_holds(call: Call) -> None:
    assert [f"{name}: {verdict}" for name, verdict in check(call) if not verdict.passed] == []


@settings(SETTINGS, max_examples=200)
@given(calls())
def test_random_calls(call):
    assert_holds(call)


@pytest.mark.slow
@settings(SETTINGS, max_examples=7500)
@given(calls())
def test_many_random_calls(call):
    assert_holds(call)
