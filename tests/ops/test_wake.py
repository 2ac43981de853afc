"""Threads of a parallel region that sleep are woken on other cores than that of the thread which wakes them."""

import os
import threading
import time
from pathlib import Path

import pytest
import torch

from fastbert import native, ops

IDLE = 0.02  # seconds; csrc/wake.cpp takes threads for asleep after 0.001

pytestmark = [
    pytest.mark.skipif(not native.load().available, reason="the native library is absent"),
    pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads' cores are known on Linux only"),
]


def cores_of_threads():
    """Thread → the cores on which it may run."""
    found = {}
    for task in Path("/proc/self/task").iterdir():
        try:
            found[int(task.name)] = frozenset(os.sched_getaffinity(int(task.name)))
        except ProcessLookupError:  # it has ended meanwhile
            continue
    return found


def seen_during(work):
    """What `cores_of_threads` said while `work` ran."""
    found, ended = [], threading.Event()

    def look():
        while not ended.is_set():
            found.append(cores_of_threads())
            time.sleep(0.001)

    with_it = threading.Thread(target=look)
    with_it.start()
    try:
        time.sleep(IDLE)
        work()
    finally:
        ended.set()
        with_it.join()
    return found


@pytest.fixture
def product():
    """A product of 0.1 s or so, by two threads, which have run before."""
    count = torch.get_num_threads()
    torch.set_num_threads(2)
    x, weight = torch.randn(2048, 2048), ops.pack_weight(torch.randn(2048, 2048), "cpu")

    def run():
        with ops.use_backend("cpu"):
            ops.linear(x, weight)

    run()
    yield run
    torch.set_num_threads(count)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is one core")
def test_a_thread_that_slept_is_kept_off_this_core_until_the_region_ends(product):
    before = cores_of_threads()
    here = before[threading.get_native_id()]
    seen = seen_during(product)
    moved = {task for found in seen for task in before if task in found and found[task] != before[task]}
    assert len(moved) == 1 and threading.get_native_id() not in moved
    (task,) = moved
    during = {found[task] for found in seen} - {before[task]}
    assert all(len(cores) == len(here) - 1 and cores < here for cores in during)
    assert cores_of_threads()[task] == before[task]


def test_threads_that_may_run_nowhere_else_are_left_alone(product):
    before = os.sched_getaffinity(0)
    one = {min(before)}
    tasks = list(cores_of_threads())
    try:
        for task in tasks:
            os.sched_setaffinity(task, one)
        assert {cores for found in seen_during(product) for cores in found.values()} == {frozenset(one)}
    finally:
        for task in tasks:
            os.sched_setaffinity(task, before)
