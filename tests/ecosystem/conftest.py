from collections.abc import Callable

import pytest
import torch
import transformers

from tests.models.small import LONGEST, VOCABULARY, config, stock


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tiny products: a second thread would only wait for the first."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_tokenizer(family: str) -> transformers.PreTrainedTokenizerBase:
    """A BertTokenizer over the words w5 … w98, whose ids are their numbers; [PAD] has the id of the family's config."""
    special = ["[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    special.insert(config(family).pad_token_id, "[PAD]")
    words = special + [f"w{i}" for i in range(len(special), VOCABULARY)]
    return transformers.BertTokenizer(vocab={w: i for i, w in enumerate(words)}, model_max_length=LONGEST)


@pytest.fixture(scope="session")
def tokenizer() -> transformers.PreTrainedTokenizerBase:
    return make_tokenizer("bert")


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Callable[..., str]:
    """saved(name, family, **config) → a folder with that small stock model and its tokenizer, as a user keeps one."""

    def save(name: str, family: str, **changes: object) -> str:
        folder = tmp_path_factory.mktemp(name)
        stock(name, family, **changes).save_pretrained(folder)
        make_tokenizer(family).save_pretrained(folder)
        return str(folder)

    return save
