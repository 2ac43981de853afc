"""What a forward has seen of a model does not outlive a change: from the third forward on nothing else is looked at."""

import copy

import pytest
import torch
import transformers
from torch import nn

import fastbert
from fastbert import native
from fastbert.models import forward, seen
from tests.models.small import assert_parity, batch, pair, reasons, same_as_stock


@pytest.fixture
def inputs():
    return batch("bert")


@pytest.fixture
def bert(inputs):
    """A stock model and ours, which has seen itself."""
    expected, model = pair("BertModel", "bert")
    with torch.no_grad():
        model(**inputs)
        model(**inputs)
    assert state_of(model).seen is not None
    return expected, model


def state_of(model):
    return model.__dict__[forward.ATTRIBUTE]


def layer_of(model):
    return model.encoder.layer[1]


def doubled(module, args, output):
    return output * 2


def a_hook(model):
    layer_of(model).output.dense.register_forward_hook(doubled)


def a_hook_in_a_new_dict(model):
    dense = layer_of(model).output.dense
    dense._forward_hooks = type(dense._forward_hooks)()
    dense.register_forward_hook(doubled)


def a_hook_before(model):
    layer_of(model).intermediate.register_forward_pre_hook(lambda module, args: (args[0] * 2,))


def a_hook_on_the_pooler(model):
    model.pooler.dense.register_forward_hook(doubled)


def a_forward_of_its_own(model):
    dense = layer_of(model).output.dense
    dense.forward = lambda x: nn.functional.linear(x, dense.weight, dense.bias) * 2


def a_layer_twice(model):
    model.encoder.layer.append(model.encoder.layer[0])


def another_class(model):
    class Doubled(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    layer_of(model).output.dense.__class__ = Doubled


def another_activation(model):
    layer_of(model).intermediate.intermediate_act_fn = nn.ReLU()


def another_dtype_of_one(model):
    model.embeddings.position_embeddings.to(torch.bfloat16)


TO_STOCK = [a_hook, a_hook_in_a_new_dict, a_hook_before, a_forward_of_its_own, a_layer_twice, another_class,
            another_activation, another_dtype_of_one]  # fmt: skip


@pytest.mark.parametrize("change", TO_STOCK, ids=lambda f: f.__name__)
@torch.no_grad()
def test_a_change_that_takes_the_stock_path(change, bert, inputs):
    expected, model = bert
    for m in bert:
        change(m)
    same_as_stock(expected, model, **inputs)
    assert reasons(model)[-1] != ""


def another_eps(model):
    layer_of(model).output.LayerNorm.eps = 0.5


def another_linear(model):
    torch.manual_seed(5)
    layer_of(model).output.dense = nn.Linear(96, 64).eval()


def another_parameter(model):
    dense = layer_of(model).output.dense
    dense.weight = nn.Parameter(dense.weight * 2)


def other_data(model):
    layer_of(model).output.dense.weight.data = layer_of(model).output.dense.weight.data * 2


def edited_in_place(model):
    layer_of(model).output.dense.weight[0, 1] += 50  # which is no sample


def edited_data(model):
    layer_of(model).attention.self.key.weight.data *= 3


def transposed_data(model):
    query = layer_of(model).attention.self.query
    query.weight.data = query.weight.data.t()  # the same memory


def other_words(model):
    model.embeddings.word_embeddings.weight.data = model.embeddings.word_embeddings.weight.data.flip(0)


def a_layer_less(model):
    del model.encoder.layer[0]


def another_scaling(model):
    for layer in model.encoder.layer:
        layer.attention.self.scaling = 0.5


FAST = [another_eps, another_linear, another_parameter, other_data, edited_in_place, edited_data, transposed_data,
        other_words, a_layer_less, another_scaling, a_hook_on_the_pooler]  # fmt: skip


@pytest.mark.parametrize("change", FAST, ids=lambda f: f.__name__)
@torch.no_grad()
def test_a_change_that_the_fast_path_follows(change, bert, inputs):
    expected, model = bert
    for m in bert:
        change(m)
    for _ in range(2):  # by what is seen now too
        assert_parity(expected, model, **inputs)
    assert reasons(model) == [""]


@torch.no_grad()
def test_dropout_that_is_turned_on(bert, inputs):
    _, model = bert
    before = model(**inputs).last_hidden_state
    layer_of(model).output.dropout.train()
    first, second = (model(**inputs).last_hidden_state for _ in range(2))
    assert not torch.equal(first, second) and reasons(model) == [""]
    model.eval()
    assert torch.equal(model(**inputs).last_hidden_state, before)


@torch.no_grad()
def test_dropout_that_another_thread_turns_on_while_the_model_is_looked_at(bert, inputs, monkeypatch):
    _, model = bert
    model.looked_at = "anew"

    class Meeting(seen.Contents):
        def __init__(self, *args):
            layer_of(model).output.dropout.train()
            super().__init__(*args)

    monkeypatch.setattr(seen, "Contents", Meeting)
    model(**inputs)
    first, second = (model(**inputs).last_hidden_state for _ in range(2))
    assert not torch.equal(first, second)


@torch.no_grad()
def test_another_thread_may_drop_or_replace_what_was_seen(bert, monkeypatch):
    _, model = bert
    state = state_of(model)
    own, holds = state.seen, seen.Seen.holds
    for other in (None, object()):

        def meeting(self, model, other=other):
            state.seen = other
            return holds(self, model)

        monkeypatch.setattr(seen.Seen, "holds", meeting)
        state.seen = own
        assert state.seen_of(model) is own


@torch.no_grad()
def test_settings_that_are_not_in_the_modules(bert, inputs):
    expected, model = bert
    want = model(**inputs).last_hidden_state
    for m in bert:
        m.config.is_causal = True
    same_as_stock(expected, model, **inputs)
    for m in bert:
        m.config.is_causal = False
    assert torch.equal(model(**inputs).last_hidden_state, want)
    with fastbert.ops.record() as calls, fastbert.use_backend("reference"):
        model(**inputs)
    assert {call.backend for call in calls} == {"reference"}
    with torch.autocast("cpu", torch.bfloat16):
        low = model(**inputs).last_hidden_state
    assert not torch.equal(low, want) and torch.equal(model(**inputs).last_hidden_state, want)


@torch.no_grad()
def test_another_dtype(bert, inputs):
    expected, model = (m.double() for m in bert)
    real = inputs["attention_mask"] == 1
    a, b = (m(**inputs).last_hidden_state[real] for m in (expected, model))
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_gradients_need_a_look_of_their_own(bert, inputs):
    _, model = bert
    model(**inputs).last_hidden_state.sum().backward()
    assert all(p.grad is not None for p in model.encoder.parameters())
    layer_of(model).register_full_backward_pre_hook(lambda module, grads: None)
    model(**inputs)
    assert reasons(model)[-1] == "a hook is set on encoder.layer.1"


@torch.no_grad()
def test_a_model_that_is_always_another_is_not_seen_any_more(bert, inputs):
    """What cannot hold is not looked for: it would cost a second look at every forward."""
    expected, model = bert
    state = state_of(model)
    for i in range(2 * forward.MOST_LOSSES):
        model.calls_so_far = i
        model(**inputs)
    assert state.seen is None and state.losses == forward.MOST_LOSSES
    assert_parity(expected, model, **inputs)


@torch.no_grad()
def test_a_loss_now_and_then_does_not_count(bert, inputs):
    _, model = bert
    for i in range(2 * forward.MOST_LOSSES):
        model.epoch = i
        for _ in range(3):
            model(**inputs)
    assert state_of(model).seen is not None and state_of(model).losses == 0


@pytest.mark.parametrize("library", ["native", "absent"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.int64, torch.float64], ids=str)
def test_a_watch_holds_until_something_changes(dtype, library, monkeypatch):
    if library == "absent":
        monkeypatch.setattr(native, "load", lambda: native.Native("it is not here", ""))
    elif not native.load().available:
        pytest.skip(native.load().reason)

    def watched(*shape):
        whole = torch.arange(120 * 90).remainder(100).to(dtype)[: torch.Size(shape).numel()].view(shape)
        live = whole.view(-1)[::7], whole[::3, ::2]
        return whole, native.Watch((whole,), live, tuple(x.clone() for x in live))

    for place in ((0, 0), (59, 88), (0, 7), (119, 0)):
        whole, watch = watched(120, 90)  # so many samples that threads share them
        assert watch.holds()
        whole[place] += 1
        differs = bool(watch.live[0].ne(watch.held[0]).any() or watch.live[1].ne(watch.held[1]).any())
        assert watch.holds() != differs
    assert differs
    for change in (
        lambda x: x.set_(x.clone()), lambda x: x.set_(x.view(40, 30)), lambda x: x.set_(x.t()),
        lambda x: x.set_(x[:20]),
    ):  # fmt: skip
        whole, watch = watched(30, 40)
        assert watch.holds()
        change(whole)
        assert not watch.holds()
    whole, watch = watched(30, 40)
    watch.tensors[0].data = whole.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize])
    assert watch.holds() == (dtype == torch.int64)


@pytest.mark.skipif(not native.load().available, reason="the native library is absent")
def test_a_watch_that_is_gone_or_makes_no_sense():
    x = torch.zeros(3, 4)
    watch = native.Watch((x,), (x,), (x.clone(),))
    number = watch.number
    assert torch.ops.fastbert_native.watch_holds(number)
    del watch
    with pytest.raises(RuntimeError, match="there is none of this number"):
        torch.ops.fastbert_native.watch_holds(number)
    for held in ((), (x[0],), (x.double(),), (x[:, :2],)):
        with pytest.raises(RuntimeError, match="samples are not pairs"):
            native.Watch((x,), (x,), held)


def test_copies_see_for_themselves(bert, inputs):
    expected, model = bert
    other = copy.deepcopy(model)
    with torch.no_grad():
        layer_of(model).output.dense.weight.mul_(2)
        assert state_of(other).seen is None
        assert_parity(expected, other, **inputs)
    assert isinstance(other, transformers.BertModel)
