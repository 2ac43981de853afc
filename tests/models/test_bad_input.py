"""What HuggingFace rejects is rejected with its exception, and in words; what it takes gives its numbers."""

from __future__ import annotations

import copy
import functools
import warnings

import pytest
import torch
import transformers
from torch import nn

import fastbert
from fastbert.models.families import FAMILIES
from fastbert.parity import judge
from tests.models.small import ALL_BASES, BASES, LONGEST, batch, last_reason, pair, reasons, same_as_stock, stock

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = dict(ALL_BASES)
shared_pair = functools.cache(lambda family: pair(NAMES[family], family))

# One call each


def changed(rows: torch.Tensor, **values: object) -> torch.Tensor:
    """A copy with one value at [0, 2], or as given: rows, places."""
    out = rows.clone()
    out[values.get("at", (0, 2))] = values["to"]
    return out


def embeds(model, *shape, dtype=torch.float32):
    return torch.zeros(*shape, model.embeddings.word_embeddings.embedding_dim, dtype=dtype)


TYPED = ("bert", "roberta", "xlm-roberta", "camembert", "data2vec-text", "electra", "ernie")  # that read token types
# case: (the call, of a good one and the model; what is wrong with it; the families that reject it, empty: all)
# {places}: tokens that the model has positions for; {width}: of its embeddings; {left_out}: RoBERTa counts no pads
REJECTED = {
    "an id past the vocabulary": (
        lambda i, m: dict(i, input_ids=changed(i["input_ids"], to=1000)),
        "input_ids holds 1000 at [0, 2], outside the vocabulary of 99 rows",
    ),
    "a negative id": (
        lambda i, m: dict(i, input_ids=changed(i["input_ids"], to=-1)),
        "input_ids holds -1 at [0, 2], outside the vocabulary of 99 rows",
    ),
    "the first id that is none, in int32": (
        lambda i, m: dict(i, input_ids=changed(i["input_ids"].int(), to=99)),
        "input_ids holds 99 at [0, 2], outside the vocabulary of 99 rows",
    ),
    "ids of -100 at masked positions": (
        lambda i, m: dict(i, input_ids=i["input_ids"].masked_fill(i["attention_mask"] == 0, -100)),
        "input_ids holds -100 at [1, 1] (and 74 more), outside the vocabulary of 99 rows",
    ),
    "a token type past its table": (
        lambda i, m: dict(i, token_type_ids=changed(i["input_ids"] * 0, to=2)),
        "token_type_ids holds 2 at [0, 2], outside its table of 2 rows",
        *TYPED,
    ),
    "a negative token type": (
        lambda i, m: dict(i, token_type_ids=changed(i["input_ids"] * 0, to=-1, at=(3, 32))),
        "token_type_ids holds -1 at [3, 32], outside its table of 2 rows",
        *TYPED,
    ),
    "token types for other lengths": (
        lambda i, m: dict(i, token_type_ids=torch.zeros(4, 7, dtype=torch.long)),
        "token_type_ids has shape [4, 7], not [4, 33]",
        *TYPED,
    ),
    "token types of no row": (
        lambda i, m: {"input_ids": i["input_ids"][:1], "token_type_ids": torch.zeros(0, 33, dtype=torch.long)},
        "token_type_ids has shape [0, 33], not [1, 33]",
        *TYPED,
    ),
    "token types of floats": (
        lambda i, m: dict(i, token_type_ids=torch.zeros(4, 33)),
        "token_type_ids is torch.float32, not int64 or int32: give it token_type_ids.long()",
        *TYPED,
    ),
    "token types in a list": (
        lambda i, m: dict(i, token_type_ids=[[0] * 33] * 4),
        'token_type_ids is a list, not a tensor [B, S]: a tokenizer gives tensors with return_tensors="pt"',
        *TYPED,
    ),
    "a task type past its table": (
        lambda i, m: dict(i, task_type_ids=changed(i["task_type_ids"], to=3)),
        "task_type_ids holds 3 at [0, 2], outside its table of 3 rows",
        "ernie",
    ),
    "task types for each choice": (
        lambda i, m: dict(i, task_type_ids=torch.zeros(1, 4, 33, dtype=torch.long)),
        "task_type_ids has shape [1, 4, 33], not [4, 33]",
        "ernie",
    ),
    "a position past the table": (
        lambda i, m: dict(i, position_ids=changed(torch.zeros(4, 33, dtype=torch.long), to=50)),
        "position_ids holds 50 at [0, 2], outside its table of 50 rows",
    ),
    "a negative position": (
        lambda i, m: dict(i, position_ids=changed(torch.zeros(1, 33, dtype=torch.long), to=-1)),
        "position_ids holds -1 at [0, 2], outside its table of 50 rows",
    ),
    "positions of three rows": (
        lambda i, m: dict(i, position_ids=torch.zeros(3, 33, dtype=torch.long)),
        "position_ids has shape [3, 33], not [4, 33]",
    ),
    "positions of floats": (
        lambda i, m: dict(i, position_ids=torch.zeros(4, 33)),
        "position_ids is torch.float32, not int64 or int32: give it position_ids.long()",
    ),
    "positions in a list": (
        lambda i, m: dict(i, position_ids=[[0] * 33] * 4),
        'position_ids is a list, not a tensor [B, S]: a tokenizer gives tensors with return_tensors="pt"',
    ),
    "a sequence longer than the model": (
        lambda i, m: {"input_ids": torch.full((2, 60), 7)},
        "the model has positions for {places} tokens, the batch is 60 long{left_out}: truncate it",
    ),
    "embeddings longer than the model": (
        lambda i, m: {"inputs_embeds": embeds(m, 2, 60)},
        "the model has positions for {places} tokens, the batch is 60 long: truncate it",
    ),
    "no row": (
        lambda i, m: {k: v[:0] for k, v in i.items()},
        "the batch is empty: input_ids has shape [0, 33]",
    ),
    "no column": (
        lambda i, m: {k: v[:, :0] for k, v in i.items()},
        "the batch is empty: input_ids has shape [4, 0]",
    ),
    "embeddings of no row": (
        lambda i, m: {"inputs_embeds": embeds(m, 0, 3)},
        "the batch is empty: inputs_embeds has shape [0, 3, {width}]",
    ),
    "ids of int16": (
        lambda i, m: dict(i, input_ids=i["input_ids"].short()),
        "input_ids is torch.int16, not int64 or int32: give it input_ids.long()",
    ),
    "ids of floats": (
        lambda i, m: dict(i, input_ids=i["input_ids"].float()),
        "input_ids is torch.float32, not int64 or int32: give it input_ids.long()",
    ),
    "ids in lists": (
        lambda i, m: {"input_ids": i["input_ids"].tolist()},
        'input_ids is a list, not a tensor [B, S]: a tokenizer gives tensors with return_tensors="pt"',
    ),
    "what a tokenizer gives, as it is": (
        lambda i, m: {"input_ids": transformers.BatchEncoding(i)},
        "input_ids is a BatchEncoding, not a tensor [B, S]: give what is in it by name, model(**inputs)",
    ),
    "one text": (
        lambda i, m: {"input_ids": i["input_ids"][0]},
        "input_ids has shape [33], not [B, S]: for one text give input_ids[None]",
    ),
    "ids for each choice": (
        lambda i, m: {"input_ids": i["input_ids"][None]},
        "input_ids has shape [1, 4, 33], not [B, S]",
    ),
    "sparse ids": (
        lambda i, m: {"input_ids": i["input_ids"].to_sparse()},
        "input_ids is laid out as torch.sparse_coo: give it input_ids.to_dense()",
    ),
    "nested ids": (
        lambda i, m: {"input_ids": torch.nested.nested_tensor([torch.tensor([5, 6]), torch.tensor([7])])},
        "input_ids is a nested tensor: pad it",
    ),
    "a sparse mask": (
        lambda i, m: dict(i, attention_mask=i["attention_mask"].to_sparse()),
        "attention_mask is laid out as torch.sparse_coo: give it attention_mask.to_dense()",
    ),
    "embeddings of one text": (
        lambda i, m: {"inputs_embeds": embeds(m, 33)},
        "inputs_embeds has shape [33, {width}], not [B, S, H]: for one text give inputs_embeds[None]",
    ),
    "embeddings of another width": (
        lambda i, m: {"inputs_embeds": torch.zeros(2, 3, 7)},
        "inputs_embeds has 7 channels, the model's embeddings have {width}",
    ),
    "embeddings as wide as the layers": (
        lambda i, m: {"inputs_embeds": torch.zeros(4, 33, 64), "attention_mask": i["attention_mask"]},
        "inputs_embeds has 64 channels, the model's embeddings have 32",
        "electra",
    ),
    "embeddings of float64": (
        lambda i, m: {"inputs_embeds": embeds(m, 2, 3, dtype=torch.float64)},
        "inputs_embeds is torch.float64, the model is torch.float32: give it inputs_embeds.to(torch.float32)",
    ),
    "ids and embeddings": (
        lambda i, m: dict(i, inputs_embeds=embeds(m, 4, 33)),
        "both of input_ids and inputs_embeds given: give one of them",
    ),
    "neither": (lambda i, m: {}, "neither of input_ids and inputs_embeds given: give one of them"),
    "a mask of other columns": (
        lambda i, m: dict(i, attention_mask=i["attention_mask"][:, :5]),
        "attention_mask has shape [4, 5], the input [4, 33]",
    ),
    "a mask of three rows": (
        lambda i, m: dict(i, attention_mask=i["attention_mask"][:3]),
        "attention_mask has shape [3, 33], the input [4, 33]",
    ),
    "a 3-D mask": (
        lambda i, m: dict(i, attention_mask=i["attention_mask"][:, None]),
        "attention_mask has shape [4, 1, 33], the input [4, 33]",
    ),
    "a 4-D mask of other columns": (
        lambda i, m: dict(i, attention_mask=i["attention_mask"][:, None, None, :5].bool()),
        "attention_mask has shape [4, 1, 1, 5], the scores [4, 4, 33, 33]",
    ),
    "a mask in lists": (
        lambda i, m: dict(i, attention_mask=i["attention_mask"].tolist()),
        'attention_mask is a list, not a tensor [B, S]: a tokenizer gives tensors with return_tensors="pt"',
    ),
    "a mask on another device, without values": (
        lambda i, m: dict(i, attention_mask=i["attention_mask"].to("meta")),
        "attention_mask is on meta, where a tensor has no values",
    ),
    "two things at once": (
        lambda i, m: dict(i, input_ids=changed(i["input_ids"], to=-7), attention_mask=i["attention_mask"][:3]),
        "attention_mask has shape [3, 33], the input [4, 33]; "
        "input_ids holds -7 at [0, 2], outside the vocabulary of 99 rows",
    ),
}  # fmt: skip


def rejected_by(case: str) -> tuple[str, ...]:
    return REJECTED[case][2:] or tuple(NAMES)


@pytest.mark.parametrize(("case", "family"), [(c, f) for c in REJECTED for f in rejected_by(c)])
@torch.no_grad()
def test_huggingfaces_error_and_what_is_wrong(case, family):
    expected, model = shared_pair(family)
    change, words = REJECTED[case][:2]
    call = change(batch(family), expected)
    with pytest.raises(Exception) as theirs:
        expected(**call)
    with pytest.raises(theirs.type) as ours:
        model(**call)
    assert type(ours.value) is theirs.type
    after_padding = hasattr(expected.embeddings, "padding_idx")
    words = words.format(
        places=LONGEST if after_padding else LONGEST + 2,
        left_out=", pad tokens left out" if after_padding else "",
        width=expected.embeddings.word_embeddings.embedding_dim,
    )
    assert str(ours.value) == f"{theirs.value} (fastbert: {words})".lstrip()
    assert any(reasons(model))  # `explain` counted it


@torch.no_grad()
def test_an_input_on_another_device(bert, inputs):
    """The device meta stands for any other; a list makes HuggingFace's forward raise, which computes with both."""
    _, model = bert
    with pytest.raises(TypeError) as error:
        model(**dict(inputs, input_ids=inputs["input_ids"].to("meta"), position_ids=[[0]]))
    words = "input_ids is on meta, the model is on cpu: give it input_ids.to('cpu'); position_ids is a list"
    assert words in str(error.value) and "input_ids is on meta, the model is not" in last_reason(model)
    model(**dict(inputs, token_type_ids=inputs["token_type_ids"].to("meta")))
    assert last_reason(model) == "token_type_ids is on meta, the model is not"


@pytest.mark.parametrize("family", ["roberta", "mpnet"])
@torch.no_grad()
def test_robertas_limit_counts_no_pad_tokens(family):
    """60 columns of which a row has at most 48 tokens run; 49 in one row do not."""
    expected, model = shared_pair(family)
    ids = torch.full((2, 60), expected.config.pad_token_id)
    ids[:, :LONGEST] = 7
    same_as_stock(expected, model, input_ids=ids)
    ids[1, 59] = 7
    with pytest.raises(Exception) as theirs:
        expected(input_ids=ids)
    with pytest.raises(theirs.type) as ours:
        model(input_ids=ids)
    words = "the model has positions for 48 tokens, the batch is 49 long, pad tokens left out: truncate it"
    assert str(ours.value) == f"{theirs.value} (fastbert: {words})"


@pytest.mark.parametrize("family", ["distilbert", "mpnet"])
@torch.no_grad()
def test_token_types_that_a_family_does_not_read_are_ignored(family):
    expected, model = shared_pair(family)
    inputs = batch(family)
    want = model(**inputs)[0]
    for types in (torch.full((4, 33), 99), torch.zeros(2, 2), [[0]]):
        assert expected(**inputs, token_type_ids=types)[0].shape == want.shape
        assert torch.equal(model(**inputs, token_type_ids=types)[0], want)


@torch.no_grad()
def test_an_error_of_another_cause_is_left_alone(bert, inputs):
    """Nothing is said of inputs that are right, whatever a user's hook raises; an argument that is no text stays."""
    _, model = bert
    odd = ValueError(7, "x")

    def hook(module, args, output):
        raise odd

    model.encoder.layer[1].register_forward_hook(hook)
    with pytest.raises(ValueError) as error:
        model(**inputs)
    assert error.value is odd and odd.args == (7, "x")
    with pytest.raises(ValueError):
        model(**dict(inputs, attention_mask=inputs["attention_mask"][:1]))
    assert odd.args == (7, "x")


class Theirs(Exception):
    """A user's own, which takes no other words."""

    args = property(lambda self: ("no connection",))


TAKEN = {
    "a mask of ones for one row": lambda i, m: dict(i, attention_mask=torch.ones(33)),
    "a mask of ones with three dimensions": lambda i, m: dict(i, attention_mask=torch.ones(4, 33, 33)),
    "a longer mask of ones": lambda i, m: dict(i, attention_mask=torch.ones(4, 34)),
    "a mask a row": lambda i, m: dict(i, attention_mask=torch.tensor([[1], [1], [0], [1]])),
    "narrower embeddings": lambda i, m: {"inputs_embeds": m.embeddings.word_embeddings(i["input_ids"]).bfloat16()},
    "embeddings of one channel": lambda i, m: {"inputs_embeds": torch.ones(4, 33, 1)},
}


@pytest.mark.parametrize("case", TAKEN)
@torch.no_grad()
def test_no_input_that_huggingface_takes_is_blamed(case, bert, inputs):
    expected, model = bert
    call = TAKEN[case](inputs, expected)
    same_as_stock(expected, model, **call)

    def hook(module, args, output):
        raise RuntimeError("no connection")

    model.encoder.layer[1].register_forward_hook(hook)
    with pytest.raises(RuntimeError) as error:
        model(**call)
    assert str(error.value) == "no connection"


@pytest.mark.parametrize("error", [Theirs(), torch.OutOfMemoryError("no connection")], ids=lambda e: type(e).__name__)
@torch.no_grad()
def test_an_error_that_is_not_pythons_own_stays(error, bert, inputs):
    _, model = bert

    def hook(module, args):
        raise error

    model.embeddings.register_forward_pre_hook(hook)
    with pytest.raises(type(error)) as raised:
        model(inputs["input_ids"] + 1000)
    assert raised.value is error and error.args == ("no connection",)


@torch.no_grad()
def test_a_packed_sequence_longer_than_the_table(bert):
    expected, model = bert
    call = {"input_ids": torch.full((1, 90), 7), "cu_seq_lens_q": torch.tensor([0, 10, 90])}
    with pytest.raises(RuntimeError) as theirs:
        expected(**call)
    with pytest.raises(RuntimeError) as ours:
        model(**call)
    words = "the model has positions for 50 tokens, the batch is 90 long: truncate it"
    assert str(ours.value) == f"{theirs.value} (fastbert: {words})"
    assert reasons(model) == ["a sequence of 80 tokens is longer than the position table allows"]


class Marked(torch.Tensor):
    """A tensor of a user's own class."""


@pytest.mark.parametrize("name", ["input_ids", "attention_mask", "token_type_ids", "position_ids"])
@torch.no_grad()
def test_a_tensor_of_another_class(name, bert, inputs):
    """It may do anything when it is looked at: HuggingFace's path, and no value is read for a message."""
    expected, model = bert
    call = dict(inputs, position_ids=torch.zeros(4, 33, dtype=torch.long))
    call[name] = call[name].as_subclass(Marked)
    same_as_stock(expected, model, **call)
    assert "plain tensor" in last_reason(model) or "attention_mask is not a tensor [4, 33]" in last_reason(model)
    if name != "attention_mask":
        with pytest.raises(IndexError) as error:
            model(**dict(call, **{name: call[name] + 1000}))
        assert "fastbert" not in str(error.value)


@torch.no_grad()
def test_a_model_without_what_the_message_needs():
    """An error of HuggingFace's is not hidden by one of the search for words."""
    expected, model = pair("RobertaModel", "roberta")
    for m in (expected, model):
        m.embeddings.padding_idx = None
    with pytest.raises(TypeError) as theirs:
        expected(**batch("roberta"))
    with pytest.raises(TypeError) as ours:
        model(**batch("roberta"))
    assert str(ours.value) == str(theirs.value)


@torch.no_grad()
def test_many_bad_calls_are_counted_under_few_reasons(bert):
    """`explain` names the table, not each value: what it keeps does not grow with what users send."""
    _, model = bert
    for value in range(100, 400):
        with pytest.raises(IndexError, match=f"input_ids holds {value} at"):
            model(input_ids=torch.full((1, 2), value))
        with pytest.raises(RuntimeError, match="truncate it"):
            model(input_ids=torch.ones(1, value, dtype=torch.long))
    calls = fastbert.explain(model).models[0].calls
    assert len(calls) <= 65 and calls["input_ids reaches outside its table of 99 rows"] == 300
    assert sum(calls.values()) == 600 and calls["for more reasons than are kept"] > 200


@torch.no_grad()
def test_arguments_given_twice_or_too_many_are_rejected(bert, inputs):
    for model in bert:
        with pytest.raises(TypeError, match="multiple values for argument 'input_ids'"):
            model(inputs["input_ids"], input_ids=inputs["input_ids"])
        with pytest.raises(TypeError, match=r"positional arguments|multiple values"):
            model(*[None] * 20)


@torch.no_grad()
def test_an_inner_argument_is_rejected(bert, inputs):
    expected, model = bert
    with pytest.raises(Exception) as theirs:
        expected(**inputs, scaling=1.0)
    with pytest.raises(theirs.type) as ours:
        model(**inputs, scaling=1.0)
    assert str(ours.value) == str(theirs.value) and last_reason(model) == "scaling was given"


# Rows that are masked from end to end

OTHERS = [0, 2, 3]  # of the batch's four rows, 1 is empty


def with_empty_rows(family: str, rows: list[int], filler: int) -> dict[str, torch.Tensor]:
    """A batch whose `rows` hold `filler` and are masked."""
    inputs = batch(family)
    inputs["attention_mask"][rows] = 0
    inputs["input_ids"][rows] = filler
    return inputs


@pytest.mark.parametrize("pad_output", ["zeros", "exact"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", NAMES)
@torch.no_grad()
def test_an_empty_row_changes_no_other(family, dtype, pad_output):
    """Against the batch without it by the rule, against another empty row bitwise; nothing is NaN."""
    expected = stock(NAMES[family], family).to(dtype)
    model = fastbert.accelerate(copy.deepcopy(expected), pad_output)
    one, other = (model(**with_empty_rows(family, [1], filler)) for filler in (7, 90))
    for x, y in zip(one.to_tuple(), other.to_tuple(), strict=True):
        assert x.isfinite().all() and y.isfinite().all()
        assert torch.equal(x[OTHERS], y[OTHERS])
    without = {name: x[OTHERS] for name, x in batch(family).items()}
    real = without["attention_mask"] == 1
    base, ref = expected(**without), copy.deepcopy(expected).double()(**without)
    verdict = judge(one[0][OTHERS][real], ref[0][real], base[0][real])
    assert verdict.passed, verdict
    reason = "column 0 of a row is masked (left padding or an empty row), and pad rows are read there"
    assert last_reason(model) == reason or family == "mpnet"
    same_as_stock(expected, model, **with_empty_rows(family, [0, 1, 2, 3], 7))  # all of them
    assert model(**with_empty_rows(family, [0, 1, 2, 3], 7))[0].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", [family for family, _ in BASES])
def test_an_empty_row_in_training(family, dtype):
    """The loss of the other rows has the same gradients whatever the empty one holds, and no gradient is NaN."""
    _, model = pair(NAMES[family], family)
    model.to(dtype).train()

    def gradients(filler, rows):
        torch.manual_seed(3)
        inputs = with_empty_rows(family, [1], filler)
        model.zero_grad()
        model(**inputs)[0][rows].float().square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    one, other, everything = gradients(7, OTHERS), gradients(90, OTHERS), gradients(7, slice(None))
    assert one.keys() == other.keys() and len(one) > 20
    for name, grad in one.items():
        assert grad.isfinite().all() and everything[name].isfinite().all(), name
        assert torch.equal(grad, other[name]), name


# Models


KNOWN = ", ".join(family.model for family in FAMILIES)
TINY = {"n_layer": 1, "n_embd": 8, "n_head": 1, "vocab_size": 9, "n_positions": 8}
T5 = {"num_layers": 1, "d_model": 8, "d_ff": 8, "num_heads": 1, "d_kv": 8, "vocab_size": 9}
UNSUPPORTED = {
    "GPT2Model": lambda: transformers.GPT2Model(transformers.GPT2Config(**TINY)),
    "T5Model": lambda: transformers.T5Model(transformers.T5Config(**T5)),
    "Linear": lambda: nn.Linear(3, 3),
    "Sequential": lambda: nn.Sequential(),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_a_model_of_another_kind(name):
    """The message names what fastbert knows; the model stays as it was."""
    model = UNSUPPORTED[name]()
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(ValueError) as error:
        fastbert.accelerate(model)
    assert str(error.value) == f"{name} holds no model that fastbert accelerates; it knows {KNOWN}"
    with pytest.raises(ValueError) as error:
        fastbert.explain(model)
    assert str(error.value) == f"{name} holds no model that fastbert accelerates; it knows {KNOWN}"
    assert fastbert.restore(model) is model and [type(m) for m in model.modules()] == kinds


class Pipeline:
    """As transformers.Pipeline: no module, but it holds one."""

    model = None


NO_MODULES = {
    "str": "bert-base-uncased",
    "NoneType": None,
    "dict": {},
    "type": transformers.BertModel,
    "Pipeline": Pipeline(),
}


@pytest.mark.parametrize(
    "function", [fastbert.accelerate, fastbert.explain, fastbert.restore], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("kind", NO_MODULES)
def test_what_is_no_model(kind, function):
    with pytest.raises(TypeError) as error:
        function(NO_MODULES[kind])
    hint = "; give it the pipeline's .model" if kind == "Pipeline" else ""
    assert str(error.value) == f"fastbert.{function.__name__} takes a torch.nn.Module, not {kind}{hint}"


def test_a_supported_model_that_was_not_accelerated():
    with pytest.raises(ValueError) as error:
        fastbert.explain(stock("BertModel", "bert"))
    assert str(error.value) == "nothing in BertModel was accelerated: call fastbert.accelerate on it first"


@pytest.mark.parametrize(
    ("auto", "config"),
    [("AutoModel", transformers.GPT2Config(**TINY)), ("AutoModelForCausalLM", transformers.GPT2Config(**TINY)),
     ("AutoModelForSeq2SeqLM", transformers.T5Config(**T5))],
    ids=str,
)  # fmt: skip
def test_auto_classes_leave_other_models_alone(auto, config, tmp_path):
    made = getattr(fastbert, auto).from_config(config)
    assert type(made) is type(getattr(transformers, auto).from_config(config))
    made.save_pretrained(tmp_path)
    assert type(getattr(fastbert, auto).from_pretrained(tmp_path)) is type(made)


class QuantizedLinear(nn.Linear):
    """As the layers of bitsandbytes: an nn.Linear by inheritance whose weights are 8-bit, scaled by row."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features)
        scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((linear.weight / scale).round().to(torch.int8), requires_grad=False)
        self.scale, self.bias = nn.Parameter(scale), linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


class QuantizedWeight(torch.Tensor):
    """As torchao's: a tensor subclass in the weight of a plain nn.Linear."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is not nn.functional.linear:
            return super().__torch_function__(function, types, args, kwargs)
        x, weight, bias = args
        return nn.functional.linear(x, (weight.as_subclass(torch.Tensor) * 16).round() / 16, bias)


def quantize_by_torch(model: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated, and used
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def quantize_by_modules(model: nn.Module) -> nn.Module:
    for layer in model.encoder.layer:
        layer.intermediate.dense = QuantizedLinear(layer.intermediate.dense)
    return model


def quantize_by_weights(model: nn.Module) -> nn.Module:
    for layer in model.encoder.layer:
        weight = layer.output.dense.weight.detach()
        layer.output.dense.weight = nn.Parameter(weight.as_subclass(QuantizedWeight), requires_grad=False)
    return model


QUANTIZED = {
    "torch": (quantize_by_torch, "is torch.ao.nn.quantized.dynamic.modules.linear.Linear, not torch.nn.Linear"),
    "modules": (quantize_by_modules, "QuantizedLinear, not torch.nn.Linear"),
    "weights": (quantize_by_weights, "a weight is QuantizedWeight, not torch.nn.Parameter"),
}


@pytest.mark.parametrize("order", ["quantized first", "accelerated first"])
@pytest.mark.parametrize("way", QUANTIZED)
@torch.no_grad()
def test_a_quantized_model(way, order, inputs):
    """HuggingFace's path with the quantized numbers, bitwise; a quantized module inside a layer is never read."""
    quantize, reason = QUANTIZED[way]
    bare = stock("BertModel", "bert")
    expected = quantize(copy.deepcopy(bare))
    model = copy.deepcopy(bare)
    model = fastbert.accelerate(quantize(model)) if order == "quantized first" else quantize(fastbert.accelerate(model))
    same_as_stock(expected, model, **inputs)
    assert reason in last_reason(model) and any(reason in r for r in fastbert.explain(model).models[0].reasons)
    assert not torch.equal(expected(**inputs)[0], bare(**inputs)[0])


@pytest.mark.parametrize("order", ["offloaded first", "accelerated first"])
@pytest.mark.parametrize("where", ["cpu", "disk"])
@torch.no_grad()
def test_an_offloaded_model(where, order, inputs, tmp_path):
    """The library accelerate keeps the weights elsewhere and fetches them as modules are called."""
    accelerate = pytest.importorskip("accelerate")

    def offload(model):
        device = torch.device("cpu")
        if where == "disk":
            return accelerate.disk_offload(model, str(tmp_path), device)
        return accelerate.cpu_offload(model, device)

    expected, model = stock("BertModel", "bert"), stock("BertModel", "bert")
    model = fastbert.accelerate(offload(model)) if order == "offloaded first" else offload(fastbert.accelerate(model))
    assert model.encoder.layer[0].output.dense.weight.is_meta
    same_as_stock(expected, model, **inputs)
    found = "; ".join(fastbert.explain(model).models[0].reasons)
    assert "is offloaded (it has an _hf_hook)" in found
    if order == "offloaded first":  # then the library calls the stock forward that it found
        assert "the forward of the model was replaced on the instance" in found and reasons(model) == []
        return
    assert "is offloaded (it has an _hf_hook)" in last_reason(model)
    with pytest.raises(IndexError) as error:
        model(**dict(inputs, input_ids=changed(inputs["input_ids"], to=1000)))
    assert "(fastbert: input_ids holds 1000 at [0, 2], outside the vocabulary of 99 rows)" in str(error.value)
