"""Part "provenance": what is measured: the card, the machine, versions, and the sources of every kernel of ours."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator

from benchmarks.record import card
from benchmarks.record.setting import Line, Setting, in_words
from fastbert import devices, ops, proven
from fastbert.ops import kernels
from fastbert.provenance import provenance


def run(setting: Setting) -> Iterator[Line]:
    own = [(op.name, name) for op in ops.ALL for name in op.backends if name in proven.OWN]
    sources = {f"{op} {name}": proven.running(op, name) for op, name in own}
    said = {key: card.asked(fields, setting.place) for key, fields in card.FIELDS.items()}
    of_card = {"card": devices.card(setting.place), "nvidia_smi": said}
    yield {"device": setting.device, **of_card, "dry_run": setting.dry_run, **provenance(), "sources": sources,
           "tiles": tile_tables(), "without": list(setting.without)}  # fmt: skip


def tile_tables() -> dict[str, str]:
    """Op → a digest of the functions that choose its kernels' tiles, or why there is none."""
    if reason := kernels.absent():
        return {"note": reason}
    found = {}
    for op in ops.FORWARD:
        try:
            chosen = {f for name, f in vars(kernels.kernel(op.name)).items() if name.startswith("choose_")}
            text = "\n".join(sorted(map(inspect.getsource, chosen)))
            found[op.name] = hashlib.sha256(text.encode()).hexdigest()[:16] if text else "it has no tiles"
        except Exception as error:
            found[op.name] = in_words(error)
    return found
