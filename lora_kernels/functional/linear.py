"""lora_linear and its autograd formula: what is saved, and which gradient needs which equation."""

import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from .. import operation as ops
from ..backends.torch.linear import Needs, weight_gradient
from ..mask import as_seed, draw_seed
from ..nf4.weight import NF4Weight

NF4_FIELDS, NF4_TENSORS = 9, 5  # of NF4Weight, the tensors first


def lora_linear(
    x: Tensor,
    weight: Tensor | NF4Weight,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """y = x·Wᵀ + s·drop(x)·Aᵀ·Bᵀ + c, with gradients for x, A, B, c, and W where it is trained too (Hu et al. 2021, §4.1).

    Shapes: x[..., K], weight W[N, K], lora_A[R, K], lora_B[N, R], bias c[N] -> y[..., N].
    Dtypes: bfloat16, float16, float32 or float64. x, weight and bias share one, which is also y's; the adapters share one,
    which may be another (float32 adapters over a 16-bit base are computed in float32). Under torch.autocast, x, weight and
    bias of any dtype are read as autocast's.
    A 4-bit weight (NF4Weight, frozen) is read as x's dtype, in both directions, and bias with it; adapters as above (QLoRA,
    Dettmers et al. 2023).
    scaling: s = alpha / r, a float or a 0-d tensor, which is read on the device.
    dropout_p: applies whenever it is above 0; pass 0 in evaluation. The mask is `dropout_mask(M, K, dropout_p, seed)`.
    seed: None draws it from torch's generator of x's device.

    Saves x itself, h = drop(x)·Aᵀ [M, R] and the seed for the backward pass, each only if a wanted gradient reads it.
    Raises TypeError or ValueError for arguments that do not fit, and RuntimeError on a second derivative.
    """
    ops.check(x, weight, lora_A, lora_B, bias, scaling, dropout_p)
    dtype = _compute_dtype(x, weight)
    if dropout_p > 0:
        seed = draw_seed(x.device) if seed is None else as_seed(seed, x.device)
    else:
        seed = None
    if torch.compiler.is_compiling() or isinstance(x, FakeTensor):
        if not isinstance(scaling, Tensor):
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            scaling = torch.full((), scaling, dtype=wide, device=x.device)
        forward: Callable[..., tuple[Tensor, Tensor]] = registered_forward
    else:
        forward = LoRALinearFunction.apply
    y, _ = forward(x, weight, lora_A, lora_B, bias, scaling, float(dropout_p), seed, dtype)
    return y.view(*x.shape[:-1], weight.shape[0])


def _compute_dtype(x: Tensor, weight: Tensor | NF4Weight) -> torch.dtype:
    """autocast's dtype where it applies (never to float64), otherwise a dense weight's, or x's with a 4-bit one."""
    if torch.is_autocast_enabled(x.device.type) and torch.float64 not in (x.dtype, weight.dtype):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype if isinstance(weight, NF4Weight) else weight.dtype


def _save_for_backward(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor], weight_inputs: int = 1) -> None:
    ctx.weight_inputs = weight_inputs
    x, weight, lora_A, lora_B, bias, scaling, dropout_p, seed, _ = inputs
    _, h = output
    need_x, need_W, need_A, need_B, _ = _needed(ctx)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(h)
    ctx.x_shape, ctx.x_dtype = x.shape, x.dtype
    ctx.weight_dtype, ctx.bias_dtype = weight.dtype, None if bias is None else bias.dtype
    ctx.dropout_p = dropout_p
    ctx.scaling = None if isinstance(scaling, Tensor) else scaling
    ctx.nf4_format, saved_weight = _flatten(weight) if need_x else (None, [])
    ctx.save_for_backward(
        x if need_A or need_W else None,
        lora_A if need_x else None,
        lora_B if need_x or need_A else None,
        h if need_B else None,
        scaling if isinstance(scaling, Tensor) else None,
        seed if need_x or need_A else None,
        *saved_weight,
    )


def _needed(ctx: Any) -> tuple[bool, ...]:
    """needs_input_grad of x, weight, A, B and bias; a weight given as the fields of an NF4Weight needs none."""
    needs, after = ctx.needs_input_grad, 1 + ctx.weight_inputs
    return needs[0], ctx.weight_inputs == 1 and needs[1], *needs[after : after + 3]


def _flatten(weight: Tensor | NF4Weight) -> tuple[NF4Weight | None, list[Tensor | None]]:
    """(an NF4Weight without its tensors, or None; the weight's tensors): what a saved weight is put together from again."""
    if not isinstance(weight, NF4Weight):
        return None, [weight]
    fields = weight.fields()
    return NF4Weight.from_fields((None,) * NF4_TENSORS + fields[NF4_TENSORS:]), list(fields[:NF4_TENSORS])


def _backward(lora_backward: Callable[..., tuple], ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * (8 + ctx.weight_inputs)
    x, lora_A, lora_B, h, scaling, seed, *saved_weight = ctx.saved_tensors
    weight = saved_weight[0] if saved_weight else None
    if ctx.nf4_format is not None:
        weight = NF4Weight.from_fields((*saved_weight, *ctx.nf4_format.fields()[NF4_TENSORS:]))
    need_x, need_W, need_A, need_B, need_c = _needed(ctx)
    needs = Needs(need_x, need_A, need_B, need_c)
    scaling = ctx.scaling if scaling is None else scaling
    dx, dA, dB, dc = lora_backward(dy, x if need_A else None, weight, lora_A, lora_B, h, scaling, ctx.dropout_p, seed, needs)
    dW = weight_gradient(dy, x.reshape(-1, x.shape[-1]).to(dy.dtype)).to(ctx.weight_dtype) if need_W else None
    return (
        dx.view(ctx.x_shape).to(ctx.x_dtype) if need_x else None,
        dW,
        *(None,) * (ctx.weight_inputs - 1),
        dA if need_A else None,
        dB if need_B else None,
        dc.to(ctx.bias_dtype) if need_c else None,
        *(None,) * 4,
    )


class LoRABackwardFunction(torch.autograd.Function):
    """ops.lora_backward under create_graph=True: its own derivative is an error, not a silent zero."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor | None, ...]:
        return ops.lora_backward(*args)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> NoReturn:
        _no_second_derivative(ctx, *grads)


def _no_second_derivative(ctx: Any, *grads: Tensor | None) -> NoReturn:
    raise RuntimeError(
        "lora_linear: the second derivative is not implemented; "
        "for a gradient penalty or a Hessian compute the layer with plain PyTorch operations"
    )


def _eager_backward(*args: Any) -> tuple[Tensor | None, ...]:
    return LoRABackwardFunction.apply(*args) if torch.is_grad_enabled() else ops.lora_backward(*args)


class LoRALinearFunction(torch.autograd.Function):
    """(y[M, N], h[M, R]) of ops.lora_forward, differentiable once; h carries no gradient."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = ops.lora_forward(*inputs)
        _save_for_backward(ctx, inputs, output)  # a setup_context of its own would cost 50 µs per call (torch 2.13)
        return output

    backward = staticmethod(functools.partial(_backward, _eager_backward))


# ---- the same formula for the registered operators, which torch.compile differentiates ----


def registered_forward(x: Tensor, weight: Tensor | NF4Weight, *rest: Any) -> tuple[Tensor, Tensor]:
    if isinstance(weight, NF4Weight):
        return torch.ops.lora_kernels.lora_forward_nf4(x, *weight.fields(), *rest)
    return torch.ops.lora_kernels.lora_forward(x, weight, *rest)


def _registered_backward(dy: Tensor, x: Tensor | None, weight: Tensor | NF4Weight | None, *rest: Any) -> tuple[Tensor, ...]:
    if isinstance(weight, NF4Weight):
        return torch.ops.lora_kernels.lora_backward_nf4(dy, x, *weight.fields(), *rest)
    return torch.ops.lora_kernels.lora_backward(dy, x, weight, *rest)


def _save_nf4_for_backward(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    _save_for_backward(ctx, ops.with_nf4_weight(inputs), output, NF4_FIELDS)


_formula = functools.partial(_backward, _registered_backward)
torch.library.register_autograd("lora_kernels::lora_forward", _formula, setup_context=_save_for_backward)
torch.library.register_autograd("lora_kernels::lora_forward_nf4", _formula, setup_context=_save_nf4_for_backward)
torch.library.register_autograd("lora_kernels::lora_backward", _no_second_derivative)
torch.library.register_autograd("lora_kernels::lora_backward_nf4", _no_second_derivative)
