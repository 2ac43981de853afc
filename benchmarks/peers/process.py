"""An engine in a process of its own, where its threads, its OpenMP and its caches of code are beside no other engine's.

Batches and outputs cross over as pickled bytes; seconds are taken inside.
"""

from __future__ import annotations

import gc
import multiprocessing
import pickle
import signal
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from benchmarks.peers.rival import Bind, Rival, Run
from benchmarks.record.setting import in_words
from fastbert.workloads import Batch

# Imported once by the server that the processes are forked from.
PRELOADED = [__name__, "transformers.models.bert.modeling_bert"]

GRACE = 5.0  # seconds to end by itself


class Failed(RuntimeError):
    """What the engine raised, in words; or that its process ended."""


class Process:
    """Our end of it.

    Args:
        rival: which engine; it is pickled, by name.
        model: file of the pickled model.
        folder: for what the engine converts.

    Raises:
        Failed: by every method.
    """

    def __init__(self, rival: Rival, model: Path, folder: Path) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.pipe, theirs = context.Pipe()
        given = rival, model, folder, torch.get_num_threads()
        self.process = context.Process(target=serve, args=(theirs, *given), daemon=True)
        self.process.start()
        theirs.close()

    def make(self, dtype: str) -> None:
        """Makes the engine ready in a precision."""
        self.ask("make", dtype)

    def bind(self, name: str, dtype: str, batches: Sequence[Batch]) -> tuple[list[Tensor], float]:
        """Takes batches under a name, which stands for no others any more, and calls the engine for the first time.

        Returns:
            the last hidden state [B, S, H] of each batch, and the seconds.
        """
        found: tuple[list[Tensor], float] = self.ask("bind", name, dtype, tuple(batches))
        return found

    def seconds(self, name: str, rest: float = 0.0, again: bool = False) -> float:
        """Of a call on all batches of a name, after so many seconds of rest; again: after an untimed call behind it."""
        found: float = self.ask("seconds", name, rest, again)
        return found

    def ask(self, *request: Any) -> Any:
        try:
            self.pipe.send_bytes(pickle.dumps(request))
            found, words = pickle.loads(self.pipe.recv_bytes())
        except (EOFError, OSError):
            self.process.join()
            raise Failed(f"its process ended with {self.process.exitcode}") from None
        if words:
            raise Failed(words)
        return found

    def close(self) -> None:
        """Ends the process, which may be in the middle of a call."""
        self.pipe.close()
        self.process.join(GRACE)
        self.process.terminate()
        self.process.join()


def serve(pipe: Connection, rival: Rival, model: Path, folder: Path, threads: int) -> None:
    """Answers requests until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends this process
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    seat = Seat(rival, model, folder)
    while True:
        try:
            method, *arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            answer = getattr(seat, method)(*arguments), ""
        except Exception as error:
            answer = None, in_words(error)
        pipe.send_bytes(pickle.dumps(answer))


class Seat:
    """The engine's end."""

    def __init__(self, rival: Rival, model: Path, folder: Path) -> None:
        self.rival, self.file, self.folder = rival, model, folder
        self.model: Any = None
        self.ready: dict[str, Bind] = {}
        self.bound: dict[str, list[Run]] = {}

    def make(self, dtype: str) -> None:
        if self.model is None:
            self.model = torch.load(self.file, weights_only=False)
        self.ready[dtype] = self.rival.make(self.model, dtype, self.folder)

    def bind(self, name: str, dtype: str, batches: Sequence[Batch]) -> tuple[list[Tensor], float]:
        begin = time.perf_counter()
        runs = [self.ready[dtype](batch) for batch in batches]
        outputs = [run().clone() for run in runs]  # an engine may give the same memory again
        self.bound[name] = runs
        return outputs, time.perf_counter() - begin

    def seconds(self, name: str, rest: float, again: bool) -> float:
        runs = self.bound[name]
        collecting = gc.isenabled()
        gc.disable()
        try:
            time.sleep(rest)
            for _ in range(1 + again):
                begin = time.perf_counter()
                for run in runs:
                    run()
                seconds = time.perf_counter() - begin
        finally:
            if collecting:
                gc.enable()
        return seconds
