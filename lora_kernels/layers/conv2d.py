"""LoRAConv2d: a drop-in nn.Conv2d; made here, from its sizes or from a layer, computed here and made a plain layer again."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional.conv2d import POSITIONS, lora_conv2d
from .adapters import DEFAULT_ADAPTER, AdaptedWeight, Adapter
from .merging import bias_sum
from .stand_in import refuse_options, stand_in

OPTIONS = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


class LoRAConv2d(AdaptedWeight):
    """y = x ∗ W + s·(drop(x) ∗ A) ∗ B + c: a drop-in nn.Conv2d with named low-rank adapters, one of them active.

    x[n, in_channels, ·, ·] -> y[n, out_channels, ·, ·]. `weight` (frozen) and `bias` keep nn.Conv2d's names; adapter `name` is
    `lora_A[name]` [r, in, kh, kw], a convolution with the layer's stride, padding and dilation, and `lora_B[name]`
    [out, r, 1, 1]. Scaling, dropout, lora_bias, init_lora_weights and merging are as in LoRALinear, of which W, A and B are
    matrices [out, in·kh·kw], [r, in·kh·kw] and [out, r]; DoRA, AdaLoRA and 4-bit weights are not there.
    dropout_position: "x" as in PEFT, or "h", drop(x ∗ A), as in kohya's scripts.
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int] | str
    dilation: tuple[int, int]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        bias: bool = True,
        *,
        r: int = 8,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        dropout_position: str = "x",
        **adapter: Any,
    ):
        """adapter: the options of `add_adapter`; lora_alpha defaults to 8."""
        conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, 1, bias, device=device, dtype=dtype)
        self._init(conv, dropout_position)
        self._source: tuple[nn.Module, ...] = ()
        self.add_adapter(DEFAULT_ADAPTER, r, adapter.pop("lora_alpha", 8), **adapter)

    @classmethod
    def from_conv(
        cls,
        conv: nn.Module,
        *,
        r: int | None = 8,
        adapter_name: str = DEFAULT_ADAPTER,
        dropout_position: str = "x",
        **adapter: Any,
    ) -> "LoRAConv2d":
        """A LoRAConv2d over `conv`'s own weight and bias, shared and frozen, with its training mode and hooks.

        adapter: the options of `add_adapter`; lora_alpha defaults to 8. r=None adds no adapter.
        Raises TypeError or ValueError for what cannot be adapted.
        """
        if type(conv) is not nn.Conv2d:
            raise TypeError(f"conv: got {type(conv).__name__}, expected nn.Conv2d")
        if (reason := why_not_conv2d(conv)) is not None:
            raise ValueError(f"conv: {reason}")
        flags = [(parameter, parameter.requires_grad) for parameter in conv.parameters()]
        layer = cls.__new__(cls)
        layer._init(conv, dropout_position)
        layer._source = (conv,)  # a tuple hides it from nn.Module
        stand_in(layer, conv, flags, r, adapter_name, adapter)
        return layer

    def _init(self, conv: nn.Conv2d, dropout_position: str) -> None:
        if dropout_position not in POSITIONS:
            raise ValueError(f"dropout_position: got {dropout_position!r}, expected 'x' or 'h'")
        AdaptedWeight.__init__(self, conv.weight, conv.bias)  # type: ignore[arg-type]
        vars(self).update({name: getattr(conv, name) for name in OPTIONS}, dropout_position=dropout_position)

    def to_plain(self) -> nn.Module:
        """The nn.Conv2d, the one given to `from_conv` or a new one, with the merged weight or else the original one."""
        made = nn.Conv2d(**{name: getattr(self, name) for name in OPTIONS}, bias=self.bias is not None, device="meta")
        conv: Any = (self._source or (made,))[0].train(self.training)
        conv.weight, conv.bias = self.weight if self.merged else self._original_weight(), self.bias
        return conv

    def forward(self, x: Tensor) -> Tensor:
        name = self.active_adapter
        if name is None or self._unmerged:
            return self._base_forward(x)
        adapter, b = self.adapters[name], self.lora_bias.get(name)
        bias = self.bias if b is None else bias_sum(self.bias, b, adapter.scaling, self.base_dtype)
        p = adapter.lora_dropout if self.training else 0.0
        return self._convolve(x, self.lora_A[name], self.lora_B[name], bias, adapter.scaling, p)

    def _convolve(self, x: Tensor, A: Tensor, B: Tensor, bias: Tensor | None, scaling: float | Tensor, p: float) -> Tensor:
        options: Any = {name: getattr(self, name) for name in ("stride", "padding", "dilation", "dropout_position")}
        return lora_conv2d(x, self.weight, A, B, bias, scaling=scaling, dropout_p=p, **options)

    def _base_forward(self, x: Tensor) -> Tensor:
        if self.merged and self.training and torch.is_grad_enabled():
            raise RuntimeError("LoRAConv2d is merged, so its adapter gets no gradient: call unmerge() to train, or eval()")
        term = self.initial_term
        if term is None or self.merged:
            return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation)
        shape_A, shape_B = self.adapter_shapes(len(term.A))
        return self._convolve(x, term.A.view(shape_A), term.B.view(shape_B), self.bias, term.scaling, 0.0)

    # ---- W, A and B as matrices, for initialisation and merging ----

    @property
    def matrix(self) -> Tensor:
        """W[out, in·kh·kw]."""
        return self.weight.flatten(1)

    def stored(self, matrix: Tensor) -> Tensor:
        last = self.weight.is_contiguous(memory_format=torch.channels_last)
        form = torch.channels_last if last and not self.weight.is_contiguous() else torch.contiguous_format
        return matrix.reshape(self.weight.shape).contiguous(memory_format=form)

    def adapter_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return conv2d_shapes(self, r)

    def right(self, name: str) -> Tensor:
        return self.lora_A[name].flatten(1)

    def left(self, name: str) -> Tensor:
        return self.lora_B[name].flatten(1)

    def add_adapter(self, name: str, r: int, lora_alpha: float, **options: Any) -> None:
        refuse_options("Conv2d", **{key: options.get(key) for key in ("use_dora", "use_adalora")})
        super().add_adapter(name, r, lora_alpha, **options)

    def _initialize(self, adapter: Adapter, lora_A: Tensor, lora_B: Tensor, lora_E: Tensor | None = None) -> None:
        A, B = (torch.empty(t.flatten(1).shape, dtype=t.dtype, device=t.device) for t in (lora_A, lora_B))
        super()._initialize(adapter, A, B)
        lora_A.copy_(A.view(lora_A.shape))
        lora_B.copy_(B.view(lora_B.shape))

    def reset_parameters(self) -> None:
        """nn.Conv2d's initialisation of weight and bias, and that of every adapter: for a layer made on the meta device."""
        self._refuse_if_merged("reset the layer")
        self._initial_A = self._initial_B = None
        nn.Conv2d.reset_parameters(self)  # type: ignore[arg-type]
        for name in self.adapters:
            self.reset_lora_parameters(name)

    def extra_repr(self) -> str:
        adapters = ", ".join(f"{name}: r={a.r}, lora_alpha={a.lora_alpha}" for name, a in self.adapters.items())
        base = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        return (
            f"{base}, padding={self.padding}, dilation={self.dilation}, bias={self.bias is not None}, "
            f"active={self.active_adapter}, merged={self.merged}, adapters={{{adapters}}}"
        )


def conv2d_shapes(conv: Any, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(A's, B's) of an adapter of this rank over an nn.Conv2d or LoRAConv2d."""
    return (r, conv.in_channels, *conv.kernel_size), (conv.out_channels, r, 1, 1)


def why_not_conv2d(conv: nn.Conv2d) -> str | None:
    """Why an nn.Conv2d cannot be adapted."""
    if conv.groups != 1:
        return f"a grouped Conv2d (groups={conv.groups}): a rank that is shared by its groups would mix what they keep apart"
    if conv.padding_mode != "zeros":
        return f"a Conv2d with padding_mode={conv.padding_mode!r}, of which the adapter, as PEFT's, has zeros"
    return None
