"""GELU and its slope on the device, in fp32 (Hendrycks & Gimpel 2016).

For 16-bit results the normal distribution's tail is Φ(-a) = 2^P(a), a >= 0, P a polynomial: log2 Φ(-a) is nearly a
parabola, so that few terms hold the tail's relative error where 1 + erf cancels. P(0) = -1; the other coefficients are
a minimax fit (Lawson 1961) of log2 Φ(-a) in float64 on [0, 14.5], its error weighed 1 up to a = 5, less behind, where
PyTorch's own 1 + erf has no bits left, and for fp16 20 times around 0.75, where the slope is zero.
"""

from __future__ import annotations

import triton
import triton.language as tl

CLIP = tl.constexpr(14.5)  # 2^P is 0 in fp32 from here on
TANH_CLIP = tl.constexpr(7.0)  # 1 + tanh is 0 from here on: even in fp64 it has lost its last bits
SQRT_HALF = tl.constexpr(0.7071067811865476)
PEAK = tl.constexpr(0.3989422804014327)  # of the normal density, 1/√(2π)
HALF_LOG2_E = tl.constexpr(0.7213475204444817)
CUBIC = tl.constexpr(0.044715)
TWICE_SCALE = tl.constexpr(1.5957691216057308)  # 2·√(2/π)
TWICE_SCALE_LOG2_E = tl.constexpr(2.302208198144325)


@triton.jit
def log2_tail_bfloat16(a):
    """log2 Φ(-a); relative error of Φ(-a): 2.9e-4 for a <= 5, 4.3% for a <= 9, 24% for a <= 13 (Φ(-13) = 6e-39)."""
    p = tl.fma(a, 1.0177235708397347e-05, -0.00037828495260328054)
    p = tl.fma(p, a, 0.005647020414471626)
    p = tl.fma(p, a, -0.04658089578151703)
    p = tl.fma(p, a, -0.46712982654571533)
    p = tl.fma(p, a, -1.1478705406188965)
    return tl.fma(p, a, -1.0)


@triton.jit
def log2_tail_float16(a):
    """log2 Φ(-a); relative error of Φ(-a): 2.9e-5 for a <= 5; fp16 ends at Φ(-5.4) = 3e-8."""
    p = tl.fma(a, -1.1341884373905486e-06, 4.7084104153327644e-05)
    p = tl.fma(p, a, -0.0008156743715517223)
    p = tl.fma(p, a, 0.008069975301623344)
    p = tl.fma(p, a, -0.05313098803162575)
    p = tl.fma(p, a, -0.4591824412345886)
    p = tl.fma(p, a, -1.1510261297225952)
    return tl.fma(p, a, -1.0)


@triton.jit
def normal_cdf(x, DTYPE: tl.constexpr):
    """Φ(x) of x in fp32, as exact as results in DTYPE need it; exactly 0 and 1 beyond the clip."""
    if DTYPE == tl.float32:  # noqa: SIM300
        cdf = tl.fma(tl.math.erf(x * SQRT_HALF), 0.5, 0.5)
    else:
        a = tl.minimum(tl.abs(x), CLIP)
        tail = tl.exp2(log2_tail_bfloat16(a) if DTYPE == tl.bfloat16 else log2_tail_float16(a))  # noqa: SIM300
        cdf = tl.where(x > 0, 1.0 - tail, tail)
    return cdf


@triton.jit
def tanh_parts(x):
    """(1 + tanh u)/2 and (1 - tanh u)/2 for u = √(2/π)·(x + 0.044715·x³), none by a difference, and x clipped."""
    a = tl.minimum(tl.abs(x), TANH_CLIP)
    e = tl.exp2(-a * tl.fma(a * a, CUBIC, 1.0) * TWICE_SCALE_LOG2_E)  # e^(-2u)
    e = tl.where(a < TANH_CLIP, e, 0.0)
    larger = 1.0 / (1.0 + e)
    smaller = e * larger
    return tl.where(x > 0, larger, smaller), tl.where(x > 0, smaller, larger), a


@triton.jit
def gelu(x, APPROXIMATE: tl.constexpr, DTYPE: tl.constexpr):
    """x·Φ(x) in fp32, by erf ("none") or by tanh ("tanh"); DTYPE: what it is rounded to."""
    if APPROXIMATE == "tanh":
        weight, _, _ = tanh_parts(x)
    else:
        weight = normal_cdf(x, DTYPE)
    return x * weight


@triton.jit
def gelu_slope(x, APPROXIMATE: tl.constexpr, DTYPE: tl.constexpr):
    """Φ(x) + x·φ(x) in fp32, or its tanh form."""
    if APPROXIMATE == "tanh":
        weight, rest, a = tanh_parts(x)
        rise = tl.fma(a * a, 3 * CUBIC, 1.0) * TWICE_SCALE  # 2·du/dx
        slope = tl.fma(x * (weight * rest), rise, weight)
    else:
        density = tl.exp2(-x * x * HALF_LOG2_E) * PEAK
        slope = tl.fma(x, density, normal_cdf(x, DTYPE))
    return slope
