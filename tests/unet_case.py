"""diffusers' UNet2DConditionModel in small, from its configuration, and what the tests of image models do with it."""

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

TARGETS = ["conv1", "conv2", "conv_shortcut", "conv", "proj_in", "proj_out", "to_q", "to_k", "to_v", "to_out.0"]


def unet(dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same at each call: two levels, one of them with attention, 3x3, 1x1 and strided convolutions."""
    torch.manual_seed(0)
    sizes = {"block_out_channels": (8, 16), "norm_num_groups": 4, "cross_attention_dim": 8, "attention_head_dim": 4}
    blocks = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    own = UNet2DConditionModel(sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, **sizes, **blocks)
    return own.to(dtype)


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """(noisy samples, steps, states of the text)."""
    torch.manual_seed(1)
    return torch.randn(2, 3, 8, 8, dtype=dtype), torch.tensor([3, 700]), torch.randn(2, 4, 8, dtype=dtype)


def step(model: nn.Module, dtype: torch.dtype = torch.float32) -> tuple[Tensor, dict[str, Tensor]]:
    """(prediction, gradients of what is trained) of the squared error against noise."""
    noise = torch.randn(2, 3, 8, 8, dtype=dtype, generator=torch.Generator().manual_seed(2))
    y = model(*batch(dtype)).sample
    model.zero_grad()
    (y - noise).square().mean().backward()
    return y.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def fill(model: nn.Module) -> None:
    """Values for the adapters, the same for ours and PEFT's: by the order of their names in PEFT's files."""
    for name, parameter in sorted((place(name), p) for name, p in model.named_parameters() if "lora_" in name):
        generator = torch.Generator().manual_seed(hash_of(name))
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def place(name: str) -> str:
    """Where a parameter of an adapter is, the same for ours ("conv.lora_A.default") and PEFT's ("….lora_A.default.weight")."""
    return name.removeprefix("base_model.model.").removesuffix(".weight").replace("lora_embedding_", "lora_")


def hash_of(name: str) -> int:
    return sum(ord(character) * 31**i for i, character in enumerate(name)) % 2**31
