import pytest
import torch

from tests.ops.cases import CASES, DEVICES, DTYPES
from tests.ops.common import backends_of

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
    if "backend" in names:
        metafunc.parametrize("backend", backends, ids=str)
    if "plain_backend" in names:
        metafunc.parametrize("plain_backend", [b for b in backends if not b.packed], ids=str)


@pytest.fixture(autouse=True)
def _poisoned(poisoned):
    """Every op test runs with fresh memory full of NaN, and in one thread: its tensors are small (models take two)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
