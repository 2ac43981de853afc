"""Kernels that break a rule each: python -m tests.kernels.planted compiles them, and prints what is said of each."""

import json
import os
import sys
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from benchmarks import compiled


@triton.jit
def product(A, B, C, steps, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    row, column, inner = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    out = tl.zeros([M, N], tl.float32)
    for step in range(steps):
        a = tl.load(A + row * 4096 + step * K + inner[None, :])
        b = tl.load(B + (step * K + inner[:, None]) * N + column)
        out = tl.dot(a, b, out)
    tl.store(C + row * N + column, out.to(C.dtype.element_ty))


@triton.jit
def excused_product(A, B, C, steps, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    row, column, inner = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :], tl.arange(0, K)
    out = tl.dot(tl.load(A + row * K + inner[None, :]), tl.load(B + inner[:, None] * N + column))
    tl.store(C + row * N + column, out.to(C.dtype.element_ty))


@triton.jit
def flagged(A, FIRST: tl.constexpr, SECOND: tl.constexpr, THIRD: tl.constexpr, FOURTH: tl.constexpr):
    if FIRST and SECOND and THIRD and FOURTH:
        tl.store(A, 0.0)


@triton.jit
def wrong(A):
    tl.static_assert(False, "this does not compile")


@triton.jit
def ragged(A, tokens):
    tl.store(A, tokens)


EXCEPTIONS = {"excused_product M=16": "16 rows are fewer than HGMMA's 64"}


@dataclass(frozen=True)
class Tiles:
    num_warps: int
    num_stages: int
    ctas: int = 0
    instructions: int = 100000


def launch(kernel, tiles, m, n, k, **options):
    a, b, c = (torch.empty(8192, dtype=torch.bfloat16) for _ in range(3))
    sizes = {"M": m, "N": n, "K": k, "num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    kernel[(1,)](a, b, c, 7, **sizes, **options)


def die(*_):
    print("LLVM ERROR: planted", file=sys.stderr, flush=True)
    os.abort()


PLANTED = {
    "sound": (90, lambda: launch(product, Tiles(4, 2), 64, 64, 64)),
    "spills": (80, lambda: launch(product, Tiles(4, 2), 128, 128, 32, maxnreg=64)),
    "shared memory": (86, lambda: launch(product, Tiles(8, 4), 128, 128, 128)),
    "HMMA": (90, lambda: launch(product, Tiles(4, 2), 16, 64, 64)),
    "HMMA on sm_80": (80, lambda: launch(product, Tiles(4, 2), 16, 64, 64)),
    "HMMA, excused": (90, lambda: launch(excused_product, Tiles(4, 2), 16, 64, 64)),
    "HMMA, not excused": (90, lambda: launch(excused_product, Tiles(4, 2), 32, 64, 64)),
    "CTAs": (90, lambda: launch(product, Tiles(8, 2, ctas=9), 64, 64, 64)),
    "instructions": (90, lambda: launch(product, Tiles(4, 2, instructions=10), 64, 64, 64)),
    "flags": (90, lambda: flagged[(1,)](torch.empty(8), True, True, True, True)),
    "compiles not": (90, lambda: wrong[(1,)](torch.empty(8))),
    "the compiler dies": (90, lambda: launch(product, Tiles(4, 3), 64, 64, 64)),
}


ONE = torch.ones(3)
WAITING = {
    "item": lambda: ONE[0].item(),
    "int": lambda: int(ONE[0]),
    "bool": lambda: bool(ONE.all()),
    "nonzero": lambda: ONE.nonzero(),
    "boolean index": lambda: ONE[ONE > 0],
    "masked_select": lambda: ONE.masked_select(ONE > 0),
    "no wait": lambda: ONE[torch.zeros(2, dtype=torch.int64)],
}


def waits(action):
    try:
        with compiled.NeverWaiting():
            action()
    except RuntimeError as error:
        return "waits for the device" in str(error)
    return False


def main():
    said, real = {}, compiled.compile_row
    for name, (arch, run) in PLANTED.items():
        with compiled.recorded(compiled.CARDS[arch]) as launches:
            run()
        compiled.compile_row = die if name == "the compiler dies" else real
        (row,) = compiled.compile_all([("planted", each) for each in launches])
        said[name] = row.failures
    with compiled.recorded(compiled.CARDS[90]) as launches:
        for tokens in (16, 17, 1):
            ragged[(1,)](torch.empty(8, dtype=torch.int32), tokens)
    said["ragged"] = len({each.specialisation for each in launches}), len({each.instance for each in launches})
    said["waits"] = [name for name, action in WAITING.items() if waits(action)]
    print(json.dumps(said))


if __name__ == "__main__":
    main()
