"""Fine-tunes a real checkpoint with HuggingFace and with fastbert, step by step in turns, on a task of real text.

    python -m benchmarks.fine_tune [--steps 200] [--dropout 0.0] [--json FILE] [--plot FILE]

The task: from which package of the standard library a docstring comes. Both runs start from the same weights and see
the same batches; a pair of steps is timed on the same batch. With dropout 0 the loss curves must agree within the noise
of the arithmetic, which further HuggingFace runs show: the same but for the order of the sums (rows of each batch in
another order, eager for sdpa attention). Exit code 1: they do not agree, or a forward was not fast.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import random
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import fastbert
from fastbert import bench, checkpoint, workloads
from fastbert.models.families import position_limit
from fastbert.parity import MAX_FACTOR, ROUNDING_FACTOR, ROUNDING_OFFSET
from fastbert.provenance import provenance
from fastbert.workloads import Batch

PACKAGES = ("asyncio", "email", "importlib", "logging", "multiprocessing", "tkinter", "unittest", "xml")
TEXTS_OF_A_PACKAGE, HELD_OUT = 240, 0.2
BATCH_SIZE, LONGEST, LEARNING_RATE, SEED = 16, 256, 1e-4, 0
STOCK, OURS = "HuggingFace", "fastbert"
NOISE_RUNS = 2
Example = tuple[Batch, torch.Tensor]  # texts, labels [B]


@dataclasses.dataclass(frozen=True)
class Task:
    """Batches of texts with labels: `train` in the order of the steps, `held_out` once."""

    train: list[Example]
    held_out: list[Example]
    texts: int
    held_out_texts: int

    @property
    def fill(self) -> float:
        """Real tokens over padded tokens of the steps."""
        batches = [batch for batch, _ in self.train]
        return sum(b.real_tokens for b in batches) / sum(b.padded_tokens for b in batches)


@dataclasses.dataclass
class Run:
    """One model in training: its losses, and the seconds of each step."""

    model: Any
    optimizer: torch.optim.Optimizer
    losses: list[float] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)

    def step(self, example: Example, dtype: str) -> None:
        """One step of AdamW on a batch."""
        batch, labels = example
        begin = time.perf_counter()
        with autocast(dtype):
            loss = self.model(**batch.inputs(), labels=labels).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.seconds.append(time.perf_counter() - begin)
        self.losses.append(loss.item())

    def accuracy(self, examples: Sequence[Example], dtype: str) -> float:
        """The share of texts whose package is named."""
        right = total = 0
        self.model.eval()
        with torch.inference_mode(), autocast(dtype):
            for batch, labels in examples:
                right += int((self.model(**batch.inputs()).logits.argmax(1) == labels).sum())
                total += len(labels)
        return right / total


@dataclasses.dataclass(frozen=True)
class Result:
    """One dtype.

    Args:
        difference: the largest between the loss curves of HuggingFace and fastbert.
        noise: the largest between those of HuggingFace; None, as is `passed`: with dropout nothing is judged.
        fast: every forward of ours was.
    """

    dtype: str
    losses: dict[str, list[float]]
    seconds: dict[str, list[float]]
    speedup: bench.Ratio
    difference: float
    noise: float | None
    accuracy: dict[str, float]
    fast: bool
    passed: bool | None


def autocast(dtype: str) -> contextlib.AbstractContextManager[Any]:
    """bf16: autocast; fp32: nothing."""
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16")


def make_task(tokenizer: Any, steps: int, longest: int) -> Task:
    """The docstrings of PACKAGES, shuffled with a fixed seed; batches go round the training texts."""
    library = Path(sysconfig.get_paths()["stdlib"])
    labelled = [
        (text, label)
        for label, package in enumerate(PACKAGES)
        for text in workloads.standard_library_docstrings(library / package)[:TEXTS_OF_A_PACKAGE]
    ]
    generator = random.Random(SEED)
    generator.shuffle(labelled)
    held = round(len(labelled) * HELD_OUT)
    held_out, training = labelled[:held], labelled[held:]
    order: list[tuple[str, int]] = []
    while len(order) < steps * BATCH_SIZE:
        order += generator.sample(training, len(training))
    return Task(
        [make_batch(order[i * BATCH_SIZE : (i + 1) * BATCH_SIZE], tokenizer, longest) for i in range(steps)],
        [make_batch(held_out[i : i + BATCH_SIZE], tokenizer, longest) for i in range(0, held, BATCH_SIZE)],
        len(training),
        held,
    )


def make_batch(labelled: Sequence[tuple[str, int]], tokenizer: Any, longest: int) -> Example:
    """Texts cut at `longest` tokens and padded to their longest, and their labels."""
    texts, labels = zip(*labelled, strict=True)
    made = tokenizer(list(texts), truncation=True, max_length=longest, padding=True, return_tensors="pt")
    lengths = tuple(made["attention_mask"].sum(1).tolist())
    batch = Batch(made["input_ids"], made["attention_mask"], made.get("token_type_ids"), lengths)
    return batch, torch.tensor(labels)


def reordered(example: Example, seed: int) -> Example:
    """The same rows in another order."""
    batch, labels = example
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    types = None if batch.token_type_ids is None else batch.token_type_ids[order]
    lengths = tuple(batch.lengths[i] for i in order.tolist())
    return Batch(batch.input_ids[order], batch.attention_mask[order], types, lengths), labels[order]


def start(model: str, dropout: float, attention: str = "sdpa") -> Run:
    """A stock model of the checkpoint with a classification head, the same at every call, and its optimizer."""
    torch.manual_seed(SEED)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(
        model,
        num_labels=len(PACKAGES),
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        attn_implementation=attention,
    )
    return Run(loaded.train(), torch.optim.AdamW(loaded.parameters(), lr=LEARNING_RATE))


def compare(model: str, task: Task, dtype: str, dropout: float, advance: Callable[[], object]) -> Result:
    """Both runs in turns, then the noise runs, which are not timed."""
    runs = {STOCK: start(model, dropout), OURS: start(model, dropout)}
    fastbert.accelerate(runs[OURS].model)
    for example in task.train:
        for run in runs.values():
            run.step(example, dtype)
        advance()
    fast = all(base.calls.keys() == {""} for base in fastbert.explain(runs[OURS].model).models)
    losses = {name: run.losses for name, run in runs.items()}
    difference, noise, passed = apart(losses[STOCK], losses[OURS]), None, None
    if not dropout:
        for i in range(NOISE_RUNS):
            again = start(model, dropout, "eager")
            for step, example in enumerate(task.train):
                again.step(reordered(example, NOISE_RUNS * step + i), dtype)
                advance()
            losses[f"{STOCK}, sums in order {i + 2}"] = again.losses
        noise = max(apart(losses[STOCK], curve) for name, curve in losses.items() if name not in runs)
        passed = difference <= MAX_FACTOR * noise + rounding(losses[STOCK])
    seconds = {name: run.seconds for name, run in runs.items()}
    return Result(
        dtype,
        losses,
        seconds,
        bench.ratio(seconds[STOCK], seconds[OURS]),
        difference,
        noise,
        {name: run.accuracy(task.held_out, dtype) for name, run in runs.items()},
        fast,
        passed,
    )


def apart(one: Sequence[float], other: Sequence[float]) -> float:
    """The largest difference of two curves."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def rounding(curve: Sequence[float]) -> float:
    """What the parity rule allows for rounding of numbers of this size: losses are float32."""
    base = torch.tensor(curve, dtype=torch.float32)
    return ROUNDING_FACTOR * float(((base + ROUNDING_OFFSET - ROUNDING_OFFSET) - base).abs().max())


def table_of(results: Sequence[Result], title: str) -> Table:
    """One line a dtype."""
    table = Table(title=title, title_justify="left", header_style="bold")
    table.add_column("dtype", no_wrap=True)
    for name in ("HF ms", "ours ms", "x HF", "apart", "noise", "accuracy", "agree"):
        table.add_column(name, justify="right", no_wrap=True)
    for r in results:
        table.add_row(
            r.dtype,
            *(f"{bench.summarize(r.seconds[name]).median * 1e3:.0f}" for name in (STOCK, OURS)),
            f"{r.speedup.median:.2f}",
            f"{r.difference:.1e}",
            "-" if r.noise is None else f"{r.noise:.1e}",
            "/".join(f"{100 * r.accuracy[name]:.1f}" for name in (STOCK, OURS)),
            {True: "yes", False: "NO", None: "-"}[r.passed] if r.fast else "NOT FAST",
        )
    return table


def plot(results: Sequence[Result], path: Path) -> None:
    """Loss curves above, their distance from HuggingFace's below, one column a dtype."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(results), figsize=(6 * len(results), 6), squeeze=False, sharex=True)
    for (above, below), r in zip(axes.T, results, strict=True):
        above.set_title(r.dtype)
        above.plot(r.losses[STOCK], color="#9aa5b1", linewidth=3, label=STOCK)
        above.plot(r.losses[OURS], color="#d9480f", linewidth=1, label=OURS)
        above.legend()
        for name, curve in r.losses.items():
            if name != STOCK:
                distance = [max(abs(a - b), 1e-9) for a, b in zip(curve, r.losses[STOCK], strict=True)]
                below.semilogy(distance, color="#d9480f" if name == OURS else "#9aa5b1", linewidth=1, label=name)
        below.legend()
        below.set_xlabel("step")
    axes[0, 0].set_ylabel("loss")
    axes[1, 0].set_ylabel("|loss - HuggingFace's|")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


@contextlib.contextmanager
def quiet_loading() -> Iterator[None]:
    """transformers says at every load that the head is new."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)
        transformers.logging.enable_progress_bar()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fine_tune", description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="a folder; default: the demo checkpoint")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--dropout", type=float, default=0.0, help="above 0 curves are shown, not judged")
    parser.add_argument("--dtypes", default="fp32,bf16", help="bf16 is autocast")
    parser.add_argument("--json", type=Path, metavar="FILE", help="everything, with raw samples and provenance")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="loss curves (PNG)")
    given = parser.parse_args(arguments)
    model, console = checkpoint.resolve(given.model), Console()
    before = provenance()
    longest = min(LONGEST, position_limit(transformers.AutoConfig.from_pretrained(model)))
    task = make_task(checkpoint.load_tokenizer(model), given.steps, longest)
    dtypes = given.dtypes.split(",")
    total = len(dtypes) * given.steps * (1 if given.dropout else 1 + NOISE_RUNS)
    with quiet_loading(), Progress(console=console, transient=True) as progress:
        bar = progress.add_task("fine-tuning", total=total)
        results = [compare(model, task, dtype, given.dropout, lambda: progress.advance(bar)) for dtype in dtypes]
    words = (
        f"{checkpoint.title(model)}: {given.steps} steps of AdamW, dropout {given.dropout}, {len(PACKAGES)} classes, "
        f"{task.texts} docstrings to train on and {task.held_out_texts} held out, batches of {BATCH_SIZE} cut at "
        f"{longest} tokens, fill {task.fill:.2f}, {torch.get_num_threads()} threads"
    )
    console.print(words)
    console.print(table_of(results, "A step's median time, curves apart, accuracy (HF/ours, %)"))
    for r in results:
        console.print(
            f"{r.dtype}: loss {r.losses[OURS][0]:.3f} → {r.losses[OURS][-1]:.3f}; x HF over pairs of steps "
            f"{r.speedup.median:.2f} (95% interval {r.speedup.low:.2f}-{r.speedup.high:.2f})"
        )
    if given.json:
        found = {"format": 1, "task": words, "steps": given.steps, "dropout": given.dropout, "fill": task.fill}
        found |= {"provenance": before, "results": [dataclasses.asdict(r) for r in results]}
        given.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if given.plot:
        plot(results, given.plot)
    return 0 if all(r.fast and r.passed is not False for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
