"""What a layer with adapters has of the plain layer in whose place it stands."""

from typing import Any

from torch import nn

from .adapters import AdaptedWeight
from .offload import give_hook


def stand_in(
    layer: AdaptedWeight,
    source: nn.Module,
    trained: list[tuple[nn.Parameter, bool]],
    r: int | None,
    name: str,
    adapter: dict[str, Any],
) -> None:
    """Give `layer`, made over source's own tensors, source's training mode and hooks, and unless r is None adapter `name`.

    trained: source's parameters with what their requires_grad was, which they have again if the adapter cannot be added.
    """
    layer.train(source.training)
    vars(layer).update({name: hooks for name, hooks in vars(source).items() if "_hooks" in name})
    give_hook(source, layer)
    if r is None:
        return
    try:
        layer.add_adapter(name, r, adapter.pop("lora_alpha", 8), **adapter)
    except BaseException:
        for parameter, flag in trained:
            parameter.requires_grad_(flag)
        raise


def refuse_options(kind: str, **options: object) -> None:
    """Raise ValueError for an adapter's option that a layer of this kind lacks."""
    for name, value in options.items():
        if value:
            raise ValueError(f"{name}: got {value!r}, expected False for a {kind}: only linear layers have it here")
