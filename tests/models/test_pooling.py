"""`fastbert.pool`: one vector a text, equal to sentence-transformers' formulas, never NaN."""

import pytest
import torch

import fastbert

MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0]])  # full, right-padded, holes, empty
MODES = ("cls", "mean", "max")


@pytest.fixture
def hidden():
    return torch.randn(4, 4, 3)


def by_hand(hidden, mask, mode):
    """Row by row, in float64."""
    rows = []
    for x, keep in zip(hidden.double(), mask, strict=True):
        x = x[keep != 0]
        pooled = {"cls": lambda x: x[0], "mean": lambda x: x.mean(0), "max": lambda x: x.max(0).values}[mode]
        rows.append(pooled(x) if len(x) else torch.zeros(3, dtype=torch.float64))
    return torch.stack(rows)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_a_mask_of_any_dtype(mode, dtype, hidden):
    scale = 1 if dtype in (torch.bool, torch.uint8) else -3
    out = fastbert.pool(hidden, (MASK * scale).to(dtype), mode)
    torch.testing.assert_close(out.double(), by_hand(hidden, MASK, mode))


@pytest.mark.parametrize("mode", MODES)
def test_what_stands_at_masked_positions_is_not_read(mode, hidden):
    want = fastbert.pool(hidden, MASK, mode)
    hidden[MASK == 0] = torch.nan
    assert torch.equal(fastbert.pool(hidden, MASK, mode), want) and want[3].eq(0).all()


@pytest.mark.parametrize("mode", MODES)
def test_no_mask_and_no_tokens(mode, hidden):
    torch.testing.assert_close(fastbert.pool(hidden, None, mode).double(), by_hand(hidden, torch.ones(4, 4), mode))
    assert torch.equal(fastbert.pool(hidden[:, :0], None, mode), torch.zeros(4, 3))
    assert fastbert.pool(hidden[:0], MASK[:0], mode).shape == (0, 3)


def test_the_mean_is_summed_in_float32():
    """One rounding, at the end; a sum beyond float16's largest number."""
    assert fastbert.pool(torch.full((1, 4096, 2), 20.0, dtype=torch.float16), None, "mean").eq(20).all()
    x = torch.randn(8, 100, 64).to(torch.bfloat16)
    out, exact = fastbert.pool(x, None, "mean"), x.double().mean(1).to(torch.bfloat16)
    assert out.dtype == torch.bfloat16 and (out == exact).double().mean() > 0.99


@pytest.mark.parametrize("mode", MODES)
def test_gradients(mode, hidden):
    x = hidden.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: fastbert.pool(x, MASK, mode), x)
    fastbert.pool(x, MASK, mode).sum().backward()
    assert x.grad[MASK == 0].eq(0).all()


def test_the_formulas_of_sentence_transformers(hidden):
    Pooling = pytest.importorskip("sentence_transformers.sentence_transformer.modules").Pooling
    mask = MASK[:3]  # of an empty row its maximum is -1e9
    for mode in MODES:
        module = Pooling(3, pooling_mode=mode)
        keep = mask if mode != "cls" else torch.ones_like(mask)  # it takes row 0, ours the first that counts
        features = {"token_embeddings": hidden[:3], "attention_mask": keep}
        torch.testing.assert_close(fastbert.pool(hidden[:3], keep, mode), module(features)["sentence_embedding"])


def test_what_pool_refuses_in_words(hidden):
    with pytest.raises(ValueError, match="mode is 'sum'; it can be 'cls', 'mean', 'max'"):
        fastbert.pool(hidden, MASK, "sum")
    with pytest.raises(ValueError, match=r"mask has shape \[4, 3\], not \[4, 4\] as hidden has"):
        fastbert.pool(hidden, MASK[:, :3], "mean")
    with pytest.raises(ValueError, match=r"hidden is torch.float32 \[4, 3\], not floating numbers \[B, S, H\]"):
        fastbert.pool(hidden[:, 0], None, "mean")
    with pytest.raises(ValueError, match=r"hidden is torch.int64 \[4, 4, 3\], not floating"):
        fastbert.pool(hidden.long(), MASK, "mean")
