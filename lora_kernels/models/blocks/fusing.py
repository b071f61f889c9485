"""fuse_blocks and unfuse_blocks."""

from collections import Counter

from torch import nn

from ...layers.offload import forward_is_replaced
from ...layers.projection import is_adapted
from ...plan import PLAIN
from ..wrappers import named_modules, unwrapped
from . import finding, groups, mlps
from .report import BlockReport
from .wiring import NO_MLP, argument_of, why_results_differ, wiring_of

IN_TWO = "its MLP lies in two modules: what this one returns is an activation's result, which a fused MLP does not keep"


def fuse_blocks(model: nn.Module) -> BlockReport:
    """Compute each MLP with adapted layers as one operation (lora_glu_mlp), and siblings such as q, k and v, or gate and up
    where the MLP cannot be, as one (lora_linear_group): fewer passes over memory, fewer saved tensors, the same results.

    model: one that add_lora changed, or PEFT's after `accelerate`, which calls this itself. Blocks are found by their children
    and by running them, never by the model's name. An MLP's forward is replaced only after it showed the same arithmetic and
    the same result on random inputs; q, k and v need no knowledge of the attention's code: the first of them that is called
    computes all, and hands the others theirs if they get the same tensor unchanged.
    Each call decides anew: with adapters disabled or merged, hooks on an MLP's layers, sharded tensors … the layers compute as
    without fuse_blocks, and the report counts the reason. Dropout stays; a fused gate_up_proj drops x for each half by itself.
    Call it before `fully_shard`; again after layers were added or exchanged: the report says what is fused now.
    Raises ValueError for a model without LoRA layers that can be members.
    """
    if not any(is_adapted(module) for module in model.modules()):
        raise ValueError(
            f"model: got a {type(unwrapped(model)).__name__} without LoRA layers of lora_kernels, expected some; call add_lora "
            "first, or accelerate for a PeftModel"
        )
    return fuse_what_can_be(model)


def fuse_what_can_be(model: nn.Module) -> BlockReport:
    """fuse_blocks of a model that may have no such layer."""
    kept = _undo(model)
    modules, report = dict(named_modules(model)), BlockReport(model)
    in_several = finding.shared(modules)
    for path, parent in modules.items():
        if not is_adapted(parent) and (members := finding.members_of(parent)):
            calls = kept.get(id(parent), {})
            if not _fuse_mlp(path, parent, members, in_several, calls, report):
                _join(path, parent, members, in_several, calls, report)
    return report


def unfuse_blocks(model: nn.Module) -> None:
    """Each module computes as before `fuse_blocks`, with the classes and hooks that it had."""
    _undo(model)


def _undo(model: nn.Module) -> dict[int, dict[tuple[str, ...], Counter]]:
    """unfuse_blocks; the counters, by the id of the parent and the names of the members."""
    kept: dict[int, dict[tuple[str, ...], Counter]] = {}
    for module in model.modules():
        own = {group.names: group.calls for group in groups.groups_of(module)}
        if (block := mlps.block_of(module)) is not None:
            own[block.wiring.members] = block.calls
        kept[id(module)] = own
        groups.part(module)
        mlps.unfuse(module)
    return kept


Calls = dict[tuple[str, ...], Counter]


def _fuse_mlp(
    path: str, parent: nn.Module, members: dict[str, nn.Module], in_several: set[int], calls: Calls, report: BlockReport
) -> bool:
    """Whether the parent is an MLP whose forward is one operation now; the reason, if it is one and cannot be, is reported."""
    names, argument = finding.mlp_members(members), argument_of(parent)
    if names is None or argument is None:
        half = len(members) == 1 and not finding.parameters_beside(parent, members)
        if (names is not None or half) and finding.has_activation(parent):
            report.skipped[path] = IN_TWO if names is None else "its MLP is a part of a forward of several tensors"
        return False
    reason = finding.why_not_joined(parent, names, in_several) or _why_not_run(parent)
    wiring = reason or wiring_of(parent, names)
    if isinstance(wiring, str):
        if wiring != NO_MLP:
            report.skipped[path] = wiring
        return False
    if (reason := why_results_differ(parent, wiring)) is not None:
        report.skipped[path] = reason
        return False
    mlps.fuse(parent, mlps.Block(parent, wiring, argument, calls.get(wiring.members, Counter())))
    report.mlps.append(path)
    return True


def _why_not_run(parent: nn.Module) -> str | None:
    """Why an MLP's forward cannot be tried."""
    if forward_is_replaced(parent):
        return "its forward was replaced on the instance"
    for module in parent.modules():
        if "_hf_hook" in module.__dict__:
            return "accelerate's hooks move its tensors"
    parameters = list(parent.parameters())
    if not parameters:
        return "its weights are no parameters of its own, as in FullyShardedDataParallel"
    for tensor in parameters:
        if tensor.is_meta:
            return "its weights are on the meta device, and have no values to compare results with"
        if hasattr(tensor, "full_tensor"):
            return "its weights are sharded: call fuse_blocks before fully_shard"
        if type(tensor) not in PLAIN and type(tensor).__name__ != "Params4bit":
            return f"its weights are {type(tensor).__name__}"
    return None


def _join(
    path: str, parent: nn.Module, members: dict[str, nn.Module], in_several: set[int], calls: Calls, report: BlockReport
) -> None:
    """Let the siblings among the parent's children be groups."""
    for names in finding.siblings(members):
        if (reason := finding.why_not_joined(parent, names, in_several)) is not None:
            report.skipped[path] = reason
            continue
        groups.join(parent, names, calls.get(names, Counter()))
        report.groups.append(f"{path}.{{{','.join(names)}}}".removeprefix("."))
