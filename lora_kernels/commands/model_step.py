"""One training step of a causal language model, over the same frozen tensors: bare, with this package, with PEFT."""

import copy
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..functional.nf4 import quantize_nf4
from ..layers.frozen_weight import is_conv1d
from ..models.adalora.config import AdaLoRAConfig
from ..models.adalora.orthogonality import orthogonality_loss
from ..models.blocks import fuse_blocks
from ..models.config import LoRAConfig
from ..models.state import lora_state
from ..models.surgery import add_lora
from ..nf4.state_dict import to_params4bit


def shared_copy(model: nn.Module) -> Any:
    """A copy of `model` over the very same parameters and buffers, so that a twin costs no memory."""
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared)


def frozen_twin(model: nn.Module) -> nn.Module:
    """The model without adapters; the gradient runs back to the embeddings, as through every adapted layer."""
    twin = shared_copy(model).requires_grad_(False)
    twin.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    return twin


def ours(model: nn.Module, config: LoRAConfig, quantize: str | None = None) -> nn.Module:
    """The model with this package's layers; quantize="nf4": over 4-bit copies of their weights."""
    twin = shared_copy(model)
    add_lora(twin, config, quantize=quantize)
    return twin


def fused(model: nn.Module, config: LoRAConfig, quantize: str | None = None) -> nn.Module:
    """The same with fused blocks."""
    twin = ours(model, config, quantize)
    fuse_blocks(twin)
    return twin


def peft_twin(model: nn.Module, config: LoRAConfig, quantize: str | None = None) -> nn.Module:
    """The model under PEFT with the settings of `config`; its adapters are float32 over a 16-bit base, as ours are.

    quantize="nf4": its linear layers are bitsandbytes', over 4-bit weights of the same bytes as ours.
    """
    from peft import AdaLoraConfig, LoraConfig, get_peft_model

    twin = peft_base(shared_copy(model), quantize)
    names = ["lora_alpha", "lora_dropout", "target_modules"]
    if isinstance(config, AdaLoRAConfig):
        twin.is_loaded_in_4bit = quantize is not None  # PEFT asks for it here
        names += ["init_r", "target_r", "tinit", "tfinal", "total_step"]
    else:
        names += ["r", "use_dora"]
    kind = AdaLoraConfig if isinstance(config, AdaLoRAConfig) else LoraConfig
    return get_peft_model(twin, kind(**{name: getattr(config, name) for name in names}, task_type="CAUSAL_LM"))


def peft_base(model: Any, quantize: str | None) -> Any:
    """`model` as PEFT adapts it; quantize="nf4": its linear layers, but for the output head, are bitsandbytes' Linear4bit."""
    if quantize is None:
        return model
    from bitsandbytes.nn import Linear4bit

    head = model.get_output_embeddings()
    for path, module in list(model.named_modules()):
        if (type(module) is nn.Linear or is_conv1d(module)) and module is not head:
            weight = module.weight.detach().T if is_conv1d(module) else module.weight.detach()
            layer = Linear4bit(1, 1, compute_dtype=weight.dtype, quant_type="nf4")
            (layer.out_features, layer.in_features), layer.bias = weight.shape, module.bias
            layer.weight = to_params4bit(quantize_nf4(weight), torch.uint8, layer)
            owner, _, attribute = path.rpartition(".")
            setattr(model.get_submodule(owner), attribute, layer)
    return model


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean cross-entropy of the next token over ids[sequences, length]."""
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def training_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """What is trained on: the loss, and of AdaLoRA the regulariser that PEFT's own forward has added to it."""
    adalora = any(isinstance(config, AdaLoRAConfig) for config in lora_state(model).configs.values())
    return loss(model, ids) + orthogonality_loss(model) if adalora else loss(model, ids)


def step(model: nn.Module, ids: Tensor) -> Callable[[], None]:
    """One forward + backward on `ids`, without the optimizer, which is the same for every way of training adapters."""

    def run() -> None:
        model.zero_grad(set_to_none=True)
        training_loss(model, ids).backward()

    return run


def random_ids(model: Any, tokens: int, length: int, seed: int) -> Tensor:
    """ids[tokens // length, length], uniform over the vocabulary."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocabulary, (max(1, tokens // length), length), generator=generator)
    return ids.to(next(model.parameters()).device)
