"""How important a triplet (A's row, E, B's column) is, from weights and gradients: AdaLoRA's equations 6 to 9.

I = |θ·∇θ|, Ī = β1·Ī + (1 − β1)·I, Ū = β2·Ū + (1 − β2)·|I − Ī|, s(θ) = Ī·Ū; each rounded where PEFT rounds, so that the same
gradients give the same numbers. A triplet's score is s(E) + mean of s over A's row + mean of s over B's column.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

KINDS = ("lora_A", "lora_B", "lora_E")
OF_TRIPLETS = {"lora_A": 2, "lora_B": 1, "lora_E": 2}  # dimension of a block [n, …] over which a triplet's mean is

# Parameters of one shape are stacked into blocks, each operation one call for a block, which the cache holds for all of them
# (torch._foreach_* goes through the memory of all parameters in each). On a CPU 2¹⁵ numbers, above which PyTorch divides an
# operation among threads: with 2¹⁷ two threads of a busy machine took 2.1 s for a step of 20 ms. On a GPU launches cost more.
BLOCK = {"cpu": 1 << 15}
LARGE_BLOCK = 1 << 24


class Block:
    """The running means of some parameters of one kind and shape: `mean` is Ī and `spread` Ū, [n, …]."""

    def __init__(self, kind: str, layers: Sequence[int], like: Tensor):
        self.kind, self.layers = kind, list(layers)
        self.index = torch.tensor(self.layers, device=like.device)
        self.mean = like.new_zeros(len(self.layers), *like.shape)
        self.spread = torch.zeros_like(self.mean)

    def update(self, parameters: Sequence[Tensor], beta1: float, beta2: float) -> None:
        """One step of Ī and Ū from the parameters and their gradients, which are there."""
        importance = torch.stack(list(parameters))
        importance.mul_(torch.stack([p.grad for p in parameters])).abs_()  # type: ignore[misc]
        self.mean.mul_(beta1).add_(importance * (1 - beta1))
        self.spread.mul_(beta2).add_(importance.sub_(self.mean).abs_().mul_(1 - beta2))

    def scores(self) -> Tensor:
        """This kind's part of the triplets' scores, [n, R]."""
        return (self.mean * self.spread).mean(OF_TRIPLETS[self.kind])


def blocks(kind: str, parameters: Sequence[Tensor]) -> Iterator[Block]:
    """The blocks of one kind of parameter, given for every layer."""
    groups: dict[tuple, list[int]] = {}
    for layer, parameter in enumerate(parameters):
        groups.setdefault((parameter.shape, parameter.dtype, parameter.device), []).append(layer)
    for (shape, _, device), layers in groups.items():
        n = max(1, BLOCK.get(device.type, LARGE_BLOCK) // shape.numel())
        for start in range(0, len(layers), n):
            own = layers[start : start + n]
            yield Block(kind, own, parameters[own[0]].detach())


class Sensitivity:
    """Ī and Ū of all layers' parameters, which are given as {kind: [one of each layer]}."""

    def __init__(self, parameters: Mapping[str, Sequence[Tensor]]):
        self.blocks = [block for kind in KINDS for block in blocks(kind, parameters[kind])]
        self.shape = len(parameters["lora_E"]), parameters["lora_E"][0].shape[0]

    @torch.no_grad()
    def update(
        self, parameters: Mapping[str, Sequence[Tensor]], beta1: float, beta2: float, *, scored: bool = False
    ) -> Tensor | None:
        """Take in the gradients; the scores after that where they are asked for, of each block while it is in the cache."""
        found = []
        for block in self.blocks:
            block.update([parameters[block.kind][layer] for layer in block.layers], beta1, beta2)
            if scored:
                found.append(block.scores())
        return self._in_order(found) if scored else None

    @torch.no_grad()
    def scores(self) -> Tensor:
        """Of every triplet, [layers, R]; on the device of the first layer."""
        return self._in_order([block.scores() for block in self.blocks])

    def _in_order(self, found: list[Tensor]) -> Tensor:
        device, dtype = found[0].device, found[0].dtype
        parts = {kind: torch.empty(self.shape, device=device, dtype=dtype) for kind in KINDS}
        for block, scores in zip(self.blocks, found, strict=True):
            parts[block.kind].index_copy_(0, block.index.to(device), scores.to(device, dtype))
        return parts["lora_E"] + (parts["lora_A"] + parts["lora_B"])

    def tensors(self) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """By kind, (Ī, Ū) of each layer's parameter: views of what is kept here."""
        found: dict[str, dict[int, tuple[Tensor, Tensor]]] = {kind: {} for kind in KINDS}
        for block in self.blocks:
            for place, layer in enumerate(block.layers):
                found[block.kind][layer] = block.mean[place], block.spread[place]
        return {kind: [own[layer] for layer in range(len(own))] for kind, own in found.items()}


def most_important(scores: Tensor, budget: int) -> Tensor:
    """Which triplets stay: those with scores above the (all − budget)-th smallest."""
    gone = scores.numel() - budget
    return ~(scores <= scores.flatten().kthvalue(gone).values) if gone else torch.ones_like(scores, dtype=torch.bool)
