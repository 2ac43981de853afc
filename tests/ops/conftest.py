import pytest
import torch

from tests import emulated
from tests.ops.cases import CASES, DEVICES, DTYPES
from tests.ops.common import Backend, backends_of

pytest.register_assert_rewrite("tests.ops.gradients")


def pytest_generate_tests(metafunc):
    """A module's SPEC gives the backends; cases and dtypes are the same for every op."""
    spec = getattr(metafunc.module, "SPEC", None)
    names = metafunc.fixturenames
    if spec is None:
        return
    if "spec" in names:
        metafunc.parametrize("spec", [spec], ids=[spec.op.name])
    if "case" in names:
        metafunc.parametrize("case", CASES, ids=str)
    if "gradient_case" in names:
        slow = {"large": pytest.mark.slow}  # base shows it too, in a third of the time
        metafunc.parametrize(
            "gradient_case", [pytest.param(c, marks=slow.get(c.name, ())) for c in CASES], ids=[str(c) for c in CASES]
        )
    if "dtype" in names:
        metafunc.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
    backends = list(backends_of(spec, DEVICES))  # last, so that they follow one another: they share ref and base
    if metafunc.function.__name__ == "test_gradcheck":
        backends = [b for b in backends if b.takes_float64]
    if "backend" in names:
        metafunc.parametrize("backend", backends, ids=str)
    if "plain_backend" in names:
        metafunc.parametrize("plain_backend", [b for b in backends if not b.packed], ids=str)


QUICK_CASES = {  # interpreted or emulated; the kernels' own tests add lengths and head sizes at tile boundaries
    "float32": ("edges", "odd", "empty_ends", "no_tokens"),
    "bfloat16": ("edges", "odd", "narrow", "equal"),
    "float16": ("odd", "equal"),
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Interpreted or emulated a few cases in each dtype are quick, bfloat16 alone for what does not depend on it."""
    for item in items:
        given = getattr(item, "callspec", None)
        found = given.params.get("backend", given.params.get("plain_backend")) if given else None
        if not isinstance(found, Backend) or not (found.interpreted or found.emulated) or "dtype" not in given.params:
            continue
        dtype = str(given.params["dtype"]).removeprefix("torch.")
        case = given.params.get("case", given.params.get("gradient_case"))
        is_long = item.originalname == "test_only_what_is_needed_is_returned"  # one run for each gradient
        other = dtype != "bfloat16" if case is None else str(case) not in QUICK_CASES[dtype]
        if is_long or other:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def _emulated():
    """The CUDA kernels on the CPU, compiled where there is a compiler."""
    if emulated.is_here():
        emulated.load()


@pytest.fixture(autouse=True)
def _poisoned(poisoned):
    """Every op test runs with fresh memory full of NaN, and in one thread: its tensors are small (models take two)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
