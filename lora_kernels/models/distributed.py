"""Tensors of which each process has a part (FSDP2), and whole ones."""

from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, of which this process has a part."""
    return hasattr(tensor, "full_tensor")


def refuse_fsdp2(model: nn.Module, action: str) -> None:
    """Raise ValueError if fully_shard holds a part of the model: it puts its own weights back at each call."""
    if any(base.__name__ == "FSDPModule" for module in model.modules() for base in type(module).__mro__):
        raise ValueError(
            f"cannot {action} under fully_shard (FSDP2), which would put its own weights back, and has a part of each here: "
            "save_adapter, load_adapter into a model that is not sharded, and merge that"
        )


def full(tensor: Tensor) -> Tensor:
    """The whole of a tensor that is sharded over processes; each of them has to ask."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def sharded_like(value: Tensor, tensor: Tensor) -> Tensor:
    """`value` sharded over processes as `tensor` is; the dtype is copy_'s matter."""
    if not is_sharded(tensor):
        return value
    from torch.distributed.tensor import distribute_tensor

    # Every process has read the whole file: each keeps its own part, and nothing is sent.
    return distribute_tensor(value.to(tensor.device), tensor.device_mesh, tensor.placements, src_data_rank=None)  # type: ignore[attr-defined]
