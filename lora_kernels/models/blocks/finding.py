"""Which modules are blocks: by their children's names, common to many models, and sizes; never by a model's name."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...layers.offload import forward_is_replaced
from ...layers.projection import features, is_adapted, is_member
from ...reference.activation import act
from ...values import ACTIVATIONS

# names of layers that get the same x, lower case and without "_proj", "_lin" or "_layer"
SIBLINGS = (
    ("q", "k", "v"),
    ("query", "key", "value"),
    ("wq", "wk", "wv"),
    ("w_q", "w_k", "w_v"),
    ("to_q", "to_k", "to_v"),
    ("gate", "up"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
    ("w_gate", "w_up"),
)


def members_of(parent: nn.Module) -> dict[str, Any]:
    """The children that can be members, if one of them is adapted."""
    found = {name: child for name, child in parent._modules.items() if child is not None and is_member(child)}
    return found if any(is_adapted(child) for child in found.values()) else {}


def mlp_members(members: Mapping[str, Any]) -> tuple[str, ...] | None:
    """The names of what may be an MLP's linear layers, by their sizes: K -> I twice and I -> N, K -> 2·I or I and I -> N."""
    sizes = [features(child) for child in members.values()]
    fits = False
    if len(sizes) == 3:
        fits = any(
            sizes[i] == sizes[j] and sizes[i][1] == sizes[k][0] for i, j, k in ((0, 1, 2), (0, 2, 1), (1, 2, 0))
        )  # fmt: skip
    elif len(sizes) == 2:
        (K, I), (J, N) = sizes  # noqa: E741
        fits = I in (J, 2 * J) or N in (K, 2 * K)
    return tuple(members) if fits else None


def siblings(members: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The names of members that get the same x, as far as names and sizes say it."""
    plain = {_plain(name): name for name in members}
    found: list[tuple[str, ...]] = []
    for names in SIBLINGS:
        present = [plain[name] for name in names if name in plain]
        for K in dict.fromkeys(features(members[name])[0] for name in present):
            group = tuple(name for name in present if features(members[name])[0] == K)
            if len(group) > 1 and any(is_adapted(members[name]) for name in group):
                found.append(group)
    return found


def _plain(name: str) -> str:
    name = name.lower()
    for end in ("_proj", "_lin", "_layer"):
        name = name.removesuffix(end)
    return name


def parameters_beside(parent: nn.Module, members: Mapping[str, Any]) -> bool:
    """Whether children other than the members have parameters."""
    others = [child for name, child in parent._modules.items() if child is not None and name not in members]
    return any(list(child.parameters()) for child in others)


def has_activation(parent: nn.Module) -> bool:
    """Whether one of its own functions or modules is an activation that an MLP's operation knows."""
    v = torch.linspace(-3, 3, 13, dtype=torch.float64)
    own = [value for name, value in vars(parent).items() if callable(value) and name[0] != "_" and name != "forward"]
    modules = [child for child in parent._modules.values() if child is not None and not list(child.parameters())]
    return any(_activates(function, v) for function in (*own, *modules) if not isinstance(function, type))


def _activates(function: Any, v: Tensor) -> bool:
    try:
        with torch.no_grad():
            got = type(function).forward(function, v) if isinstance(function, nn.Module) else function(v)
        return any(torch.allclose(got, act(v, name)) for name in ACTIVATIONS)
    except Exception:  # a function of something else
        return False


def shared(modules: Mapping[str, nn.Module]) -> set[int]:
    """Ids of the modules that are children of several."""
    counts = Counter(id(child) for parent in modules.values() for child in parent._modules.values() if child is not None)
    return {module for module, count in counts.items() if count > 1}


def why_not_joined(parent: nn.Module, names: tuple[str, ...], in_several: set[int]) -> str | None:
    """A reason in the members themselves why they are left alone."""
    for name in names:
        module: Any = parent._modules[name]
        if id(module) in in_several:
            return f"{name} is a child of several modules"
        if forward_is_replaced(module) and "_hf_hook" not in module.__dict__:
            return f"{name}'s forward was replaced on the instance"
    return None
