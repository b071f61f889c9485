"""LoRA linear layers that cost almost nothing beyond their frozen base layer: y = x·Wᵀ + (α/r)·drop(x)·Aᵀ·Bᵀ + c."""

from .functional.conv2d import lora_conv2d
from .functional.dora import dora_norm
from .functional.eggroll import eggroll_gradient, eggroll_linear
from .functional.glu_mlp import lora_glu_mlp
from .functional.grouped_linear import lora_grouped_linear, multi_lora_linear
from .functional.linear import backend_report, lora_linear, lora_linear_group
from .functional.nf4 import dequantize_nf4, quantize_nf4
from .integrations.checkpoints import adapter_checkpoints
from .integrations.experts import register_experts
from .integrations.peft import AccelerationReport, accelerate, accelerated, restore
from .layers.conv2d import LoRAConv2d
from .layers.embedding import LoRAEmbedding
from .layers.linear import LoRALinear
from .mask import dropout_mask
from .models.adalora.allocator import RankAllocator
from .models.adalora.compaction import compact_ranks
from .models.adalora.config import AdaLoRAConfig
from .models.adalora.orthogonality import orthogonality_loss
from .models.adapter_files import load_adapter
from .models.adapter_loading import LoadedAdapter
from .models.adapter_saving import save_adapter
from .models.blocks import BlockReport, fuse_blocks, unfuse_blocks
from .models.combining import add_weighted_adapter
from .models.config import LoRAConfig
from .models.eggroll import Eggroll
from .models.export import save_merged
from .models.merging import merge_lora, unmerge_lora
from .models.mixing import mixed_adapters
from .models.parameters import lora_parameters, lora_plus_param_groups
from .models.state_dict import load_lora_state_dict, lora_state_dict
from .models.surgery import LoRAReport, add_lora, remove_lora
from .models.switching import delete_adapter, set_adapter
from .nf4 import NF4Weight
from .plan import use_backend
from .segments import Segments
from .values import LoRAAdapter, LoRAWeights

__version__ = "0.2.0"

__all__ = [
    "AccelerationReport",
    "AdaLoRAConfig",
    "BlockReport",
    "Eggroll",
    "LoRAAdapter",
    "LoRAConfig",
    "LoRAConv2d",
    "LoRAEmbedding",
    "LoRALinear",
    "LoRAReport",
    "LoRAWeights",
    "LoadedAdapter",
    "NF4Weight",
    "RankAllocator",
    "Segments",
    "accelerate",
    "accelerated",
    "adapter_checkpoints",
    "add_lora",
    "add_weighted_adapter",
    "backend_report",
    "compact_ranks",
    "delete_adapter",
    "dequantize_nf4",
    "dora_norm",
    "dropout_mask",
    "eggroll_gradient",
    "eggroll_linear",
    "fuse_blocks",
    "load_adapter",
    "load_lora_state_dict",
    "lora_conv2d",
    "lora_glu_mlp",
    "lora_grouped_linear",
    "lora_linear",
    "lora_linear_group",
    "lora_parameters",
    "lora_plus_param_groups",
    "lora_state_dict",
    "merge_lora",
    "mixed_adapters",
    "multi_lora_linear",
    "orthogonality_loss",
    "quantize_nf4",
    "register_experts",
    "remove_lora",
    "restore",
    "save_adapter",
    "save_merged",
    "set_adapter",
    "unfuse_blocks",
    "unmerge_lora",
    "use_backend",
]
