"""Work in processes of their own, some at a time: a kernel that ends its process, or its device, ends no other."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection
from typing import Any

from benchmarks.record.setting import Line, in_words

PRELOADED = ["benchmarks.record.load", "triton"]  # imported once by the server that the processes are forked from


def in_processes(
    work: Callable[..., Line], tasks: Sequence[tuple[Any, ...]], jobs: int, deadline: float
) -> Iterator[tuple[tuple[Any, ...], Line]]:
    """Each task with what `work(*task)` returned, or {"error": words}: as soon as it is known, `jobs` at a time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    waiting, running = list(tasks)[::-1], dict[Any, tuple[Any, tuple[Any, ...]]]()
    try:
        while (waiting or running) and time.monotonic() < deadline:
            while waiting and len(running) < jobs:
                ours, theirs = context.Pipe(duplex=False)
                task = waiting.pop()
                process = context.Process(target=answer, args=(theirs, work, task))
                process.start()
                theirs.close()
                running[ours] = process, task
            for ours in connection.wait(list(running), min(600.0, max(0.0, deadline - time.monotonic()))):
                process, task = running.pop(ours)
                yield task, received(ours, process)
        left = [task for _, task in running.values()] + waiting[::-1]
        yield from ((task, {"error": "the part's time is over", "cut": "no time"}) for task in left)
    finally:
        for process, _ in running.values():
            process.kill()
            process.join()


def received(pipe: Any, process: Any) -> Line:
    """What a process sent, or in words that it ended without."""
    try:
        line: Line = pipe.recv()
    except EOFError:
        process.join()
        line = {"error": f"its process ended with {process.exitcode}"}
    process.join()
    return line


def answer(pipe: Any, work: Callable[..., Line], task: tuple[Any, ...]) -> None:
    """Sends what `work` returns, or in words what it raised."""
    try:
        line = work(*task)
    except Exception as error:
        line = {"error": in_words(error)}
    pipe.send(line)
    pipe.close()
