"""The two operations every backend provides, checked once and registered with torch.library.

    lora_forward   equations 1, 2     (x, W, A, B, s, c, dropout) -> y, h
    lora_backward  equations 3 to 6   (dy, x, W, A, B, h, s, dropout, needs) -> dx, dA, dB, dc

Either weight is dense or an NF4Weight, in which case the product reads it as `dtype`, rounded once.

Eager mode calls the Python functions here, which pick a backend from the tensors; `torch.compile` and `torch.export` see the
registered operators `torch.ops.lora_kernels.*` of the same names, which do the same. A registered operator cannot return None
or take a float-or-tensor argument: there, a gradient that is not needed is an empty tensor and the scaling is a tensor.
"""

import torch
from torch import Tensor

from . import plan as backends
from .backends.torch.linear import Needs
from .mask import as_seed, check_p
from .nf4.weight import NF4Weight

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def lora_forward(
    x: Tensor,
    weight: Tensor | NF4Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float | Tensor,
    dropout_p: float,
    seed: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Equations 1 and 2 on checked arguments. x[..., K] is flattened to M rows; x, weight and bias are read as `dtype`.

    Returns fresh y[M, N] of `dtype` and h[M, R] of the adapter's dtype.
    """
    x = x.reshape(-1, x.shape[-1]).to(dtype)
    backend = backends.choose(x, weight, lora_A, lora_B)
    bias = None if bias is None else bias.to(dtype)
    return backend.lora_forward(x, as_dtype(weight, dtype), lora_A, lora_B, scaling, bias, dropout_p, seed)


def lora_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | NF4Weight | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    h: Tensor | None,
    scaling: float | Tensor,
    dropout_p: float,
    seed: Tensor | None,
    needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Equations 3 to 6 for the gradients that `needs` names: dx[M, K], dA, dB, dc. dy[M, N] has the forward's `dtype`."""
    if x is not None:
        x = x.reshape(-1, x.shape[-1]).to(dy.dtype)
    weight = None if weight is None else as_dtype(weight, dy.dtype)
    backend = backends.choose(dy, weight, lora_A, lora_B)
    return backend.lora_backward(dy, x, weight, lora_A, lora_B, h, scaling, dropout_p, seed, needs)


def as_dtype(weight: Tensor | NF4Weight, dtype: torch.dtype) -> Tensor | NF4Weight:
    """A dense weight in `dtype`; an NF4Weight as it is, for the product rounds it."""
    return weight if isinstance(weight, NF4Weight) else weight.to(dtype)


def check(
    x: Tensor,
    weight: Tensor | NF4Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    scaling: float | Tensor,
    dropout_p: float,
) -> None:
    """Raise TypeError or ValueError, naming the argument, what it is, what it should be and the cure."""
    tensors = {"x": x, "lora_A": lora_A, "lora_B": lora_B}
    if isinstance(weight, NF4Weight):
        weight.check()
        if isinstance(x, Tensor) and weight.device != x.device:
            raise ValueError(f"weight: got an NF4Weight on {weight.device}, expected {x.device} as x; use weight.to(x.device)")
    else:
        tensors["weight"] = weight
    if bias is not None:
        tensors["bias"] = bias
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: got {type(tensor).__name__}, expected a torch.Tensor")
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{name}: got dtype {tensor.dtype}, expected bfloat16, float16, float32 or float64")
        if tensor.device != x.device:
            raise ValueError(f"{name}: got a tensor on {tensor.device}, expected {x.device} as x; use {name}.to(x.device)")
    _check_shapes(x, weight, lora_A, lora_B, bias)
    _check_dtypes(x, weight, lora_A, lora_B, bias)
    _check_scaling(scaling, x.device)
    check_p(dropout_p)


def _check_shapes(x: Tensor, weight: Tensor | NF4Weight, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None) -> None:
    for name, tensor, letters in (("weight", weight, "N, K"), ("lora_A", lora_A, "R, K"), ("lora_B", lora_B, "N, R")):
        if tensor.ndim != 2:
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected two dimensions [{letters}]")
    (N, K), R = weight.shape, lora_A.shape[0]
    if R == 0:
        raise ValueError(f"lora_A: got rank 0 (shape {tuple(lora_A.shape)}), expected at least 1; for no adapter use F.linear")
    expected: dict[str, tuple[Tensor, tuple[int, ...]]] = {"lora_A": (lora_A, (R, K)), "lora_B": (lora_B, (N, R))}
    if bias is not None:
        expected["bias"] = (bias, (N,))
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            cure = f"; use {name}.T" if tensor.ndim == 2 and tensor.T.shape == shape else ""
            raise ValueError(
                f"{name}: got shape {tuple(tensor.shape)}, expected {tuple(shape)} "
                f"for weight {tuple(weight.shape)} and rank {R}{cure}"
            )
    if x.ndim == 0 or x.shape[-1] != K:
        raise ValueError(f"x: got shape {tuple(x.shape)}, expected [..., {K}] for weight {tuple(weight.shape)}")


def _check_dtypes(x: Tensor, weight: Tensor | NF4Weight, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None) -> None:
    if lora_A.dtype != lora_B.dtype:
        raise TypeError(f"lora_B: got dtype {lora_B.dtype}, expected {lora_A.dtype} as lora_A; use lora_B.to(lora_A.dtype)")
    if isinstance(weight, NF4Weight):
        return  # weight and bias are read as x's dtype, or autocast's
    if torch.is_autocast_enabled(x.device.type) and torch.float64 not in (x.dtype, weight.dtype):
        return  # x, weight and bias are read as autocast's dtype
    if x.dtype != weight.dtype:
        raise TypeError(f"x: got dtype {x.dtype}, expected {weight.dtype} as weight; use x.to(weight.dtype), or torch.autocast")
    # A wider bias, such as float32 beside a bfloat16 weight, keeps its gradient from being rounded to the weight's dtype.
    if bias is not None and torch.promote_types(bias.dtype, weight.dtype) != bias.dtype:
        raise TypeError(
            f"bias: got dtype {bias.dtype}, expected {weight.dtype} as weight, or a wider one; "
            "use bias.to(weight.dtype), or torch.autocast"
        )


def _check_scaling(scaling: float | Tensor, device: torch.device) -> None:
    if not isinstance(scaling, Tensor):
        if isinstance(scaling, bool) or not isinstance(scaling, (int, float)):
            raise TypeError(f"scaling: got {type(scaling).__name__}, expected a float or a 0-d tensor")
        return
    if scaling.ndim != 0 or not scaling.is_floating_point():
        raise ValueError(
            f"scaling: got a {scaling.dtype} tensor of shape {tuple(scaling.shape)}, expected a 0-d floating-point tensor"
        )
    if scaling.device != device and scaling.device.type != "cpu":
        raise ValueError(f"scaling: got a tensor on {scaling.device}, expected {device}; use scaling.to({str(device)!r})")
    if scaling.requires_grad:
        raise ValueError("scaling: requires_grad is set, but scaling has no gradient here; use scaling.detach()")


# ---- torch.library: the same two functions, as operators that a compiler can see ----

NF4_SCHEMA = (
    "Tensor codes, Tensor absmax, Tensor? nested_absmax, Tensor? nested_map, Tensor? nested_offset, SymInt[] shape, "
    "ScalarType weight_dtype, int blocksize, str quant_type"
)
FORWARD_SCHEMA = (
    "(Tensor x, {weight}, Tensor lora_A, Tensor lora_B, Tensor? bias, Tensor scaling, float dropout_p, Tensor? seed, "
    "ScalarType dtype) -> (Tensor y, Tensor h)"
)
BACKWARD_SCHEMA = (
    "(Tensor dy, Tensor? x, {weight}, Tensor? lora_A, Tensor? lora_B, Tensor? h, Tensor scaling, float dropout_p, "
    "Tensor? seed, bool[] needs) -> (Tensor dx, Tensor dA, Tensor dB, Tensor dc)"
)


def with_nf4_weight(arguments: tuple, at: int = 1) -> tuple:
    """Arguments in which the nine fields of an NF4Weight, from `at` on, are one."""
    return *arguments[:at], NF4Weight.from_fields(arguments[at : at + 9]), *arguments[at + 9 :]


def _forward_op(x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed, dtype):
    check(x, weight, lora_A, lora_B, bias, scaling, dropout_p)
    if dropout_p > 0 and seed is None:
        raise ValueError("seed: got None, expected an int64 tensor where dropout_p > 0")
    seed = None if seed is None else as_seed(seed, x.device)
    return lora_forward(x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed, dtype)


def _backward_op(dy, x, weight, lora_A, lora_B, h, scaling, dropout_p, seed, needs):
    grads = lora_backward(dy, x, weight, lora_A, lora_B, h, scaling, dropout_p, seed, Needs(*needs))
    return tuple(dy.new_empty(0) if grad is None else grad for grad in grads)


def _forward_fake(x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed, dtype):
    M = x.shape[:-1].numel()
    return x.new_empty(M, weight.shape[0], dtype=dtype), lora_A.new_empty(M, lora_A.shape[0])


def _backward_fake(dy, x, weight, lora_A, lora_B, h, scaling, dropout_p, seed, needs):
    needs, total = Needs(*needs), torch.promote_types(dy.dtype, torch.float32)
    M, N = dy.shape
    return (
        dy.new_empty(M, weight.shape[1]) if needs.dx else dy.new_empty(0),
        lora_B.new_empty(lora_B.shape[1], x.shape[-1]) if needs.dA else dy.new_empty(0),
        h.new_empty(N, h.shape[1]) if needs.dB else dy.new_empty(0),
        dy.new_empty(N, dtype=total) if needs.dc else dy.new_empty(0),
    )


_library = torch.library.Library("lora_kernels", "DEF")
for _name, _schema, _dense, _at, _op, _fake in (
    ("lora_forward", FORWARD_SCHEMA, "Tensor weight", 1, _forward_op, _forward_fake),
    ("lora_backward", BACKWARD_SCHEMA, "Tensor? weight", 2, _backward_op, _backward_fake),
):
    _variants = (
        (_name, _dense, _op, _fake),
        (
            f"{_name}_nf4",
            NF4_SCHEMA,
            lambda *args, op=_op, at=_at: op(*with_nf4_weight(args, at)),
            lambda *args, fake=_fake, at=_at: fake(*with_nf4_weight(args, at)),
        ),
    )
    for _variant, _weight, _implementation, _shapes in _variants:
        _library.define(_variant + _schema.format(weight=_weight), tags=torch.Tag.pt2_compliant_tag)
        _library.impl(_variant, _implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"lora_kernels::{_variant}", _shapes, lib=_library)
