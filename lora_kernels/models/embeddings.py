"""Embeddings that transformers' resize_token_embeddings changed: as in PEFT, an adapter's file has them whole, for the rows of
new tokens are drawn at random in every process.
"""

import contextlib
import warnings
from typing import Any

from torch import Tensor, nn

from ..layers.adapters import AdaptedWeight
from ..layers.offload import with_values
from .adapter_checks import same_values
from .adapter_keys import PREFIX, Form
from .exchanges import add_exchanges, refuse_offloaded
from .state import lora_state
from .switching import active_adapter
from .wrappers import named_modules, submodule, unwrapped

Brought = dict[tuple[str, str], nn.Module | nn.Parameter]  # by (path of the owner, attribute), as plan_exchanges' originals


def resized_embeddings(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the embedding and the head, under PEFT's keys, if the model was resized after it was loaded; or {}."""
    if not _was_resized(getattr(model, "config", None)):
        return {}
    tensors: dict[str, Tensor] = {}
    value = with_values(model)
    for path, module in _embeddings(model).items():
        inner = f"{PREFIX}{path}.base_layer" if isinstance(module, AdaptedWeight) else f"{PREFIX}{path}"
        own = {name: tensor for name, tensor in module.named_parameters() if name in ("weight", "bias")}
        tensors.update({f"{inner}.{name}": value(tensor) for name, tensor in own.items()})
    return tensors


def brought_embeddings(model: nn.Module, saved: dict[str, Tensor], expected: dict[str, Form]) -> Brought:
    """The embedding and the head of `model`, where a file has another for the adapter: some rows differ, but most are the same.

    Where most differ the file is of another base model. Raises ValueError for one that accelerate offloads.
    """
    brought: Brought = {}
    value = with_values(model)
    for path, module in _embeddings(model).items():
        key = f"{PREFIX}{path}.weight"
        ours = key in expected or f"{PREFIX}{path}.lora_A.weight" in expected or isinstance(module, AdaptedWeight)
        if not ours and key in saved and module.weight.shape == saved[key].shape:  # type: ignore[union-attr]
            same = same_values(value(module.weight), saved[key]).all(dim=1)  # type: ignore[arg-type]
            if same.float().mean() >= 0.5 and not same.all():
                owner, _, attribute = path.rpartition(".")
                brought[owner, attribute] = module
    refuse_offloaded(model, brought)
    return brought


def add_embeddings(model: nn.Module, adapter: str, brought: Brought) -> None:
    """Give `adapter` copies of brought_embeddings' modules, in place while it is active, and frozen, as PEFT has them."""
    exchanges = lora_state(model).exchanges
    add_exchanges(exchanges, adapter, brought)
    for exchange in exchanges:
        if (exchange.path, exchange.attribute) in brought:
            exchange.choices[adapter].requires_grad_(False)
            exchange.activate(model, active_adapter(model))


def _embeddings(model: nn.Module) -> dict[str, Any]:
    """The base model's input and output embeddings by path; none for a model that does not say which they are."""
    found = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        with contextlib.suppress(AttributeError, NotImplementedError):
            found.append(unwrapped(getattr(unwrapped(model), name)()))
    paths = [path for path, module in named_modules(model) if path and any(module is each for each in found)]
    originals = {each.name: each.choices[None] for each in lora_state(model).exchanges}
    return {path: originals.get(path, submodule(model, path)) for path in paths}


def _was_resized(config: Any) -> bool:
    """Whether a transformers model has another vocabulary than the checkpoint from which it was loaded."""
    name = getattr(config, "_name_or_path", None)
    if not name or not hasattr(config, "get_text_config"):
        return False
    try:
        if not type(config).get_config_dict(name, local_files_only=True)[0]:  # from_pretrained would make a default one
            raise OSError(f"{name} has no config.json")
        before = type(config).from_pretrained(name, local_files_only=True)
    except (OSError, ValueError) as error:
        warnings.warn(
            f"the configuration of the base model {name!r} cannot be read, so it is taken that resize_token_embeddings was not "
            f"called; if it was, put the embedding and the head into modules_to_save: {error}",
            stacklevel=4,
        )
        return False
    return before.get_text_config().vocab_size != config.get_text_config().vocab_size
