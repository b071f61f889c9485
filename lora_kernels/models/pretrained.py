"""save_pretrained of a transformers model that add_lora changed: the model for transformers, its adapters for PEFT."""

import contextlib
import copy
import os
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from ..layers.adapters import AdaptedWeight
from .adapter_saving import CONFIG_FILE, prepare_adapter, remove_adapter
from .distributed import is_sharded
from .export import merged_tensors, untie, unties
from .quantization_config import quantization_config
from .state import lora_exchanges, lora_layers, lora_state
from .switching import active_adapter
from .wrappers import named_modules, plain_names, plain_state_dict

ADAPTERS = "adapters"  # a folder: beside config.json, transformers would put an adapter into PEFT's layers on loading
NOT_GIVEN: Any = object()
HAS_ADAPTERS = "_hf_peft_config_loaded"  # transformers' own flag; Trainer refuses a quantised model without it


class SavesAdapters:
    """What save_pretrained does in a model with LoRA layers; its arguments are transformers' own.

    Unmerged it writes the model without its adapters, for `from_pretrained`: 4-bit layers become bitsandbytes' Linear4bit over
    the same bytes. Every adapter goes into the folder "adapters" beside it, in PEFT's files, for `load_adapter` and PEFT.
    Merged it writes a dense model with the merged weights. Adapters of a model saved there before are removed.
    A `state_dict` with the model's own keys, as accelerate gathers it, is written in the same way (a merged model's is
    made anew); any other as it is, with a warning. None, which Trainer gives, is the model's own with its adapters' keys, which
    Trainer reads again; of a merged model it is what is written without.
    A part of a model that add_lora was given is written without adapters, which belong to the whole, with a warning.

    An adapter or a 4-bit layer that those files cannot say, or one with NaN or infinity, is a ValueError before anything is
    written; with a `state_dict` a warning, for that is written all the same.

    It is a base class and no attribute of the model: that would keep the model in a circle, or only a weak reference to it, and
    belong to another model in a copy.
    """

    def __reduce_ex__(self: Any, protocol: Any) -> Any:  # a class that is made here has no name for pickle
        make, arguments, *rest = cast(tuple, super().__reduce_ex__(protocol))
        kind = _own_class(self)
        return _made_again, (kind, make, tuple(kind if each is type(self) else each for each in arguments)), *rest

    def save_pretrained(
        self: Any,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: Any = NOT_GIVEN,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        layers, configs, folder = lora_layers(self), lora_state(self).configs, Path(save_directory) / ADAPTERS
        merged = any(layer.merged for layer in layers.values())
        sharded = any(is_sharded(parameter) for layer in layers.values() for parameter in layer.adapter_parameters())
        given: Any = None if state_dict is NOT_GIVEN else state_dict
        whole = (
            state_dict is NOT_GIVEN
            or (given is None and merged)
            or (given is not None and not sharded and _is_own(self, given))
        )
        names = [] if merged or not (whole or (given is None and not sharded)) else list(configs)
        try:
            quantization = quantization_config(self, merged=whole and merged)
            adapters = [prepare_adapter(self, folder, name) for name in names]
        except ValueError as error:
            if state_dict is NOT_GIVEN:
                raise
            warnings.warn(f"only load_state_dict of a model made in the same way reads this checkpoint: {error}", stacklevel=2)
            quantization, adapters, whole = getattr(self.config, "quantization_config", None), [], False
        else:
            if given is not None and not whole:
                why = "of a sharded model" if sharded else "that are not the model's own"
                warnings.warn(
                    f"state_dict: got {len(given)} tensors {why}, so save_pretrained writes them to {save_directory} as they "
                    "are, and no adapters; save_adapter writes those",
                    stacklevel=2,
                )
        if whole:
            given = dict(merged_tensors(self)) if merged else plain_state(self, given)
        if given is None or whole:
            _refuse_without_values(self, given)
        if is_main_process or sharded:
            for adapter in adapters:
                adapter.write()
        untied = whole and merged and unties(self, given)
        with _described(self, quantization, untied):
            super().save_pretrained(save_directory, is_main_process, given, *args, **kwargs)  # type: ignore[misc]
        if is_main_process and (whole or given is None):
            _remove_other_adapters(folder, {adapter.directory for adapter in adapters})
        if not whole:
            return
        if adapters:
            warnings.warn(
                f"save_pretrained wrote the model without its adapters to {save_directory}, and {', '.join(names)} to "
                f"{folder}, for load_adapter or PEFT; save_merged writes one model",
                stacklevel=2,
            )
        held = {name for layer in layers.values() for name in layer.adapters}
        if left := sorted(held - set(names) - ({active_adapter(self)} if merged else set())):
            whose = (
                "which are not merged" if merged else "which belong to the model around it, whose save_pretrained writes them"
            )
            warnings.warn(
                f"save_pretrained wrote to {save_directory} nothing of the adapters {left}, {whose}; save_adapter writes each",
                stacklevel=2,
            )


@cache
def _saving(kind: Any) -> Any:
    """`kind` with SavesAdapters, under its own name, by which transformers knows a model."""
    named = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (SavesAdapters, kind), named)


def _own_class(model: SavesAdapters) -> type:
    return type(model).__bases__[1]


def _made_again(kind: type, make: Callable, arguments: tuple) -> Any:
    """A copy of a model with SavesAdapters, as copy and pickle go on to fill it."""
    model = make(*arguments)
    model.__class__ = _saving(kind)
    return model


def _is_own(model: nn.Module, state: dict[str, Tensor]) -> bool:
    """Whether `state` has all of the model's own keys, with its adapters' or without, and no others."""
    plain, own = plain_names(model), plain_state_dict(model).keys()
    adapters = _adapter_keys(model)
    return {plain(name) for name in state if not plain(name).startswith(adapters)} == {
        name for name in own if not name.startswith(adapters)
    }


def _remove_other_adapters(folder: Path, kept: set[Path]) -> None:
    """Remove the adapters in `folder` that an earlier model left there: they do not belong to the base beside them now."""
    for file in list(folder.rglob(CONFIG_FILE)):
        if file.parent not in kept:
            remove_adapter(file.parent)
    for directory in sorted((folder, *(path for path in folder.rglob("*") if path.is_dir())), reverse=True):
        with contextlib.suppress(OSError):  # not empty, or not there
            directory.rmdir()


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


def take_over_saving(model: nn.Module) -> None:
    """Give every transformers model in `model` the save_pretrained above, and let Trainer train it over weights that others
    quantised. One around `model` is not reached: it would write the adapters' keys among its own, which nothing reads.

    A model with PEFT's adapters in it keeps its own.
    """
    for _, module in named_modules(model):
        own = isinstance(module, SavesAdapters) or "save_pretrained" in vars(module)
        if own or not hasattr(module, HAS_ADAPTERS) or getattr(module, HAS_ADAPTERS):
            continue
        kind: Any = type(module)
        module.__class__ = _saving(kind)
        if getattr(module, "hf_quantizer", None) is not None:
            setattr(module, HAS_ADAPTERS, True)


def give_back_saving(model: nn.Module) -> None:
    """Undo take_over_saving."""
    for _, module in named_modules(model):
        if isinstance(module, SavesAdapters):
            module.__class__ = _own_class(module)  # type: ignore[assignment]
            if not hasattr(module, "peft_config"):  # which PEFT's adapters come with
                vars(module).pop(HAS_ADAPTERS, None)


def _adapter_keys(model: nn.Module) -> tuple[str, ...]:
    """What the keys of the adapters in the plain model's state dict begin with."""
    layers = (path for path, module in named_modules(model, remove_duplicate=False) if isinstance(module, AdaptedWeight))
    return tuple([f"{path}.lora_" for path in layers])


def plain_state(model: nn.Module, given: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The state dict of the model, or `given` in its place, without its adapters: only the base's keys, and the originals of
    what adapters train in copies.
    """
    own, plain = _adapter_keys(model), plain_names(model)
    named = plain_state_dict(model) if given is None else {plain(name): tensor for name, tensor in given.items()}
    state = {name: tensor for name, tensor in named.items() if not name.startswith(own)}
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
