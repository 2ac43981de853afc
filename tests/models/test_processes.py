"""Worker processes, forked with the model in memory or spawned with it pickled to them, give the answers of the parent.

Every wait has an end, so that a hang is a failure. A forked child whose parent has computed on several threads must
call torch.set_num_threads(1), whatever model it runs: libgomp's threads do not survive a fork.
"""

import copy
import multiprocessing
import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch

import fastbert
from tests.models.small import batch, pair, stock

PATIENCE = 120  # seconds after which a process that gives no answer is a failure
needs_fork = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="there is no fork here")
# Torch built for CUDA refuses a backward in the fork of a process that has run one, whatever the model
FORKS_TRAIN = not torch.backends.cuda.is_built()
FORK = pytest.param("fork", marks=needs_fork)
FORKSERVER = pytest.param("forkserver", marks=[needs_fork, pytest.mark.slow])
SLOW_SPAWN = pytest.param("spawn", marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def one_thread():
    """As the workers compute; what a hang has left is ended."""
    count = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(count)
    for child in multiprocessing.active_children():
        child.kill()


def answer(pipe, work, arguments):
    torch.set_num_threads(1)
    pipe.send(work(*arguments))


def in_process(method, work, *arguments):
    """work(*arguments) in a process of its own → what it returns; an AssertionError if it hangs or dies."""
    context = multiprocessing.get_context(method)
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=answer, args=(theirs, work, arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        assert ours.poll(PATIENCE), f"a {method} worker gave no answer in {PATIENCE} s"
        return ours.recv()
    except EOFError:
        process.join(PATIENCE)
        raise AssertionError(f"a {method} worker ended with {process.exitcode}") from None
    finally:
        process.kill()
        process.join()


def infer(model, inputs):
    """Numbers, which no process needs to share memory for."""
    with torch.no_grad():
        return model(**inputs)[0].numpy()


def train(model, inputs):
    torch.manual_seed(4)
    model.train().zero_grad()
    model(**inputs).last_hidden_state[:, 0].square().sum().backward()
    return [p.grad.numpy() for p in model.parameters() if p.grad is not None]


def same(found, wanted):
    return len(found) == len(wanted) and all((a == b).all() for a, b in zip(found, wanted, strict=True))


@needs_fork
@pytest.mark.parametrize("parent", ["has not computed", "has computed", "has trained"])
def test_a_fork_inherits_the_model(parent, bert, inputs):
    """Its packed weights too, which are still checked against the parameters."""
    _, model = bert
    if parent == "has computed":
        infer(model, inputs)
    if parent == "has trained":
        train(model, inputs)
        model.eval()
    found = in_process("fork", infer, model, inputs)
    if FORKS_TRAIN:
        assert same(in_process("fork", train, model, inputs), train(copy.deepcopy(model), inputs))
    assert same([found], [infer(model, inputs)])
    assert same([in_process("fork", edited, model, inputs)], [edited(copy.deepcopy(model), inputs)])


def edited(model, inputs):
    with torch.no_grad():
        model.encoder.layer[0].output.dense.weight.mul_(1.5)
    return infer(model, inputs)


@needs_fork
def test_forks_while_other_threads_compute(bert, inputs):
    """A lock that another thread holds at that moment would stay taken in the child for ever."""
    _, model = bert
    wanted, stop = infer(model, inputs), threading.Event()

    def work(model):
        while not stop.is_set():
            fastbert.accelerate(model)
            infer(model, inputs)

    threads = [threading.Thread(target=work, args=(copy.deepcopy(model),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        assert all(same([in_process("fork", infer, model, inputs)], [wanted]) for _ in range(10))
    finally:
        stop.set()
        for thread in threads:
            thread.join(PATIENCE)


def describe(models, inputs):
    """What a worker makes of models that were pickled to it."""
    described = []
    for model in models:
        outputs = [infer(model, inputs), infer(model, inputs)]
        kinds = [f"{type(m).__module__}.{type(m).__name__}" for m in (model, getattr(model, "bert", model))]
        others = []
        if "_fastbert" in getattr(model, "bert", model).__dict__:  # HuggingFace's own forget to capture, once pickled
            flipped = {name: x.flip(1) for name, x in inputs.items()}
            with torch.no_grad():
                others.append(len(model(**flipped, output_hidden_states=True).hidden_states))
            explained = fastbert.explain(model).models[0]
            others += [explained.calls, explained.pad_output]
        described.append((outputs, kinds, others))
    return described


def some_models():
    """Accelerated, by import, with a head, with exact pad rows, restored."""
    _, model = pair("BertModel", "bert")
    imported = fastbert.BertForTokenClassification(stock("BertForTokenClassification", "bert").config).eval()
    _, exact = pair("BertForQuestionAnswering", "bert")
    return [model, imported, exact, fastbert.restore(copy.deepcopy(model))]


@pytest.mark.parametrize("method", ["spawn", FORKSERVER])
def test_models_are_pickled_to_a_worker(method, inputs):
    models = some_models()
    found, wanted = in_process(method, describe, models, inputs), describe(models, inputs)
    for (outputs, *others), (expected, *expected_others) in zip(found, wanted, strict=True):
        assert same(outputs, expected) and others == expected_others
    assert [kinds[0] for _, kinds, _ in found] == [
        "fastbert.BertModel", "fastbert.BertForTokenClassification",
        "transformers.models.bert.modeling_bert.BertForQuestionAnswering",
        "transformers.models.bert.modeling_bert.BertModel",
    ]  # fmt: skip
    assert [kinds[1].split(".")[0] for _, kinds, _ in found] == ["fastbert"] * 3 + ["transformers"]


UNPICKLE = """
import pickle, sys
models, inputs = pickle.load(sys.stdin.buffer)
assert "tests.models.test_processes" not in sys.modules
import torch
torch.set_num_threads(1)
from tests.models.test_processes import describe
pickle.dump(describe(models, inputs), sys.stdout.buffer)
"""


def test_a_process_that_only_unpickles(inputs):
    """It imports nothing itself; HuggingFace's capture of hidden states knows the classes on the stock path too."""
    models = some_models()
    pickled = pickle.dumps((models, inputs))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-c", UNPICKLE], input=pickled, capture_output=True, env=environment, timeout=PATIENCE
    )
    assert run.returncode == 0, run.stderr.decode()
    for (outputs, *others), (expected, *wanted) in zip(pickle.loads(run.stdout), describe(models, inputs), strict=True):
        assert same(outputs, expected) and others == wanted


def edit_shared(model, inputs, told, asked):
    """Computes, edits a weight in the memory it shares, computes again when the parent has edited another one."""
    torch.set_num_threads(1)
    first = infer(model, inputs)
    with torch.no_grad():
        model.encoder.layer[0].attention.self.query.weight.mul_(1.5)
    told.send(first)
    assert asked.poll(PATIENCE) and asked.recv()
    told.send(infer(model, inputs))


@pytest.mark.parametrize("method", [FORK, SLOW_SPAWN, FORKSERVER])
def test_weights_in_shared_memory(method, bert, inputs):
    """Edited by the worker, then by the parent: no version tells of it, and both see it at the next forward."""
    _, model = bert
    infer(model, inputs)
    model.share_memory()
    fresh, first = copy.deepcopy(model), infer(model, inputs)
    context = torch.multiprocessing.get_context(method)
    told, tell = context.Pipe(duplex=False)
    asked, ask = context.Pipe(duplex=False)
    process = context.Process(target=edit_shared, args=(model, inputs, tell, asked), daemon=True)
    process.start()
    try:
        assert told.poll(PATIENCE) and same([told.recv()], [first])
        with torch.no_grad():
            fresh.encoder.layer[0].attention.self.query.weight.mul_(1.5)
            second = infer(fresh, inputs)
            assert same([infer(model, inputs)], [second]) and not same([first], [second])
            for m in (model, fresh):
                m.encoder.layer[1].output.dense.weight.mul_(0.5)
        ask.send(True)
        assert told.poll(PATIENCE) and same([told.recv()], [infer(fresh, inputs)])
    finally:
        process.kill()
        process.join()


class Encoded(torch.utils.data.Dataset):
    """Texts as vectors: the model runs in the workers of the loader, in items and in the collation."""

    def __init__(self, model, inputs):
        self.model, self.inputs = model, inputs

    def __len__(self):
        return len(self.inputs["input_ids"])

    def __getitem__(self, index):
        one = {name: x[index : index + 1] for name, x in self.inputs.items()}
        return one, infer(self.model, one)

    def collate(self, items):
        joined = {name: torch.cat([one[name] for one, _ in items]) for name in self.inputs}
        return infer(self.model, joined), [alone for _, alone in items]


@pytest.mark.parametrize("method", [FORK, SLOW_SPAWN, FORKSERVER])
def test_workers_of_a_data_loader(method, bert):
    _, model = bert
    data = Encoded(model, batch("bert", (33, 1, 16, 7, 8, 8)))
    wanted = [data.collate([data[i], data[i + 1]]) for i in (0, 2, 4)]
    loader = torch.utils.data.DataLoader(
        data, 2, num_workers=2, collate_fn=data.collate, multiprocessing_context=method, timeout=PATIENCE
    )
    for (joined, alone), (expected, expected_alone) in zip(loader, wanted, strict=True):
        assert same([joined, *alone], [expected, *expected_alone])


def keep(model, inputs):
    torch.set_num_threads(1)
    globals()["kept"] = model, inputs


def infer_kept(index):
    model, inputs = globals()["kept"]
    return os.getpid(), infer(model, {name: x[index:] for name, x in inputs.items()})


@pytest.mark.parametrize("method", [FORK, SLOW_SPAWN, FORKSERVER])
def test_a_pool_of_processes(method, bert, inputs):
    _, model = bert
    keep(model, inputs)
    wanted = [infer_kept(index)[1] for index in range(4)]
    context = multiprocessing.get_context(method)
    with ProcessPoolExecutor(2, context, keep, (model, inputs)) as pool:
        try:
            found = [future.result(PATIENCE) for future in [pool.submit(infer_kept, i) for i in range(4)]]
        finally:
            for child in multiprocessing.active_children():
                child.terminate()
    assert same([out for _, out in found], wanted) and os.getpid() not in {process for process, _ in found}


# The parent only loads a checkpoint and accelerates it; then forks, and the children compute on two threads each.
LOADED = """
import multiprocessing, sys
import torch, transformers, fastbert
torch.set_num_threads(2)
expected, model = (transformers.BertModel.from_pretrained(sys.argv[1]).eval() for _ in range(2))
fastbert.accelerate(model)
mask = torch.tensor([[1] * 48] * 8 + [[1] * 9 + [0] * 39] * 8)
inputs = {"input_ids": mask * 7, "attention_mask": mask}

def work(model, pipe):
    with torch.no_grad():
        pipe.send((torch.get_num_threads(), model(**inputs).last_hidden_state.numpy()))

def child(model, patience):
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(model, theirs), daemon=True)
    process.start()
    found = ours.recv() if ours.poll(patience) else None
    process.kill()
    process.join()
    return found

found = [child(m, 60) for m in (expected, model)]
assert found[0] is not None, "stock hangs in a child of a parent that has not computed"
assert found[1] is not None, "fastbert hangs where stock does not"
with torch.no_grad():
    for m, (threads, out) in zip((expected, model), found):
        assert threads == 2 and (m(**inputs).last_hidden_state.numpy() == out).all()
if "after" in sys.argv:
    found = [child(m, 15) is not None for m in (expected, model)]
    assert found[1] or not found[0], "fastbert hangs where stock does not"
"""


@needs_fork
@pytest.mark.parametrize("when", ["before", pytest.param("after", marks=pytest.mark.slow)])
def test_a_fork_computes_on_several_threads_wherever_stock_does(when, tmp_path):
    """Importing fastbert and accelerating a model starts no thread of OpenMP, whose pool a fork would break."""
    stock("BertModel", "bert", hidden_size=256, intermediate_size=1024).save_pretrained(tmp_path)
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", LOADED, str(tmp_path), when]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=2 * PATIENCE)
    assert run.returncode == 0, run.stderr
