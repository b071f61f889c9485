"""act(v) and act'(v) in float32.

    silu       v·σ(v)                                   σ(v) + v·σ(v)·(1 - σ(v))
    gelu       v·Φ(v),  Φ(v) = (1 + erf(v/√2)) / 2      Φ(v) + v·exp(-v²/2) / √(2π)
    gelu_tanh  v·σ(2z), z = √(2/π)·(v + 0.044715·v³)    σ(2z) + v·σ(2z)·(1 - σ(2z))·2z'
    relu2      v·max(v, 0)                              2·max(v, 0)

(1 + tanh z)/2 is σ(2z), in which nothing cancels.
"""

import triton
import triton.language as tl

_SQRT_HALF = tl.constexpr(0.7071067811865476)
_RSQRT_2_PI = tl.constexpr(0.3989422804014327)
_TWICE_SQRT_2_OVER_PI = tl.constexpr(1.5957691216057308)
_CUBE, _SLOPE_OF_CUBE = tl.constexpr(0.07135481627260025), tl.constexpr(0.21406444881780076)  # of 2z and its slope


@triton.jit
def gate_of(v, ACT: tl.constexpr):
    """The factor of v in act(v): σ(v), Φ(v), σ(2z) or max(v, 0)."""
    if ACT == "silu":
        return tl.sigmoid(v)
    elif ACT == "gelu":
        return 0.5 + 0.5 * tl.erf(v * _SQRT_HALF)
    elif ACT == "gelu_tanh":
        return tl.sigmoid(v * (_TWICE_SQRT_2_OVER_PI + _CUBE * v * v))
    else:
        tl.static_assert(ACT == "relu2")
        return tl.maximum(v, 0.0)


@triton.jit
def slope_of(v, gate, act, ACT: tl.constexpr):
    """act'(v), given gate_of(v) and act = v·gate."""
    if ACT == "silu":
        return gate + act * (1 - gate)
    elif ACT == "gelu":
        return gate + v * tl.exp(-0.5 * v * v) * _RSQRT_2_PI
    elif ACT == "gelu_tanh":
        return gate + act * (1 - gate) * (_TWICE_SQRT_2_OVER_PI + _SLOPE_OF_CUBE * v * v)
    else:
        return 2 * gate


@triton.jit
def gated(e, u, ACT: tl.constexpr):
    """act(e)·u in float32; act(u) where e is None."""
    v = e.to(tl.float32) if e is not None else u.to(tl.float32)
    act = v * gate_of(v, ACT)
    return act * u.to(tl.float32) if e is not None else act
