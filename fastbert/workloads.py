"""Named workloads: which sequence lengths are timed, and where they come from.

A workload is either a fixed list of lengths (its token ids are random, seeded) or a list of real texts.
`batches(name, ...)` turns one into padded batches for a tokenizer or for a vocabulary size alone.
"""

from __future__ import annotations

import ast
import math
import random
import re
import sysconfig
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # the shell's completion asks for the names and cannot wait for torch
    import torch
    from torch import Tensor

SEED = 20240
_NOT_LIBRARY = {"test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "ensurepip", "_vendor"}
_NOT_LIBRARY |= {"site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Batch:
    """One right-padded batch; `lengths` counts the real tokens of each row."""

    input_ids: Tensor  # [B, S] int64
    attention_mask: Tensor  # [B, S] int64, 1 = real
    token_type_ids: Tensor | None  # [B, S] int64, zeros
    lengths: tuple[int, ...]

    @property
    def real_tokens(self) -> int:
        return sum(self.lengths)

    @property
    def padded_tokens(self) -> int:
        return self.input_ids.numel()

    def inputs(self) -> dict[str, Tensor]:
        """The keyword arguments of a model's forward."""
        named = {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        if self.token_type_ids is not None:
            named["token_type_ids"] = self.token_type_ids
        return named

    def to(self, device: torch.device | str) -> Batch:
        types = None if self.token_type_ids is None else self.token_type_ids.to(device)
        return replace(
            self,
            input_ids=self.input_ids.to(device),
            attention_mask=self.attention_mask.to(device),
            token_type_ids=types,
        )

    def widened(self, width: int, pad_id: int = 0) -> Batch:
        """The same rows padded to `width` columns (at least the present width)."""
        extra = width - self.input_ids.shape[1]
        if extra < 0:
            raise ValueError(f"width {width} is below the present {self.input_ids.shape[1]}")

        from torch.nn.functional import pad

        def wide(x: Tensor, value: int) -> Tensor:
            return pad(x, (0, extra), value=value)

        types = None if self.token_type_ids is None else wide(self.token_type_ids, 0)
        return replace(
            self,
            input_ids=wide(self.input_ids, pad_id),
            attention_mask=wide(self.attention_mask, 0),
            token_type_ids=types,
        )


@dataclass(frozen=True)
class Workload:
    """A name, its source in words, and either `rows` (lengths of one batch) or `texts`."""

    name: str
    source: str
    width: int  # columns of the batch; for texts: the longest a text may be
    batch_size: int
    rows: tuple[int, ...] = ()
    texts: Callable[[], list[str]] | None = None


@dataclass(frozen=True)
class Batches:
    """What `batches` returns: the batches and what was counted while they were made."""

    workload: str
    source: str
    batches: tuple[Batch, ...]
    tokenize_seconds: float | None  # None: ids are random, nothing was tokenized
    max_length: int

    @property
    def texts(self) -> int:
        return sum(len(b.lengths) for b in self.batches)

    @property
    def real_tokens(self) -> int:
        return sum(b.real_tokens for b in self.batches)

    @property
    def padded_tokens(self) -> int:
        return sum(b.padded_tokens for b in self.batches)

    @property
    def fill(self) -> float:
        """Real tokens over padded tokens, between 0 and 1."""
        return self.real_tokens / self.padded_tokens


def lognormal_lengths(count: int, width: int, median: float, sigma: float = 0.6, seed: int = SEED) -> tuple[int, ...]:
    """`count` lengths at the even quantiles of a lognormal (median `median * width` tokens), cut to 4..width.

    Quantiles rather than draws: a small batch then has the distribution's own fill. The longest is set to `width`
    so that a padded batch really has that width; the order is shuffled with `seed`.
    """
    normal = NormalDist(math.log(median * width), sigma)
    lengths = [round(math.exp(normal.inv_cdf((i + 0.5) / count))) for i in range(count)]
    lengths = [min(max(n, 4), width) for n in lengths]
    lengths[-1] = width
    random.Random(seed).shuffle(lengths)
    return tuple(lengths)


def uniform_lengths(count: int, width: int, shortest: int, seed: int = SEED) -> tuple[int, ...]:
    """`count` lengths evenly spread from `shortest` to `width`, shuffled with `seed`."""
    step = (width - shortest) / (count - 1)
    lengths = [round(shortest + i * step) for i in range(count)]
    random.Random(seed).shuffle(lengths)
    return tuple(lengths)


def standard_library_docstrings(root: Path | None = None) -> list[str]:
    """Every distinct docstring of the running Python's standard library, shuffled with a fixed seed.

    Modules, classes and functions, read with `ast` (nothing is imported); tests, IDLE and vendored packages are left
    out. The list depends on the Python version and on nothing else.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    found: set[str] = set()
    for path in root.rglob("*.py"):
        if _NOT_LIBRARY.isdisjoint(path.relative_to(root).parts):
            found.update(_docstrings(path))
    texts = sorted(found)
    random.Random(SEED).shuffle(texts)
    return texts


def _docstrings(path: Path) -> list[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return []
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    texts = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, owners))
    return [text for text in texts if text]


def _fixed(name: str, source: str, width: int, rows: Sequence[int]) -> Workload:
    return Workload(name, source, width, len(rows), rows=tuple(rows))


_ALL = (
    _fixed("dense-8x128", "8 rows of 128 tokens, no padding: the case in which nothing can be dropped", 128, [128] * 8),
    _fixed("ragged-16x256", "synthetic: 16 lognormal lengths (median 64, sigma 0.6) padded to 256", 256,
           lognormal_lengths(16, 256, 0.25)),
    _fixed("query-1x16", "one short query of 16 tokens: latency", 16, [16]),
    Workload("docstrings", "real English text: the docstrings of this Python's standard library, natural lengths, "
             "shuffled, batches of 32 padded to their longest", 512, 32, texts=standard_library_docstrings),
    _fixed("squad-like-8x384", "synthetic, no SQuAD text: 8 lognormal lengths (median 161) padded to 384, the width "
           "question answering on SQuAD is run at", 384, lognormal_lengths(8, 384, 0.42)),
    _fixed("squad-like-64x384", "synthetic, no SQuAD text: 64 lognormal lengths (median 161) padded to 384", 384,
           lognormal_lengths(64, 384, 0.42)),
    _fixed("uniform-16x512", "synthetic: 16 lengths evenly from 102 to 512, mean 0.6 of 512 (the setting of the "
           "ByteTransformer paper's BERT figure)", 512, uniform_lengths(16, 512, 102)),
    _fixed("dense-32x384", "32 rows of 384 tokens, no padding (the setting of FasterTransformer's BERT figures)", 384,
           [384] * 32),
)  # fmt: skip
WORKLOADS: dict[str, Workload] = {w.name: w for w in _ALL}


def get(name: str) -> Workload:
    """The workload called `name`; KeyError that lists the names where there is none."""
    if name not in WORKLOADS:
        raise KeyError(f"no workload is called {name!r}; there are: {', '.join(WORKLOADS)}")
    return WORKLOADS[name]


def batches(
    name: str,
    *,
    vocab_size: int,
    tokenizer: Any = None,
    max_length: int = 512,
    max_texts: int | None = None,
    sort: bool = False,
    token_types: bool = True,
    pad_id: int = 0,
) -> Batches:
    """The padded batches of a workload.

    Args:
        tokenizer: a HuggingFace tokenizer for workloads of texts; without one a text is as long as it has words and
            punctuation marks (plus two), and its ids are random.
        max_length: longer sequences are cut here.
        max_texts: for workloads of texts, take the first so many.
        sort: order the texts by token count before batching (what a careful user of a padded model does).
    """
    workload = get(name)
    seconds: float | None = None
    if workload.texts is None:
        rows = _random_ids([min(n, max_length) for n in workload.rows], vocab_size)
    else:
        texts = workload.texts()[:max_texts]
        if tokenizer is None:
            counts = [len(re.findall(r"\w+|[^\w\s]", text)) + 2 for text in texts]
            rows = _random_ids([min(n, max_length) for n in counts], vocab_size)
        else:
            begin = time.perf_counter()
            rows = tokenizer(texts, truncation=True, max_length=max_length, padding=False)["input_ids"]
            seconds = time.perf_counter() - begin
    if sort:
        rows = sorted(rows, key=len)
    size = workload.batch_size
    made = tuple(_pad(rows[i : i + size], token_types, pad_id) for i in range(0, len(rows), size))
    return Batches(name, workload.source, made, seconds, max_length)


def _random_ids(lengths: Sequence[int], vocab_size: int) -> list[list[int]]:
    low = min(1000, vocab_size // 2)  # above the special tokens of BERT's vocabularies
    generator = random.Random(SEED)
    return [[generator.randrange(low, vocab_size) for _ in range(n)] for n in lengths]


def _pad(rows: Sequence[Sequence[int]], token_types: bool, pad_id: int) -> Batch:
    import torch

    lengths = tuple(len(row) for row in rows)
    ids = torch.full((len(rows), max(lengths)), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
        mask[i, : len(row)] = 1
    return Batch(ids, mask, torch.zeros_like(ids) if token_types else None, lengths)
