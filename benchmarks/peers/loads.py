"""Which models run on which batches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.cases import TINY_CASES, Case, random_model
from fastbert import checkpoint, workloads
from fastbert.models.families import position_limit
from fastbert.workloads import Batch

WORKLOADS = {
    "dense": "dense-8x128",
    "ragged": "ragged-16x256",
    "docstrings": "docstrings",
    "query": "query-1x16",
}
BASE = Case("base", "BERT-base: what everyone knows", 12, 64, "dense-8x128")
TEXTS, CALIBRATED, DRY_TEXTS, DRY_LENGTH = 64, 32, 4, 32


def minilm() -> Any:
    """all-MiniLM-L6-v2 in fp32, without its pooler: every engine gives the last hidden state alone."""
    model = checkpoint.load_model(str(checkpoint.demo_folder()), torch.float32, head=False)
    model.pooler = None
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "minilm": minilm,
    "bert-base": lambda: random_model(BASE, BASE.layers, torch.float32, "cpu"),
}
DRY_MODELS: dict[str, Callable[[], Any]] = {"tiny": lambda: random_model(TINY_CASES[0], 1, torch.float32, "cpu")}


@dataclass(frozen=True)
class Load:
    """A workload's batches for a model; a call of an engine takes all of them."""

    name: str
    batches: tuple[Batch, ...]
    ids: str  # in words, where they come from

    @property
    def texts(self) -> int:
        return sum(len(batch.lengths) for batch in self.batches)

    @property
    def real_tokens(self) -> int:
        return sum(batch.real_tokens for batch in self.batches)

    @property
    def padded_tokens(self) -> int:
        return sum(batch.padded_tokens for batch in self.batches)


def load(name: str, model: Any, dry_run: bool = False) -> Load:
    """The batches of a workload."""
    if name == "docstrings":
        return docstrings(model, DRY_TEXTS if dry_run else TEXTS, DRY_LENGTH if dry_run else None)
    longest = DRY_LENGTH if dry_run else position_limit(model.config)
    made = workloads.batches(WORKLOADS[name], vocab_size=model.config.vocab_size, max_length=longest)
    return Load(name, made.batches, "random")


def docstrings(model: Any, count: int, longest: int | None = None) -> Load:
    """The first so many, tokenized as MiniLM does where that is installed and the ids fit; else of random ids."""
    tokenizer, limit = tokenizer_of_the_demo()
    if tokenizer is not None and len(tokenizer) > model.config.vocab_size:
        tokenizer, limit = None, position_limit(model.config)
    made = workloads.batches(
        WORKLOADS["docstrings"], vocab_size=model.config.vocab_size, tokenizer=tokenizer, max_texts=count,
        max_length=min(longest or limit, limit, position_limit(model.config)),
    )  # fmt: skip
    return Load("docstrings", made.batches, "random" if tokenizer is None else "the tokenizer of all-MiniLM-L6-v2")


def calibration(model: Any) -> list[Batch]:
    """Docstrings behind those that are timed, each alone: what quantization may look at."""
    found = []
    for batch in docstrings(model, TEXTS + CALIBRATED).batches[TEXTS // 32 :]:
        for ids, n in zip(batch.input_ids, batch.lengths, strict=True):
            mask = torch.ones(1, n, dtype=torch.int64)
            found.append(Batch(ids[None, :n].contiguous(), mask, torch.zeros_like(mask), (n,)))
    return found


@functools.cache
def tokenizer_of_the_demo() -> tuple[Any, int]:
    """MiniLM's tokenizer and where it cuts a text; None, 512: the checkpoint is not installed."""
    try:
        folder = str(checkpoint.demo_folder())
    except checkpoint.MissingModel:
        return None, 512
    tokenizer = checkpoint.load_tokenizer(folder)
    return tokenizer, checkpoint.text_limit(folder, tokenizer, 512)[0]
