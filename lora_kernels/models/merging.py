"""Merge the adapters of a whole model into its weights, and take them out again."""

from torch import nn

from .distributed import refuse_fsdp2
from .state import adapted_layers, refuse_if_merged, refuse_in_fsdp1, refuse_offloaded_adapters


def merge_lora(model: nn.Module) -> dict[str, float]:
    """Merge the active adapter of every layer into its weight (`LoRALinear.merge`); all layers or, on an error, none.

    Returns the relative error of each layer whose 4-bit weight had to be quantised again, by path.
    Raises RuntimeError if merged already, if no adapter is active, or if accelerate offloads the adapters, and ValueError under
    FSDP.
    """
    refuse_in_fsdp1(model, "merge")
    refuse_fsdp2(model, "merge")
    layers = adapted_layers(model)
    refuse_if_merged(layers, "merge again")
    refuse_offloaded_adapters(model, "merge")
    active = {path: layer for path, layer in layers.items() if layer.active_adapter is not None}
    if not active:
        raise RuntimeError("cannot merge: no adapter is active; call set_adapter(model, name) first")
    try:
        errors = {path: layer.merge() for path, layer in active.items()}
    except BaseException:
        for layer in active.values():
            if layer.merged:
                layer.unmerge()
        raise
    return {path: error for path, error in errors.items() if error is not None}


def unmerge_lora(model: nn.Module) -> None:
    """Take the merged adapters out of the weights again, bit-exactly. Raises RuntimeError if nothing is merged,
    or if accelerate keeps a merged weight together with the adapters of its layer.
    """
    merged = [layer for layer in adapted_layers(model).values() if layer.merged]
    if not merged:
        raise RuntimeError("cannot unmerge: no layer is merged")
    refuse_offloaded_adapters(model, "unmerge", on_their_own=False)
    for layer in merged:
        layer.unmerge()
