"""The ranks that AdaLoRA kept, a bar for each layer of the model."""

from collections.abc import Mapping

from torch import nn

from ...models.adalora.config import active_adalora
from ...models.names import end_of, layer_index
from ..console import Output

BAR = 40  # characters of the longest


def kept_ranks(model: nn.Module) -> dict[str, int]:
    """Singular values that are not zero, by the layer's path."""
    name, _, layers = active_adalora(model)
    return {path: int(layer.lora_E[name].count_nonzero()) for path, layer in layers.items()}


def print_ranks(ranks: Mapping[str, int], output: Output) -> None:
    """Of each numbered layer the sum, as a bar, and each projection's rank."""
    layers: dict[int | None, dict[str, int]] = {}
    for path, rank in ranks.items():
        layers.setdefault(layer_index(path, None), {})[end_of(path)] = rank
    most = max(1, *(sum(own.values()) for own in layers.values()))
    names = list(dict.fromkeys(name for own in layers.values() for name in own))
    rows = []
    for number, own in layers.items():
        total = sum(own.values())
        label = "" if number is None else number
        rows.append((f"{label:<3} {'█' * round(BAR * total / most)}", total, *(own.get(name, "") for name in names)))
    title = f"Ranks that AdaLoRA kept: {sum(ranks.values())} in {len(ranks)} layers"
    output.table(title, ("layer", "sum", *names), rows, None, names)
