"""The timing library. No test here asserts how long anything takes."""

import gc
import statistics

import pytest
import torch
from transformers import BertConfig, DistilBertConfig

from fastbert import bench, limits
from fastbert.bench import Gate, Ratio, SpeedRow
from fastbert.limits import Dimensions

BASE = Dimensions(layers=12, hidden=768, intermediate=3072)


def test_rounds_are_interleaved_after_the_warm_up():
    calls = []
    candidates = {name: (lambda i, name=name: calls.append((name, i))) for name in "AB"}
    samples = bench.interleave(candidates, 3, warmup=2)
    warm, timed = calls[:4], calls[4:]
    assert warm == [("A", 0), ("B", 0), ("A", 1), ("B", 1)]
    assert timed == [("A", 0), ("B", 0), ("A", 1), ("B", 1), ("A", 2), ("B", 2)]
    assert {name: len(seconds) for name, seconds in samples.items()} == {"A": 3, "B": 3}


def test_inner_calls_are_averaged(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: float(next(clock)))
    calls = []
    samples = bench.interleave({"A": calls.append}, 2, warmup=0, inner=4)
    assert calls == [0, 0, 0, 0, 1, 1, 1, 1]
    assert samples == {"A": [0.25, 0.25]}  # one tick a sample, four calls


def test_progress_is_told_every_round_and_garbage_collection_comes_back():
    told = []
    states = []
    bench.interleave(
        {"A": lambda i: states.append(gc.isenabled())}, 2, warmup=0, progress=lambda *a: told.append(a), what="x"
    )
    assert told == [("x", 1, 2), ("x", 2, 2)]
    assert states == [False, False]
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        bench.interleave({"A": lambda i: 1 / 0}, 1, warmup=0)
    assert gc.isenabled()


def test_summary_of_known_samples():
    summary = bench.summarize([4.0, 1.0, 3.0, 2.0, 5.0, 9.0, 7.0, 6.0, 8.0, 10.0, 11.0])
    assert summary == bench.Summary(median=6.0, p10=2.0, p90=10.0, total=66.0, count=11)


def test_ratio_is_taken_pair_by_pair():
    # the machine is three times slower in the second half: totals and medians of each alone would see it, pairs do not
    ours = [1.0, 1.1, 0.9, 3.0, 3.3, 2.7]
    base = [2.0 * x for x in ours]
    found = bench.ratio(base, ours)
    assert (found.median, found.low, found.high) == pytest.approx((2.0, 2.0, 2.0))
    assert found.of_totals == pytest.approx(2.0)


def test_interval_holds_the_median_and_widens_with_noise():
    quiet = bench.ratio([2.0, 2.02, 1.98, 2.01, 1.99] * 4, [1.0] * 20)
    noisy = bench.ratio([2.0, 3.0, 1.0, 2.5, 1.5] * 4, [1.0] * 20)
    for found in (quiet, noisy):
        assert found.low <= found.median <= found.high
    assert noisy.high - noisy.low > quiet.high - quiet.low > 0
    spread = [1.0 + 0.01 * i * i for i in range(30)]
    assert bench.ratio(spread, [1.0] * 30, draws=50) == bench.ratio(spread, [1.0] * 30, draws=50)  # seeded


def test_ratio_wants_pairs():
    with pytest.raises(ValueError, match="2 samples against 1"):
        bench.ratio([1.0, 2.0], [1.0])


def row(parity):
    return SpeedRow("w", "fastbert", "fp32", parity, 0.5, 8, 100, 200, 1000, 50, relative_error=1e-3)


def timed(parity):
    return bench.timed(
        row(parity), [0.5, 0.5, 1.0], texts=24, real_tokens=300, flops=3000, gemm_peak=6000.0,
        speedup=Ratio(2.0), memory_bytes=7,
    )  # fmt: skip


def test_speed_from_samples():
    found = timed(Gate(True, "fine"))
    assert found.seconds.median == 0.5
    assert found.texts_per_second == 12.0
    assert found.tokens_per_second == 150.0
    assert found.flops_per_second == 1500.0
    assert found.share_of_gemm_peak == 0.25
    assert found.samples == [0.5, 0.5, 1.0]
    assert (found.speedup, found.memory_bytes) == (Ratio(2.0), 7)


def test_a_silenced_row_has_no_speed():
    found = bench.silenced(row(Gate(False, "layer 3 is off")))
    silent = (
        "seconds", "texts_per_second", "tokens_per_second", "flops_per_second", "share_of_gemm_peak", "speedup",
        "memory_bytes",
    )  # fmt: skip
    assert [getattr(found, name) for name in silent] == [None] * len(silent)
    assert found.samples == []
    assert "layer 3 is off" in found.note
    assert found.relative_error == 1e-3  # what is wrong is still said


def test_a_base_row_needs_no_parity():
    assert timed(None).seconds is not None


@pytest.mark.parametrize(
    ("dimensions", "lengths", "expected"),
    [
        # BERT-base at S=512: 24·768² + 4·512·768 = 15 728 640 a token and layer, 188.7 MFLOP a token
        (BASE, [512], 12 * 512 * 15_728_640),
        # BERT-large, 24 layers: 24·1024² + 4·512·1024 = 27 262 976, 654.3 MFLOP a token
        (Dimensions(24, 1024, 4096), [512], 24 * 512 * 27_262_976),
        # lengths 1 and 3, H=2, I=3: a token 8·4 + 4·2·3 = 56; scores 4·1·2 + 4·9·2 = 80; 4·56 + 80 = 304
        (Dimensions(1, 2, 3), [1, 3], 304),
        # each sequence at its own length: two of 64 cost less than one of 128
        (BASE, [64, 64], 12 * 2 * (64 * 24 * 768**2 + 4 * 64 * 64 * 768)),
    ],
    ids=["base-512", "large-512", "by-hand", "own-length"],
)
def test_flops_by_hand(dimensions, lengths, expected):
    assert limits.encoder_flops(dimensions, lengths) == expected


def test_bytes_by_hand():
    weights = 12 * (4 * 768**2 + 2 * 768 * 3072) * 2
    assert limits.weight_bytes(BASE, 2) == weights
    assert limits.fused_bytes(BASE, 100, 2) == 12 * 100 * 26 * 768 * 2 + weights  # 26 H elements at I = 4 H
    assert limits.stock_bytes(BASE, 100, 2) == 12 * 100 * 40 * 768 * 2 + weights  # SDPA: 40 H


def test_dimensions_of_both_kinds_of_config():
    assert Dimensions.of(BertConfig()) == BASE
    assert Dimensions.of(DistilBertConfig()) == Dimensions(6, 768, 3072)


def test_gemm_peak_is_the_best_of_all_rates():
    found = limits.gemm_peak(Dimensions(1, 64, 128), torch.float32, tokens=32, repeats=2)
    assert len(found["rates"]) == 8  # four products, F.linear and packed
    assert found["flops_per_second"] == max(found["rates"].values()) == found["rates"][found["where"]]


def test_gemm_peak_counts_a_product_once(monkeypatch):
    monkeypatch.setattr(limits, "best_seconds", lambda run, device, repeats: 1.0)
    found = limits.gemm_peak(Dimensions(1, 64, 128), torch.float32, tokens=10)
    assert found["flops_per_second"] == 2 * 10 * 64 * 192  # QKV is the largest here


def test_copy_bandwidth_counts_reads_and_writes(monkeypatch):
    monkeypatch.setattr(limits, "best_seconds", lambda run, device, repeats: 2.0)
    assert limits.copy_bandwidth(megabytes=4) == 2 * 4 * 2**20 / 2.0


def test_peak_memory_sees_what_a_call_takes():
    megabytes = 64
    found = limits.peak_memory(lambda: torch.ones(megabytes * 2**18).sum())
    if found is None:
        pytest.skip("this system does not say")
    assert 0.9 * megabytes < found / 2**20 < 2 * megabytes
    assert limits.peak_memory(lambda: None) < 8 * 2**20


def test_median_is_not_the_mean():
    assert bench.summarize([1.0, 1.0, 10.0]).median == statistics.median([1.0, 1.0, 10.0]) == 1.0
