"""What the fast path is made of: declared ops only, padding dropped once, the same class, checkpoint and outputs."""

import copy
import importlib
import pickle

import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

import fastbert
from fastbert import native, ops
from fastbert.models.accelerate import PUBLIC_CLASSES, fast_class, head_class
from fastbert.models.families import AUTO_CLASSES, ERNIE, FAMILIES
from tests.models.small import (
    ALL_BASES,
    ALL_HEADS,
    BASES,
    HEADS,
    REFUSED,
    assert_parity,
    batch,
    config,
    config_for,
    head_batch,
    pair,
    reasons,
    stock,
)

LAYER = ["linear", "attention", "linear", "add_layer_norm", "feed_forward", "add_layer_norm"]
PROJECTION = {"electra": ["linear"]}  # from the width of the embeddings to that of the layers


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize(("family", "name"), BASES)
def test_each_layer_calls_exactly_the_ops_of_the_design(family, name):
    _, model = pair(name, family)
    with ops.record() as calls, fastbert.use_backend("torch"):
        model(**batch(family))
    projection = PROJECTION.get(family, [])
    assert [c.op for c in calls] == ["unpad", "embed_layer_norm", *projection, *LAYER, *LAYER, "pad"]
    tokens, width = 33 + 1 + 16 + 7, 64
    assert all(c.shapes[0][0] == tokens for c in calls if c.op not in ("unpad", "pad"))
    assert calls[-1].shapes[0] == (tokens, width)


@pytest.mark.skipif(not ops.encodes(torch.device("cpu"), torch.float32), reason="the native library is not here")
@pytest.mark.parametrize(("family", "name"), BASES)
def test_all_layers_are_one_call_on_a_cpu(family, name):
    """Up to a layer whose input is wanted; the same bits, whatever is wanted."""
    _, model = pair(name, family)
    start = ["unpad", "embed_layer_norm", *PROJECTION.get(family, [])]
    with ops.record() as calls:
        whole = model(**batch(family)).last_hidden_state
    assert [c.op for c in calls] == [*start, "encoder_forward", "pad"]
    with ops.record() as calls:
        parts = model(**batch(family), output_hidden_states=True)
    assert [c.op for c in calls] == [*start, *["pad", "encoder_forward"] * 2, "pad"]
    assert torch.equal(parts.last_hidden_state, whole)
    with torch.enable_grad(), ops.record() as calls:
        model(**batch(family))
    assert "encoder_forward" not in [c.op for c in calls]


@pytest.mark.parametrize(("family", "name"), BASES)
def test_no_built_in_computes_between_the_ops(family, name, monkeypatch):
    """From the embeddings to the last layer nothing runs outside a declared op but views and the care for weights."""
    views = {"view", "unflatten", "flatten", "detach", "alias", "split", "as_strided", "select", "slice", "t"}
    weights = {
        "cat",
        "equal",
        "watch_holds",
        "isa",
    }  # q, k and v's bias, and the look whether a weight changed
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
    for op in ops.ALL:
        monkeypatch.setattr(op, "dispatch", counted(f"op {op.name}", op.dispatch))
    for backends, layers in ((("torch",), LAYER * 2), (("cpu", "torch"), ["encoder_forward"])):
        if "cpu" in backends and not ops.encodes(torch.device("cpu"), torch.float32):
            continue
        with fastbert.use_backend(*backends):
            model(**inputs)  # prepares the weights
            seen.clear()
            with Watch():
                model(**inputs)
        between = seen[seen.index("op embed_layer_norm") + 1 : seen.index("op pad")]
        outside = {name for name in between if not name.startswith("op ")}
        assert outside <= views | weights, outside - views - weights
        called = [name.removeprefix("op ") for name in between if name.startswith("op ")]
        assert called == PROJECTION.get(family, []) + layers


@pytest.mark.parametrize(("family", "name"), HEADS + BASES)
def test_outputs_have_the_stock_classes_and_fields(family, name):
    expected, model = pair(name, family)
    inputs = head_batch(name, family)
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
    assert type(model) is fastbert.BertForMaskedLM and type(model.bert) is fastbert.BertModel
    assert isinstance(model, transformers.BertForMaskedLM) and type(model).__name__ == "BertForMaskedLM"
    assert isinstance(model.bert, transformers.BertModel) and type(model.bert).__name__ == "BertModel"
    assert repr(model) == repr(before)
    assert fastbert.restore(model) is model
    assert type(model) is transformers.BertForMaskedLM and type(model.bert) is transformers.BertModel
    assert "_fastbert" not in model.bert.__dict__
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


def saved(model, folder):
    """The files that a model saves: name → bytes."""
    model.save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("family", "name"), ALL_HEADS + ALL_BASES)
def test_classes_by_import_and_accelerated_ones_are_the_stock_ones_made_fast(family, name, tmp_path):
    """Nothing that a user can save or print tells them from the stock class, but the module of the class."""
    expected = stock(name, family)
    files, text = saved(expected, tmp_path / "stock"), repr(expected)
    loaded = getattr(fastbert, name).from_pretrained(tmp_path / "stock").eval()
    accelerated = fastbert.accelerate(copy.deepcopy(expected))
    for ours in (loaded, accelerated, pickle.loads(pickle.dumps(loaded)), copy.deepcopy(accelerated)):
        assert type(ours).__name__ == name and isinstance(ours, getattr(transformers, name)) and repr(ours) == text
        assert list(ours.state_dict()) == list(expected.state_dict())
        if family not in REFUSED and "QuestionAnswering" not in name:
            ours(**head_batch(name, family))
            assert reasons(ours) == [""]
    assert type(loaded).__module__ == "fastbert"
    assert saved(loaded, tmp_path / "loaded") == files == saved(accelerated, tmp_path / "accelerated")
    assert loaded.config.architectures == accelerated.config.architectures == [name]
    restored = fastbert.restore(accelerated)
    assert type(restored) is getattr(transformers, name) and saved(restored, tmp_path / "restored") == files


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_a_family_has_every_head_that_transformers_has(family):
    module = importlib.import_module(getattr(transformers, family.model).__module__)
    assert set(family.heads) == {name for name in module.__all__ if "For" in name or "LMHead" in name}


@pytest.mark.parametrize("name", AUTO_CLASSES)
def test_auto_classes(name, tmp_path):
    """Every Auto class that knows one of our families, for every family that it knows."""
    ours, theirs, made = getattr(fastbert, name), getattr(transformers, name), []
    for family, _ in ALL_BASES:
        own = config_for(name, family)
        if type(own) not in theirs._model_mapping:
            continue
        model = ours.from_config(own).eval()
        made.append(model)
        assert type(model).__name__ == type(theirs.from_config(own)).__name__
        if family in REFUSED or "QuestionAnswering" in name:
            continue
        model(**head_batch(name, family))
        assert reasons(model) == [""]
    assert made or name == "AutoModelForSeq2SeqLM"
    for model in made[:1]:
        model.save_pretrained(tmp_path)
        loaded = ours.from_pretrained(tmp_path).eval()
        assert reasons(loaded) == [] and type(loaded).__name__ == type(model).__name__


def test_the_auto_class_of_an_encoder_and_decoder(tmp_path):
    encoder, decoder = config("bert"), config("bert", is_decoder=True, add_cross_attention=True)
    both = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    transformers.EncoderDecoderModel(both).save_pretrained(tmp_path)
    model = fastbert.AutoModelForSeq2SeqLM.from_pretrained(tmp_path).eval()
    model(**batch("bert"), decoder_input_ids=torch.ones(4, 2, dtype=torch.long))
    assert reasons(model) == [""]
    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        fastbert.AutoModelForSeq2SeqLM.from_config(encoder)


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
    others = {"explain", "pool", "quantize", "restore", "use_backend", "use_batch_invariant"}
    assert set(fastbert.__all__) == {*PUBLIC_CLASSES, *others}
    for name in fastbert.__all__:
        assert getattr(fastbert, name) is not None


class OlderTransformers:
    """A transformers that has no ERNIE."""

    def __getattr__(self, name):
        if name.startswith("Ernie"):
            raise AttributeError(f"module transformers has no attribute {name}")
        return getattr(transformers, name)


def test_a_class_that_transformers_lacks_is_missing_by_name_only(monkeypatch):
    expected = stock("BertForMaskedLM", "bert")
    monkeypatch.setattr("fastbert.hf.transformers", OlderTransformers())
    for make, name in [(head_class, "ErnieForMaskedLM"), (fast_class, ERNIE)]:
        with pytest.raises(AttributeError, match="no attribute Ernie"):
            make.__wrapped__(name)  # not out of the cache of another test
    model = fastbert.accelerate(expected)
    model(**batch("bert"))
    assert reasons(model) == [""] and type(fastbert.restore(model)) is transformers.BertForMaskedLM


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
    assert "bert (BertModel): fast path" in text
    assert "1 forward so far: fast" in text and "packed copies of weights" in text
    assert "\n  attention: cpu" in text and "\n  unpad: cpu" in text
    assert f"\n  linear: {ops.packer(torch.device('cpu'), torch.float32)}" in text
    with fastbert.use_backend("reference"):
        assert "\n  attention: reference" in str(fastbert.explain(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_residual_stream_is_float32_on_a_cpu(dtype, monkeypatch):
    """Products in the model's dtype; what is added to them, and what LayerNorm makes of it, in float32."""
    _, model = pair("BertModel", "bert")
    found, stock_op = set(), ops.add_layer_norm

    def seen(x, bias, residual, *rest):
        outputs = stock_op(x, bias, residual, *rest)
        found.add((x.dtype, residual.dtype, outputs[0].dtype))
        return outputs

    monkeypatch.setattr(ops, "add_layer_norm", seen)
    with fastbert.use_backend("torch"):
        output = model.to(dtype)(**batch("bert"), output_hidden_states=True)
    assert found == {(dtype, torch.float32, torch.float32)}
    assert {x.dtype for x in (output.last_hidden_state, *output.hidden_states)} == {dtype}


def test_backends_agree_on_a_whole_model(monkeypatch):
    monkeypatch.setattr(native, "_emulated", "")  # as where no other test has loaded the emulated CUDA kernels
    expected, model = pair("BertModel", "bert")
    inputs = batch("bert")
    with fastbert.use_backend("reference"), ops.record() as calls:
        assert_parity(expected, model, **inputs)
    assert {c.backend for c in calls} == {"reference"}
    with fastbert.use_backend("cuda"), pytest.raises(ops.BackendRefused, match="cuda: it runs on cuda, not on cpu"):
        model(**inputs)
