"""A private name of transformers or torch that is gone or changed costs speed and one warning; no number is wrong.

Every private name that hf.py and torch_private.py read is found in their source, and each in turn is taken away: the
source runs again with another name in its place, which no library has. So the libraries themselves stay whole.
"""

import ast
import contextlib
import importlib
import inspect
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from contextvars import ContextVar
from pathlib import Path
from weakref import WeakKeyDictionary

import pytest
import torch
import transformers
from torch import nn

import fastbert
from fastbert import doctor, hf, once, torch_private
from tests.models.gradients import compare, gradients_of
from tests.models.small import assert_parity, batch, head_batch, pair, reasons, stock

GONE = "_which_is_gone"
LIBRARIES = {hf: "transformers", torch_private: "torch"}
# What may be absent without a loss: the fast path runs on, and nobody is warned.
SPARED = {
    "resolve_hidden_states_indices": "transformers before 5.20 has none, and takes no indices of hidden states",
    "_hf_hook": "the mark of a module that is offloaded; its forward is replaced too, which is seen",
    "torch.nn.attention.varlen": "on CUDA alone",
    "varlen_attn": "on CUDA alone",
    "AuxRequest": "on CUDA alone",
}
# Names of torch behind which stands something slower, and not HuggingFace's own forward.
REPLACED = {
    "_reorder_linear_weight",
    "_linear_pointwise",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
    "_unsafe_view",
}

# The same, of quantized models alone: others do not ask for it, `doctor` does.
OF_INT8 = {"_int_mm"}


def is_private(name):
    return isinstance(name, str) and name.isidentifier() and name.startswith("_") and not name.startswith("__")


def is_inside(node):
    """Whether an expression is a submodule of transformers: what it has is not promised."""
    return (isinstance(node, ast.Name) and node.id == "activations") or (
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "stock_module"
    )


def private_names(module):
    """The private names of its library that a file reads: attributes, strings, submodules and what they hold."""
    library, found = LIBRARIES[module], set()
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.Attribute) and (is_private(node.attr) or is_inside(node.value)):
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and is_private(node.value):
            found.add(node.value)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{library}."):
            found |= {node.module, *(alias.name for alias in node.names)}
    return found


class Renamed(ast.NodeTransformer):
    """A file in which one name is another."""

    def __init__(self, name):
        self.name, self.short = name, name.partition(".")[2]

    def visit_Attribute(self, node):
        self.generic_visit(node)
        node.attr += GONE if node.attr == self.name else ""
        return node

    def visit_Constant(self, node):
        if isinstance(node.value, str) and node.value in (self.name, self.short or None):
            return ast.copy_location(ast.Constant(node.value + GONE), node)
        return node

    def visit_ImportFrom(self, node):
        if node.module == self.name:
            node.module += GONE
        for alias in node.names:
            if alias.name == self.name:
                alias.name, alias.asname = alias.name + GONE, alias.asname or alias.name
        return node


@contextlib.contextmanager
def without(module, name):
    """Every module of fastbert uses `module` as it is where its library has no such name; nothing was asked before."""
    users = [m for n, m in sys.modules.items() if n.split(".")[0] == "fastbert" and m is not None]
    before = [(user, dict(vars(user))) for user in users]
    old = dict(vars(module))
    tree = ast.fix_missing_locations(Renamed(name).visit(ast.parse(inspect.getsource(module))))
    try:
        exec(compile(tree, module.__file__, "exec"), vars(module))
        for user, fields in before:
            for key, value in fields.items():
                if user is not module and value is not None and old.get(key) is value and inspect.isroutine(value):
                    setattr(user, key, vars(module)[key])
        once._said = {}
        for other in LIBRARIES:
            forget(other)
        yield
    finally:
        for user, fields in before:
            vars(user).clear()
            vars(user).update(fields)


def forget(module):
    """The answers of all probes, and what was warned of."""
    once._said = {}
    for value in vars(module).values():
        if hasattr(value, "cache_clear"):
            value.cache_clear()


@pytest.fixture(autouse=True, scope="module")
def classes():
    """fastbert's classes are made, and known to HuggingFace's capture, before a name is taken away."""
    pair("BertForTokenClassification", "bert")


@pytest.fixture
def fresh(monkeypatch):
    """A process in which nothing was asked yet, before and after the test; what is patched is put back first."""
    for module in LIBRARIES:
        forget(module)
    yield monkeypatch
    monkeypatch.undo()
    for module in LIBRARIES:
        forget(module)


@pytest.fixture
def said(caplog):
    """The warnings of fastbert so far."""
    caplog.set_level(logging.WARNING, "fastbert")
    return lambda: [r.getMessage() for r in caplog.records if r.name == "fastbert"]


def head_loss(model):
    inputs = head_batch("BertForTokenClassification", "bert")
    labels = torch.arange(inputs["input_ids"].numel()).view_as(inputs["input_ids"]) % 3
    return model(**inputs, labels=labels.masked_fill(inputs["attention_mask"] == 0, -100)).loss


def use(is_fast):
    """A model is accelerated, runs, captures, trains with and without checkpointing, explains itself; all is right."""
    expected, model = pair("BertModel", "bert")
    inputs = batch("bert")
    with torch.no_grad():
        assert_parity(expected, model, **inputs)
        theirs, ours = (m(**inputs, output_hidden_states=True).hidden_states for m in (expected, model))
        assert len(theirs) == len(ours) == 3
        model(**{name: x[:2, :1] for name, x in inputs.items()})  # without padding
    assert (fastbert.explain(model).models[0].reasons == []) == is_fast
    if is_fast:
        assert reasons(model) == [""]
    else:
        assert all(torch.equal(a, b) for a, b in zip(theirs, ours, strict=True)) and "" not in reasons(model)
    assert (type(model) is transformers.BertModel) == bool(hf.missing())
    head = stock("BertForTokenClassification", "bert")
    found, ours = compare(head, torch.float32, [head_loss])
    assert [f"{name}: {verdict}" for name, verdict in found.items() if not verdict.passed] == []
    for accelerated in (ours.train(), head.train()):
        accelerated.gradient_checkpointing_enable()
        gradients_of(accelerated, head_loss)
    if not is_fast:  # dropout draws as HuggingFace's
        torch.manual_seed(3)
        first = gradients_of(head, head_loss)
        torch.manual_seed(3)
        assert all(torch.equal(first[name], g) for name, g in gradients_of(ours, head_loss).items())
    assert fastbert.restore(model) is model and type(model) is transformers.BertModel


CASES = [(module, name) for module in LIBRARIES for name in sorted(private_names(module))]


def test_the_names_are_found():
    """The search sees attributes, strings, imports; and the lists above name nothing that is not there."""
    names = {name for _, name in CASES}
    seen = {
        "_active_collector",
        "_hf_hook",
        "_gelu_python",
        "sdpa_attention_forward",
        "transformers.utils.output_capturing",
    }
    assert seen <= names and {"_C", "_version", "_parameters", "_linear_pointwise", "_backward_hooks"} <= names
    assert {*SPARED} | REPLACED | OF_INT8 <= names


@pytest.mark.parametrize(("module", "name"), CASES, ids=[name for _, name in CASES])
def test_a_name_that_is_gone(module, name, said):
    with without(module, name):
        spared = name in SPARED
        use(is_fast=spared or name in REPLACED | OF_INT8)
        assert len(said()) == (0 if spared or name in OF_INT8 else 1), said()
        states = doctor.torch_names() if module is torch_private else doctor.transformers_names()
        assert spared or any(states.values()), states
        assert len(said()) == (0 if spared else 1)
        assert spared or (name in said()[0] and GONE not in said()[0].replace(name + GONE, name)), said()


def test_all_names_are_gone_when_fastbert_is_imported(tmp_path):
    """A process of its own, from the import on: no exception, the stock numbers, one warning for each library."""
    package = tmp_path / "fastbert"
    shutil.copytree(Path(fastbert.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    for module in LIBRARIES:
        tree = ast.parse(inspect.getsource(module))
        for name in private_names(module) - {*SPARED}:
            tree = Renamed(name).visit(tree)
        (package / Path(module.__file__).name).write_text(ast.unparse(tree))
    code = """
import torch, transformers, fastbert
from fastbert import BertForTokenClassification, doctor, hf
assert "_which_is_gone" in open(hf.__file__).read()
config = transformers.BertConfig(
    vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
)
expected = transformers.BertForTokenClassification(config)
model = BertForTokenClassification(config)
model.load_state_dict(expected.state_dict())
ids, mask = torch.randint(5, 90, (2, 7)), torch.tensor([[1] * 7, [1] * 3 + [0] * 4])
for m in (expected, model):
    torch.manual_seed(1)
    m.out = m(ids, attention_mask=mask, labels=ids % 2, output_hidden_states=True)
    m.out.loss.backward()
assert torch.equal(expected.out.loss, model.out.loss) and len(model.out.hidden_states) == 3
assert all(torch.equal(a.grad, b.grad) for a, b in zip(expected.parameters(), model.parameters()) if a.grad is not None)
assert "HuggingFace's own path" in str(fastbert.explain(model))
found = doctor.examine()
assert all(found["private names of transformers"].values()) and all(
    reason for name, reason in found["private names of torch"].items() if "varlen" not in name
), found
fastbert.restore(model)
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert run.returncode == 0, run.stderr
    said = [line.partition(" of torch ")[0] for line in run.stderr.splitlines() if line.startswith("fastbert ")]
    assert len(said) == len({*said}) and "Traceback" not in run.stderr, run.stderr
    assert said[0].startswith("fastbert runs HuggingFace's own forward for every model"), run.stderr
    assert "fastbert cannot use the inner state of modules" in said


def raising(error):
    def raises(*args, **kwargs):
        raise error

    return raises


class Instead:
    """An object with other attributes in place of some of its own; a name set to None is absent."""

    def __init__(self, original, **changes):
        self.original, self.changes = original, changes

    def __getattr__(self, name):
        found = self.changes[name] if name in self.changes else getattr(self.original, name)
        if found is None:
            raise AttributeError(f"no attribute {name!r}")
        return found


def patched(target, name, value):
    """A change of an attribute of whatever stands at a dotted path."""

    def change(monkeypatch):
        owner = importlib.import_module(target) if target in sys.modules else eval(target)
        monkeypatch.setattr(owner, name, value, raising=False)

    return change


CAPTURING, MODELING = "transformers.utils.output_capturing", "transformers.modeling_utils"
# What is there and is not what fastbert knows: what to change, the name that the warning says.
CHANGED_TRANSFORMERS = {
    "a collector that cannot be asked": (patched(CAPTURING, "_active_collector", object()), "_active_collector"),
    "a collector without a default": (patched(CAPTURING, "_active_collector", ContextVar("none")), "_active_collector"),
    "a registry of another kind": (
        patched(CAPTURING, "_CAN_RECORD_REGISTRY", WeakKeyDictionary()), "_CAN_RECORD_REGISTRY",
    ),
    "a registry by class": (patched(CAPTURING, "_CAN_RECORD_REGISTRY", {int: {}}), "_CAN_RECORD_REGISTRY"),
    "attention functions without sdpa": (
        patched(MODELING, "ALL_ATTENTION_FUNCTIONS", {}), "ALL_ATTENTION_FUNCTIONS",
    ),
    "attention functions that are no mapping": (
        patched(MODELING, "ALL_ATTENTION_FUNCTIONS", None), "ALL_ATTENTION_FUNCTIONS",
    ),
    "an implementation that cannot be asked": (
        patched("transformers.BertConfig", "_attn_implementation", property(raising(RuntimeError("no")))),
        "_attn_implementation",
    ),
    "checkpointing set otherwise": (
        patched("transformers.PreTrainedModel", "_set_gradient_checkpointing", lambda self, /, function: None),
        "_gradient_checkpointing_func",
    ),
    "checkpointing that sets another name": (
        patched("transformers.PreTrainedModel", "_set_gradient_checkpointing", lambda self, enable, function: None),
        "_gradient_checkpointing_func",
    ),
    "a GELU that takes no flag": (
        patched("transformers.activations", "GELUActivation", type("GELUActivation", (nn.Module,), {})), "_gelu_python",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGED_TRANSFORMERS)
def test_a_name_of_transformers_that_has_changed(case, fresh, said):
    """Asked while the change is in place; then the models run, on HuggingFace's own path, with a whole library."""
    change, name = CHANGED_TRANSFORMERS[case]
    with monkeypatch_of(change):
        lacks = hf.missing()
        told = doctor.transformers_names()
    ((lacked, why),) = lacks.items()
    assert name in lacked and re.match(r"(Type|Attribute|Lookup|Key|Import|Runtime)Error: .", why)
    assert {name: reason for name, reason in told.items() if reason} == lacks and set(told) == set(hf.PROBES)
    use(is_fast=False)
    assert said() == [
        f"fastbert runs HuggingFace's own forward for every model, and gains no speed: transformers "
        f"{transformers.__version__} lacks or has changed {lacked} ({why}). Results are right. "
        "Install another version of transformers, or a newer fastbert."
    ]


def test_a_package_that_transformers_needs_is_broken(tmp_path):
    """The warning and the doctor name what cannot be imported, and another transformers would be no remedy."""
    (tmp_path / "safetensors.py").write_text('raise ImportError("no such symbol\\nin its library")')
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1", "COLUMNS": "300"}
    run = subprocess.run(
        [sys.executable, "-m", "fastbert", "doctor", "--json", "-"],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    broken = f"models of transformers {transformers.__version__} cannot be imported: ImportError: no such symbol"
    assert run.returncode == 1, run.stderr
    assert json.loads(run.stdout)["private names of transformers"] == {"error": f"ImportError: {broken}"}
    assert "Traceback" not in run.stderr
    warning = [sys.executable, "-c", "from fastbert import hf; assert len(hf.missing()) > 5"]
    run = subprocess.run(warning, env=environment, capture_output=True, text=True, timeout=120)
    assert (run.returncode, run.stderr) == (0, (
        f"fastbert runs HuggingFace's own forward for every model, and gains no speed: {broken}. "
        "Results are right. Install again what cannot be imported.\n"
    ))  # fmt: skip


@contextlib.contextmanager
def monkeypatch_of(change):
    with pytest.MonkeyPatch.context() as monkeypatch:
        change(monkeypatch)
        yield


MKLDNN, ATEN = torch.ops.mkldnn, torch.ops.aten


class WrongNumbers:
    """torch.ops.mkldnn._linear_pointwise, with wrong sums."""

    binary = MKLDNN._linear_pointwise.binary

    def __call__(self, *args):
        return MKLDNN._linear_pointwise(*args) * 1.5


PRODUCTS = "products run on plain weights, more slowly"
ATTENTION = "attention runs by plain products and a softmax, more slowly"
COPIED = "the output is copied once more"
STOCK = "HuggingFace's own forward runs for every model, and no speed is gained"
FLASH = "_scaled_dot_product_flash_attention_for_cpu"


def other_arguments(function):
    """The op called with an argument that its schema does not have."""
    return lambda *args, **kwargs: function(*args, **kwargs, another=1)


def mkldnn(**changes):
    return patched("torch.ops", "mkldnn", Instead(MKLDNN, **changes))


def aten(**changes):
    return patched("torch.ops", "aten", Instead(ATEN, **changes))


def functorch(**changes):
    return patched("torch._C", "_functorch", Instead(torch._C._functorch, **changes))


CHANGED_TORCH = {
    "packing takes other arguments": (
        mkldnn(_reorder_linear_weight=other_arguments(MKLDNN._reorder_linear_weight)), PRODUCTS,
    ),
    "products take other arguments": (mkldnn(_linear_pointwise=raising(TypeError("takes 3 arguments"))), PRODUCTS),
    "products give wrong numbers": (mkldnn(_linear_pointwise=WrongNumbers()), PRODUCTS),
    "attention takes other arguments": (aten(**{FLASH: other_arguments(getattr(ATEN, FLASH))}), ATTENTION),
    "attention gives one output": (aten(**{FLASH: lambda *args, **kwargs: args[0]}), ATTENTION),
    "attention gives wrong numbers": (
        aten(**{FLASH: lambda *args, scale: getattr(ATEN, FLASH)(*args)}), ATTENTION,
    ),
    "a view of another shape": (aten(_unsafe_view=lambda x, shape: x), COPIED),
    "a view with other arguments": (aten(_unsafe_view=raising(TypeError("takes 3 arguments"))), COPIED),
    "a stack of interpreters that takes an argument": (functorch(peek_interpreter_stack=lambda level: None), STOCK),
    "modes asked otherwise": (patched("torch._C", "_get_dispatch_mode", lambda: None), STOCK),
    "modes without names": (patched("torch._C", "_TorchDispatchModeKey", object()), STOCK),
    "a level that is no number": (patched("torch.autograd.forward_ad", "_current_level", None), STOCK),
}  # fmt: skip


@pytest.mark.parametrize("case", CHANGED_TORCH)
def test_a_name_of_torch_that_has_changed(case, fresh, said):
    change, instead = CHANGED_TORCH[case]
    with monkeypatch_of(change):
        reasons = [reason for reason in (probe() for probe in torch_private.PROBES.values()) if reason]
        assert any("cannot be used" in reason for reason in reasons)
        assert torch_private.transforms_active() == (instead == STOCK), "where nobody can tell, it may be"
    use(is_fast=instead != STOCK)
    assert (
        len(said()) == 1
        and said()[0].startswith("fastbert cannot use ")
        and f" of torch {torch.__version__}: " in said()[0]
    )
    assert said()[0].endswith(
        f". Results are right, but {instead}. Install another version of torch, or a newer fastbert."
    )


@torch.no_grad()
def test_what_a_machine_cannot_do_is_no_loss_to_warn_of(fresh, said, inputs):
    limit = raising(RuntimeError("bf16 path needs the cpu support avx512"))
    for change in (
        mkldnn(_reorder_linear_weight=limit),
        patched("torch.backends.mkldnn", "is_available", lambda: False),
    ):
        with monkeypatch_of(change):
            torch_private.packed_linear_refusal.cache_clear()
            assert torch_private.packed_linear_refusal(torch.float32) is not None
            assert_parity(*pair("BertModel", "bert"), **inputs)
    assert said() == []


def test_attention_over_packed_sequences_is_missed_where_there_is_cuda(fresh, said):
    """Without a card nothing is lost."""
    name = "torch.nn.attention.varlen.varlen_attn"
    for has_cuda in (False, True):
        fresh.setattr(torch.cuda, "is_available", lambda has_cuda=has_cuda: has_cuda)
        for change, problem in (
            (lambda inner: inner.setattr(name, lambda q, k, v, scale: None), "it takes no return_aux"),
            (lambda inner: inner.delattr(name), "cannot import name 'varlen_attn'"),
        ):
            torch_private.varlen_attention_refusal.cache_clear()
            with monkeypatch_of(change):
                assert problem in torch_private.varlen_attention_refusal()
        assert len(said()) == (2 if has_cuda else 0)
    assert "but sequences are padded for attention." in said()[0]


@torch.no_grad()
def test_other_indices_of_hidden_states_are_huggingfaces_affair(fresh, said, bert, inputs):
    _, model = bert
    fresh.setattr(f"{CAPTURING}.resolve_hidden_states_indices", lambda indices: indices, raising=False)
    model(**inputs, output_hidden_states=True)
    assert reasons(model) == [""]
    with contextlib.suppress(TypeError):  # of HuggingFace's own
        model(**inputs, output_hidden_states=[0])
    assert reasons(model)[-1].startswith("output_hidden_states is no flag") and said() == []


@torch.no_grad()
def test_hooks_of_output_capture_by_any_name_are_huggingfaces(bert, inputs):
    _, model = bert
    from transformers.utils import output_capturing

    output_capturing.install_output_capuring_hook(model.encoder.layer[0], "attentions", 1)
    (hook,) = model.encoder.layer[0]._forward_hooks.values()
    hook.__name__ = "another_name"
    model(**inputs)
    assert reasons(model) == [""]


def test_hooks_for_gradients_by_another_name_mean_the_stock_path(bert, inputs):
    """The embeddings' output must require a gradient: HuggingFace's own path sees to it."""
    expected, model = bert
    for m in (expected, model.requires_grad_(False)):
        m.enable_input_require_grads()
        for hook in m.embeddings.word_embeddings._forward_hooks.values():
            hook.__name__ = "another_name"
    assert model(**inputs).last_hidden_state.requires_grad
    assert reasons(model) == ["a hook is set on embeddings.word_embeddings"]


@torch.no_grad()
def test_an_offloaded_module_is_seen_by_its_forward_too(bert):
    hooks = pytest.importorskip("accelerate.hooks")
    _, model = bert
    hooks.add_hook_to_module(model.encoder.layer[0].output.dense, hooks.ModelHook())
    del model.encoder.layer[0].output.dense._hf_hook
    assert fastbert.explain(model).models[0].reasons == ["the forward of encoder.layer.0.output.dense was replaced"]
