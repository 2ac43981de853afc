"""Whole models against HuggingFace by the parity rule: `fastbert parity [MODEL]`, and the gate before any timing.

    report = parity_models.run(None, ["fp32", "bf16"])     # None: the demo checkpoint; a folder, a hub id, a module
    report.passed, report.worst, report.rows, report.as_dict()
    comparison = parity_models.compare_models(stock, inputs, torch.bfloat16)     # one dtype, inputs of one's own

Three runs on the same real tokens: ref is the stock model in float64 with weights rounded to the tested dtype, base the
stock model in that dtype, ours an accelerated copy. Judged are real positions only.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import itertools
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastbert
from fastbert import checkpoint, ops, workloads
from fastbert.bench import Progress, quiet
from fastbert.dtypes import DTYPES, dtype_name
from fastbert.models.families import position_limit
from fastbert.parity import judge

# At and beside tile sizes; then short rows, because outputs of one row a sequence need rows to be judged by.
LENGTHS = (512, 511, 128, 127, 65, 64, 63, 17, 16, 15, 1, *range(2, 15))
# Of a tensor whose rms passes and whose largest error does not. HuggingFace's own error at an ill-conditioned token
# differs tenfold between inputs that differ by one rounding: that of one run says little (docs/numerics.md).
DRAWS = 8
# The only [B, S] outputs, by class and field; other 2-D ones are one row a sequence.
TOKEN_LOGITS = ("start_logits", "end_logits", "ElectraForPreTrainingOutput.logits")


@dataclass(frozen=True)
class Row:
    """One tensor of one dtype. Ratios are measured / allowed (parity.Verdict); layer 0 is the embeddings' output."""

    tensor: str  # "hidden_states.3", "last_hidden_state", "pooler_output", "logits", ...
    dtype: str  # "fp32", ...
    layer: int | None
    max_ratio: float
    rms_ratio: float
    max_error: float
    passed: bool
    note: str = ""

    @property
    def ratio(self) -> float:
        return max(self.max_ratio, self.rms_ratio)


@dataclass(frozen=True)
class Comparison:
    """One model in one dtype: its rows, the op calls of our forward, and whether that was the fast path.

    `why` is `explain`'s text when it was not: then nothing was compared with anything, and `passed` is False.
    """

    rows: tuple[Row, ...]
    calls: Mapping[str, int]  # op name → calls in the one forward
    fast: bool
    why: str = ""

    @property
    def passed(self) -> bool:
        return self.fast and bool(self.rows) and all(row.passed for row in self.rows)

    @property
    def worst(self) -> Row:
        return max(self.rows, key=lambda row: row.ratio)


@dataclass(frozen=True)
class ParityReport:
    """What `run` found. `model` is a hub id, a folder's name or a class; `inputs` says what the models were run on."""

    model: str
    inputs: str
    lengths: tuple[int, ...]
    comparisons: Mapping[str, Comparison]  # dtype → comparison

    @property
    def rows(self) -> tuple[Row, ...]:
        return tuple(row for comparison in self.comparisons.values() for row in comparison.rows)

    @property
    def passed(self) -> bool:
        return bool(self.comparisons) and all(c.passed for c in self.comparisons.values())

    @property
    def worst(self) -> Row:
        """The row with the largest ratio of all dtypes."""
        return max(self.rows, key=lambda row: row.ratio)

    @property
    def worst_layer(self) -> Row | None:
        """The hidden state with the largest ratio of all dtypes; its `layer` is the number of layers before it."""
        return max((r for r in self.rows if r.layer is not None), key=lambda row: row.ratio, default=None)

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        worst_layer = self.worst_layer
        return {
            "model": self.model,
            "inputs": self.inputs,
            "lengths": list(self.lengths),
            "passed": self.passed,
            "worst": dataclasses.asdict(self.worst) if self.rows else None,
            "worst_layer": dataclasses.asdict(worst_layer) if worst_layer else None,
            "dtypes": {
                name: {"passed": c.passed, "fast": c.fast, "why": c.why, "calls": dict(c.calls)}
                for name, c in self.comparisons.items()
            },
            "rows": [dataclasses.asdict(row) for row in self.rows],
        }


def run(
    model: str | nn.Module | None,
    dtypes: Sequence[str | torch.dtype] = ("fp32", "bf16"),
    *,
    lengths: Sequence[int] = LENGTHS,
    inputs: Mapping[str, Tensor] | None = None,
    device: str = "cpu",
    progress: Progress = quiet,
) -> ParityReport:
    """Judges a model in each dtype.

    Args:
        model: a folder, a hub id, None for the demo checkpoint, or a module, which is copied and not changed.
        dtypes: names ("fp32", "bfloat16", ...) or torch dtypes.
        lengths: of the ragged batch, cut to the model's positions; its ids are real text where the checkpoint has a
            tokenizer, else random.
        inputs: keyword arguments of the forward, instead of that batch.
        progress: called before the model is loaded, and in each dtype before and after every forward and the judging.

    Raises:
        checkpoint.CheckpointError: there is no such checkpoint, or it cannot be loaded.
        ValueError: an unknown dtype.
    """
    wanted = [dtype_name(dtype) for dtype in dtypes]
    stock: Any
    if isinstance(model, nn.Module):
        name, stock, text = type(model).__name__, model, None
    else:
        place = checkpoint.resolve(model)
        name = checkpoint.public_name(place)
        progress(f"loading {name}", 0, 1)
        stock = load(place)
        text = text_ids(place, sum(lengths), stock.config.vocab_size)
        progress(f"loading {name}", 1, 1)
    if inputs is None:
        config: Any = stock.config
        limit = position_limit(config)
        lengths = tuple(min(n, limit) for n in lengths)
        inputs = ragged_batch(stock, lengths, text=text)
        if type(stock).__name__.endswith("MultipleChoice"):  # [B, 1, S]: one choice a row
            # ERNIE's head does not take task types apart
            inputs = {name: x[:, None] for name, x in inputs.items() if name != "task_type_ids"}
        words = "text of the standard library's docstrings" if text else "random ids"
    else:
        lengths, words = tuple(real_mask(inputs).sum(1).tolist()), "given inputs"
    comparisons = {}
    for dtype in wanted:
        comparisons[dtype] = compare_models(stock, inputs, DTYPES[dtype], device=device, progress=progress)
    return ParityReport(name, words, tuple(lengths), comparisons)


def compare_models(
    stock: nn.Module,
    inputs: Mapping[str, Tensor],
    dtype: torch.dtype,
    *,
    labels: Mapping[str, Tensor] | None = None,
    device: str = "cpu",
    accelerate: Callable[[nn.Module], nn.Module] | None = None,
    progress: Progress = quiet,
) -> Comparison:
    """Judges every floating output of an accelerated copy of `stock` in `dtype` on `inputs`.

    `stock` is not changed; if it is accelerated its copies are restored first. Hidden states are asked for. The stock
    runs take the batch in parts of like length, which have less padding; ours is one forward.

    A tensor that only its largest error fails is judged once more, by the same rule, over `DRAWS` draws together: in
    each of the others the embedding tables' numbers are moved by about one rounding step, alike in all three runs.

    Args:
        labels: further arguments, rows first, with which the model returns a loss (labels, start_positions …). The loss
            is judged as the row "loss", token by token or row by row: see `unreduced_losses`. Labels of masked
            positions must be -100.
        accelerate: makes the copy fast; default `fastbert.accelerate` with pad rows of zeros, which are not judged.
        progress: called before and after every forward and the judging.
    """
    inputs = {name: x.to(device) for name, x in inputs.items()}
    labels = {name: x.to(device) for name, x in (labels or {}).items()}
    make = accelerate or functools.partial(fastbert.accelerate, pad_output="zeros")
    parts = len(like_lengths(inputs))  # stock runs them twice; ours is one forward more, then the judging

    def draw(number: int) -> tuple[list[dict[str, Tensor]], Counter[str], nn.Module]:
        """Outputs of ours, ref and base; the op calls of ours; our model."""
        phase = f"parity, {dtype_name(dtype)}" + (f", draw {number + 1} of {DRAWS}" if number else "")
        steps = itertools.count()

        def step() -> None:
            progress(phase, next(steps), 2 * parts + 2)

        step()
        base_model = fastbert.restore(copy.deepcopy(stock)).to(device=device, dtype=dtype).eval()
        if number:
            nudge(base_model, number)
        ours_model = make(copy.deepcopy(base_model))
        with torch.inference_mode():
            with ops.record() as calls:
                ours = collect(ours_model, inputs, labels, step)
            base = collect(base_model, inputs, labels, step, parts=True)
            ref = collect(base_model.double(), inputs, labels, step, parts=True)
        step()
        return [ours, ref, base], Counter(call.op for call in calls), ours_model

    first, counts, ours_model = draw(0)
    verdicts = {name: judge(first[0][name], first[1][name], first[2][name]) for name in first[0]}
    places = {name: f"worst at {list(verdict.index)}" for name, verdict in verdicts.items()}
    again = [name for name, v in verdicts.items() if v.max_ratio > 1 >= v.rms_ratio]
    if again:
        draws = [first, *([{name: run[name] for name in again} for run in draw(n)[0]] for n in range(1, DRAWS))]
        for name in again:
            ours, ref, base = (torch.cat([runs[which][name] for runs in draws]) for which in range(3))
            verdicts[name] = judge(ours, ref, base)
            number, row = divmod(verdicts[name].index[0], len(first[0][name]))
            places[name] = f"worst at {[row, *verdicts[name].index[1:]]} of draw {number + 1} of {DRAWS}"
    fast = counts["attention"] + counts["encoder_forward"] == layers(stock) > 0  # all hidden states: a layer a call
    rows = []
    for name, verdict in verdicts.items():
        layer = int(name.rpartition(".")[2]) if name.startswith("hidden_states.") else None
        rows.append(
            Row(name, dtype_name(dtype), layer, verdict.max_ratio, verdict.rms_ratio, verdict.max_error,
                verdict.passed, verdict.note or places[name])
        )  # fmt: skip
    return Comparison(tuple(rows), dict(counts), fast, "" if fast else str(fastbert.explain(ours_model)))


@torch.no_grad()
def nudge(model: nn.Module, seed: int) -> None:
    """Moves every number of the embedding tables by about one rounding step up, down, or not at all."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            weight = module.weight
            ways = torch.randint(-1, 2, weight.shape, generator=generator).to(weight.device)
            weight.copy_(weight.double() * (1 + ways * torch.finfo(weight.dtype).eps))


def collect(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    labels: Mapping[str, Tensor],
    step: Callable[[], object] = lambda: None,
    parts: bool = False,
) -> dict[str, Tensor]:
    """Every floating output by name, hidden states first: per-token ones [T, ...] of real positions, others [B, ...].

    Args:
        labels: further arguments that make the model return a loss.
        step: called after every forward.
        parts: run rows of like length together, cut to their longest (where the mask is padded on the right).
    """
    shape = inputs["input_ids"].shape
    lengths = real_mask(inputs).view(*shape).sum(-1)
    arguments = {**inputs, **labels}
    along_tokens = {name for name, x in arguments.items() if x.shape == shape}
    found: dict[str, list[tuple[int, Tensor]]] = {}
    for rows in like_lengths(inputs) if parts else [list(range(len(lengths)))]:
        part = {name: x[rows] for name, x in arguments.items()}
        if parts:
            width = max(int(lengths[rows].max()), 1)
            part = {name: x[..., :width].contiguous() if name in along_tokens else x for name, x in part.items()}
        real = real_mask(part)
        with unreduced_losses(len(rows)):
            output = model(**part, output_hidden_states=True, return_dict=True)
        step()
        token_loss = "labels" in along_tokens
        for name, x in named_outputs(output):
            is_token_logits = bool({name, f"{type(output).__name__}.{name}"} & {*TOKEN_LOGITS})
            per_token = x.dim() > 2 or is_token_logits or (name == "loss" and token_loss and x.shape == real.shape)
            if name == "loss" and token_loss and x.dim() == 1:  # ELECTRA's discriminator: one number a real token
                pieces: Sequence[Tensor] = torch.split(x, real.sum(1).tolist())
            else:
                each = len(x) // len(rows)  # choices of a multiple-choice row
                choices = [slice(i * each, (i + 1) * each) for i in range(len(rows))]
                pieces = [x[mine][real[mine]] if per_token else x[mine] for mine in choices]
            found.setdefault(name, []).extend(zip(rows, pieces, strict=True))
    return {name: torch.cat([x for _, x in sorted(pairs, key=lambda p: p[0])]) for name, pairs in found.items()}


@contextlib.contextmanager
def unreduced_losses(rows: int) -> Iterator[None]:
    """Within it, HuggingFace's losses are no means but what they are means of: one mean is too noisy to be judged.

    A cross entropy over the tokens of `rows` sequences gives [rows, S], 0 where the label is -100; one over sequences
    [rows, 1]; losses of one number a label the shape of the labels. A float64 model's loss is float64, which
    HuggingFace would round by `logits.float()`. It exchanges torch's functions for a while, so it is not for programs
    that compute losses in other threads at that time.
    """
    functional: Any = torch.nn.functional
    tensor: Any = Tensor
    names = ("cross_entropy", "binary_cross_entropy_with_logits", "mse_loss")
    stock = {name: getattr(functional, name) for name in names}
    to_float = tensor.float

    def unreduced(name: str) -> Callable[..., Tensor]:
        def loss(logits: Tensor, target: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            target = target.to(logits.dtype) if target.is_floating_point() else target
            each: Tensor = stock[name](logits, target, *args, **{**kwargs, "reduction": "none"})
            return each.view(rows, -1) if name == "cross_entropy" else each

        return loss

    for name in names:
        setattr(functional, name, unreduced(name))
    tensor.float = lambda x: x if x.dtype == torch.float64 else to_float(x)
    try:
        yield
    finally:
        del tensor.float  # its own is inherited
        for name in names:
            setattr(functional, name, stock[name])


def named_outputs(output: Any) -> Iterable[tuple[str, Tensor]]:
    """(name, tensor) of a model output's floating tensors, hidden states first; a tuple's items as "name.i"."""
    for name, value in sorted(output.items(), key=lambda item: item[0] != "hidden_states"):
        for i, x in enumerate(value) if isinstance(value, tuple) else [(None, value)]:
            if isinstance(x, Tensor) and x.is_floating_point():
                yield (name if i is None else f"{name}.{i}"), x


def real_mask(inputs: Mapping[str, Tensor]) -> Tensor:
    """Which positions are real: bool [rows, S], a multiple-choice batch's choices as rows."""
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    return mask.view(-1, mask.shape[-1]) != 0


def like_lengths(inputs: Mapping[str, Tensor]) -> list[list[int]]:
    """Row numbers in groups of like length, longest first; one group of all unless the mask is right-padded and 2-D."""
    real, count = real_mask(inputs), len(inputs["input_ids"])
    lengths = real.sum(1)
    width = {x.shape[-1] for x in inputs.values()}
    if len(width) > 1 or not torch.equal(real, torch.arange(real.shape[1], device=real.device) < lengths[:, None]):
        return [list(range(count))]
    longest = lengths.view(count, -1).max(1).values.tolist()
    groups: list[list[int]] = []
    for row in sorted(range(count), key=lambda i: -longest[i]):
        if not groups or longest[row] < 0.8 * longest[groups[-1][0]] - 8:
            groups.append([])
        groups[-1].append(row)
    return groups


def ragged_batch(
    model: nn.Module, lengths: Sequence[int], seed: int = 0, text: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """Keyword arguments of a forward: right-padded ids [B, S] and mask; token types where the model has two, all used.

    Args:
        text: token ids to cut the rows from; None: random ids.
    """
    config: Any = model.config
    generator = torch.Generator().manual_seed(seed)
    pad = config.pad_token_id or 0
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    real = torch.randint(0, config.vocab_size, (sum(lengths),), generator=generator)
    if text:
        real = torch.tensor(list(itertools.islice(itertools.cycle(text), sum(lengths))))
    real[real == pad] = (pad + 1) % config.vocab_size  # RoBERTa takes positions from where the pad id is not
    ids = torch.full_like(mask, pad)
    ids[mask != 0] = real
    inputs = {"input_ids": ids, "attention_mask": mask}
    if getattr(config, "type_vocab_size", 0) > 1:
        inputs["token_type_ids"] = (torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None] // 2).long() * mask
    if getattr(config, "use_task_id", False):
        inputs["task_type_ids"] = (torch.arange(max(lengths)) % config.task_type_vocab_size) * mask
    return inputs


def layers(model: nn.Module) -> int:
    """The number of encoder layers that the config names."""
    config: Any = model.config
    return int(config.num_hidden_layers)


def load(name: str) -> nn.Module:
    """The stock model of a folder or hub id in float32, as the class that its config names."""
    model: nn.Module = checkpoint.load_model(name, torch.float32, head=True)
    return model


def text_ids(name: str, count: int, vocab_size: int) -> list[int] | None:
    """At least `count` token ids of real text by the checkpoint's tokenizer; None where it has none.

    Raises:
        checkpoint.CheckpointError: an id is not below `vocab_size`.
    """
    tokenizer = checkpoint.load_tokenizer(name)
    if tokenizer is None:
        return None
    texts = workloads.standard_library_docstrings(Path(sysconfig.get_paths()["stdlib"]) / "asyncio")
    ids: list[int] = []
    for text in texts:
        if len(ids) < count:
            ids += tokenizer(text)["input_ids"]
    checkpoint.check_ids(name, tokenizer, max(ids, default=0), vocab_size)
    return ids or None
