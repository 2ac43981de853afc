"""The tests that every op has. A test file names its SPEC and imports those it wants; conftest.py parametrizes them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch

from fastbert import ops
from fastbert.ops.encoder import packed_layers
from fastbert.parity import judge
from tests import emulated, interpreter
from tests.ops.cases import CASES, NO_TOKENS, Arguments, Case, Spec, cast

EDGES = CASES[0]
FEW_EDGES = dataclasses.replace(EDGES, name="few_edges", lengths=EDGES.lengths[:5], heads=1)  # for the interpreter


def as_tuple(outputs: object) -> tuple[torch.Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def arguments_of(spec: Spec, arguments: Arguments, dtype: torch.dtype, backend: Backend) -> Arguments:
    """What the backend is called with: rounded to the dtype, on its device, matrices packed if it wants them so."""
    found = list(cast(arguments, dtype, backend.device))
    for i in spec.weights if backend.packed else ():
        if i < len(found):  # trailing defaults are left out
            found[i] = backend.pack(found[i])
    return tuple(found)


class Backend:
    """A backend to test: its name, a device, and whether matrices come packed."""

    def __init__(self, name: str, device: str, packed: bool = False) -> None:
        self.name, self.device, self.packed = name, device, packed

    def pack(self, weight: Any) -> Any:
        """A weight as the backend wants it, the reference, which wants none, as torch's; of layers those of each."""
        if isinstance(weight, list):
            return packed_layers(weight, functools.partial(ops.pack_weight, backend="cpu"))
        if weight is None:
            return None
        return ops.pack_weight(weight, "cpu" if self.name == "cpu" or weight.dtype == torch.int8 else "torch")

    @property
    def interpreted(self) -> bool:
        """Whether it runs in Triton's interpreter, a thousand times slower."""
        return self.name == "triton" and self.device == "cpu"

    @property
    def emulated(self) -> bool:
        """Whether it is CUDA on the CPU, ten to a hundred times slower."""
        return self.name == "cuda" and self.device == "cpu"

    @property
    def takes_float64(self) -> bool:
        return self.name not in ("triton", "cuda", "cpu")

    @property
    def edges(self) -> Case:
        """The case of tests that take one: its third sequence has 128 tokens."""
        return FEW_EDGES if self.interpreted else EDGES

    def __str__(self) -> str:
        return "-".join(
            [self.name, *([self.device] if self.device != "cpu" else []), *(["packed"] if self.packed else [])]
        )

    def __call__(self, spec: Spec, arguments: Arguments) -> tuple[torch.Tensor, ...]:
        with ops.use_backend(self.name), torch.no_grad():
            return as_tuple(spec.op(*arguments))


def backends_of(spec: Spec, devices: tuple[str, ...]) -> Iterator[Backend]:
    for device in devices:
        for name in names_here(spec.op, device):
            if not spec.weights or name != "cpu":  # which takes packed ones only
                yield Backend(name, device)
            if spec.weights and device == "cpu" and (spec.op.backends[name].pack or name == "reference"):
                yield Backend(name, device, packed=True)


def names_here(op: ops.Op, device: str) -> list[str]:
    """The names of the backends that are tested on a device; on a CPU Triton's by its interpreter, CUDA's emulated."""
    found = [backend.name for backend in op.order(device)]
    more = {"triton": interpreter.is_here, "cuda": emulated.is_here} if device == "cpu" else {}
    return [*found, *(name for name, is_here in more.items() if name in op.backends and is_here())]


def judged(
    spec: Spec, case: Case, dtype: torch.dtype, backend: Backend
) -> Iterator[tuple[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor, bool]]]:
    """(check, (ours, ref, base, elementwise)) of each call of the spec and each of its outputs."""
    for name, exact in spec.inputs(case, dtype):
        rounded = cast(exact, dtype)
        ours = backend(spec, arguments_of(spec, exact, dtype, backend))
        ref = as_tuple(spec.reference(*cast(rounded, torch.float64)))
        base = as_tuple(spec.stock(*cast(rounded, dtype, backend.device)))
        for i, output in enumerate(spec.outputs):
            if case.tokens < 32 and output in ("mean", "rstd"):
                continue  # base's error in a few numbers is no measure; y shows theirs
            check = "/".join([spec.op.name, str(backend), output, *([name] if name else [])])
            yield check, (ours[i].cpu(), ref[i], base[i].cpu(), spec.elementwise(output))


def test_parity(spec, case, dtype, backend, parity):
    for check, tensors in judged(spec, case, dtype, backend):
        parity(*tensors[:3], name=check, elementwise=tensors[3])


def test_reference_is_the_formula(spec, case):
    """In float64 the reference and the stock formula agree: the rule would let through an error that both had alone."""
    for name, exact in spec.inputs(case, torch.float64):
        for ref, stock in zip(as_tuple(spec.reference(*exact)), as_tuple(spec.stock(*exact)), strict=False):
            torch.testing.assert_close(ref, stock, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


def test_dtypes_and_shapes(spec, dtype, backend):
    """What the fake says: 16-bit outputs, statistics in fp32, also where T = 0."""
    for case in (backend.edges, NO_TOKENS):
        for _, exact in spec.inputs(case, dtype):
            arguments = arguments_of(spec, exact, dtype, backend)
            fake = as_tuple(spec.op.fake(*arguments))
            for ours, expected in zip(backend(spec, arguments), fake, strict=True):
                assert (ours.dtype, ours.shape, ours.device) == (expected.dtype, expected.shape, expected.device)
                assert ours.isfinite().all()


def test_reruns_are_bitwise_equal(spec, dtype, backend):
    for _, exact in spec.inputs(backend.edges, dtype):
        arguments = arguments_of(spec, exact, dtype, backend)
        for first, second in zip(backend(spec, arguments), backend(spec, arguments), strict=True):
            assert torch.equal(first, second)


def test_other_sequences_do_not_matter(spec, dtype, backend):
    """Filling one sequence with other values, and with NaN, leaves every other row bitwise as it was."""
    offsets = backend.edges.cu_seqlens().tolist()
    start, end = offsets[2], offsets[3]  # the sequence of 128
    others = torch.ones(backend.edges.tokens, dtype=torch.bool)
    others[start:end] = False
    for _, exact in spec.inputs(backend.edges, dtype):
        arguments = arguments_of(spec, exact, dtype, backend)
        before = backend(spec, arguments)
        for value in (-3.0, float("nan")):
            changed = list(arguments)
            for i in spec.rows:
                changed[i] = arguments[i].clone()
                changed[i][start:end] = value
            after = backend(spec, tuple(changed))
            for old, new in zip(before, after, strict=True):
                if not old.numel():  # what was not to be saved
                    continue
                dim = old.shape.index(backend.edges.tokens)
                assert torch.equal(*(x.movedim(dim, 0)[others.to(x.device)] for x in (old, new)))
            assert not all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same values as every second element of a larger tensor that holds NaN between them."""
    wide = x.new_full((*x.shape, 2), float("nan") if x.is_floating_point() else 0)
    wide[..., 0] = x
    return wide[..., 0]


def test_strided_inputs(spec, dtype, backend, parity):
    """Tensors that are not contiguous give what their contiguous copies give."""
    for name, exact in spec.inputs(backend.edges, dtype):
        rounded = cast(exact, dtype)
        arguments = cast(rounded, dtype, backend.device)
        views = tuple(
            strided(a) if isinstance(a, torch.Tensor) else [strided(x) for x in a] if isinstance(a, list) else a
            for a in arguments
        )
        if backend.packed:
            views = tuple(backend.pack(a) if i in spec.weights else a for i, a in enumerate(views))
        ours, ref = backend(spec, views), as_tuple(spec.reference(*cast(rounded, torch.float64)))
        base = as_tuple(spec.stock(*arguments))
        for i, output in enumerate(spec.outputs):
            check = "/".join([spec.op.name, str(backend), output, "strided", *([name] if name else [])])
            parity(ours[i].cpu(), ref[i], base[i].cpu(), name=check, elementwise=spec.elementwise(output))


def test_inputs_are_not_written(spec, dtype, backend):
    for _, exact in spec.inputs(backend.edges, dtype):
        arguments = arguments_of(spec, exact, dtype, backend)
        tensors = [a for a in arguments if isinstance(a, torch.Tensor)]
        copies = [a.clone() for a in tensors]
        backend(spec, arguments)
        assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))


def test_opcheck(spec, dtype):
    """Schema and fake hold, as torch.library sees them."""
    for case in (EDGES, NO_TOKENS):
        for _, exact in spec.inputs(case, dtype):
            overload = getattr(torch.ops.fastbert, spec.op.name).default
            torch.library.opcheck(overload, cast(exact, dtype), test_utils=("test_schema", "test_faketensor"))


def verdicts(spec: Spec, case: Case, dtype: torch.dtype, backend: Backend) -> Iterator[tuple[str, float]]:
    """(check, ratio) of what test_parity asserts, for the tests of the tests."""
    for check, (ours, ref, base, elementwise) in judged(spec, case, dtype, backend):
        yield check, judge(ours, ref, base, elementwise).ratio
