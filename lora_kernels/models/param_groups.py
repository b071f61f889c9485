"""Parameter groups of LoRA+: B learns faster than A (Hayou et al. 2024, "LoRA+: Efficient Low Rank Adaptation")."""

from typing import Any

from torch import nn

OUTPUT_SIDE = {"lora_B", "lora_embedding_B", "lora_bias"}  # parts of a parameter's name, here and in PEFT


def lora_plus_param_groups(model: nn.Module, lr: float, ratio: float = 16.0) -> list[dict[str, Any]]:
    """Groups for a torch optimizer: lr for the A matrices, ratio · lr for the B matrices and adapters' own biases, lr for
    whatever else is trained (biases, modules_to_save).

    model: changed by add_lora, or a PeftModel with LoRA. Only parameters that require a gradient are in a group, each once.
    Raises ValueError where no B is trained, and for an lr or a ratio that is not above 0.
    """
    for name, value in (("lr", lr), ("ratio", ratio)):
        if not value > 0:
            raise ValueError(f"{name}: got {value}, expected a number above 0")
    groups: dict[str, list[nn.Parameter]] = {"lora_A": [], "lora_B": [], "other": []}
    for path, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts = set(path.split("."))
            side = "lora_B" if parts & OUTPUT_SIDE else "lora_A" if parts & {"lora_A", "lora_embedding_A"} else "other"
            groups[side].append(parameter)
    if not groups["lora_B"]:
        raise ValueError(
            f"model: {type(model).__name__} has no trainable lora_B; "
            "call add_lora or peft.get_peft_model first, and make an adapter active"
        )
    rates = {"lora_A": lr, "lora_B": lr * ratio, "other": lr}
    return [{"params": parameters, "lr": rates[side]} for side, parameters in groups.items() if parameters]
