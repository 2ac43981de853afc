"""Part "baselines", of `--baselines` alone: HuggingFace's model in every way it can be run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from benchmarks.cases import batch_of, model_cases, random_model
from benchmarks.record.models import compared, compiled, infer, train
from benchmarks.record.setting import Line, Setting, in_words
from fastbert import limits
from fastbert.dtypes import DTYPES

# Name → attention, torch.compile's options (None: not compiled), whether the mask is given.
WAYS: dict[str, tuple[str, dict[str, Any] | None, bool]] = {
    "sdpa": ("sdpa", None, True),
    "sdpa, no mask": ("sdpa", None, False),
    "eager": ("eager", None, True),
    "flash": ("flash_attention_2", None, True),
    "sdpa, compiled": ("sdpa", {}, True),
    "sdpa, compiled, no mask": ("sdpa", {}, False),
    "sdpa, max-autotune": ("sdpa", {"mode": "max-autotune"}, True),
    "sdpa, max-autotune, no mask": ("sdpa", {"mode": "max-autotune"}, False),
}
NAMES = ("base-squad", "base-dense", "large-uniform", "base-query", "tiny")
PLAIN_SECONDS, COMPILE_SECONDS, AUTOTUNE_SECONDS = 8.0, 50.0, 150.0  # with less time left such a way is not begun


def run(setting: Setting) -> Iterator[Line]:
    """Way by way, the cheap ones first, over all cases; inference everywhere, training where nothing is compiled."""
    listed = [(case, dtype) for case, dtype in model_cases(setting.device, setting.dry_run) if case.name in NAMES]
    listed = listed[:1] if setting.dry_run else listed
    for way, (attention, options, masked) in WAYS.items():
        for case, dtype in listed:
            layers = 1 if setting.dry_run else case.layers
            line: Line = {"case": case.name, "dtype": dtype, "layers": layers, "engine": way}
            if not setting.has(0 if setting.dry_run else seconds_of(options)):
                yield {**line, "cut": f"less than {seconds_of(options):.0f} s were left"}
                continue
            try:
                model = random_model(case, layers, DTYPES[dtype], setting.device)
                model.set_attn_implementation(attention)
                batch = batch_of(case, setting.device)
                tokens = {"real_tokens": batch.real_tokens, "fill": batch.real_tokens / batch.padded_tokens}
                flops = limits.encoder_flops(limits.Dimensions.of(model.config), batch.lengths)
                line |= {**tokens, "flops": flops, "limit_seconds": setting.limit(flops, 0, dtype)[0]}
                given = batch if masked else replace(batch, attention_mask=None)  # type: ignore[arg-type]
                for mode, step in {"inference": infer, "training": train}.items():
                    if mode == "training" and (options is not None or not masked):
                        continue
                    run_, note = (lambda s=step, m=model, b=given: s(m, b)), {}  # type: ignore[misc]
                    if options is not None:
                        torch.compiler.reset()
                        run_, note = compiled(setting, model, given, step, **options)
                    for row in compared(setting, {**line, "mode": mode}, {way: run_}, way, {way: note}):
                        del row["speedup"]
                        yield row
            except Exception as error:
                yield {**line, "note": f"not here: {in_words(error)}"}


def seconds_of(options: dict[str, Any] | None) -> float:
    """With how much time left such a way is begun."""
    return PLAIN_SECONDS if options is None else AUTOTUNE_SECONDS if options else COMPILE_SECONDS
