"""lora_conv2d: its docstring, the checks of its arguments, and autograd's Function of it."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends.torch import conv2d
from ..backends.torch.engine import to
from ..dtypes import without_autocast
from ..mask import check_p
from ..nf4 import NF4Weight
from ..operation.definition import compute_dtype, seeded
from ..values import Dropout, LoRAWeights, Window
from .checks import check_dtypes, check_scaling, check_tensors
from .linear import lora_linear

POSITIONS = ("x", "h")
Pair = int | tuple[int, int]


def lora_conv2d(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    scaling: float | Tensor = 1.0,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    dropout_position: str = "x",
) -> Tensor:
    """y = x ∗ W + s·(drop(x) ∗ A) ∗ B + c, ∗ a 2-D convolution; with gradients for x, A, B, c, and W where it is trained too.

    Shapes: x[n, C, H, W], weight [N, C, kh, kw], lora_A [R, C, kh, kw], lora_B [N, R, 1, 1], bias [N] -> y[n, N, ·, ·].
    Dtypes, scaling, seed and autocast as in `lora_linear`; no 4-bit weights. Any memory format; y has that of `F.conv2d`.
    stride, padding (numbers, "valid" or "same"), dilation: of `F.conv2d`, of W and A alike; groups = 1.
    dropout_p: applies whenever it is above 0. dropout_position: "x" drops the adapter's input, as PEFT does, with the mask
    `dropout_mask(n·H·W, C, dropout_p, seed)`, a row for each pixel; "h" drops drop(x ∗ A) instead, as kohya's scripts do, with
    `dropout_mask(n·H'·W', R, dropout_p, seed)` for y's pixels.

    A 1x1 convolution of stride 1 on a channels-last x is `lora_linear` over its pixels, without a copy. Otherwise W and A are
    the vendor's convolutions, and B is added into W's result in place.
    Saves x itself, h [n, R, ·, ·] and the seed for the backward pass, each only if a wanted gradient reads it: no mask and no
    dropped x.
    Raises TypeError or ValueError for arguments that do not fit, and RuntimeError on a second derivative.
    """
    member = LoRAWeights(weight, lora_A, lora_B, bias, scaling)
    check(x, member, dropout_p, dropout_position)
    window = window_of(weight.shape[2:], stride, padding, dilation)
    check_size(x, weight, window)
    if _is_linear(x, weight, window) and (dropout_position == "x" or not dropout_p):
        A, B = lora_A.flatten(1), lora_B.flatten(1)
        pixels, W = x.permute(0, 2, 3, 1), weight.flatten(1)
        y = lora_linear(pixels, W, A, B, bias, scaling=scaling, dropout_p=dropout_p, seed=seed)
        return y.permute(0, 3, 1, 2)
    dtype = compute_dtype(x, (member,))
    dropout = seeded(Dropout(dropout_p, seed), x.device) if dropout_p else None  # type: ignore[arg-type]
    x, weight = to(x, dtype), to(weight, dtype)
    return Conv2dFunction.apply(x, weight, lora_A, lora_B, bias, scaling, dropout, dropout_position, window)


def _is_linear(x: Tensor, weight: Tensor, window: Window) -> bool:
    """Whether the pixels of x are rows of a linear layer as they lie in memory."""
    plain = weight.shape[2:] == (1, 1) and window.stride == (1, 1) and window.padding == (0, 0)
    return plain and x.numel() > 0 and x.is_contiguous(memory_format=torch.channels_last)


class Conv2dFunction(torch.autograd.Function):
    """lora_conv2d where it is no linear layer, differentiable once."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        A: Tensor,
        B: Tensor,
        c: Tensor | None,
        s: float | Tensor,
        dropout: Dropout | None,
        position: str,
        window: Window,
    ) -> Tensor:
        with without_autocast(x.device):
            y, h = conv2d.forward(x, LoRAWeights(W, A, B, c, s), dropout, position, window)
        need_x, need_W, need_A, need_B = ctx.needs_input_grad[:4]
        ctx.save_for_backward(
            x if need_A or need_W else None,
            W if need_x or need_W else None,
            A if need_x or need_A else None,
            B if need_x or need_A else None,
            h if need_B else None,
            s if isinstance(s, Tensor) else None,
            dropout.seed if dropout is not None and (need_x or need_A) else None,
        )
        ctx.about = x.shape, s, None if dropout is None else dropout.p, position, window
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, W, A, B, h, scaling, seed = ctx.saved_tensors
        shape, s, p, position, window = ctx.about
        member = LoRAWeights(W, A, B, None, s if scaling is None else scaling)
        dropout = None if seed is None else Dropout(p, seed)
        with without_autocast(dy.device):
            grads = conv2d.backward(dy, x, shape, member, h, dropout, position, window, ctx.needs_input_grad[:5])
        return *grads, None, None, None, None


# ---- the arguments ----


def check(x: Tensor, member: LoRAWeights, dropout_p: float, dropout_position: str) -> None:
    """Raise TypeError or ValueError for tensors or dropout that do not fit."""
    weight, A, B, bias, scaling, _ = member
    if isinstance(weight, NF4Weight):
        raise TypeError("weight: got an NF4Weight, expected a torch.Tensor: there are no 4-bit convolutions; use dequantize()")
    check_tensors(x, member, "")
    for name, tensor, letters in (
        ("x", x, "n, C, H, W"), ("weight", weight, "N, C, kh, kw"), ("lora_A", A, "R, C, kh, kw"), ("lora_B", B, "N, R, 1, 1"),
    ):  # fmt: skip
        if tensor.ndim != 4:  # type: ignore[union-attr]
            raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected four dimensions [{letters}]")  # type: ignore[union-attr]
    (N, C, *kernel), R = weight.shape, A.shape[0]  # type: ignore[union-attr]
    if R == 0:
        raise ValueError("lora_A: got rank 0, expected at least 1; for no adapter use F.conv2d")
    if x.shape[1] != C:
        grouped = "; a grouped convolution has no such adapter: groups is 1 here" * (C > 0 and x.shape[1] % C == 0)
        raise ValueError(f"x: got {x.shape[1]} channels, expected {C} for weight {tuple(weight.shape)}{grouped}")
    expected: dict[str, tuple[Any, tuple[int, ...]]] = {"lora_A": (A, (R, C, *kernel)), "lora_B": (B, (N, R, 1, 1))}
    if bias is not None:
        expected["bias"] = (bias, (N,))
    for name, (tensor, shape) in expected.items():
        if tensor.shape != shape:
            raise ValueError(
                f"{name}: got shape {tuple(tensor.shape)}, expected {shape} for weight {tuple(weight.shape)} and rank {R}"
            )
    check_dtypes(x, member, "")
    check_scaling(scaling, x.device, "")
    check_p(dropout_p)
    if dropout_position not in POSITIONS:
        raise ValueError(f"dropout_position: got {dropout_position!r}, expected 'x' or 'h'")


def window_of(kernel: tuple[int, ...], stride: Pair, padding: Pair | str, dilation: Pair) -> Window:
    """The window of a kernel of this size. Raises TypeError or ValueError for options that F.conv2d has not."""
    steps, apart = _pair("stride", stride, 1), _pair("dilation", dilation, 1)
    if not isinstance(padding, str):
        return Window(steps, _pair("padding", padding, 0), apart)
    if padding not in ("valid", "same"):
        raise ValueError(f"padding: got {padding!r}, expected numbers, 'valid' or 'same'")
    if padding == "valid":
        return Window(steps, (0, 0), apart)
    if steps != (1, 1):
        raise ValueError(f"stride: got {stride} with padding='same', expected 1: PyTorch has no strided one; give numbers")
    total = [d * (k - 1) for d, k in zip(apart, kernel, strict=True)]
    return Window(steps, (total[0] // 2, total[1] // 2), apart, (total[0] % 2, total[1] % 2))


def _pair(name: str, value: Pair, least: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or not all(isinstance(v, int) and not isinstance(v, bool) and v >= least for v in pair):
        raise ValueError(f"{name}: got {value!r}, expected an integer of at least {least}, or a pair of such")
    return pair


def check_size(x: Tensor, weight: Tensor, window: Window) -> None:
    """Raise ValueError for an x that is smaller than the kernel."""
    for i, side in enumerate(("height", "width")):
        there = x.shape[2 + i] + 2 * window.padding[i] + window.beyond[i]
        needed = window.dilation[i] * (weight.shape[2 + i] - 1) + 1
        if there < needed:
            raise ValueError(
                f"x: got shape {tuple(x.shape)}, expected a padded {side} of at least {needed}, the kernel's; got {there}"
            )
