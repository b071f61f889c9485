"""LoRALinear: owns the tensors of a frozen linear layer and its adapters; `forward` is one call."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..functional.linear import lora_linear
from ..mask import check_p
from ..models.config import scaling
from ..nf4.state_dict import from_bnb, to_params4bit
from ..nf4.weight import NF4Weight, quantize_nf4
from .frozen_weight import FrozenWeight, apply_to_bytes, is_linear4bit, without_weight
from .initialization import check_init, initialize, rewrites_weight

DEFAULT_ADAPTER = "default"


@dataclass
class Adapter:
    """The settings of one adapter of a layer; its A and B are parameters of the layer."""

    r: int
    lora_alpha: float
    lora_dropout: float = 0.0
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    lora_bias: bool = False
    scaling: float | Tensor = 1.0  # a 0-d tensor may be put here: it is read on the device


class LoRALinear(FrozenWeight):
    """y = x·Wᵀ + s·drop(x)·Aᵀ·Bᵀ + c: a drop-in nn.Linear with named low-rank adapters, one of them active.

    x[..., in_features] -> y[..., out_features]. `weight` [out, in] (frozen) and `bias` keep nn.Linear's names, so a base
    checkpoint loads unchanged; adapter `name` is `lora_A[name]` [r, in] and `lora_B[name]` [out, r]. s = lora_alpha / r, or
    lora_alpha / √r with use_rslora (Kalajdzievski 2023). Dropout applies in training mode only. With lora_bias the adapter has
    a bias too, `lora_bias[name]` [out], which is scaled like the rest: y = … + s·b.

    init_lora_weights: True (A Kaiming-uniform, B zero), "gaussian" (A normal with deviation 1/r, B zero), "orthogonal" (A and B
    in orthogonal subspaces, r even), "pissa" or "pissa_niter_<n>" (principal singular vectors of W, Meng et al. 2024), "olora"
    (QR of W, Büyükakyüz 2024), or False (A and B both random, for tests). The last two named ones take s·B·A out of W, so that
    the layer's function is unchanged, and need to be the layer's only adapter.

    The base may be in 4 bits (QLoRA): `from_linear(…, quantize="nf4")`, bitsandbytes' Linear4bit, or a 4-bit state dict.
    """

    _initial_A: Tensor | None
    _initial_B: Tensor | None

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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        linear = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        super().__init__(linear.weight, linear.bias)  # type: ignore[arg-type]
        self._start()
        self.add_adapter(
            DEFAULT_ADAPTER,
            r,
            lora_alpha,
            lora_dropout=lora_dropout,
            use_rslora=use_rslora,
            init_lora_weights=init_lora_weights,
            lora_bias=lora_bias,
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
        `adapter`: the options of `add_adapter`; lora_alpha defaults to r, as in the constructor. r=None adds no adapter.
        """
        check_quantize(quantize)
        fan_in_fan_out = type(linear).__name__ == "Conv1D"
        if not (isinstance(linear, nn.Linear) or fan_in_fan_out):
            raise TypeError(f"linear: got {type(linear).__name__}, expected nn.Linear, Linear4bit or transformers' Conv1D")
        weight: Any = linear.weight
        layer = cls.__new__(cls)
        if is_linear4bit(linear):
            storage = weight.dtype if weight.dtype.is_floating_point else torch.uint8
            FrozenWeight.__init__(layer, from_bnb(weight), linear.bias, storage=storage)  # type: ignore[arg-type]
        else:
            if quantize is not None:
                W = weight.detach().T if fan_in_fan_out else weight.detach()
                weight = quantize_nf4(W, blocksize=blocksize, double_quant=double_quant)
            FrozenWeight.__init__(layer, weight, linear.bias, fan_in_fan_out=fan_in_fan_out)  # type: ignore[arg-type]
        layer._start(source=without_weight(linear) if layer.quantized else linear)
        layer.train(linear.training)
        vars(layer).update({name: hooks for name, hooks in vars(linear).items() if "_hooks" in name})
        if r is not None:
            layer.add_adapter(adapter_name, r, adapter.pop("lora_alpha", 8), **adapter)
        return layer

    def _start(self, source: nn.Module | None = None) -> None:
        self.lora_A, self.lora_B, self.lora_bias = nn.ParameterDict(), nn.ParameterDict(), nn.ParameterDict()
        self.adapters: dict[str, Adapter] = {}
        self.active_adapter: str | None = None
        # the layer that this one stands for, without its weight if that is in 4 bits; a tuple hides it from nn.Module
        self._source: tuple[nn.Module, ...] = () if source is None else (source,)
        self._unmerged: tuple[nn.Parameter | NF4Weight, ...] = ()  # the weight without the adapter, while merged
        self._unmerged_bias: tuple[nn.Parameter | None, ...] = ()  # the bias without lora_bias, while that is merged
        compute_dtype = getattr(source, "compute_dtype", None)
        self.compute_dtype = compute_dtype if compute_dtype in (torch.bfloat16, torch.float16) else None
        # A and B of an initialisation that took s·B·A out of the weight: with them the original weight is known
        self.register_buffer("_initial_A", None, persistent=False)
        self.register_buffer("_initial_B", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.compute_dtype is not None and x.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type):
            return self._forward(x.to(self.compute_dtype)).to(x.dtype)  # as bitsandbytes' bnb_4bit_compute_dtype
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        if self.active_adapter is None or self.merged:
            return self._base_forward(x)
        adapter = self.adapters[self.active_adapter]
        return lora_linear(
            x,
            self.matrix,
            self.lora_A[self.active_adapter],
            self.lora_B[self.active_adapter],
            self._bias_with(self.active_adapter),
            scaling=adapter.scaling,
            dropout_p=adapter.lora_dropout if self.training else 0.0,
        )

    def _base_forward(self, x: Tensor) -> Tensor:
        if self.merged and self.training and torch.is_grad_enabled():
            raise RuntimeError("LoRALinear is merged, so its adapter gets no gradient: call unmerge() to train, or eval()")
        W = self.matrix
        if isinstance(W, NF4Weight):  # with an adapter of zeros
            return lora_linear(x, W, x.new_zeros(1, self.in_features), x.new_zeros(self.out_features, 1), self.bias)
        if self._initial_A is None or self._initial_B is None or self.merged:
            return F.linear(x, W, self.bias)
        return lora_linear(x, W, self._initial_A, self._initial_B, self.bias, scaling=self._initial_scaling)

    def _bias_with(self, name: str) -> Tensor | None:
        lora_bias = self.lora_bias.get(name, None)
        return bias_sum(self.bias, lora_bias, self.adapters[name].scaling, self.base_dtype)

    # ---- adapters ----

    def add_adapter(
        self,
        name: str,
        r: int,
        lora_alpha: float,
        *,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        lora_bias: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Add and initialise adapter `name`; the first one becomes the active one. dtype: of A, B, b, by default the weight's.

        Raises ValueError for a name in use or with a dot in it, r < 1, lora_dropout outside [0, 1], an unknown initialisation,
        or a second adapter beside one that rewrote the weight.
        """
        if not name or "." in name or name in self.adapters:
            raise ValueError(f"name: got {name!r}, expected a new name without dots; adapters here: {list(self.adapters)}")
        if isinstance(r, bool) or not isinstance(r, int) or r < 1:
            raise ValueError(f"r: got {r!r}, expected an integer of at least 1")
        check_p(lora_dropout, "lora_dropout")
        check_init(init_lora_weights, r, self.in_features, self.out_features)
        self._refuse_if_merged("add an adapter")
        if self.adapters and (rewrites_weight(init_lora_weights) or self._initial_A is not None):
            raise ValueError(
                f"init_lora_weights: an initialisation that rewrites the weight must be the layer's only adapter; "
                f"adapters here: {list(self.adapters)}"
            )
        s = scaling(r, lora_alpha, use_rslora)
        adapter = Adapter(r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, lora_bias, s)
        if self.quantized and rewrites_weight(init_lora_weights):
            raise ValueError(
                f"init_lora_weights: got {init_lora_weights!r} for a 4-bit weight, which it cannot rewrite exactly; use True"
            )
        dtype = dtype or self.base_dtype
        A, B = self.weight.new_empty(r, self.in_features, dtype=dtype), self.weight.new_empty(self.out_features, r, dtype=dtype)
        self._initialize(adapter, A, B)
        self.adapters[name] = adapter
        trainable = self.active_adapter is None and len(self.adapters) == 1
        self.lora_A[name], self.lora_B[name] = (nn.Parameter(t, requires_grad=trainable) for t in (A, B))
        if lora_bias:
            self.lora_bias[name] = nn.Parameter(A.new_zeros(self.out_features), requires_grad=trainable)
        if trainable:
            self.active_adapter = name

    def set_adapter(self, name: str | None) -> None:
        """Make `name` the active adapter; None leaves the base layer alone.

        The adapter becomes trainable if all of its tensors were frozen (one that was frozen on purpose stays so), the others
        are frozen. None freezes nothing. Raises KeyError for an unknown name, RuntimeError while merged.
        """
        self._refuse_if_merged("change the active adapter")
        if name is not None:
            self._require(name)
            for other in self.adapters:
                parameters = self._parameters_of(other)
                if other != name or not any(parameter.requires_grad for parameter in parameters):
                    for parameter in parameters:
                        parameter.requires_grad_(other == name)
        self.active_adapter = name

    def delete_adapter(self, name: str) -> None:
        """Remove adapter `name`. If it was active, none is. A weight it rewrote is restored, to the rounding of its dtype."""
        self._refuse_if_merged("delete an adapter")
        self._require(name)
        self._restore_weight()
        for named in (self.adapters, self.lora_A, self.lora_B, self.lora_bias):
            if name in named:
                del named[name]  # type: ignore[attr-defined]
        if self.active_adapter == name:
            self.active_adapter = None

    def reset_lora_parameters(self, name: str) -> None:
        """Initialise A and B of adapter `name` again, as when it was added."""
        self._refuse_if_merged("reset an adapter")
        self._require(name)
        self._restore_weight()
        self._initialize(self.adapters[name], self.lora_A[name].data, self.lora_B[name].data)
        if name in self.lora_bias:
            nn.init.zeros_(self.lora_bias[name])

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

    def _initialize(self, adapter: Adapter, A: Tensor, B: Tensor) -> None:
        method = adapter.init_lora_weights
        W = self.matrix
        residual = initialize(method, A, B, None if isinstance(W, NF4Weight) else W.detach(), float(adapter.scaling))
        if residual is not None:
            self.weight = self.as_weight(residual)
            self._initial_A, self._initial_B, self._initial_scaling = A.clone(), B.clone(), float(adapter.scaling)

    def _restore_weight(self) -> None:
        self.weight = self._original_weight()
        self._initial_A = self._initial_B = None

    def _original_weight(self) -> nn.Parameter:
        if self._initial_A is None or self._initial_B is None:
            return self.weight
        return self.as_weight(self.plus(self._initial_A, self._initial_B, self._initial_scaling))

    def adapter_parameters(self) -> list[nn.Parameter]:
        """A, B and b of every adapter."""
        return [*self.lora_A.parameters(), *self.lora_B.parameters(), *self.lora_bias.parameters()]

    def _parameters_of(self, name: str) -> list[nn.Parameter]:
        return [named[name] for named in (self.lora_A, self.lora_B, self.lora_bias) if name in named]

    def to_linear(self) -> nn.Module:
        """The plain layer, the one given to `from_linear` or an nn.Linear, with the merged weight or else the original one.

        From a Linear4bit that is one again, over the same bytes; where `quantize` was asked for, the weight is dequantised.
        """
        source = self._source or (nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta"),)
        linear = source[0].train(self.training)
        W = self.matrix
        if not isinstance(W, NF4Weight):
            weight = self.weight if self.merged else self._original_weight()
        elif is_linear4bit(linear):
            weight = to_params4bit(W, self._format.storage, linear)  # type: ignore[union-attr]
        else:
            dense = W.dequantize()
            weight = nn.Parameter(dense.T.contiguous() if self.fan_in_fan_out else dense, requires_grad=False)
        linear.weight, linear.bias = weight, self.bias  # type: ignore[assignment]
        return linear

    # ---- merging ----

    @property
    def merged(self) -> bool:
        """Whether the active adapter is in the weight."""
        return bool(self._unmerged)

    def merge(self) -> float | None:
        """W + s·B·A, rounded once to W's dtype, becomes the weight; the unmerged one is kept, so unmerge() is bit-exact.
        c + s·b becomes the bias of an adapter with lora_bias.

        A 4-bit W is dequantised, added to and quantised again; the relative error of that, ‖new − (W + s·B·A)‖ / ‖W + s·B·A‖,
        is returned. The tensor that may be shared with other modules is not written to. Costs a second weight while merged.
        Raises RuntimeError if already merged or if no adapter is active.
        """
        self._refuse_if_merged("merge again")
        if self.active_adapter is None:
            raise RuntimeError("cannot merge: no adapter is active; call set_adapter(name) first")
        name, W = self.active_adapter, self.matrix
        A, B, s = self.lora_A[name], self.lora_B[name], self.adapters[name].scaling
        if isinstance(W, NF4Weight):
            wanted = self.plus(A, B, s)
            merged = self._requantize(wanted)
            self._hold(merged)
            self._unmerged = (W,)
            self._merge_bias(name)
            size = torch.linalg.vector_norm(wanted).item()
            return torch.linalg.vector_norm(wanted.sub_(merged.dequantize(wanted.dtype))).item() / (size or 1.0)
        unmerged = self.weight
        self.weight = self.as_weight(self.plus(A, B, s))
        self._unmerged = (unmerged,)
        self._merge_bias(name)
        return None

    def _merge_bias(self, name: str) -> None:
        if name in self.lora_bias:
            dtype = self.base_dtype if self.bias is None else self.bias.dtype
            merged = self._bias_with(name).detach().to(dtype)  # type: ignore[union-attr]
            self._unmerged_bias, self.bias = (self.bias,), nn.Parameter(merged, requires_grad=False)

    def unmerge(self) -> None:
        """The weight as it was before merge(), the same Parameter, or the same codes. Raises RuntimeError if not merged."""
        if not self.merged:
            raise RuntimeError("cannot unmerge: LoRALinear is not merged")
        (weight,), self._unmerged = self._unmerged, ()
        if isinstance(weight, NF4Weight):
            self._hold(weight)
        else:
            self.weight = weight
        if self._unmerged_bias:
            (self.bias,), self._unmerged_bias = self._unmerged_bias, ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LoRALinear":
        super()._apply(fn, recurse)
        moved: list[nn.Parameter | NF4Weight] = []
        for weight in self._unmerged:
            if isinstance(weight, NF4Weight):
                weight = weight.with_tensors(**{name: apply_to_bytes(fn, t) for name, t in weight.tensors().items()})
            else:
                weight.data = fn(weight.data)
            moved.append(weight)
        self._unmerged = tuple(moved)
        for bias in self._unmerged_bias:
            if bias is not None:
                bias.data = fn(bias.data)
        return self

    def _check_loadable(self) -> None:
        self._refuse_if_merged("load a 4-bit weight")
        if self._initial_A is not None:
            raise RuntimeError("cannot load a 4-bit weight: an adapter's initialisation took s·B·A out of this one")

    def _require(self, name: str) -> None:
        if name not in self.adapters:
            raise KeyError(f"adapter {name!r}: not found; adapters here: {list(self.adapters)}")

    def _refuse_if_merged(self, action: str) -> None:
        if self.merged:
            raise RuntimeError(f"cannot {action}: LoRALinear is merged; call unmerge() first")

    def extra_repr(self) -> str:
        adapters = ", ".join(f"{name}: r={a.r}, lora_alpha={a.lora_alpha}" for name, a in self.adapters.items())
        base = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        if self._format is not None:
            base += f", {self._format.quant_type} of {self._format.dtype} in blocks of {self._format.blocksize}"
        return f"{base}, active={self.active_adapter}, merged={self.merged}, adapters={{{adapters}}}"


def check_quantize(quantize: str | None) -> None:
    """Raise ValueError for a quantisation that there is not."""
    if quantize not in (None, "nf4"):
        raise ValueError(f"quantize: got {quantize!r}, expected None or 'nf4'")


def bias_sum(
    bias: Tensor | None, lora_bias: Tensor | None, scaling: float | Tensor, weight_dtype: torch.dtype
) -> Tensor | None:
    """c + s·b, in a dtype at least as wide as b's: b's gradient is then not rounded to a 16-bit weight's. None for neither."""
    if lora_bias is None:
        return bias
    scaled = (lora_bias * scaling).to(torch.promote_types(lora_bias.dtype, weight_dtype))
    return scaled if bias is None else scaled + bias
