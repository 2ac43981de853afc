import pytest

from tests.models.small import batch, pair


@pytest.fixture
def bert():
    """A small stock BertModel and an accelerated copy of it."""
    return pair("BertModel", "bert")


@pytest.fixture
def inputs():
    """A ragged batch for `bert`."""
    return batch("bert")
