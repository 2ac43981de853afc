import pytest

from tests import interpreter


def pytest_collection_modifyitems(items):
    """Without Triton there is nothing to test; with a GPU the tests of tests/ops run its kernels there."""
    if not interpreter.is_here():
        for item in items:
            if "/kernels/" in str(item.path):
                item.add_marker(pytest.mark.skip("Triton is not installed, or runs on the GPU that is here"))
