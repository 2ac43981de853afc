import pytest
import torch

from tests.ops.cases import CASES, DEVICES, DTYPES
from tests.ops.common import backends_of


def pytest_generate_tests(metafunc):
    """A module's SPEC gives the backends; cases and dtypes are the same for every op."""
    spec = getattr(metafunc.module, "SPEC", None)
    names = metafunc.fixturenames
    if spec is None:
        return
    if "spec" in names:
        metafunc.parametrize("spec", [spec], ids=[spec.op.name])
    if "backend" in names:
        metafunc.parametrize("backend", list(backends_of(spec, DEVICES)), ids=str)
    if "case" in names:
        metafunc.parametrize("case", CASES, ids=str)
    if "dtype" in names:
        metafunc.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


@pytest.fixture(autouse=True)
def _poisoned(poisoned):
    """Every op test runs with fresh memory full of NaN, and in one thread: its tensors are small (models take two)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
