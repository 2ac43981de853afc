"""Threads that share a model, or work on models of their own, get the serial answers, bitwise.

With few cores a race is rare. So threads start at a barrier and switch every microsecond, and some tests put a sleep at
the place where two threads would meet.
"""

import asyncio
import copy
import logging
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers

import fastbert
from fastbert import hf, once, ops, torch_private
from fastbert.models import accelerate as accelerating
from fastbert.models import forward, weights
from tests.models.small import batch, head_batch, pair, reasons, stock

THREADS = 8
PATIENCE = 120  # seconds after which a thread that does not come back is a failure
LENGTHS = ((33, 1, 16, 7), (5, 5), (1,), (40, 2, 2), (16,) * 8, (33, 1, 16, 7, 8), (3, 2, 1), (48,))
BATCHES = [batch("bert", lengths) for lengths in LENGTHS]


@pytest.fixture(autouse=True)
def hasty():
    """Threads switch as often as they can; each computes alone."""
    interval, count = sys.getswitchinterval(), torch.get_num_threads()
    sys.setswitchinterval(1e-6)
    torch.set_num_threads(1)
    yield
    sys.setswitchinterval(interval)
    torch.set_num_threads(count)


def in_threads(work, count=THREADS):
    """work(i) for each i below `count`, in threads that start at once → what they return; raises what one raises."""
    barrier = threading.Barrier(count, timeout=PATIENCE)

    def start(index):
        barrier.wait()
        return work(index)

    with ThreadPoolExecutor(count) as pool:
        return [future.result(PATIENCE) for future in [pool.submit(start, index) for index in range(count)]]


def infer(model, index, **more):
    with torch.no_grad():
        return model(**BATCHES[index], **more).last_hidden_state


def all_equal(found, wanted):
    return len(found) == len(wanted) and all(map(torch.equal, found, wanted))


def slowly(function):
    """The same function, which lets the other threads in before and after."""

    def run(*args, **kwargs):
        time.sleep(0.002)
        made = function(*args, **kwargs)
        time.sleep(0.002)
        return made

    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_threads_give_the_serial_answers(dtype, bert):
    """Other shapes in every thread, and every forward is counted."""
    model = bert[1].to(dtype)
    wanted = [infer(model, i) for i in range(THREADS)]
    for found in zip(*in_threads(lambda i: [infer(model, i) for _ in range(6)]), strict=True):
        assert all_equal(found, wanted)
    assert fastbert.explain(model).models[0].calls == {"": 7 * THREADS}


def test_threads_in_other_dtypes_and_ways_of_calling(bert):
    """Autocast is a thread's own, and so are packed weights of its dtype; one takes HuggingFace's path meanwhile."""
    _, model = bert
    flipped = {name: x.flip(1) for name, x in BATCHES[0].items()}  # left padding
    embeds = model.embeddings.word_embeddings(BATCHES[3]["input_ids"]).detach()

    def autocast(dtype):
        # torch's cache of casts is one for all threads, and knows no dtypes
        with torch.autocast("cpu", dtype, cache_enabled=False):
            return infer(model, 1)

    def inference_mode():
        with torch.inference_mode():
            return model(**BATCHES[5]).last_hidden_state

    ways = [
        lambda: infer(model, 0),
        lambda: autocast(torch.bfloat16),
        lambda: autocast(torch.float16),
        lambda: model(inputs_embeds=embeds, attention_mask=BATCHES[3]["attention_mask"]).last_hidden_state.detach(),
        lambda: torch.stack(model(**BATCHES[4], output_hidden_states=True).hidden_states).detach(),
        inference_mode,
        lambda: model(**flipped).last_hidden_state.detach(),
        lambda: model(**BATCHES[7], return_dict=False)[0].detach(),
    ]
    wanted = [way() for way in ways]
    assert not torch.equal(wanted[1], infer(model, 1)) and not torch.equal(wanted[1], wanted[2])
    for found in zip(*in_threads(lambda i: [ways[i]() for _ in range(6)]), strict=True):
        assert all_equal(found, wanted)


MEETING_PLACES = {
    "nowhere": [],
    "structure": [(forward, "examine")],
    "packing": [(weights, "joined"), (weights, "sample")],
    "probes": [(torch_private, "pack_linear_weight"), (torch_private, "cpu_flash_attention")],
}


@pytest.mark.parametrize("place", MEETING_PLACES)
def test_the_first_forward_from_all_threads(place, monkeypatch):
    """Each may be the one that looks at the model, packs its weights, tries out what torch can do."""
    expected = stock("BertModel", "bert")
    wanted = [infer(fastbert.accelerate(copy.deepcopy(expected)), i) for i in range(THREADS)]
    for module, name in MEETING_PLACES[place]:
        monkeypatch.setattr(module, name, slowly(getattr(module, name)))
    for _ in range(10 if place == "nowhere" else 2):
        for probe in vars(torch_private).values():
            if hasattr(probe, "cache_clear"):
                probe.cache_clear()
        model = fastbert.accelerate(copy.deepcopy(expected))

        def work(index, model=model):
            time.sleep(0.001 * index if place != "nowhere" else 0)  # some come when others are half done
            return infer(model, index)

        assert all_equal(in_threads(work), wanted)
        assert all_equal([infer(model, i) for i in range(THREADS)], wanted)
        assert fastbert.explain(model).models[0].calls == {"": 2 * THREADS}


def test_every_forward_is_counted():
    for _ in range(100):
        state = forward.State("zeros")
        in_threads(lambda i, state=state: [state.count(("", "a reason")[(i + n) % 2]) for n in range(100)])
        assert dict(state.calls) == {"": 50 * THREADS, "a reason": 50 * THREADS}


@pytest.mark.parametrize("edit", [lambda w: w.mul_(1.5), lambda w: w.data.mul_(1.5), lambda w: w.numpy().__imul__(1.5)])
def test_an_edit_between_two_forwards_is_seen_by_all(edit, bert):
    """Thread 0 edits a weight while the others wait; the next forward of each has the new weight."""
    _, model = bert
    changed = copy.deepcopy(model)
    weight = model.encoder.layer[1].intermediate.dense.weight
    with torch.no_grad():
        edit(changed.encoder.layer[1].intermediate.dense.weight.requires_grad_(False))
    old, new = ([infer(m, i) for i in range(THREADS)] for m in (model, changed))
    before, after = (threading.Barrier(THREADS, timeout=PATIENCE) for _ in range(2))

    def work(index):
        first = infer(model, index)
        if before.wait() == 0:
            with torch.no_grad():
                edit(weight.detach())
        after.wait()
        return first, infer(model, index)

    first, second = zip(*in_threads(work), strict=True)
    assert all_equal(first, old) and all_equal(second, new) and not torch.equal(old[0], new[0])


@pytest.mark.parametrize("moment", ["before the weight is packed", "after the weight is packed"])
@torch.no_grad()
def test_an_edit_while_weights_are_packed_is_seen_afterwards(moment, bert, monkeypatch):
    """Through `.data`, which no version tells of: what is in the copy and what was sampled must not be taken apart."""
    _, model = bert
    weight, pack, left = model.encoder.layer[0].output.dense.weight, ops.pack_weight, [1]

    def pack_weight(whole):
        packed = pack(whole) if moment.startswith("after") else None
        if whole.data_ptr() == weight.data_ptr() and left:
            left.pop()
            weight.data.mul_(1.5)  # what another thread does
        return packed or pack(whole)

    monkeypatch.setattr(ops, "pack_weight", pack_weight)
    model(**BATCHES[0])
    assert left == []
    fresh = fastbert.accelerate(copy.deepcopy(model))
    assert torch.equal(infer(model, 0), infer(fresh, 0))


def test_what_other_threads_do_to_the_model_meanwhile(bert):
    """Accelerated again, restored, explained, its cache dropped, while six threads compute: one of two answers."""
    expected, model = bert
    answers = [(infer(expected, i), infer(model, i)) for i in range(THREADS)]
    assert not torch.equal(*answers[0])  # the paths are told apart by their pad rows
    done, working = threading.Event(), list(range(THREADS - 3))

    def change():
        while not done.is_set():
            fastbert.restore(model)
            fastbert.accelerate(model)

    def ask():
        while not done.is_set():
            try:
                assert fastbert.explain(model).models[0].reasons == []
            except ValueError as error:
                assert "was accelerated" in str(error)
            fastbert.accelerate(model)

    def compute(index):
        try:
            return [infer(model, index) for _ in range(30)]
        finally:
            working.pop()
            if not working:
                done.set()

    found = in_threads(lambda i: compute(i) if i < THREADS - 3 else change() if i < THREADS - 1 else ask())
    for index, outputs in enumerate(found[: THREADS - 3]):
        assert all(any(torch.equal(out, answer) for answer in answers[index]) for out in outputs)
    fastbert.restore(fastbert.accelerate(model))
    assert type(model) is transformers.BertModel and "_fastbert" not in model.__dict__


def test_a_model_is_found_while_its_class_changes(bert, monkeypatch):
    """Another thread accelerates it between two looks at its class."""
    model, accelerated = bert

    def meeting(function):
        def run(*args):
            model.__class__ = type(accelerated)  # what the other thread does
            return function(*args)

        return run

    for name in ("is_stock", "stock_class"):
        monkeypatch.setattr(hf, name, meeting(getattr(hf, name)))
    assert [found for _, found, _ in accelerating.base_models(model)] == [model]
    assert type(model) is type(accelerated)


def test_a_forward_under_way_when_its_model_is_restored(bert, monkeypatch):
    """It ends on the path on which it began."""
    _, model = bert
    wanted = infer(model, 0)
    examined, restored = threading.Event(), threading.Event()
    pack = forward.pack_inputs

    def pack_inputs(*args):
        examined.set()
        assert restored.wait(PATIENCE)
        return pack(*args)

    monkeypatch.setattr(forward, "pack_inputs", pack_inputs)
    with ThreadPoolExecutor(1) as pool:
        out = pool.submit(infer, model, 0)
        assert examined.wait(PATIENCE)
        fastbert.restore(model)
        restored.set()
        assert torch.equal(out.result(PATIENCE), wanted)


def test_each_thread_has_its_own_choice_of_backend_and_its_own_record(bert):
    _, model = bert
    inside = threading.Barrier(THREADS, timeout=PATIENCE)

    def work(index, wait=inside.wait):
        with ops.record() as calls, ops.use_backend("reference" if index % 2 else "torch"):
            wait()
            out = infer(model, index)
        return out, calls

    wanted = [work(index, wait=lambda: None) for index in range(THREADS)]
    found = in_threads(work)
    for index, (out, calls) in enumerate(found):
        assert torch.equal(out, wanted[index][0]) and calls == wanted[index][1]
        assert {call.backend for call in calls} == {"reference" if index % 2 else "torch"}
    with ops.record() as calls, ops.use_backend("reference"):
        in_threads(lambda i: infer(model, i))
    assert calls == [], "threads that are started do not inherit a context"


def test_asyncio_carries_the_context_into_its_threads(bert):
    """asyncio.to_thread copies the context, as it says: a record sees the calls, a choice of backend holds."""
    _, model = bert
    wanted = [infer(model, i) for i in range(THREADS)]

    async def gather(*, backend=None):
        with ops.record() as calls:
            if backend is None:
                return await asyncio.gather(*(asyncio.to_thread(infer, model, i) for i in range(THREADS))), calls
            with ops.use_backend(backend):
                return await asyncio.gather(*(asyncio.to_thread(infer, model, i) for i in range(THREADS))), calls

    found, calls = asyncio.run(asyncio.wait_for(gather(), PATIENCE))
    assert all_equal(found, wanted)
    _, by_reference = asyncio.run(asyncio.wait_for(gather(backend="reference"), PATIENCE))
    count = [sum(call.op == "embed_layer_norm" for call in found) for found in (calls, by_reference)]
    assert count == [THREADS, THREADS] and {call.backend for call in by_reference} == {"reference"}


def step(model, index):
    """The gradients of one loss, by backward()."""
    out = model(**BATCHES[index])
    (out.last_hidden_state[:, 0].square().sum() + out.pooler_output.sum()).backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_threads_train_models_of_their_own(checkpointing, bert):
    _, model = bert
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    serial, models = ([copy.deepcopy(model) for _ in range(THREADS)] for _ in range(2))
    wanted = [step(m, i) for i, m in enumerate(serial)]
    for found, expected in zip(in_threads(lambda i: step(models[i], i)), wanted, strict=True):
        assert all_equal(found, expected)
    assert all(reasons(m) == [""] for m in models)


def test_threads_differentiate_one_model(bert):
    """torch.autograd.grad leaves nothing on the shared parameters; some threads compute without gradients meanwhile."""
    _, model = bert

    def gradients(index):
        if index % 4 == 3:
            return [infer(model, index) for _ in range(3)]
        out = model(**BATCHES[index])
        loss = out.last_hidden_state[:, 0].square().sum() + out.pooler_output.sum()
        return list(torch.autograd.grad(loss, list(model.parameters())))

    wanted = [gradients(index) for index in range(THREADS)]
    for _ in range(3):
        assert all(map(all_equal, in_threads(gradients), wanted))
    assert all(p.grad is None for p in model.parameters())


def test_dropout_draws_the_serial_seeds_in_some_order(bert):
    """torch has one generator for all threads: each forward draws one seed of it; which thread gets which is open."""
    _, model = bert
    model.train()

    def outputs(run):
        torch.manual_seed(11)
        return run(lambda _: infer(model, 0))

    serial = outputs(lambda work: [work(i) for i in range(THREADS)])
    for _ in range(3):
        found = outputs(in_threads)
        assert len({out.sum().item() for out in serial}) == THREADS
        assert all(sum(torch.equal(out, other) for other in found) == 1 for out in serial)


def test_threads_that_take_turns_have_seeds_of_their_own(bert):
    """Where a thread holds a lock from manual_seed to its forward, the seed is its own; the backward needs no lock."""
    _, model = bert
    models = [copy.deepcopy(model).train() for _ in range(THREADS)]
    lock = threading.Lock()

    def train(model, index):
        model.zero_grad()
        with lock:
            torch.manual_seed(index)
            out = model(**BATCHES[index])
        out.last_hidden_state[:, 0].square().sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    wanted = [[g.clone() for g in train(m, i)] for i, m in enumerate(models)]
    assert all(map(all_equal, in_threads(lambda i: train(models[i], i)), wanted))


def test_replicas_share_weights(bert):
    """What torch.nn.DataParallel does with a model, without its copies to other cards."""
    _, model = bert
    wanted = [infer(model, i) for i in range(THREADS)]
    replicas = [replicate(model) for _ in range(THREADS)]
    assert all_equal(in_threads(lambda i: infer(replicas[i], i)), wanted)
    with torch.no_grad():
        assert torch.equal(torch.nn.DataParallel(model)(**BATCHES[0]).last_hidden_state, wanted[0])


def replicate(module):
    replica = module._replicate_for_data_parallel()
    replica._parameters = dict(module._parameters)
    replica._modules = {name: child and replicate(child) for name, child in module._modules.items()}
    return replica


def test_losses_of_a_shared_head_keep_their_choice_of_pad_rows():
    """Each thread's labels decide for itself alone whether pad rows are exact."""
    _, model = pair("BertForTokenClassification", "bert")
    inputs = head_batch("BertForTokenClassification", "bert")
    whole = torch.ones_like(inputs["input_ids"])
    labels = [whole, whole.masked_fill(inputs["attention_mask"] == 0, -100)]

    @torch.no_grad()
    def loss(index):
        return [model(**inputs, labels=labels[index % 2]).loss for _ in range(5)]

    wanted = [loss(index) for index in range(THREADS)]
    assert all(map(all_equal, in_threads(loss), wanted))
    assert sorted(fastbert.explain(model).models[0].calls.values()) == [5 * THREADS] * 2


def test_threads_that_accelerate_first_share_one_class(monkeypatch):
    """Each would make a class of its own: such a model could be neither restored nor pickled."""
    makers = {name: getattr(accelerating, name).__wrapped__ for name in ("fast_class", "head_class")}
    for name, make in makers.items():
        monkeypatch.setattr(accelerating, name, once.once(slowly(make)))
    models = [stock("BertForTokenClassification", "bert") for _ in range(THREADS)]
    in_threads(lambda i: fastbert.accelerate(models[i]))
    assert len({type(model) for model in models}) == len({type(model.bert) for model in models}) == 1
    assert (
        {type(model).__module__ for model in models}
        == {type(model.bert).__module__ for model in models}
        == {"fastbert"}
    )
    for model in models:
        fastbert.restore(model)
        assert type(model) is transformers.BertForTokenClassification and type(model.bert) is transformers.BertModel


def test_the_first_to_ask_decides_for_all():
    made = once.once(slowly(lambda key: object()))
    first = in_threads(lambda _: made("a"))
    assert len(set(first)) == 1 and made("a") is first[0] and made("b") is not first[0]


def test_one_warning_whatever_the_number_of_threads(monkeypatch, caplog):
    monkeypatch.setattr(once, "_said", {})
    monkeypatch.setitem(hf.PROBES, "PreTrainedModel._a_name", slowly(lambda: transformers.PreTrainedModel._a_name))
    models = [stock("BertModel", "bert") for _ in range(THREADS)]
    hf.missing.cache_clear()
    try:
        with caplog.at_level(logging.WARNING, "fastbert"):
            in_threads(lambda i: infer(fastbert.accelerate(models[i]), i))
        said = [record.getMessage() for record in caplog.records if record.name == "fastbert"]
        assert len(said) == 1 and "lacks or has changed PreTrainedModel._a_name" in said[0]
    finally:
        monkeypatch.undo()
        hf.missing.cache_clear()


# What transformers imports at first use is imported before: `from transformers import BertModel` fails now and then in
# threads that are the first to ask, whoever asks.
FIRST_USE = """
import sys, threading
from concurrent.futures import ThreadPoolExecutor
import transformers
transformers.BertModel, transformers.BertConfig
sys.setswitchinterval(1e-4)
barrier = threading.Barrier(8)

def work(index):
    barrier.wait()
    import fastbert
    from transformers import BertConfig
    if index % 2:
        from transformers import BertModel
    else:
        from fastbert import BertModel
    import torch
    model = BertModel(BertConfig(vocab_size=9, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)).eval()
    fastbert.accelerate(model)
    model(torch.ones(2, 3, dtype=torch.long), attention_mask=torch.tensor([[1, 1, 1], [1, 0, 0]]))
    return type(model), fastbert.explain(model).models[0].calls

with ThreadPoolExecutor(8) as pool:
    found = [f.result(100) for f in [pool.submit(work, i) for i in range(8)]]
import fastbert
assert found == [(fastbert.BertModel, {"": 1})] * 8, found
"""


def test_the_first_use_in_a_process_from_all_threads():
    """Imports, classes, the native library, probes: all of them for the first time, in eight threads at once."""
    run = subprocess.run([sys.executable, "-c", FIRST_USE], capture_output=True, text=True, timeout=PATIENCE)
    assert run.returncode == 0, run.stderr
