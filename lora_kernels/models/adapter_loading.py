"""An adapter that was read from a file, put into a model: everything that can be wrong is found before anything changes."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .adapter_checks import check_settings, check_tensors, not_linear
from .adapter_keys import PREFIX, adapter_tensors, exchanged_tensors, forms, planned_forms
from .config import LoRAConfig
from .distributed import sharded_like
from .embeddings import Brought, add_embeddings, brought_embeddings
from .expert_files import refuse_exchanged
from .lora_files.adapters import fitted
from .peft_layers import refuse_peft_layers
from .state import lora_layers, lora_state, refuse_if_merged, refuse_offloaded_adapters
from .surgery import add_adapter
from .switching import active_adapter
from .targets import Plan, plan_layers


@dataclass(frozen=True)
class Source:
    """An adapter's file, or the two of PEFT's, and what is in it beside tensors."""

    path: Path  # the directory of PEFT's two, or the file
    settings: Path  # which errors about the configuration name
    weights: Path  # which errors about tensors name
    format: str
    metadata: dict[str, str] = field(default_factory=dict)
    settings_as_written: dict[str, Any] = field(default_factory=dict)  # PEFT's
    allocation: dict[str, Tensor] | None = None  # AdaLoRA's: which triplets stay


@dataclass(frozen=True)
class LoadedAdapter:
    """What load_adapter read; str() is for people."""

    adapter: str
    directory: Path  # in which the files are, or the one file
    config: LoRAConfig
    adapted: dict[str, int]  # path -> r
    tensors: tuple[str, ...]  # all that were read, under PEFT's keys
    active: bool  # otherwise it waits for set_adapter
    format: str = "peft"

    def __str__(self) -> str:
        ranks = ", ".join(map(str, sorted(set(self.adapted.values()))))
        waits = "" if self.active else f"; not active: call set_adapter(model, {self.adapter!r})"
        whole = [key.removeprefix(PREFIX) for key in self.tensors if ".lora_" not in key]
        place = f"{self.directory}{f' ({self.format})' * (self.format != 'peft')}"
        lines = [f"adapter {self.adapter!r} from {place}: {len(self.adapted)} LoRA layers, r = {ranks}{waits}"]
        return "\n".join(lines + [f"  whole: {key}" for key in whole])


@dataclass(frozen=True)
class Loading:
    """An adapter that fits a model, before it is there."""

    model: nn.Module
    adapter_name: str
    config: LoRAConfig
    source: Source
    plan: Plan | None  # None where the model has the adapter already
    brought: Brought
    weights: dict[str, Tensor]

    def load(self, autocast_adapter_dtype: bool, quantize: str | None) -> LoadedAdapter:
        model, name = self.model, self.adapter_name
        if self.plan is not None:
            options = {"autocast_adapter_dtype": autocast_adapter_dtype, "quantize": quantize}
            add_adapter(model, self.config, name, self.plan, **options)  # type: ignore[arg-type]
        add_embeddings(model, name, self.brought)
        with torch.no_grad():
            for key, tensor in adapter_tensors(model, name).items():
                tensor.copy_(sharded_like(self.weights[key], tensor))
        if self.source.allocation is not None:
            lora_state(model).allocations[name] = self.source.allocation
        lora_state(model).metadata[name] = self.source.metadata
        adapted = {path: layer.adapters[name].r for path, layer in lora_layers(model).items() if name in layer.adapters}
        active = active_adapter(model) == name
        return LoadedAdapter(name, self.source.path, self.config, adapted, tuple(self.weights), active, self.source.format)


def refuse_unready(model: nn.Module) -> None:
    """Raise RuntimeError or ValueError for a model into which no adapter can be read now."""
    refuse_peft_layers(model)
    refuse_if_merged(lora_layers(model), "load an adapter")
    refuse_offloaded_adapters(model, "load an adapter")


def prepare_loading(
    model: nn.Module,
    config: LoRAConfig,
    saved: dict[str, Tensor],
    adapter_name: str,
    source: Source,
    *,
    autocast_adapter_dtype: bool,
) -> Loading:
    """Raises ValueError, which names the file, for what does not fit `model`; changes nothing."""
    plan: Plan | None = None
    if adapter_name in lora_state(model).configs:
        check_settings(model, config, adapter_name, source.path)
        expected = forms(adapter_tensors(model, adapter_name))
        layers: Mapping[str, object] = {path: own for path, own in lora_layers(model).items() if adapter_name in own.adapters}
    else:
        try:
            plan = plan_layers(model, config, adapter_name)
            expected, layers = planned_forms(model, config, plan.modules, autocast_adapter_dtype), plan.modules
        except ValueError as error:
            why = "; ".join([str(error), *not_linear(model, saved).values()])
            raise ValueError(f"{source.settings}: {why}") from error
    refuse_exchanged(source.settings_as_written, layers, saved, expected, str(source.weights))
    brought = brought_embeddings(model, saved, expected)
    expected |= forms(exchanged_tensors(brought))
    weights = check_tensors(model, fitted(saved, expected), expected, source.weights)
    return Loading(model, adapter_name, config, source, plan, brought, weights)
