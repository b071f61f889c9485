"""save_pretrained of a transformers model that add_lora changed: the model for transformers, its adapters for PEFT."""

import contextlib
import copy
import os
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..layers.linear import LoRALinear
from .adapter_saving import prepare_adapter
from .distributed import is_sharded
from .export import merged_tensors, untie, unties
from .quantization_config import quantization_config
from .state import lora_exchanges, lora_layers, lora_state
from .wrappers import named_modules, plain_state_dict

ADAPTERS = "adapters"  # a folder: beside config.json, transformers would put an adapter into PEFT's layers on loading
NOT_GIVEN: Any = object()
HAS_ADAPTERS = "_hf_peft_config_loaded"  # transformers' own flag; Trainer refuses a quantised model without it


class SavePretrained:
    """A model's `save_pretrained` while it has LoRA layers; its arguments are transformers' own.

    Unmerged it writes the model without its adapters, for `from_pretrained`: 4-bit layers become bitsandbytes' Linear4bit over
    the same bytes. Every adapter goes into the folder "adapters" beside it, in PEFT's files, for `load_adapter` and PEFT.
    Merged it writes a dense model with the merged weights.
    A `state_dict` that is given is written as it is. None, which Trainer gives, is the model's own with its adapters' keys,
    which Trainer reads again.

    An adapter or a 4-bit layer that those files cannot say, or one with NaN or infinity, is a ValueError before anything is
    written; with a `state_dict` a warning, for that is written all the same.
    """

    def __init__(self, model: nn.Module):
        self._model = weakref.ref(model)  # a circle would keep the weights until a garbage collection

    def __reduce__(self) -> tuple[Any, ...]:  # a copy belongs to the copied model
        return SavePretrained, (self._model(),)

    def __call__(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: Any = NOT_GIVEN,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        model: Any = self._model()
        layers, whole = lora_layers(model).values(), state_dict is NOT_GIVEN
        merged = any(layer.merged for layer in layers)
        sharded = any(is_sharded(parameter) for layer in layers for parameter in layer.adapter_parameters())
        names = [] if merged or not (whole or (state_dict is None and not sharded)) else list(lora_state(model).configs)
        try:
            quantization = quantization_config(model, merged=whole and merged)
            adapters = [prepare_adapter(model, Path(save_directory) / ADAPTERS, name) for name in names]
        except ValueError as error:
            if whole:
                raise
            warnings.warn(f"only load_state_dict of a model made in the same way reads this checkpoint: {error}", stacklevel=2)
            quantization, adapters = getattr(model.config, "quantization_config", None), []
        if whole:
            state_dict = dict(merged_tensors(model)) if merged else plain_state(model)
        if state_dict is None or whole:
            self._refuse_without_values(model, state_dict)
        if is_main_process or sharded:
            for adapter in adapters:
                adapter.write()
        untied = whole and merged and unties(model, state_dict)
        with _described(model, quantization, untied):
            type(model).save_pretrained(model, save_directory, is_main_process, state_dict, *args, **kwargs)
        if whole and adapters:
            warnings.warn(
                f"save_pretrained wrote the model without its adapters to {save_directory}, and {', '.join(names)} to "
                f"{Path(save_directory) / ADAPTERS}, for load_adapter or PEFT; save_merged writes one model",
                stacklevel=2,
            )

    @staticmethod
    def _refuse_without_values(model: Any, state: dict[str, Tensor] | None) -> None:
        """Raise ValueError for a tensor on the meta device, unless transformers has loaded the model so and reads it itself."""
        if {"cpu", "disk"} & set(getattr(model, "hf_device_map", {}).values()):
            return
        for name, tensor in (model.state_dict() if state is None else state).items():
            if tensor.is_meta:
                raise ValueError(
                    f"save_pretrained: {name} is on the meta device and has no values, so nothing was written; if accelerate "
                    "offloads it, call accelerate.hooks.remove_hook_from_submodules(model) first, or use save_merged"
                )


def take_over_saving(model: Any) -> None:
    """Give a transformers model the save_pretrained above, and let Trainer train it over weights that others quantised.

    A model with PEFT's adapters in it keeps its own.
    """
    if not hasattr(model, HAS_ADAPTERS) or getattr(model, HAS_ADAPTERS) or "save_pretrained" in vars(model):
        return
    model.save_pretrained = SavePretrained(model)
    if getattr(model, "hf_quantizer", None) is not None:
        setattr(model, HAS_ADAPTERS, True)


def give_back_saving(model: Any) -> None:
    """Undo take_over_saving."""
    if isinstance(vars(model).get("save_pretrained"), SavePretrained):
        del model.save_pretrained
    if not hasattr(model, "peft_config"):  # which PEFT's adapters come with
        vars(model).pop(HAS_ADAPTERS, None)


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the model without its adapters: only the base's keys, and the originals of what adapters train in
    copies.
    """
    layers = (path for path, module in named_modules(model, remove_duplicate=False) if isinstance(module, LoRALinear))
    own = tuple([f"{path}.lora_" for path in layers])
    state = {name: tensor for name, tensor in plain_state_dict(model).items() if not name.startswith(own)}
    for exchange in lora_exchanges(model):
        original = exchange.choices[None]
        tensors = plain_state_dict(original) if isinstance(original, nn.Module) else {"": original.detach()}
        for key, tensor in tensors.items():
            name = f"{exchange.name}.{key}".removesuffix(".")
            state[name] = tensor.to(state[name])  # what was put aside has missed model.to(…)
    return state


@contextlib.contextmanager
def _described(model: Any, quantization: Any, untied: bool) -> Iterator[None]:
    """`model` with a configuration that says `quantization` and, if `untied`, no tied head; and without what makes transformers
    save other tensors than those given: bitsandbytes' quantizer, the flag for PEFT's adapters, and the reading of 4-bit keys,
    which 5.17 cannot turn round.
    """
    hidden = [HAS_ADAPTERS, "_weight_conversions"]
    if getattr(getattr(model.config, "quantization_config", None), "quant_method", None) == "bitsandbytes":
        hidden.append("hf_quantizer")
    own = {name: vars(model).pop(name) for name in hidden if name in vars(model)}
    if own.get("_weight_conversions") is not None:
        model._weight_conversions = [step for step in own["_weight_conversions"] if not _reads_4_bits(step)]
    config = model.config
    model.config = copy.deepcopy(config)
    vars(model.config).pop("quantization_config", None)
    if quantization is not None:
        model.config.quantization_config = quantization
    if untied:
        untie(model.config)
    try:
        yield
    finally:
        vars(model).update(own)
        model.config = config


def _reads_4_bits(step: Any) -> bool:
    return any(type(operation).__name__ == "Bnb4bitDeserialize" for operation in getattr(step, "operations", None) or ())
