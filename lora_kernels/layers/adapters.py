"""AdaptedWeight: named adapters over one frozen weight, one of them active: add, switch, delete, reset."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..functional.dora import dora_norm
from ..mask import check_p
from ..nf4 import NF4Weight
from .initialization import check_init, initialize, initialize_triplets, rewrites_weight
from .merging import LowRankTerm, MergeableWeight
from .named_parameters import NamedParameters
from .offload import execution_device, onloaded

DEFAULT_ADAPTER = "default"
# a layer's dicts of parameters by the name of an adapter
PARAMETERS = ("lora_A", "lora_B", "lora_E", "lora_bias", "lora_magnitude")


def scaling(r: int, lora_alpha: float, use_rslora: bool = False, use_adalora: bool = False) -> float:
    """s = lora_alpha / r, lora_alpha / √r (Kalajdzievski 2023), or PEFT's lora_alpha / (r + 1e-5) of AdaLoRA."""
    return lora_alpha / (r**0.5 if use_rslora else r + 1e-5 if use_adalora else r)


def check_adapter_name(name: object, argument: str) -> None:
    """Raise ValueError unless it can be a part of a state dict's keys."""
    if not isinstance(name, str) or not name or "." in name:
        raise ValueError(f"{argument}: got {name!r}, expected a string that is not empty and has no dot")


def check_integer(value: object, name: str, least: int) -> None:
    """Raise ValueError unless it is an integer of at least `least` and below 2^31."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 1 << 31:
        raise ValueError(f"{name}: got {value!r}, expected an integer of at least {least} and below 2^31")


def check_lora_alpha(lora_alpha: object, name: str = "lora_alpha") -> None:
    """Raise ValueError unless it is a positive number that is finite in float32, in which a GPU's kernels take the scaling."""
    number = isinstance(lora_alpha, (int, float)) and not isinstance(lora_alpha, bool)
    if not number or not 0 < lora_alpha <= torch.finfo(torch.float32).max:  # type: ignore[operator]  # NaN fails too
        raise ValueError(f"{name}: got {lora_alpha!r}, expected a finite number above 0, in float32 too")


def check_adalora(**options: object) -> None:
    """Raise ValueError for options of an adapter that AdaLoRA, as PEFT has it, lacks."""
    cures = {
        "use_rslora": "its scaling is lora_alpha / r",
        "lora_bias": "it has none",
        "use_dora": "it has no magnitude",
        "init_lora_weights": "A and B begin normal and E zero; False for random values in all three",
    }
    for name, value in options.items():
        expected = "True or False" if name == "init_lora_weights" else "False"
        if not isinstance(value, bool) or (value and expected == "False"):
            raise ValueError(f"{name}: got {value!r}, expected {expected} for AdaLoRA: {cures[name]}")


def check_dora(*, lora_bias: bool) -> None:
    """Raise ValueError for an option of an adapter that DoRA, as PEFT has it, lacks."""
    if lora_bias:
        raise ValueError(
            "lora_bias: got True, expected False for DoRA, as in PEFT: its equation has no bias of an adapter's own"
        )


@dataclass
class Adapter:
    """The settings of one adapter of a layer; its A and B are parameters of the layer."""

    r: int
    lora_alpha: float
    lora_dropout: float = 0.0
    use_rslora: bool = False
    init_lora_weights: bool | str = True
    lora_bias: bool = False
    use_adalora: bool = False
    use_dora: bool = False
    scaling: float | Tensor = 1.0  # a 0-d tensor may be put here: it is read on the device


class AdaptedWeight(MergeableWeight):
    """A frozen weight with adapters: `adapters[name]` are the settings, `lora_A[name]` [r, in], `lora_B[name]` [out, r] and
    maybe `lora_bias[name]` [out] the parameters of adapter `name`; AdaLoRA's has singular values too, `lora_E[name]` [r, 1],
    DoRA's a magnitude, `lora_magnitude[name]` [out]. `active_adapter` is a name or None.
    """

    lora_A: NamedParameters
    lora_B: NamedParameters
    lora_E: NamedParameters
    lora_bias: NamedParameters
    lora_magnitude: NamedParameters
    stack = 1  # weights, of which A and B of rank r have E·r rows and columns
    _initial_A: Tensor | None
    _initial_B: Tensor | None

    def __init__(self, weight: nn.Parameter | NF4Weight, bias: nn.Parameter | None, **options: Any):
        super().__init__(weight, bias, **options)
        for kind in PARAMETERS:
            self.add_module(kind, NamedParameters())
        self.adapters: dict[str, Adapter] = {}
        self.active_adapter: str | None = None
        # A and B of an initialisation that took s·B·A out of the weight: with them the original weight is known
        self.register_buffer("_initial_A", None, persistent=False)
        self.register_buffer("_initial_B", None, persistent=False)

    @property
    def active_term(self) -> LowRankTerm | None:
        """s·B·A, s·b and m of the active adapter; None where no adapter is active."""
        name = self.active_adapter
        if name is None:
            return None
        b, m = self.lora_bias.get(name), self.lora_magnitude.get(name)
        return LowRankTerm(self.right(name), self.left(name), self.adapters[name].scaling, b, m)

    def adapter_shapes(self, r: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """(A's, B's) of an adapter of this rank."""
        return (r, self.in_features), (self.out_features, r)

    def left(self, name: str) -> Tensor:
        """B[out, r] of adapter `name`."""
        return self.lora_B[name]

    def right(self, name: str) -> Tensor:
        """A[r, in] of adapter `name`, or E ⊙ A of AdaLoRA: what the equation calls A."""
        modules = self._modules  # nn.Module's own look-up takes a µs for each
        A, E = modules["lora_A"].get(name), modules["lora_E"].get(name)  # type: ignore[union-attr, operator]
        return A if E is None else E * A  # type: ignore[return-value]

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
        use_adalora: bool = False,
        use_dora: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Add and initialise adapter `name`; the first one becomes the active one. dtype: of its tensors, or the weight's.

        name: any string without a dot; torch.export takes no keyword of Python and no attribute of nn.Module ("training").
        Raises ValueError for another one or one in use, r < 1, lora_alpha that is not a finite number above 0, lora_dropout
        outside [0, 1], an unknown initialisation, an option that AdaLoRA or DoRA lacks, or a second adapter beside one that
        rewrote the weight.
        """
        self._check_new(name, r, lora_alpha, lora_dropout, init_lora_weights)
        if use_adalora:
            check_adalora(use_rslora=use_rslora, lora_bias=lora_bias, use_dora=use_dora, init_lora_weights=init_lora_weights)
        if use_dora:
            check_dora(lora_bias=lora_bias)
        s = scaling(r, lora_alpha, use_rslora, use_adalora)
        adapter = Adapter(r, lora_alpha, lora_dropout, use_rslora, init_lora_weights, lora_bias, use_adalora, use_dora, s)
        like: Any = {"dtype": dtype or self.base_dtype}
        if (device := execution_device(self)) is not None:  # an offloaded weight waits elsewhere
            like["device"] = device
        A, B = (self.weight.new_empty(shape, **like) for shape in self.adapter_shapes(r))
        own = {"lora_A": A, "lora_B": B}
        if use_adalora:
            own["lora_E"] = A.new_empty(r, 1)
        self._initialize(adapter, **own)
        if lora_bias:
            own["lora_bias"] = A.new_zeros(self.out_features)
        if use_dora:
            own["lora_magnitude"] = self._norm(A, B, s).to(A.dtype)
        self.adapters[name] = adapter
        trainable = self.active_adapter is None and len(self.adapters) == 1
        for kind, tensor in own.items():
            self._modules[kind][name] = nn.Parameter(tensor, requires_grad=trainable)  # type: ignore[index, operator]
        if trainable:
            self.active_adapter = name

    def _check_new(self, name: str, r: int, lora_alpha: float, lora_dropout: float, init_lora_weights: bool | str) -> None:
        """Raise ValueError for options that add_adapter cannot follow, RuntimeError while merged."""
        check_adapter_name(name, "name")
        if name in self.adapters:
            raise ValueError(f"name: got {name!r}, expected a new name; adapters here: {list(self.adapters)}")
        check_integer(r, "r", 1)
        check_lora_alpha(lora_alpha)
        check_p(lora_dropout, "lora_dropout")
        check_init(init_lora_weights, r, self.in_features, self.out_features)
        self._refuse_if_merged("add an adapter")
        if self.adapters and (rewrites_weight(init_lora_weights) or self._initial_A is not None):
            raise ValueError(
                f"init_lora_weights: an initialisation that rewrites the weight must be the layer's only adapter; "
                f"adapters here: {list(self.adapters)}"
            )
        if self.quantized and rewrites_weight(init_lora_weights):
            raise ValueError(
                f"init_lora_weights: got {init_lora_weights!r} for a 4-bit weight, which it cannot rewrite exactly; use True"
            )

    def set_adapter(self, name: str | None) -> None:
        """Make `name` the active adapter; None leaves the base layer alone.

        The adapter becomes trainable if all of its tensors were frozen (one that was frozen on purpose stays so), the others
        are frozen. None freezes nothing. Raises KeyError for an unknown name, RuntimeError while merged.
        """
        self._refuse_if_merged("change the active adapter")
        if name is not None:
            self._require(name)
            for other in self.adapters:
                for parameter in self._parameters_of(other) if other != name else ():
                    parameter.requires_grad_(False)
            self.make_trainable(name)
        self.active_adapter = name

    def make_trainable(self, name: str) -> None:
        """Let adapter `name` be trained, if all of its tensors were frozen: one that was frozen on purpose stays so."""
        parameters = self._parameters_of(name)
        if not any(parameter.requires_grad for parameter in parameters):
            for parameter in parameters:
                parameter.requires_grad_(True)

    def delete_adapter(self, name: str) -> None:
        """Remove adapter `name`. If it was active, none is. A weight it rewrote is restored, to the rounding of its dtype."""
        self._refuse_if_merged("delete an adapter")
        self._require(name)
        self._restore_weight()
        del self.adapters[name]
        for named in self.adapter_dicts():
            if name in named:
                del named[name]
        if self.active_adapter == name:
            self.active_adapter = None

    def reset_lora_parameters(self, name: str) -> None:
        """Initialise A, B and all else of adapter `name` again, as when it was added."""
        self._refuse_if_merged("reset an adapter")
        self._require(name)
        self._restore_weight()
        E = self.lora_E.get(name)
        self._initialize(self.adapters[name], self.lora_A[name].data, self.lora_B[name].data, None if E is None else E.data)
        if name in self.lora_bias:
            nn.init.zeros_(self.lora_bias[name])
        if name in self.lora_magnitude:
            n = self._norm(self.lora_A[name], self.lora_B[name], self.adapters[name].scaling)
            self.lora_magnitude[name].data.copy_(n)

    def adapter_parameters(self) -> list[nn.Parameter]:
        """A, B, E, b and m of every adapter."""
        return [parameter for named in self.adapter_dicts() for parameter in named.parameters()]

    def adapter_dicts(self) -> list[NamedParameters]:
        """lora_A, lora_B and the other dicts of parameters by the name of an adapter."""
        return [self._modules[kind] for kind in PARAMETERS]  # type: ignore[misc]

    def _parameters_of(self, name: str) -> list[nn.Parameter]:
        return [named[name] for named in self.adapter_dicts() if name in named]

    def _require(self, name: str) -> None:
        if name not in self.adapters:
            raise KeyError(f"adapter {name!r}: not found; adapters here: {list(self.adapters)}")

    # ---- an initialisation that rewrites the weight ----

    def _initialize(self, adapter: Adapter, lora_A: Tensor, lora_B: Tensor, lora_E: Tensor | None = None) -> None:
        if lora_E is not None:
            initialize_triplets(bool(adapter.init_lora_weights), lora_A, lora_E, lora_B)
            return
        A, B, W = lora_A, lora_B, self.matrix
        dense = None if isinstance(W, NF4Weight) else W.detach()
        residual = initialize(adapter.init_lora_weights, A, B, dense, float(adapter.scaling))
        if residual is not None:
            self.weight = self.as_weight(residual)
            self._initial_A, self._initial_B, self._initial_scaling = A.clone(), B.clone(), float(adapter.scaling)

    def _norm(self, A: Tensor, B: Tensor, s: float | Tensor) -> Tensor:
        """n[out] = ‖W + s·B·A‖ by rows: DoRA's magnitude with which the layer's function is what it is without one."""
        with onloaded(self):
            return dora_norm(self.matrix, A, B, s)

    @property
    def initial_term(self) -> LowRankTerm | None:
        """What an initialisation took out of the weight."""
        if self._initial_A is None or self._initial_B is None:
            return None
        return LowRankTerm(self._initial_A, self._initial_B, self._initial_scaling)

    def _original_weight(self) -> nn.Parameter:
        return self.weight if (t := self.initial_term) is None else self.as_weight(self.plus(t.A, t.B, t.scaling))

    def _restore_weight(self) -> None:
        self.weight = self._original_weight()
        self._initial_A = self._initial_B = None

    def _check_loadable(self) -> None:
        super()._check_loadable()
        if self._initial_A is not None:
            raise RuntimeError("cannot load a 4-bit weight: an adapter's initialisation took s·B·A out of this one")
