"""Weights that are parameters of a module, where no linear layer is called: fused experts, nn.MultiheadAttention's."""

from collections.abc import Mapping

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from ..layers.experts import is_experts, weight_names
from ..layers.experts_4bit import quantized_stack

# whose three-dimensional parameters are kernels, or of a use that another module knows (weight normalisation, lists)
OTHERS = (_ConvNd, nn.Bilinear, ParametrizationList, nn.ParameterList, nn.ParameterDict)
OF_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")  # the last three where sizes differ
UNCALLED = "nn.MultiheadAttention reads its weight and does not call it"


def fused_weights(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name and shape of each such parameter that the module itself has, bitsandbytes' 4-bit stacks of experts included.

    Fused experts, as transformers 5 has them, are told by their three dimensions, [experts, out, in]; a first one of 1 is
    an embedding's, which is added. A lazy module's parameters have no shape before its first call, and are left out.
    """
    own = module.named_parameters(recurse=False)
    shapes = {name: tuple(parameter.shape) for name, parameter in own if not is_lazy(parameter)}
    for name in weight_names(module) if is_experts(module) else ():
        if (w := quantized_stack(module, name)) is not None:
            shapes[name] = tuple(w.shape)
    if isinstance(module, nn.MultiheadAttention):
        return {name: shape for name, shape in shapes.items() if name in OF_ATTENTION}
    if isinstance(module, OTHERS):
        return {}
    return {name: shape for name, shape in shapes.items() if len(shape) == 3 and shape[0] > 1}


def in_attention(path: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the module at `path` is an nn.MultiheadAttention's out_proj."""
    owner, _, name = path.rpartition(".")
    return name == "out_proj" and isinstance(modules.get(owner), nn.MultiheadAttention)


def why_fused(module: nn.Module) -> str | None:
    """The reason against a LoRA layer for the module's fused weights; None where it has none."""
    weights = fused_weights(module)
    if not weights:
        return None
    names = ", ".join(f"{name}{list(shape)}" for name, shape in weights.items())
    if isinstance(module, nn.MultiheadAttention):
        return f"nn.MultiheadAttention multiplies by {names} itself, without a linear layer: it stays as it is"
    return (
        f"{names} of {type(module).__name__} are three-dimensional parameters, as fused experts are, no linear layers, and "
        "stay as they are; target_parameters can adapt those of transformers' experts"
    )
