"""What `fastbert` prints and draws: tables of rich, one plot of matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from fastbert.bench_model import OURS, SORTED, STOCK
from fastbert.checkpoint import title

if TYPE_CHECKING:
    from fastbert.bench import SpeedRow
    from fastbert.bench_model import Result
    from fastbert.parity_models import ParityReport

COLORS = {STOCK: "#9aa5b1", SORTED: "#5c6b7a", OURS: "#d9480f"}


def speed_tables(result: Result) -> list[Table]:
    """One table a workload, one line a row: time, throughput, times HF, fill, error, share of the GEMM peak, memory."""
    return [_speed_table(result, load["name"]) for load in result.workloads]


def _speed_table(result: Result, workload: str) -> Table:
    table = Table(title=f"Speed: {workload}", title_justify="left", header_style="bold")
    table.add_column("engine")
    table.add_column("dtype")
    for name in ("ms/batch", "texts/s", "tokens/s", "x HF", "fill", "rel. error", "GEMM peak", "memory"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in result.rows:
        if row.workload == workload:
            table.add_row(row.engine, row.dtype, *_figures(row), style="bold" if row.engine == OURS else None)
    return table


def _figures(row: SpeedRow) -> list[str]:
    fill, error = f"{row.fill:.2f}", "-" if row.relative_error is None else f"{row.relative_error:.1e}"
    if row.seconds is None:
        return ["parity failed", "-", "-", "-", fill, error, "-", "-"]
    return [
        _milliseconds(row.seconds.median),
        f"{row.texts_per_second:,.0f}",
        f"{row.tokens_per_second:,.0f}",
        _times(row),
        fill,
        "0" if error == "0.0e+00" else error,
        "-" if row.share_of_gemm_peak is None else f"{row.share_of_gemm_peak:.0%}",
        "-" if row.memory_bytes is None else f"{row.memory_bytes / 2**20:,.0f} MiB",
    ]


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}" if seconds < 0.1 else f"{seconds * 1e3:.0f}"


def _times(row: SpeedRow) -> str:
    if row.engine == STOCK or row.speedup is None:
        return "1"
    if row.speedup.median is None:
        return f"{row.speedup.of_totals:.2f}"
    return f"{row.speedup.median:.2f} [{row.speedup.low:.2f}-{row.speedup.high:.2f}]"


def notes(result: Result) -> list[str]:
    """The sentences under the table: what the columns mean and what was measured besides."""
    lines = []
    for load in result.workloads:
        seconds = load["tokenize_seconds"]
        took = "" if seconds is None else f"; tokenized beforehand in {seconds:.1f} s, not in the times"
        lines.append(
            f"{load['name']}: {load['source']}. {load['texts']:,} texts, {load['real_tokens']:,} real tokens, "
            f"fill {load['fill']:.2f}, cut at {load['cut_at']} tokens ({load['cut_at_source']}){took}."
        )
    lines.append(
        "x HF: median over pairs of neighbouring runs with its 95% interval; for sorted texts total over total. "
        "GEMM peak: encoder FLOPs on real tokens over the best product rate of this run "
        f"({_peaks(result)})."
    )
    for row in result.rows:
        if row.engine == SORTED and row.texts_per_second:
            lines += [_against_sorted(result, row)]
    for padding in result.padding_doubled:
        r = padding.ratio
        lines.append(
            f"Padding width doubled ({padding.workload}, {padding.dtype}): our time x {r.median:.3f} "
            f"[{r.low:.3f}-{r.high:.3f}]."
        )
    lines += [f"{row.engine}, {row.workload}, {row.dtype}: {row.note}" for row in result.rows if row.note]
    return lines


def _peaks(result: Result) -> str:
    found = [(k.removeprefix("gemm "), v) for k, v in result.limits.items() if k.startswith("gemm ")]
    return ", ".join(f"{dtype} {value['flops_per_second'] / 1e9:,.0f} GFLOP/s" for dtype, value in found)


def _against_sorted(result: Result, best: SpeedRow) -> str:
    rows = [r for r in result.rows if (r.workload, r.dtype, r.engine) == (best.workload, best.dtype, OURS)]
    where = f"Against HuggingFace on texts sorted by length ({best.workload}, {best.dtype})"
    if not rows or not rows[0].texts_per_second or not best.texts_per_second:
        return f"{where}: no speed of ours."
    return f"{where}: x {rows[0].texts_per_second / best.texts_per_second:.2f}."


def parity_summary(result: Result) -> Table:
    """One line per dtype: the verdict and its words."""
    table = Table(title="Parity with HuggingFace", title_justify="left", header_style="bold")
    table.add_column("dtype")
    table.add_column("verdict")
    table.add_column("in words")
    for dtype, verdict in result.parity.items():
        table.add_row(dtype, _mark(verdict.passed), escape(verdict.words))
    return table


def parity_table(found: ParityReport) -> Table:
    """Every tensor's share of what the rule allows, max and rms, in each dtype."""
    table = Table(
        title=f"Parity with HuggingFace: {escape(title(found.model))}", title_justify="left", header_style="bold"
    )
    table.add_column("tensor")
    for dtype in found.comparisons:
        table.add_column(f"{dtype}: max", justify="right")
        table.add_column("rms", justify="right")
        table.add_column("max error", justify="right")
        table.add_column("")
    cells = {(row.tensor, row.dtype): row for row in found.rows}
    for tensor in dict.fromkeys(row.tensor for row in found.rows):
        line = []
        for dtype in found.comparisons:
            row = cells.get((tensor, dtype))
            figures = [f"{row.max_ratio:.3f}", f"{row.rms_ratio:.3f}", f"{row.max_error:.1e}"] if row else ["-"] * 3
            line += [*figures, _mark(row.passed) if row else ""]
        table.add_row(tensor, *line)
    return table


def parity_notes(found: ParityReport) -> list[str]:
    """What was run, what the figures mean, the worst tensor and layer, and why a dtype had no fast path."""
    sizes = f"{len(found.lengths)} sequences of {min(found.lengths)} to {max(found.lengths)} tokens"
    lines = [f"Inputs: {found.inputs}, {sizes}. max, rms: measured over allowed, up to 1 passes."]
    if found.rows:
        worst, layer = found.worst, found.worst_layer
        lines.append(
            f"Worst tensor: {worst.tensor} in {worst.dtype}, {worst.ratio:.3f} of what is allowed ({worst.note})."
        )
        if layer is not None:
            lines.append(f"Worst layer: {layer.layer} in {layer.dtype}, {layer.ratio:.3f} of what is allowed.")
    lines += [f"{d}: the fast path did not run. {c.why}" for d, c in found.comparisons.items() if not c.fast]
    return lines


def _mark(passed: bool) -> str:
    return "[green]pass[/green]" if passed else "[red]FAIL[/red]"


def doctor_tables(found: dict[str, Any]) -> list[Table]:
    """Machine and versions; what is missing and why; each op's backends."""
    parts = _plain("Parts")
    for what, part in (("fast path on", found["devices"]), ("native library,", found["native"])):
        for device, reasons in part.items():
            parts.add_row(f"{what} {device}", _reasons(reasons))
    isa = found["isa"]
    parts.add_row("its vector code", escape(isa.get("error") or isa["cpu"] or "none"))
    triton = found["triton"]
    parts.add_row("triton", _reasons(triton.get("reason") or triton.get("error")))
    demo = found["demo"]
    missing = demo.get("reason") or demo.get("error")
    parts.add_row("demo checkpoint", _reasons(missing) if missing else escape(demo["folder"]))
    for owner in ("torch", "transformers"):
        for name, reason in found[f"private names of {owner}"].items():
            parts.add_row(f"{owner}: {name}", _reasons(reason))
    return [_machine_table(found["provenance"]), parts, _kernel_table(found["kernels"]), _op_table(found["ops"])]


def _machine_table(found: dict[str, Any]) -> Table:
    facts = _plain("Machine")
    if "error" in found:
        facts.add_row("error", escape(found["error"]))
        return facts
    machine, versions = found["machine"], found["versions"]
    cores, threads = _count(machine["usable_cores"], "core"), _count(machine["threads"], "thread")
    facts.add_row("CPU", f"{machine['cpu']}, {cores}, {threads}")
    facts.add_row("vector code", f"{machine['cpu_capability']} ({', '.join(machine['isa']) or 'no flags known'})")
    cards = [f"{c['name']} (sm_{c['capability'].replace('.', '')})" for c in machine["cuda"]]
    facts.add_row("CUDA devices", ", ".join(cards) or "none that torch sees")
    for name, version in versions.items():
        facts.add_row(name, version or "none")
    return facts


def _kernel_table(found: list[dict[str, str]] | dict[str, str]) -> Table:
    if isinstance(found, dict):
        table = _plain("Kernels")
        table.add_row("error", escape(found["error"]))
        return table
    table = Table(title="Kernels of fastbert's own", title_justify="left", header_style="bold")
    for name in ("kernel", "backend", "dtype", "card", "stands"):
        table.add_column(name)
    for line in found:
        words = escape(line["words"])
        stands = f"[red]{words}[/red]" if line["state"] == "failed" else words
        table.add_row(line["kernel"], line["backend"], line["dtype"], escape(line["card"]), stands)
    return table


def _op_table(found: dict[str, Any]) -> Table:
    if "error" in found:
        table = _plain("Ops")
        table.add_row("error", escape(found["error"]))
        return table
    table = Table(title="Ops: backends in the order they are tried", title_justify="left", header_style="bold")
    table.add_column("op")
    settings = list(next(iter(found.values())))
    for setting in settings:
        table.add_column(setting)
    for op, by_setting in found.items():
        table.add_row(op, *("\n".join(f"{b}: {_reasons(r)}" for b, r in by_setting[s].items()) for s in settings))
    return table


def _plain(title: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column("name", style="bold")
    table.add_column("what")
    return table


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _reasons(reasons: list[str] | str | None) -> str:
    words = "; ".join(reasons) if isinstance(reasons, list) else reasons
    return escape(words) if words else "[green]yes[/green]"


def plot(result: Result, path: Path) -> str | None:
    """Draws throughput per row and, for workloads of many batches, time against real tokens; words on failure."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        return "no plot: matplotlib is not installed (pip install matplotlib)"
    names = list(dict.fromkeys(row.workload for row in result.rows))
    size = (12, 1.0 + 3.8 * len(names))
    figure, axes = plt.subplots(len(names), 2, figsize=size, squeeze=False, layout="constrained")
    figure.set_layout_engine("constrained", h_pad=0.12, w_pad=0.12)  # inches
    for (left, right), load in zip(axes, result.workloads, strict=True):
        rows = [row for row in result.rows if row.workload == load["name"] and row.seconds is not None]
        _draw_rates(left, rows, load)
        _draw_times(right, rows, load)
    machine = result.provenance["machine"]
    on_cpu = f"{machine['cpu']}, {_count(machine['threads'], 'thread')}"
    where = machine["cuda"][0]["name"] if result.device.startswith("cuda") else on_cpu
    figure.suptitle(f"{result.title} on {where}", fontsize=13, x=0.015, ha="left", weight="bold")
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        return f"no plot: {error}"
    finally:
        plt.close(figure)
    return None


def _draw_rates(axis: Any, rows: list[SpeedRow], load: dict[str, Any]) -> None:
    """Horizontal bars of texts per second, one group per dtype."""
    places, labels = [], []
    place = 0.0
    for i, row in enumerate(rows):
        place += 1.5 if i and rows[i - 1].dtype != row.dtype else 1.0
        places.append(place)
        labels.append(f"{row.engine}  {row.dtype}")
        rate = row.texts_per_second or 0.0
        axis.barh(place, rate, height=0.8, color=COLORS[row.engine])
        times = 1.0 if row.speedup is None else row.speedup.median or row.speedup.of_totals
        label = f" {rate:,.0f}" + (f"  (x{times:.2f})" if row.engine != STOCK else "")
        axis.text(rate, place, label, va="center", fontsize=9, weight="bold" if row.engine == OURS else "normal")
    axis.set_yticks(places, labels)
    axis.invert_yaxis()
    axis.margins(x=0.25)
    axis.set_xlim(left=0)
    axis.set_xlabel("texts per second (longer is better; x: over HuggingFace, same dtype)")
    axis.set_title(f"{load['name']}, fill {load['fill']:.2f}", loc="left", fontsize=11)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)


def _draw_times(axis: Any, rows: list[SpeedRow], load: dict[str, Any]) -> None:
    """Milliseconds of each batch against its real tokens; for a single batch, of each round."""
    dtype = rows[0].dtype if rows else ""
    tokens = load["batch_real_tokens"]
    for row in rows:
        if row.dtype != dtype or row.engine == SORTED:
            continue
        milliseconds = [s * 1e3 for s in row.samples]
        many = len(tokens) > 1
        x = tokens[: len(milliseconds)] if many else range(1, len(milliseconds) + 1)
        style = {"color": COLORS[row.engine], "markersize": 5, "alpha": 0.75, "mec": "none"}
        axis.plot(x, milliseconds, "o", label=row.engine, **style)
        axis.set_xlabel("real tokens in the batch" if many else "round")
    axis.set_title(f"ms per batch, {dtype}", loc="left", fontsize=11)
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if rows:
        axis.legend(frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderpad=0, handletextpad=0)
