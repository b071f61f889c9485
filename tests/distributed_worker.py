"""What each of two gloo processes runs: `python distributed_worker.py CASE RANK DIRECTORY`; rank 0 writes DIRECTORY/CASE.pt."""

import copy
import sys
from pathlib import Path

import tiny_models
import torch
import torch.distributed as dist
from torch import nn

from lora_kernels import (
    AdaLoRAConfig,
    BlockReport,
    LoRAConfig,
    RankAllocator,
    accelerate,
    add_lora,
    fuse_blocks,
    load_adapter,
    lora_parameters,
    orthogonality_loss,
    save_adapter,
)

TARGETS = ["q_proj", "v_proj", "down_proj"]
STEPS = 3


def tokens() -> torch.Tensor:
    """Four rows; each of two processes takes two of them."""
    return torch.randint(2, 60, (4, 9), generator=torch.Generator().manual_seed(3))


def peft_model() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(tiny_models.llama(), LoraConfig(target_modules=TARGETS, r=4, init_lora_weights=False))
    assert accelerate(model).accelerated
    return model


def own_model(dtype: torch.dtype = torch.float32, quantize: str | None = None, blocks: bool = False, **options) -> nn.Module:
    torch.manual_seed(0)
    model = tiny_models.llama().to(dtype)
    add_lora(model, LoRAConfig(target_modules=TARGETS, r=4, init_lora_weights=False, **options), quantize=quantize)
    if blocks:
        assert len(fuse_blocks(model).mlps) == 2
    return model


def blocks_model() -> nn.Module:
    return own_model(blocks=True)


def gradients(model: nn.Module, rows: torch.Tensor) -> dict[str, torch.Tensor]:
    model(input_ids=rows, labels=rows).loss.backward()
    named = {name.removeprefix("module."): p for name, p in model.named_parameters() if p.requires_grad}
    return {name: p.grad for name, p in named.items()}


def ddp(make, rank: int) -> dict[str, torch.Tensor]:
    model = nn.parallel.DistributedDataParallel(make())
    return gradients(model, tokens()[2 * rank : 2 * rank + 2])


def adalora(rows: torch.Tensor, wrap=lambda model: model) -> tuple[list[dict[str, int]], list[torch.Tensor]]:
    """Ranks after each step of a whole run with AdaLoRA, and the parameters at its end."""
    torch.manual_seed(0)
    model = tiny_models.llama()
    options = {"init_r": 8, "target_r": 2, "tinit": 1, "tfinal": 2, "total_step": 10, "orth_reg_weight": 1e-3}
    add_lora(model, AdaLoRAConfig(target_modules=TARGETS, **options))
    model = wrap(model)
    allocator, optimizer = RankAllocator(model), torch.optim.SGD(lora_parameters(model), lr=0.5)
    ranks = []
    for step in range(10):
        (model(input_ids=rows, labels=rows).loss + orthogonality_loss(model)).backward()
        optimizer.step()
        allocator.step(step)
        optimizer.zero_grad()
        ranks.append(allocator.ranks())
    return ranks, [parameter.detach() for parameter in lora_parameters(model)]


def adalora_ddp(rank: int) -> list:
    """What both processes have at the end of the run."""
    found: list = [None, None]
    dist.all_gather_object(found, adalora(tokens()[2 * rank : 2 * rank + 2], nn.parallel.DistributedDataParallel))
    return found


def train(model: nn.Module, rows: torch.Tensor) -> list[float]:
    """Losses of STEPS steps, the mean over processes where there are several."""
    optimizer = torch.optim.SGD(lora_parameters(model), lr=0.5)
    losses = []
    for _ in range(STEPS):
        loss = model(input_ids=rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        if dist.is_initialized():
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        losses.append(mean.item())
    return losses


def fsdp2(options: dict, rank: int, directory: Path) -> dict:
    """Train a sharded model, save its adapter, and load it into another sharded model."""
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from torch.distributed.tensor import DTensor

    def sharded() -> nn.Module:
        model = own_model(**options)
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)  # torch 2.8's gloo takes a mean for a sum
        return model

    model = sharded()
    losses = train(model, tokens()[2 * rank : 2 * rank + 2])
    save_adapter(model, directory)
    other = sharded()
    load_adapter(other, directory)
    pairs = list(zip(lora_parameters(model), lora_parameters(other), strict=True))
    assert all(isinstance(a, DTensor) and isinstance(b, DTensor) for a, b in pairs)
    assert all(torch.equal(a.to_local(), b.to_local()) for a, b in pairs)
    if options.get("blocks"):
        assert BlockReport(model).calls() == {"fused": 4 * STEPS}
    weight = model.model.layers[0].self_attn.q_proj.weight
    return {"losses": losses, "weight_bytes": weight.to_local().nbytes, "weight_dtype": weight.dtype}


FSDP2_OPTIONS = {
    "fsdp2-fp32": {},
    "fsdp2-bf16": {"dtype": torch.bfloat16},
    "fsdp2-blocks": {"blocks": True},
    "fsdp2-dora": {"use_dora": True},
}
if torch.__version__ >= (2, 12):  # before, FSDP2 shards no frozen uint8 weights
    FSDP2_OPTIONS["fsdp2-nf4"] = {"dtype": torch.bfloat16, "quantize": "nf4"}


def main() -> None:
    rank, directory = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/rendezvous", rank=rank, world_size=2)
    results: dict = {"ddp-peft": ddp(peft_model, rank), "ddp-own": ddp(own_model, rank), "ddp-blocks": ddp(blocks_model, rank)}
    results["adalora"] = adalora_ddp(rank)
    for name, options in FSDP2_OPTIONS.items():
        results[name] = fsdp2(options, rank, directory / name)
    if rank == 0:
        torch.save(copy.deepcopy(results), directory / "results.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
