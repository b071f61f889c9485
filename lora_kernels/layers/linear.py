"""LoRALinear: a drop-in nn.Linear; made here, from its sizes or from a layer, computed here and made a plain layer again."""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..dtypes import autocast_dtype
from ..functional.linear import lora_linear
from ..functional.nf4 import quantize_nf4
from ..nf4 import NF4Weight
from ..nf4.state_dict import to_params4bit
from ..values import LoRAWeights
from .adapters import DEFAULT_ADAPTER, AdaptedWeight
from .frozen_weight import is_conv1d, is_linear4bit, without_weight
from .merging import bias_sum
from .mixed import Mixed, forward_mixed
from .offload import (
    call_onloaded,
    device_hook,
    forward_is_replaced,
    give_hook,
    keep_present_values,
    offloading_hooks,
    onloaded,
)
from .projection import Projection
from .stand_in import stand_in


class LoRALinear(AdaptedWeight):
    """y = x·Wᵀ + s·drop(x)·Aᵀ·Bᵀ + c: a drop-in nn.Linear with named low-rank adapters, one of them active.

    x[..., in_features] -> y[..., out_features]. `weight` [out, in] (frozen) and `bias` keep nn.Linear's names, so a base
    checkpoint loads unchanged; adapter `name` is `lora_A[name]` [r, in] and `lora_B[name]` [out, r]. s = lora_alpha / r, or
    lora_alpha / √r with use_rslora (Kalajdzievski 2023). Dropout applies in training mode only. With lora_bias the adapter has
    a bias too, `lora_bias[name]` [out], which is scaled like the rest: y = … + s·b. With use_adalora (AdaLoRA, Zhang et al.
    2023) it has singular values, `lora_E[name]` [r, 1]: E ⊙ A is in the place of A, and s = lora_alpha / (r + 1e-5). With
    use_dora (DoRA, Liu et al. 2024) it has a magnitude, `lora_magnitude[name]` [out], which begins as n = ‖W + s·B·A‖ by rows:
    y = (m / n) ⊙ (x·Wᵀ + s·drop(x)·Aᵀ·Bᵀ) + c, n constant in the gradient. PEFT's, in training with dropout, is another
    function: y = x·Wᵀ + (m / n − 1) ⊙ drop(x)·Wᵀ + (m / n) ⊙ s·drop(x)·Aᵀ·Bᵀ + c.

    init_lora_weights: True (A Kaiming-uniform, B zero), "gaussian" (A normal with deviation 1/r, B zero), "orthogonal" (A and B
    in orthogonal subspaces, r even), "pissa" or "pissa_niter_<n>" (principal singular vectors of W, Meng et al. 2024), "olora"
    (QR of W, Büyükakyüz 2024), or False (A and B both random, for tests). The last two named ones take s·B·A out of W, so that
    the layer's function is unchanged, and need to be the layer's only adapter.

    The base may be in 4 bits (QLoRA): `from_linear(…, quantize="nf4")`, bitsandbytes' Linear4bit, or a 4-bit state dict.
    """

    mixed: Mixed | None = None  # of the samples of a batch, while mixed_adapters says so

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        lora_bias: bool = False,
        use_adalora: bool = False,
        use_dora: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        linear = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        super().__init__(linear.weight, linear.bias)  # type: ignore[arg-type]
        self._stand_for(None)
        self.add_adapter(
            DEFAULT_ADAPTER,
            r,
            lora_alpha,
            lora_dropout=lora_dropout,
            use_rslora=use_rslora,
            init_lora_weights=init_lora_weights,
            lora_bias=lora_bias,
            use_adalora=use_adalora,
            use_dora=use_dora,
        )

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        *,
        r: int | None = 8,
        adapter_name: str = DEFAULT_ADAPTER,
        quantize: str | None = None,
        blocksize: int = 64,
        double_quant: bool = True,
        **adapter: Any,
    ) -> "LoRALinear":
        """A LoRALinear over `linear`'s own weight and bias, shared and frozen, with its training mode and hooks.

        linear: nn.Linear, transformers' Conv1D, or bitsandbytes' quantised Linear4bit. quantize="nf4": over an NF4 copy of the
        weight instead, in blocks of `blocksize`, their absmax in 8 bits with `double_quant`; a Linear4bit stays as it is.
        `adapter`: the options of `add_adapter`; lora_alpha defaults to 8, as in the constructor. r=None adds no adapter.
        A hook of accelerate's that moves `linear`'s tensors, offloaded ones included, moves this layer's from now on; adapters
        stay on the device on which it computes. Raises TypeError or ValueError for what cannot be adapted.
        """
        check_quantize(quantize)
        conv1d = is_conv1d(linear)
        if not (isinstance(linear, nn.Linear) or conv1d):
            raise TypeError(f"linear: got {type(linear).__name__}, expected nn.Linear, Linear4bit or transformers' Conv1D")
        if (reason := why_not_hooked(linear, quantize)) is not None:
            raise ValueError(f"linear: {reason}")
        flags = [(parameter, parameter.requires_grad) for parameter in linear.parameters()]
        layer, weight, bias = cls.__new__(cls), cast(nn.Parameter, linear.weight), cast(nn.Parameter | None, linear.bias)
        if is_linear4bit(linear):
            storage = weight.dtype if weight.dtype.is_floating_point else torch.uint8
            AdaptedWeight.__init__(layer, NF4Weight.from_bnb(weight), bias, storage=storage)
        elif quantize is not None:
            W = weight.detach().T if conv1d else weight.detach()
            w = quantize_nf4(W, blocksize=blocksize, double_quant=double_quant)
            AdaptedWeight.__init__(layer, w, bias, fan_in_fan_out=conv1d)
        else:
            AdaptedWeight.__init__(layer, weight, bias, fan_in_fan_out=conv1d)
        layer._stand_for(without_weight(linear) if layer.quantized else linear)
        stand_in(layer, linear, flags, r, adapter_name, adapter)
        return layer

    def _stand_for(self, source: nn.Module | None) -> None:
        """source: the layer that to_linear() makes again, without its weight if that is in 4 bits."""
        self._source = () if source is None else (source,)  # a tuple hides it from nn.Module
        compute_dtype = getattr(source, "compute_dtype", None)
        self.compute_dtype = compute_dtype if compute_dtype in (torch.bfloat16, torch.float16) else None

    def to_linear(self) -> nn.Module:
        """The plain layer, the one given to `from_linear` or an nn.Linear, with the merged weight or else the original one.

        From a Linear4bit that is one again, over the same bytes; where `quantize` was asked for, the weight is dequantised.
        """
        source = self._source or (nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta"),)
        linear = source[0].train(self.training)
        W, made = self.matrix, None
        if isinstance(W, NF4Weight) and is_linear4bit(linear):
            made = to_params4bit(W, self._format.storage, linear)  # type: ignore[union-attr]
        elif isinstance(W, NF4Weight) or not (self.merged or self.initial_term is None):
            with onloaded(self):
                made = self._dense_weight()
        linear.weight, linear.bias = self.weight if made is None else made, self.bias  # type: ignore[assignment]
        give_hook(self, linear)
        if made is not None:
            keep_present_values(linear)
        return linear

    def _dense_weight(self) -> nn.Parameter:
        """The weight that was quantised, or from which an initialisation took s·B·A, to rounding."""
        W = self.matrix
        if not isinstance(W, NF4Weight):
            return self._original_weight()
        dense = W.dequantize()
        return nn.Parameter(dense.T.contiguous() if self.fan_in_fan_out else dense, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        if "_hf_hook" in self.__dict__:
            self._refuse_to_train(any(hook.place_submodules for hook in offloading_hooks(self)))
        if self._modules["lora_A"].__dict__.get("_hf_hook") is not None:  # accelerate dispatched the model with its adapters
            return self._with_dispatched_adapters(x)
        return self._forward(x) if self.compute_dtype is None else self._in_compute_dtype(x)

    def _refuse_to_train(self, brought: bool = False) -> None:
        """Raise RuntimeError where a gradient is wanted for adapters that accelerate's hooks keep, or have brought for a call,
        after which those parameters are gone.
        """
        if torch.is_grad_enabled() and any(p.requires_grad and (p.is_meta or brought) for p in self.adapter_parameters()):
            raise RuntimeError(
                "LoRALinear: accelerate offloads its adapters, which would get no gradients: "
                "dispatch the model before add_lora, or call it under torch.no_grad()"
            )

    def _with_dispatched_adapters(self, x: Tensor) -> Tensor:
        self._refuse_to_train()
        hooked = [named for named in self.adapter_dicts() if device_hook(named) is not None]
        return call_onloaded(hooked, self._in_compute_dtype, x)

    def _in_compute_dtype(self, x: Tensor) -> Tensor:
        if self.compute_dtype is not None and x.dtype == torch.float32 and autocast_dtype(x.device) is None:
            return self._forward(x.to(self.compute_dtype)).to(x.dtype)  # as bitsandbytes' bnb_4bit_compute_dtype
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        if self.mixed is not None:
            self._refuse_if_merged("mix adapters")
            return forward_mixed(self, x, self.mixed) if self.mixed.adapters else self._base_forward(x)
        name = self.active_adapter
        if name is None or self._unmerged:
            return self._base_forward(x)
        W, A, B, c, scaling, m = self._weights(name)
        p = self.adapters[name].lora_dropout if self.training else 0.0
        return lora_linear(x, W, A, B, c, scaling=scaling, dropout_p=p, magnitude=m)  # type: ignore[arg-type]

    def _weights(self, name: str) -> LoRAWeights:
        """The layer with adapter `name`; its bias is c + s·b."""
        adapter, named, c = self.adapters[name], self._modules, self.bias  # nn.Module's own look-up takes a µs for each
        b = named["lora_bias"].get(name)  # type: ignore[union-attr, operator]
        return LoRAWeights(
            self.matrix,
            self.right(name),
            named["lora_B"].get(name),  # type: ignore[union-attr, operator, arg-type]
            c if b is None else bias_sum(c, b, adapter.scaling, self.base_dtype),
            adapter.scaling,
            named["lora_magnitude"].get(name),  # type: ignore[union-attr, operator, arg-type]
        )

    def projection(self, x: Tensor) -> Projection | str:
        """What `forward` computes of such an x, or the reason why it alone can."""
        name = self.active_adapter
        if self.mixed is not None:
            return "its samples have several adapters"
        if "_hf_hook" in self.__dict__ or "_hf_hook" in self._modules["lora_A"].__dict__:
            return "accelerate's hooks move the layer's tensors"
        if self._unmerged or (name is None and self.initial_term is not None):
            return "an adapter is merged" if self._unmerged else "what an initialisation took out of the weight is missing"
        if self.compute_dtype is not None and x.dtype == torch.float32 and autocast_dtype(x.device) is None:
            return "the 4-bit layer's compute_dtype is not x's dtype"
        if name is None:
            return Projection(LoRAWeights(self.matrix, None, None, self.bias))
        return Projection(self._weights(name), self.adapters[name].lora_dropout if self.training else 0.0)

    def _base_forward(self, x: Tensor) -> Tensor:
        if self.merged and self.training and torch.is_grad_enabled():
            raise RuntimeError("LoRALinear is merged, so its adapter gets no gradient: call unmerge() to train, or eval()")
        W = self.matrix
        if isinstance(W, NF4Weight):  # with an adapter of zeros
            return lora_linear(x, W, x.new_zeros(1, self.in_features), x.new_zeros(self.out_features, 1), self.bias)
        term = self.initial_term
        if term is None or self.merged:
            return F.linear(x, W, self.bias)
        return lora_linear(x, W, term.A, term.B, self.bias, scaling=term.scaling)

    def reset_parameters(self) -> None:
        """nn.Linear's initialisation of weight and bias, and that of every adapter: for a layer made on the meta device."""
        self._refuse_if_merged("reset the layer")
        self._initial_A = self._initial_B = None
        if self.quantized:
            fresh = nn.Linear(self.in_features, self.out_features, False, device=self.weight.device, dtype=self.base_dtype)
            self._hold(self._requantize(fresh.weight))
            if self.bias is not None:
                nn.init.uniform_(self.bias, -(self.in_features**-0.5), self.in_features**-0.5)
        else:
            nn.Linear.reset_parameters(self)  # type: ignore[arg-type]
        for name in self.adapters:
            self.reset_lora_parameters(name)

    def extra_repr(self) -> str:
        adapters = ", ".join(
            f"{name}: {'AdaLoRA ' * a.use_adalora}{'DoRA ' * a.use_dora}r={a.r}, lora_alpha={a.lora_alpha}"
            for name, a in self.adapters.items()
        )
        base = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        if self._format is not None:
            base += f", {self._format.quant_type} of {self._format.dtype} in blocks of {self._format.blocksize}"
        return f"{base}, active={self.active_adapter}, merged={self.merged}, adapters={{{adapters}}}"


def check_quantize(quantize: str | None) -> None:
    """Raise ValueError for a quantisation that there is not."""
    if quantize not in (None, "nf4"):
        raise ValueError(f"quantize: got {quantize!r}, expected None or 'nf4'")


def why_not_hooked(linear: nn.Module, quantize: str | None = None) -> str | None:
    """Why a layer whose forward was replaced cannot be adapted; None if it can be, with accelerate's hook on it or none."""
    if not forward_is_replaced(linear):
        return None
    if device_hook(linear) is None:
        return "its forward was replaced on the instance, by something other than accelerate's device hooks, and would be lost"
    if offloading_hooks(linear) and is_linear4bit(linear):
        return "accelerate's hook offloads its 4-bit weight, whose absmax it does not bring back: give it a device of its own"
    if offloading_hooks(linear) and quantize is not None:
        return "accelerate's hook offloads its weight, which cannot be quantised there: quantize before the model is dispatched"
    return None
