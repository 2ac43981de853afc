"""The parity rule itself, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from fastbert.parity import enliven, judge

STEP = 2.0**-24  # half the spacing of fp32 at 1


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_ratios_by_hand():
    """All of ref is 1, base is off by 2^-20 and by 0; 1 + 0.3 - 0.3 is exact in fp32 to a step at most."""
    ref, base = double(1, 1, 1, 1), torch.tensor([1 + 2**-20, 1, 1, 1])
    rounding = ((base + 0.3 - 0.3) - base).abs().max().item()
    allowed_max, allowed_rms = 2 * 2**-20 + 2 * rounding, 1.5 * 2**-21 + STEP
    verdict = judge(double(1, 1, 1 - 2**-19, 1), ref, base)
    assert verdict.max_ratio == pytest.approx(2**-19 / allowed_max)
    assert verdict.rms_ratio == pytest.approx(2**-20 / allowed_rms)
    assert verdict.index == (2,) and verdict.max_error == 2**-19 and verdict.binade is None
    assert not verdict.passed and verdict.ratio == verdict.rms_ratio


@pytest.mark.parametrize("factor", [0.99, 1.01])
def test_the_limit_of_the_max(factor):
    """One element among many: its rms is small, its max decides."""
    ref = torch.full((10000,), 0.5, dtype=torch.float64)
    base = ref.float() + 2**-18
    rounding = ((base + 0.3 - 0.3) - base).double().abs().max().item()
    ours = ref.clone()
    ours[7] += factor * (2 * 2**-18 + 2 * rounding)
    verdict = judge(ours, ref, base)
    assert verdict.max_ratio == pytest.approx(factor) and verdict.passed == (factor < 1) and verdict.index == (7,)


@pytest.mark.parametrize("factor", [0.99, 1.01])
def test_the_limit_of_the_rms(factor):
    """Every element a little off: the max is far from its limit, the rms decides."""
    ref = torch.full((100,), 0.5, dtype=torch.float64)
    base = ref.float() + 2**-18
    ours = ref + factor * (1.5 * 2**-18 + STEP / 2)
    verdict = judge(ours, ref, base)
    assert verdict.rms_ratio == pytest.approx(factor) and verdict.passed == (factor < 1) and verdict.max_ratio < 0.9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_base_passes_itself(dtype):
    ref = torch.randn(1000, dtype=torch.float64)
    verdict = judge(ref.to(dtype), ref, ref.to(dtype))
    assert 0.2 < verdict.ratio < 0.4
    assert 0.2 < judge(ref.to(dtype), ref, ref.to(dtype), elementwise=True).ratio < 0.6


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("elementwise", [False, True])
def test_what_is_not_finite_fails(bad, elementwise):
    ref = torch.randn(4, 50, dtype=torch.float64)
    base, ours = ref.float(), ref.float()
    base[2, 30], ours[2, 30] = bad, bad  # whatever base has there
    verdict = judge(ours, ref, base, elementwise)
    assert not verdict.passed and verdict.ratio == math.inf and verdict.index == (2, 30)
    assert "where ref is" in str(verdict) and "(1 such elements)" in str(verdict)


def test_a_base_that_is_not_finite_allows_nothing():
    ref = torch.ones(100, dtype=torch.float64)
    base = ref.float()
    base[5] = math.inf
    assert judge(ref.clone(), ref, base).passed
    assert not judge(ref + 1e-3, ref, base).passed


@pytest.mark.parametrize(("ours", "passed"), [(math.inf, True), (-math.inf, False), (1e30, False), (math.nan, False)])
def test_where_ref_is_infinite_ours_must_be(ours, passed):
    ref = torch.cat([torch.randn(9, dtype=torch.float64), double(math.inf)])
    mine = torch.cat([ref[:9], double(ours)])
    assert judge(mine, ref, ref.float()).passed is passed


def test_a_whole_tensor_hides_what_a_binade_shows():
    """Elements near 2^-10 that are off by 1% beside elements near 1, in bf16."""
    large, small = 1 + torch.rand(1000, dtype=torch.float64), (1 + torch.rand(1000, dtype=torch.float64)) / 1024
    ref = torch.cat([large, small])
    ours = torch.cat([large, small * 1.01])
    assert judge(ours, ref, ref.bfloat16()).passed
    verdict = judge(ours, ref, ref.bfloat16(), elementwise=True)
    assert not verdict.passed and verdict.binade == -10 and verdict.index[0] >= 1000
    assert [(e, n) for e, n, *_ in verdict.binades] == [(-10, 1000), (0, 1000)]


def test_thin_binades_join_the_next():
    """Fewer than 64 elements are no sample; what is left over at the top joins the last."""
    ref = torch.cat([torch.full((n,), 2.0**e, dtype=torch.float64) for e, n in ((-5, 10), (-3, 60), (0, 64), (2, 3))])
    verdict = judge(ref, ref, ref.float(), elementwise=True)
    assert [(e, n) for e, n, *_ in verdict.binades] == [(-3, 70), (0, 67)]


def test_nothing_to_judge_passes():
    assert judge(torch.empty(0, 3), torch.empty(0, 3, dtype=torch.float64), torch.empty(0, 3)).passed


@pytest.mark.parametrize(
    ("ours", "ref"), [(torch.ones(2), torch.ones(3).double()), (torch.ones(3), torch.ones(3))], ids=["shape", "dtype"]
)
def test_what_cannot_be_judged_is_named(ours, ref):
    with pytest.raises(ValueError, match="expected one shape, and ref in float64"):
        judge(ours, ref, torch.ones(3))


def test_enlivened_weights_are_alive():
    import transformers

    config = transformers.BertConfig(hidden_size=64, num_attention_heads=2, intermediate_size=96, num_hidden_layers=1)
    model = transformers.BertForMaskedLM(config)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    after = dict(enliven(model, seed=1).named_parameters())
    for name, p in after.items():
        if name.endswith("bias"):
            assert 0.05 < p.std() < 0.15, name
        elif "LayerNorm.weight" in name:
            assert p.min() >= 0.8 and p.max() <= 1.2 and p.std() > 0.08, name
        elif "query.weight" in name or "key.weight" in name:
            assert torch.equal(p, 4 * before[name])
        else:
            assert torch.equal(p, before[name])
