"""act(v) and act'(v) in float32.

    silu       v·σ(v)                              σ(v)·(1 + v·(1 - σ(v)))
    gelu       v·Φ(v),  Φ(v) = (1 + erf(v/√2))/2   Φ(v) + v·exp(-v²/2)/√(2π)
    gelu_tanh  v·σ(2z), z = √(2/π)·(v + 0.044715·v³)   σ(2z) + v·σ(2z)·(1 - σ(2z))·2z'
    relu2      max(v, 0)²                          2·max(v, 0)

(1 + tanh z)/2 is σ(2z), in which nothing cancels.
"""

import triton
import triton.language as tl

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu2")
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_SQRT_2_PI = tl.constexpr(2.5066282746310002)
_TWICE_SQRT_2_OVER_PI = tl.constexpr(1.5957691216057308)


@triton.jit
def gate_of(v, ACT: tl.constexpr):
    """The factor of v in act(v): σ(v), Φ(v), σ(2z) or max(v, 0)."""
    if ACT == "silu":
        return tl.sigmoid(v)
    elif ACT == "gelu":
        return 0.5 + 0.5 * tl.erf(v * _SQRT_HALF)
    elif ACT == "gelu_tanh":
        return tl.sigmoid(_TWICE_SQRT_2_OVER_PI * (v + 0.044715 * v * v * v))
    else:
        tl.static_assert(ACT == "relu2")
        return tl.maximum(v, 0.0)


@triton.jit
def slope_of(v, gate, ACT: tl.constexpr):
    """act'(v), given gate_of(v)."""
    if ACT == "silu":
        return gate * (1 + v * (1 - gate))
    elif ACT == "gelu":
        return gate + v * tl.exp(-0.5 * v * v) / _SQRT_2_PI
    elif ACT == "gelu_tanh":
        return gate + v * gate * (1 - gate) * (_TWICE_SQRT_2_OVER_PI * (1 + 0.134145 * v * v))
    else:
        return 2 * gate


@triton.jit
def gated(e, u, ACT: tl.constexpr):
    """act(e)·u in float32; act(u) where e is None."""
    if e is None:
        return u.to(tl.float32) * gate_of(u.to(tl.float32), ACT)
    else:
        return e.to(tl.float32) * gate_of(e.to(tl.float32), ACT) * u.to(tl.float32)
