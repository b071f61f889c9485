"""Adapters of a model changed by add_lora, in PEFT's own file format, both ways."""

import difflib
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from ..layers.linear import DEFAULT_ADAPTER
from ..operation import FLOATS
from . import adapter_config, adapter_files
from .config import LoRAConfig
from .surgery import LoRAState, add_lora, plan_exchanges
from .targets import features, lora_layers, plan_layers, plan_modules_to_save

PREFIX = "base_model.model."


def save_adapter(model: nn.Module, directory: str | os.PathLike, adapter_name: str = DEFAULT_ADAPTER) -> None:
    """Write adapter `adapter_name` of `model` so that PEFT, and load_adapter, read it: two files, complete or not at all.

    As in PEFT, "default" goes into `directory` itself, another name into a subfolder of that name. Where parameters are sharded
    (FSDP2), every process has to call it, and the first one writes.
    Raises KeyError for an unknown adapter, and ValueError, before anything is written, for what PEFT's format cannot say.
    """
    model = _unwrapped(model)
    state = _state(model)
    if adapter_name not in state.configs:
        raise KeyError(f"adapter {adapter_name!r}: not found; adapters here: {list(state.configs)}, made by add_lora")
    config = adapter_config.to_peft(model, state.configs[adapter_name], adapter_name)
    own = _tensors(model, adapter_name)
    if any(tensor.is_meta for tensor in own.values()):
        raise ValueError(f"adapter {adapter_name!r}: it is on the meta device and has no values; fill it first")
    full = {key: _full(tensor).detach().to("cpu", copy=True).contiguous() for key, tensor in own.items()}
    sharded = any(_is_sharded(tensor) for tensor in own.values())
    if not sharded or torch.distributed.get_rank() == 0:
        target = Path(directory) if adapter_name == DEFAULT_ADAPTER else Path(directory) / adapter_name
        adapter_files.write(target, config, full)
    if sharded:
        torch.distributed.barrier()


def load_adapter(
    model: nn.Module,
    directory: str | os.PathLike,
    adapter_name: str = DEFAULT_ADAPTER,
    *,
    autocast_adapter_dtype: bool = True,
    quantize: str | None = None,
) -> None:
    """Read an adapter that PEFT or save_adapter wrote, as `adapter_name` of `model`.

    It is read from the subfolder `adapter_name` if there is one with an adapter, else from `directory` itself. A model that has
    an adapter of that name gets its values; otherwise the adapter is added, as by add_lora with the file's configuration
    and the same `autocast_adapter_dtype` and `quantize`.
    Raises FileNotFoundError or ValueError, before anything changes, for files that are missing or damaged, a configuration
    that has no counterpart here, and keys or shapes that are not exactly those of this model.
    """
    model, folder = _unwrapped(model), Path(directory)
    if (folder / adapter_name / adapter_files.CONFIG_FILE).is_file():
        folder = folder / adapter_name
    values, saved = adapter_files.read(folder)
    config = adapter_config.from_peft(values, model, str(folder / adapter_files.CONFIG_FILE))
    if any(layer.merged for layer in lora_layers(model).values()):
        raise RuntimeError("cannot load an adapter: the model is merged; call unmerge_lora(model) first")
    present = adapter_name in _state(model).configs
    if present:
        _check_scaling(model, config, adapter_name, folder)
        expected = {key: tuple(tensor.shape) for key, tensor in _tensors(model, adapter_name).items()}
    else:
        expected = _planned_shapes(model, config, adapter_name)
    weights = _checked(saved, expected, _base_tensors(model), folder / adapter_files.WEIGHTS_FILE)
    if not present:
        add_lora(model, config, adapter_name, autocast_adapter_dtype=autocast_adapter_dtype, quantize=quantize)
    with torch.no_grad():
        for key, tensor in _tensors(model, adapter_name).items():
            tensor.copy_(_like(weights[key], tensor))


# ---- names ----


def _tensors(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """The tensors of an adapter under PEFT's keys; a trained bias of an adapted layer is its base layer's."""
    layers = lora_layers(model)
    tensors: dict[str, Tensor] = {}
    for path, layer in layers.items():
        if adapter_name in layer.adapters:
            tensors[f"{PREFIX}{path}.lora_A.weight"] = layer.lora_A[adapter_name]
            tensors[f"{PREFIX}{path}.lora_B.weight"] = layer.lora_B[adapter_name]
            if adapter_name in layer.lora_bias:
                tensors[f"{PREFIX}{path}.lora_B.bias"] = layer.lora_bias[adapter_name]
    for exchange in _state(model).exchanges:
        if adapter_name in exchange.choices:
            tensors.update(_exchanged(exchange.path, exchange.attribute, exchange.choices[adapter_name], set(layers)))
    return tensors


def _exchanged(owner: str, attribute: str, choice: nn.Module | nn.Parameter, adapted: set[str]) -> dict[str, Tensor]:
    path = f"{owner}.{attribute}".removeprefix(".")
    if isinstance(choice, nn.Module):
        return {f"{PREFIX}{path}.{key}": tensor for key, tensor in choice.state_dict(keep_vars=True).items()}
    return {f"{PREFIX}{owner}.base_layer.{attribute}" if owner in adapted else f"{PREFIX}{path}": choice}


def _planned_shapes(model: nn.Module, config: LoRAConfig, adapter_name: str) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the adapter that add_lora would make; changes nothing."""
    plan, _ = plan_layers(model, config, adapter_name)
    shapes: dict[str, tuple[int, ...]] = {}
    for path, module in plan.items():
        r, (in_features, out_features) = config.rank_and_alpha(path)[0], features(module)
        shapes[f"{PREFIX}{path}.lora_A.weight"] = (r, in_features)
        shapes[f"{PREFIX}{path}.lora_B.weight"] = (out_features, r)
        if config.lora_bias:
            shapes[f"{PREFIX}{path}.lora_B.bias"] = (out_features,)
    saved = plan_modules_to_save(model, config)
    for (owner, attribute), original in plan_exchanges(model, config, saved, set(plan)).items():
        own = _exchanged(owner, attribute, original, set(plan))
        shapes.update({key: tuple(tensor.shape) for key, tensor in own.items()})
    return shapes


def _base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The base model's own parameters and buffers, under the keys that PEFT would give them."""
    layers = lora_layers(model)
    tensors = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        owner, _, attribute = name.rpartition(".")
        tensors[f"{PREFIX}{name}"] = tensor
        if owner in layers or attribute == "weight":
            tensors[f"{PREFIX}{owner}.base_layer.{attribute}"] = tensor
    return tensors


# ---- checks ----


def _checked(
    saved: dict[str, Tensor], expected: dict[str, tuple[int, ...]], base: dict[str, Tensor], source: Path
) -> dict[str, Tensor]:
    """The tensors of `expected` from the file. Raises ValueError for anything missing, unknown, of another shape or dtype."""
    unprefixed = [key for key in saved if not key.startswith(PREFIX)]
    if unprefixed or not saved:
        raise ValueError(
            f"{source}: expected keys that begin with {PREFIX!r}, got {sorted(saved)[:3]}; save it with PEFT's save_pretrained"
        )
    problems = []
    missing = sorted(expected.keys() - saved.keys())
    if missing:
        problems.append(f"missing {len(missing)} of {len(expected)}, such as {missing[0]!r}")
    for key in sorted(saved.keys() - expected.keys()):
        if (reason := _why_unknown(key, saved, expected, base)) is not None:
            problems.append(reason)
    for key in sorted(expected.keys() & saved.keys()):
        if tuple(saved[key].shape) != expected[key]:
            problems.append(f"{key!r} has shape {tuple(saved[key].shape)}, expected {expected[key]}")
        elif ".lora_" in key and saved[key].dtype not in FLOATS:
            problems.append(f"{key!r} has dtype {saved[key].dtype}, expected a floating-point one")
    if problems:
        more = f"; and {len(problems) - 4} more" * (len(problems) > 4)
        raise ValueError(f"{source} does not fit this model, nothing was changed: " + "; ".join(problems[:4]) + more)
    return {key: saved[key] for key in expected}


def _why_unknown(
    key: str, saved: dict[str, Tensor], expected: dict[str, tuple[int, ...]], base: dict[str, Tensor]
) -> str | None:
    """Why a key that is not the adapter's is an error; None for what PEFT writes beside it and which says nothing new."""
    for inside in (".original_module.", ".modules_to_save."):  # with bias="all" PEFT also writes its wrapper's inside
        if inside in key and key.replace(inside, ".") in expected:
            return None
    if key in base:  # embeddings and heads that are adapted, or were resized, are saved whole
        own, theirs = base[key], saved[key]
        narrow = own.dtype if own.dtype.itemsize <= theirs.dtype.itemsize else theirs.dtype
        if own.shape == theirs.shape and torch.equal(_full(own).detach().cpu().to(narrow), theirs.to(narrow)):
            return None
        return f"{key!r} holds another base weight than this model's: it belongs to another, or a resized, model"
    near = difflib.get_close_matches(key, expected, 1, cutoff=0.8)
    return f"unknown {key!r}" + f" (near: {near[0]!r})" * bool(near)


def _check_scaling(model: nn.Module, config: LoRAConfig, adapter_name: str, source: Path) -> None:
    """Raise ValueError where the file scales an adapter that the model has already in another way."""
    for path, layer in lora_layers(model).items():
        if adapter_name not in layer.adapters:
            continue
        scaling, own = config.scaling(path), float(layer.adapters[adapter_name].scaling)
        if abs(own - scaling) > 1e-6 * abs(scaling):
            raise ValueError(
                f"{source}: scales {path} by {scaling:g}, but this model's adapter {adapter_name!r} by {own:g}; "
                "use another adapter name, or the same r, lora_alpha and use_rslora"
            )


# ---- models and tensors in wrappers ----


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's and DistributedDataParallel's wrappers."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def _state(model: nn.Module) -> LoRAState:
    return getattr(model, "_lora_state", None) or LoRAState()


def _is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "full_tensor")


def _full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that is sharded over processes; each of them has to ask."""
    return tensor.full_tensor() if _is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def _like(value: Tensor, tensor: Tensor) -> Tensor:
    """`value` sharded over processes as `tensor` is; the dtype is copy_'s matter."""
    if not _is_sharded(tensor):
        return value
    from torch.distributed.tensor import distribute_tensor

    # Every process has read the whole file: each keeps its own part, and nothing is sent.
    return distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None)  # type: ignore[attr-defined]
