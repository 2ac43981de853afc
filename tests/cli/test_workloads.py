import hashlib

import pytest
import torch

from fastbert import workloads

FILLS = {  # as committed: a changed list must be noticed, figures refer to it
    "dense-8x128": (1.0, 8, 128),
    "ragged-16x256": (0.309, 16, 256),
    "query-1x16": (1.0, 1, 16),
    "squad-like-8x384": (0.481, 8, 384),
    "squad-like-64x384": (0.477, 64, 384),
    "uniform-16x512": (0.600, 16, 512),
    "dense-32x384": (1.0, 32, 384),
}


@pytest.mark.parametrize("name", FILLS)
def test_lengths_have_the_declared_fill(name):
    fill, rows, width = FILLS[name]
    made = workloads.batches(name, vocab_size=30522)
    (batch,) = made.batches
    assert batch.input_ids.shape == (rows, width)
    assert made.fill == pytest.approx(fill, abs=5e-4)
    assert batch.attention_mask.sum().item() == batch.real_tokens == made.real_tokens
    assert made.padded_tokens == rows * width


def test_every_workload_is_listed_and_says_its_source():
    assert set(workloads.WORKLOADS) == {*FILLS, "docstrings"}
    for name, workload in workloads.WORKLOADS.items():
        assert workload.source, name
        if len(set(workload.rows)) > 1:
            assert workload.source.startswith("synthetic"), name


def test_ragged_lengths_are_pinned():
    rows = workloads.get("ragged-16x256").rows
    assert rows == (102, 45, 141, 117, 56, 29, 40, 74, 91, 67, 81, 35, 21, 50, 61, 256)
    assert max(rows) == 256  # the padded batch really has its width


def test_lognormal_lengths_follow_their_median():
    lengths = workloads.lognormal_lengths(1001, 10_000, 0.1)
    assert sorted(lengths)[500] == pytest.approx(1000, rel=1e-3)
    assert min(lengths) >= 4
    assert max(lengths) == 10_000


def test_same_call_gives_the_same_batches():
    first, second = (workloads.batches("ragged-16x256", vocab_size=1000).batches[0] for _ in range(2))
    assert torch.equal(first.input_ids, second.input_ids)
    assert first.input_ids.max() < 1000
    assert first.input_ids[first.attention_mask == 1].min() >= 500  # above the special tokens
    assert first.input_ids[first.attention_mask == 0].unique().tolist() == [0]


def test_sequences_are_cut_at_the_models_positions():
    made = workloads.batches("ragged-16x256", vocab_size=1000, max_length=64)
    assert made.batches[0].input_ids.shape[1] == 64
    assert max(made.batches[0].lengths) == 64


def test_docstrings_are_real_many_and_distinct(docstrings):
    assert len(docstrings) > 4000
    assert len(set(docstrings)) == len(docstrings)
    assert any("Return a string" in text for text in docstrings)
    lengths = sorted(len(text.split()) for text in docstrings)
    assert lengths[len(lengths) // 2] < 40 < lengths[-1] / 5  # natural: many short, few long


def test_docstrings_do_not_depend_on_the_order_of_files(docstrings, monkeypatch):
    from pathlib import Path

    walk = Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda self, pattern: reversed(list(walk(self, pattern))))
    again = workloads.standard_library_docstrings()
    digest = [hashlib.sha256("\0".join(texts).encode()).hexdigest() for texts in (docstrings, again)]
    assert digest[0] == digest[1]
    assert docstrings != sorted(docstrings)  # shuffled, not sorted


def test_docstrings_leave_out_what_is_no_library(tmp_path):
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "inside.py").write_text('"""A test."""')
    (tmp_path / "broken.py").write_text("def (")
    (tmp_path / "module.py").write_text(
        '"""Module."""\nclass A:\n    """Class."""\n    def f(self): "Method."\n    x = 1\n'
    )
    (tmp_path / "twin.py").write_text('"""Module."""')
    assert sorted(workloads.standard_library_docstrings(tmp_path)) == ["Class.", "Method.", "Module."]


class Words:
    def __call__(self, texts, truncation, max_length, padding):
        return {"input_ids": [[7] * min(len(text.split()), max_length) for text in texts]}


def test_texts_are_batched_in_order_or_sorted(monkeypatch):
    texts = ["one", "one two three", "one two", "a b c d e f"]
    load = workloads.Workload("texts", "four texts", 512, 2, texts=lambda: texts)
    monkeypatch.setitem(workloads.WORKLOADS, "texts", load)
    natural = workloads.batches("texts", vocab_size=10, tokenizer=Words(), max_length=5)
    assert [b.lengths for b in natural.batches] == [(1, 3), (2, 5)]
    assert natural.fill == 11 / 16
    assert natural.tokenize_seconds is not None
    in_order = workloads.batches("texts", vocab_size=10, tokenizer=Words(), max_length=5, sort=True)
    assert [b.lengths for b in in_order.batches] == [(1, 2), (3, 5)]
    assert in_order.real_tokens == natural.real_tokens
    assert in_order.fill > natural.fill
    assert workloads.batches("texts", vocab_size=10, tokenizer=Words(), max_texts=2).texts == 2


def test_texts_without_a_tokenizer_have_lengths_of_words(monkeypatch):
    load = workloads.Workload("texts", "", 512, 2, texts=lambda: ["Return x.", "No."])
    monkeypatch.setitem(workloads.WORKLOADS, "texts", load)
    made = workloads.batches("texts", vocab_size=100)
    assert made.batches[0].lengths == (5, 4)  # words, marks and two
    assert made.tokenize_seconds is None


def test_widened_adds_padding_only():
    batch = workloads.batches("ragged-16x256", vocab_size=1000, pad_id=1).batches[0]
    wide = batch.widened(512, pad_id=1)
    assert wide.input_ids.shape == wide.attention_mask.shape == wide.token_type_ids.shape == (16, 512)
    assert torch.equal(wide.input_ids[:, :256], batch.input_ids)
    assert wide.input_ids[:, 256:].unique().tolist() == [1]
    assert wide.attention_mask.sum() == batch.attention_mask.sum()
    with pytest.raises(ValueError, match="below the present 256"):
        batch.widened(255)


def test_token_types_only_where_asked():
    assert set(workloads.batches("query-1x16", vocab_size=99).batches[0].inputs()) == {
        "input_ids", "attention_mask", "token_type_ids",
    }  # fmt: skip
    without = workloads.batches("query-1x16", vocab_size=99, token_types=False).batches[0]
    assert set(without.inputs()) == {"input_ids", "attention_mask"}


def test_unknown_name_lists_the_names():
    with pytest.raises(KeyError, match="ragged-16x256"):
        workloads.get("nonsense")
