"""The correctness gate of the benchmark of a model: its layers and blocks, by cases of their sizes, and its losses."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ...cases import glu_mlp, linear, members
from ...cases.linear_group import GroupCase
from ...cases.members import Layer, MembersCase
from ...layers.projection import features, is_adapted
from ...models.blocks.groups import groups_of
from ...models.blocks.mlps import block_of
from .. import model_step
from ..layer_shapes import group_layers
from .model_settings import Settings

GATE_TOKENS = 256


def why_wrong(
    models: dict[str, nn.Module], p: float, ids: Tensor, settings: Settings, device: torch.device, seed: int
) -> list[str]:
    """The rule's reasons for each different layer and block, with their own dtypes, and losses that are not finite."""
    alone, fused = (models[name] for name in (settings.names.ours, settings.names.fused))
    adapter = next(parameter.dtype for parameter in alone.parameters() if parameter.requires_grad)
    about: dict[str, Any] = {"M": min(GATE_TOKENS, ids.numel()), "p": p, "dtype": settings.dtype, "adapter_dtype": adapter}
    about |= {"seed": seed, "device": device}
    dora: dict[str, Any] = {"dora": True} if settings.dora else {}
    reasons = []
    for group in group_layers(alone):
        case = linear.Case(K=group.K, N=group.N, R=group.R, bias=False, quant_type=settings.quantize, **about, **dora)
        problem = case.draw(torch.Generator(device).manual_seed(seed))
        reasons += [f"{settings.names.ours} {group.K}→{group.N}: {reason}" for reason in linear.wrong(problem)]
    cases: dict[str, MembersCase] = {}
    for block in block_cases(fused, settings.quantize, about):
        cases.setdefault(repr(block), block)
    for block in cases.values():
        found = members.wrong(block.draw(torch.Generator(device).manual_seed(seed)))
        reasons += [f"{settings.names.fused} {block}: {reason}" for reason in found]
    with torch.no_grad():
        losses = {name: model_step.loss(model, ids).item() for name, model in models.items()}
    return reasons + [f"{name}: the loss is {loss}" for name, loss in losses.items() if not math.isfinite(loss)]


def block_cases(model: nn.Module, quantize: str | None, about: dict[str, Any]) -> Iterator[MembersCase]:
    """A case of each fused block of the model, with the sizes, ranks and weights of its layers."""

    def layer(child: Any, N: int | None = None) -> Layer:
        adapted = is_adapted(child)
        R = next(iter(child.lora_A.values())).shape[0] if adapted else None
        return Layer(N or features(child)[1], R, child.bias is not None, quant_type=quantize if adapted else None)

    for module in model.modules():
        for group in groups_of(module):
            children = [module._modules[name] for name in group.names]
            yield GroupCase(K=features(children[0])[0], members=tuple([layer(child) for child in children]), **about)
        if (block := block_of(module)) is not None:
            inner, down = (module._modules[block.wiring.members[i]] for i in (0, -1))
            (K, _), (I, N) = features(inner), features(down)  # noqa: E741
            plain = len(block.wiring.members) == 2 and block.wiring.gate_half is None
            up = module._modules[block.wiring.members[-2]]
            yield glu_mlp.Case(
                K=K, I=I, N=N, activation=block.wiring.activation, gate=None if plain else layer(inner, I), up=layer(up, I),
                down=layer(down), **about,
            )  # fmt: skip
