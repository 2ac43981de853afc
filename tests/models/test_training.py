"""Training on the fast path behaves as HuggingFace's: seeds, freezing, checkpointing, autocast, optimizers, threads."""

import copy
import threading
from collections import Counter

import pytest
import torch
from torch import nn

import fastbert
from fastbert import ops, torch_private
from fastbert.parity import judge
from tests.models.gradients import compare, gradients_of, labels_of, of_losses, verdicts
from tests.models.small import VOCABULARY, assert_parity, batch, pair, reasons, stock

LENGTHS = (33, 1, 16, 7)
BATCHES = 8


@pytest.fixture
def model():
    """A small accelerated BertModel that trains, with dropout."""
    return pair("BertModel", "bert")[1].train()


@pytest.fixture
def inputs():
    return batch("bert", LENGTHS)


def losses_on(inputs):
    """Several losses, whose gradients are judged together."""
    return [loss_on(inputs, seed) for seed in range(BATCHES)]


def head_losses(name, inputs):
    """A head's own loss for several labels."""
    labels = [labels_of(name, inputs, VOCABULARY, seed) for seed in range(BATCHES)]
    return [lambda model, given=given: model(**inputs, **given).loss for given in labels]


def loss_on(inputs, seed=0):
    """A loss that reads every real row of the last hidden state."""
    real = inputs["attention_mask"] == 1
    upstream = torch.randn(int(real.sum()), 64, generator=torch.Generator().manual_seed(seed))

    def loss(model):
        hidden = model(**inputs).last_hidden_state[real]
        return (hidden * upstream.to(hidden.dtype)).mean()

    return loss


def seeded(model, loss, seed=0):
    """The loss and all gradients of one forward after `torch.manual_seed(seed)`."""
    values = []
    torch.manual_seed(seed)
    gradients = gradients_of(model, lambda m: values.append(loss(m)) or values[0])
    return {"loss": values[0].detach(), **gradients}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def assert_gradients(found, model):
    assert [f"{name}: {verdict}" for name, verdict in found.items() if not verdict.passed] == []
    assert reasons(model) == [""]


def test_a_seed_decides(model, inputs):
    loss = loss_on(inputs)
    first, again, other = (seeded(model, loss, seed) for seed in (0, 0, 1))
    assert same(first, again)
    assert not torch.equal(first["loss"], other["loss"])
    assert reasons(model) == [""]


def test_padding_decides_nothing(model):
    """With dropout on: the same batch padded to twice its width gives bitwise the same loss and gradients."""
    wide = batch("bert", (24, 1, 16, 7), 48)
    narrow = {name: x[:, :24] for name, x in wide.items()}
    assert same(seeded(model, loss_on(narrow)), seeded(model, loss_on(wide)))


def test_a_forward_draws_one_number_and_only_where_something_drops(model, inputs):
    limits = torch.iinfo(torch.int64)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    torch.randint(limits.min, limits.max, ())
    after_one = torch.get_rng_state()
    for prepare, expected in (
        (model.train, after_one),
        (model.eval, before),
        (lambda: [m.train() for m in model.modules() if isinstance(m, nn.LayerNorm)], before),
    ):
        prepare()
        for grad in (True, False):
            torch.manual_seed(5)
            with torch.set_grad_enabled(grad):
                model(**inputs)
            assert torch.equal(torch.get_rng_state(), expected)


def test_probes_draw_nothing(model, inputs):
    """The first forward of a process, which tries out what torch can do, leaves torch's generator as it is."""
    model.eval()
    for probe in vars(torch_private).values():
        if hasattr(probe, "cache_clear"):
            probe.cache_clear()
    before = torch.get_rng_state()
    model(**inputs)
    fastbert.accelerate(copy.deepcopy(model))(**inputs)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_computes_the_same_again(reentrant, model, inputs):
    """Bitwise, with dropout; and it does compute the layers twice."""
    expected = seeded(model, loss_on(inputs))
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with ops.record() as calls:
        assert same(seeded(model, loss_on(inputs)), expected)
    assert Counter(call.op for call in calls)["attention"] == 4
    assert reasons(model) == [""]


def first_layers_frozen(model):
    model.embeddings.requires_grad_(False)
    model.encoder.layer[0].requires_grad_(False)


def only(*ends):
    def freeze(model):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name.endswith(ends))

    return freeze


FROZEN = {
    "embeddings and the first layer": first_layers_frozen,
    "all but LayerNorm": only("LayerNorm.weight", "LayerNorm.bias"),
    "all but biases (BitFit)": only("bias"),
    "all but the attention's queries": only("query.weight"),
    "all but two of the first layer": only("0.attention.self.key.weight", "0.attention.self.value.bias"),
    "the biases": lambda model: [p.requires_grad_(not n.endswith("bias")) for n, p in model.named_parameters()],
}  # fmt: skip


@pytest.mark.parametrize("case", FROZEN)
def test_frozen_parameters(case, inputs):
    """The others' gradients keep the rule; `verdicts` asserts that the same ones have a gradient as in HuggingFace."""
    model = stock("BertModel", "bert")
    FROZEN[case](model)
    found, ours = compare(model, torch.float32, losses_on(inputs))
    assert_gradients(found, ours)


def test_only_the_head_is_trained(inputs):
    model = stock("BertForSequenceClassification", "bert")
    model.bert.requires_grad_(False)
    found, ours = compare(model, torch.float32, head_losses("BertForSequenceClassification", inputs))
    assert_gradients(found, ours)
    assert {n for n, p in ours.named_parameters() if p.grad is not None} == {"classifier.weight", "classifier.bias"}


def test_gradients_of_inputs_embeds(inputs):
    expected, model = pair("BertModel", "bert")
    real = inputs["attention_mask"] == 1
    embeds = torch.randn(*real.shape, 64, generator=torch.Generator().manual_seed(0))
    found = []
    for m, dtype in (
        (model, torch.float32),
        (copy.deepcopy(expected).double(), torch.float64),
        (expected, torch.float32),
    ):
        given = embeds.to(dtype, copy=True).requires_grad_()
        loss_on({"inputs_embeds": given, "attention_mask": inputs["attention_mask"]})(m).backward()
        found.append(given.grad)
    assert not found[0][~real].any()
    verdict = judge(*(16 * x[real] for x in found))
    assert verdict.passed, verdict
    assert reasons(model) == [""]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, inputs):
    """Losses, outputs and gradients have HuggingFace's dtypes under autocast, and gradients keep the rule."""
    expected, model = pair("BertForMaskedLM", "bert")
    dtypes = []

    def under_autocast(labels):
        def loss(m):
            with torch.autocast("cpu", dtype, enabled=m in (expected, model)):
                out = m(**inputs, **labels, output_hidden_states=True)
            dtypes.append([out.loss.dtype, out.logits.dtype, *(x.dtype for x in out.hidden_states)])
            return out.loss

        return loss

    losses = [under_autocast(labels_of("BertForMaskedLM", inputs, VOCABULARY, seed)) for seed in range(BATCHES)]
    ours, base = (of_losses(m, losses, 2.0**10) for m in (model, expected))
    assert dtypes[0] == dtypes[-1]
    ref = of_losses(copy.deepcopy(expected).double(), losses)
    assert_gradients(dict(verdicts(ours, ref, base)), model)


def test_deterministic_algorithms(model, inputs):
    torch.use_deterministic_algorithms(True)
    try:
        assert same(seeded(model, loss_on(inputs)), seeded(model, loss_on(inputs)))
    finally:
        torch.use_deterministic_algorithms(False)
    assert reasons(model) == [""]


def test_gradients_add_up(model, inputs):
    """Over two backwards, over one graph twice, and by torch.autograd.grad of some parameters only."""
    loss, other = loss_on(inputs), loss_on(batch("bert", (5, 40)))
    model.eval()
    one, two = gradients_of(model, loss), gradients_of(model, other)
    model.zero_grad()
    (loss(model) + 0).backward(), other(model).backward()
    assert all(torch.equal(p.grad, one[n] + two[n]) for n, p in model.named_parameters() if n in one)
    model.zero_grad()
    value = loss(model)
    value.backward(retain_graph=True), value.backward()
    assert all(torch.equal(p.grad, one[n] + one[n]) for n, p in model.named_parameters() if n in one)
    names = ["embeddings.word_embeddings.weight", "encoder.layer.1.attention.self.key.weight"]
    some = torch.autograd.grad(loss(model), [model.get_parameter(name) for name in names])
    assert all(torch.equal(gradient, one[name]) for name, gradient in zip(names, some, strict=True))


def test_a_gradient_penalty(inputs):
    """Gradients of gradients (create_graph=True), against HuggingFace's attention that has them."""

    def penalized(loss):
        def total(m):
            value = loss(m)
            (slope,) = torch.autograd.grad(value, m.embeddings.word_embeddings.weight, create_graph=True)
            return value + 1000 * slope.square().mean()

        return total

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        found, ours = compare(stock("BertModel", "bert"), torch.float32, list(map(penalized, losses_on(inputs))))
    assert_gradients(found, ours)


def test_training_mode_without_gradients(model, inputs):
    """Drops what the forward with gradients drops; the products are others, so it is the same but for rounding."""
    torch.manual_seed(0)
    expected = model(**inputs).last_hidden_state.detach()
    with torch.no_grad():
        torch.manual_seed(0)
        got = model(**inputs).last_hidden_state
        plain = model.eval()(**inputs).last_hidden_state
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert (got - plain).abs().max() > 0.1
    assert reasons(model) == [""]


def every_dropout(p):
    return lambda model: [setattr(m, "p", p) for m in model.modules() if isinstance(m, nn.Dropout)]


def one_dropout(path):
    def change(model):
        every_dropout(0.0)(model)
        model.get_submodule(path).p = 1.0

    return change


def flags(drops, attention_trains):
    """Every p is 1; which of the flags of an attention and of its dropout is set."""

    def change(model):
        every_dropout(1.0)(model)
        model.eval()
        attention = model.encoder.layer[1].attention.self
        attention.training, attention.dropout.training = attention_trains, drops

    return change


# p is 0 or 1, so that HuggingFace drops the same.
CHANGES = {
    "p = 1 everywhere": every_dropout(1.0),
    "p = 0 everywhere": every_dropout(0.0),
    "the scores": one_dropout("encoder.layer.0.attention.self.dropout"),
    "after attention": one_dropout("encoder.layer.1.attention.output.dropout"),
    "after the feed-forward": one_dropout("encoder.layer.1.output.dropout"),
    "the flag of the scores' dropout": flags(True, False),
    "the flag of the attention": flags(False, True),
}


@pytest.mark.parametrize("case", CHANGES)
def test_dropout_changed_on_a_live_model(case, inputs):
    expected, model = pair("BertModel", "bert")
    losses = losses_on(inputs)
    gradients_of(model.train(), losses[0])  # the change must be seen afterwards
    for m in (expected.train(), model):
        CHANGES[case](m)
    ref = copy.deepcopy(expected).double()
    hidden = (m(**inputs).last_hidden_state[inputs["attention_mask"] == 1] for m in (model, ref, expected))
    assert judge(*hidden).passed
    ours, reference, base = (of_losses(m, losses) for m in (model, ref, expected))
    reached = {name for name, gradient in reference.items() if gradient.any()}
    assert not any(ours[name].any() for name in ours.keys() - reached)
    ours, reference, base = ({name: g[name] for name in reached} for g in (ours, reference, base))
    assert_gradients(dict(verdicts(ours, reference, base)), model)


def test_dropout_of_the_embeddings(inputs):
    """Of all of them: every token is alike, and the tables get no gradient."""
    expected, model = pair("BertModel", "bert")
    for m in (expected.train(), model.train()):
        one_dropout("embeddings.dropout")(m)
    assert_parity(expected, model, **inputs)
    gradients = gradients_of(model, loss_on(inputs))
    assert {name for name, gradient in gradients.items() if not gradient.any()} >= {
        name for name in gradients if name.startswith("embeddings.")
    }
    assert gradients["encoder.layer.0.output.dense.weight"].any()


def test_tied_and_untied_word_embeddings(inputs):
    """The table's gradient is the sum of both its uses; untied, each has its own."""
    for tied in (True, False):
        model = stock("BertForMaskedLM", "bert", tie_word_embeddings=tied)
        assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tied
        found, ours = compare(model, torch.float32, head_losses("BertForMaskedLM", inputs))
        assert_gradients(found, ours)
        assert ("cls.predictions.decoder.weight" in found) is not tied


def train(model, optimizer, batches, seed=0):
    torch.manual_seed(seed)
    for inputs in batches:
        optimizer.zero_grad()
        loss_on(inputs)(model).backward()
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_an_optimizer_made_before_accelerate(inputs):
    found = []
    for before in (True, False):
        model = stock("BertModel", "bert").train()
        model = model if before else fastbert.accelerate(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        model = fastbert.accelerate(model)
        found.append(train(model, optimizer, [inputs] * 3))
    assert same(*found) and not torch.equal(
        found[0]["encoder.layer.0.output.dense.weight"], stock("BertModel", "bert").encoder.layer[0].output.dense.weight
    )
    assert reasons(model) == [""]


def test_no_packed_weight_outlives_a_step(inputs):
    """Evaluation between steps computes with the new weights, and training keeps no packed copies beside them."""
    model = fastbert.accelerate(stock("BertModel", "bert"))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for _ in range(2):
        with torch.no_grad():
            assert_parity(fastbert.restore(copy.deepcopy(model.eval())), model, **inputs)
        train(model.train(), optimizer, [inputs])
    assert reasons(model) == [""]


def test_threads_train_models_of_their_own(inputs):
    def make(which):
        model = stock("BertModel", "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return fastbert.accelerate(model), optimizer, [batch("bert", LENGTHS[: which + 3])] * 4

    serial, runs, got = [train(*make(which)) for which in range(2)], [make(which) for which in range(2)], {}
    threads = [threading.Thread(target=lambda i=i: got.update({i: train(*runs[i])})) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(got[which], serial[which]) for which in range(2))


@pytest.mark.parametrize("initial_scale", [2.0**12, 2.0**40], ids=["steps", "skipped steps"])
def test_grad_scaler(initial_scale, inputs):
    """fp16 training with a real GradScaler: the same steps and skips as HuggingFace's, parameters by the rule."""
    expected, model = pair("BertForMaskedLM", "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    labels, ref = labels_of("BertForMaskedLM", inputs, VOCABULARY), copy.deepcopy(expected).double()
    start = {name: p.detach().clone() for name, p in ref.named_parameters()}
    moved, scales = [], []
    for m in (model, ref, expected):
        half = m is not ref
        optimizer = torch.optim.SGD(m.train().parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=initial_scale, growth_interval=2, enabled=half)
        for _ in range(3):
            with torch.autocast("cpu", torch.float16, enabled=half):
                loss = m(**inputs, **labels).loss
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        scales.append(scaler.get_scale())
        moved.append({name: p.detach() - start[name].to(p.dtype) for name, p in m.named_parameters()})
    assert scales[0] == scales[2]
    if initial_scale > 2.0**20:
        assert not any(x.any() for x in moved[0].values())
    else:
        assert_gradients(dict(verdicts(*moved)), model)
