"""What the fast path is made of: declared ops only, padding dropped once, the same class, checkpoint and outputs."""

import copy
import pickle

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

import fastbert
from fastbert import ops
from fastbert.models.accelerate import PUBLIC_CLASSES
from tests.models.small import BASES, HEADS, assert_parity, batch, config, config_for, pair, reasons, stock

LAYER = ["linear", "attention", "linear", "add_layer_norm", "feed_forward", "add_layer_norm"]


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize(("family", "name"), BASES)
def test_each_layer_calls_exactly_the_ops_of_the_design(family, name):
    _, model = pair(name, family)
    with ops.record() as calls:
        model(**batch(family))
    assert [c.op for c in calls] == ["unpad", "embed_layer_norm", *LAYER, *LAYER, "pad"]
    tokens, width = 33 + 1 + 16 + 7, 64
    assert all(c.shapes[0][0] == tokens for c in calls if c.op not in ("unpad", "pad"))
    assert calls[-1].shapes[0] == (tokens, width)


@pytest.mark.parametrize(("family", "name"), BASES)
def test_no_built_in_computes_between_the_ops(family, name, monkeypatch):
    """From the embeddings to the last layer nothing runs outside a declared op but views and the care for weights."""
    views = {"view", "unflatten", "flatten", "detach", "alias", "split", "as_strided", "select", "slice", "t"}
    weights = {"cat", "equal"}  # the bias of q, k and v, and the look whether a weight has changed
    inside, seen = [], []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if not inside:
                seen.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    def counted(name, run):
        def wrapper(*args):
            seen.append(name)
            inside.append(name)
            try:
                return run(*args)
            finally:
                inside.pop()

        return wrapper

    _, model = pair(name, family)
    inputs = batch(family)
    model(**inputs)  # prepares the weights
    for op in ops.ALL:
        monkeypatch.setattr(op, "dispatch", counted(f"op {op.name}", op.dispatch))
    with Watch():
        model(**inputs)
    between = seen[seen.index("op embed_layer_norm") + 1 : seen.index("op pad")]
    outside = {name for name in between if not name.startswith("op ")}
    assert outside <= views | weights, outside - views - weights
    assert [name for name in between if name.startswith("op ")] == [f"op {name}" for name in LAYER * 2]


@pytest.mark.parametrize(("family", "name"), HEADS + BASES)
def test_outputs_have_the_stock_classes_and_fields(family, name):
    expected, model = pair(name, family)
    inputs = batch(family)
    if "MultipleChoice" in name:
        inputs = {k: v.unsqueeze(0) for k, v in inputs.items()}
    a, b = expected(**inputs, output_hidden_states=True), model(**inputs, output_hidden_states=True)
    assert type(a) is type(b) and a.keys() == b.keys()
    assert len(a.hidden_states) == len(b.hidden_states) == 3
    for x, y in zip(a.to_tuple(), b.to_tuple(), strict=True):
        if isinstance(x, torch.Tensor):
            assert x.shape == y.shape and x.dtype == y.dtype
    as_tuple = model(**inputs, return_dict=False)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == len(expected(**inputs, return_dict=False))


@pytest.mark.parametrize(("family", "name"), BASES)
def test_pad_rows_are_zero_and_real_rows_do_not_see_them(family, name):
    _, model = pair(name, family)
    inputs = batch(family)
    out = model(**inputs).last_hidden_state
    assert out[inputs["attention_mask"] == 0].eq(0).all()
    changed = dict(inputs, input_ids=torch.where(inputs["attention_mask"] == 1, inputs["input_ids"], 77))
    assert torch.equal(model(**changed).last_hidden_state, out)
    assert torch.equal(model(**inputs).last_hidden_state, out)


@pytest.mark.parametrize(("family", "name"), BASES)
def test_the_width_of_the_padding_changes_nothing(family, name):
    _, model = pair(name, family)
    narrow, wide = batch(family), batch(family, width=48)
    for key, value in narrow.items():
        wide[key][:, :33] = value
    a, b = model(**narrow).last_hidden_state, model(**wide).last_hidden_state
    assert torch.equal(a, b[:, :33]) and b[:, 33:].eq(0).all()


def test_accelerate_returns_the_object_and_restore_undoes_it():
    model = stock("BertForMaskedLM", "bert")
    before = copy.deepcopy(model)
    ids = {id(p) for p in model.parameters()}
    assert fastbert.accelerate(model) is model
    model(**batch("bert"))
    assert {id(p) for p in model.parameters()} == ids
    assert type(model) is transformers.BertForMaskedLM and type(model.bert) is fastbert.BertModel
    assert isinstance(model.bert, transformers.BertModel) and type(model.bert).__name__ == "BertModel"
    assert repr(model) == repr(before)
    assert fastbert.restore(model) is model
    assert type(model.bert) is transformers.BertModel and "_fastbert" not in model.bert.__dict__
    assert repr(model) == repr(before)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before.state_dict()[name]), name


def test_accelerating_twice_changes_pad_output_only():
    _, model = pair("BertModel", "bert")
    fastbert.accelerate(model, pad_output="exact")
    model(**batch("bert"))
    assert reasons(model) == ['pad_output="exact" and the batch has padding']
    assert fastbert.restore(fastbert.restore(model)) is model


def test_question_answering_keeps_pad_rows_exact_by_itself():
    expected, model = pair("BertForQuestionAnswering", "bert")
    inputs = batch("bert")
    spans = {"start_positions": torch.tensor([3, 0, 5, 2]), "end_positions": torch.tensor([4, 0, 9, 3])}
    torch.testing.assert_close(model(**inputs, **spans).loss, expected(**inputs, **spans).loss)
    assert reasons(model) == ['pad_output="exact" and the batch has padding']
    dense = batch("bert", (16, 16))
    model(**dense)
    assert "" in reasons(model)


@pytest.mark.parametrize(("family", "name"), HEADS + BASES)
def test_classes_by_import_are_the_stock_ones_made_fast(family, name, tmp_path):
    torch.manual_seed(0)
    model = getattr(fastbert, name)(config_for(name, family)).eval()
    assert type(model).__name__ == name and isinstance(model, getattr(transformers, name))
    model.save_pretrained(tmp_path)
    again = getattr(transformers, name).from_pretrained(tmp_path)
    assert again.config.architectures == [name]
    loaded = getattr(fastbert, name).from_pretrained(tmp_path).eval()
    assert loaded.state_dict().keys() == again.state_dict().keys()
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    assert type(pickle.loads(pickle.dumps(loaded))) is type(loaded)
    if "QuestionAnswering" not in name and "LMHead" not in name and "CausalLM" not in name:
        inputs = batch(family)
        loaded(**({k: v.unsqueeze(0) for k, v in inputs.items()} if "MultipleChoice" in name else inputs))
        assert reasons(loaded) == [""]


@pytest.mark.parametrize("name", ["AutoModel", "AutoModelForMaskedLM", "AutoModelForSequenceClassification"])
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
def test_auto_classes(name, family, tmp_path):
    getattr(transformers, name).from_config(config(family)).save_pretrained(tmp_path)
    model = getattr(fastbert, name).from_pretrained(tmp_path).eval()
    model(**batch(family))
    assert reasons(model) == [""]
    assert hasattr(getattr(fastbert, name).from_config(config(family)).base_model, "_fastbert")


def test_auto_class_of_another_family_comes_back_stock(tmp_path):
    other = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=9)
    assert type(fastbert.AutoModel.from_config(other)) is transformers.GPT2Model


class MyBert(fastbert.BertModel):
    def forward(self, *args, **kwargs):
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(*args, **kwargs)


class MyMasks(fastbert.BertModel):
    def _create_attention_masks(self, **kwargs):
        return super()._create_attention_masks(**kwargs)


class MyHead(fastbert.BertForSequenceClassification):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs).logits


def test_a_users_subclass_keeps_its_class_and_its_forward():
    model = MyBert(config("bert")).eval()
    model(**batch("bert"))
    assert type(model) is MyBert and model.calls == 1 and reasons(model) == [""]
    fastbert.restore(model)(**batch("bert"))
    assert type(model) is MyBert and model.calls == 2
    with pytest.raises(ValueError, match="nothing in MyBert was accelerated"):
        fastbert.explain(model)
    other = MyMasks(config("bert")).eval()
    other(**batch("bert"))
    assert reasons(other) == ["MyMasks changes _create_attention_masks"]
    head = MyHead(config("bert")).eval()
    assert head(**batch("bert")).shape == (4, 3) and reasons(head) == [""]


def test_restore_after_two_accelerates_gives_parameters_their_own_memory(monkeypatch):
    monkeypatch.setattr("fastbert.models.weights.keeps_copies", lambda weight, dtype: False)
    _, model = pair("BertModel", "bert")
    model(**batch("bert"))
    fastbert.restore(fastbert.accelerate(model))
    attention = model.encoder.layer[0].attention.self
    parts = (attention.query.weight, attention.key.weight, attention.value.weight)
    assert len({p.untyped_storage().data_ptr() for p in parts}) == 3


def test_a_copied_or_pickled_model_stays_fast():
    _, model = pair("BertModel", "bert")
    inputs = batch("bert")
    expected = model(**inputs).last_hidden_state
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**inputs).last_hidden_state, expected)
        assert reasons(other) == [""]


def test_names_that_are_not_there():
    with pytest.raises(AttributeError, match="no attribute 'BertForTea'"):
        _ = fastbert.BertForTea
    with pytest.raises(ImportError):
        from fastbert import GPT2Model  # noqa: F401
    assert "accelerate" not in fastbert.__all__ and "accelerate" in dir(fastbert)
    assert set(fastbert.__all__) == {*PUBLIC_CLASSES, "explain", "restore", "use_backend"}
    for name in fastbert.__all__:
        assert getattr(fastbert, name) is not None


def test_what_accelerate_refuses_in_words():
    with pytest.raises(TypeError, match=r"takes a torch.nn.Module, not str"):
        fastbert.accelerate("bert-base-uncased")
    with pytest.raises(
        ValueError, match="Linear holds no model that fastbert accelerates; it knows BertModel, RobertaModel"
    ):
        fastbert.accelerate(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="pad_output is 'junk'; it can be 'zeros' or 'exact'"):
        fastbert.accelerate(stock("BertModel", "bert"), pad_output="junk")
    with pytest.raises(ValueError, match="nothing in BertModel was accelerated: call fastbert"):
        fastbert.explain(stock("BertModel", "bert"))


def test_explain_says_what_runs_where():
    _, model = pair("BertForSequenceClassification", "bert")
    model(**batch("bert"))
    text = str(fastbert.explain(model))
    assert "bert (BertModel): fast path in eval mode" in text
    assert "1 forward so far: fast" in text and "packed copies of weights" in text
    assert "\n  attention: torch" in text and "\n  unpad: cpu" in text
    with fastbert.use_backend("reference"):
        assert "\n  attention: reference" in str(fastbert.explain(model))


def test_backends_agree_on_a_whole_model():
    expected, model = pair("BertModel", "bert")
    inputs = batch("bert")
    with fastbert.use_backend("reference"), ops.record() as calls:
        assert_parity(expected, model, **inputs)
    assert {c.backend for c in calls} == {"reference"}
    with fastbert.use_backend("triton"), pytest.raises(ops.BackendRefused, match="triton: not a backend of this op"):
        model(**inputs)
