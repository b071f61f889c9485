"""What an optimizer is given: the parameters that the active adapter trains, and groups of them for LoRA+."""

from typing import Any

from torch import Tensor, nn

from .state import adapted_layers, lora_exchanges

SIDES = {  # which matrix a part of a parameter's name means, here and in PEFT
    **dict.fromkeys(("lora_A", "lora_embedding_A"), "lora_A"),
    **dict.fromkeys(("lora_B", "lora_embedding_B", "lora_bias"), "lora_B"),
}


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that training the active adapter changes: all that its layers have, trained biases and modules_to_save."""
    own: list[Tensor] = []
    for layer in adapted_layers(model).values():
        own += layer.adapter_parameters()
    for exchange in lora_exchanges(model):
        for adapter, choice in exchange.choices.items():
            if adapter is not None:
                own += choice.parameters() if isinstance(choice, nn.Module) else [choice]
    ids = {id(parameter) for parameter in own}
    return [parameter for parameter in model.parameters() if id(parameter) in ids and parameter.requires_grad]


def lora_plus_param_groups(model: nn.Module, lr: float, ratio: float = 16.0) -> list[dict[str, Any]]:
    """Groups for a torch optimizer: lr for the A matrices, ratio · lr for the B matrices and adapters' own biases, lr for
    whatever else is trained (DoRA's magnitudes, biases, modules_to_save).

    A magnitude begins at the size of W's rows and scales the whole result, as no B does; PEFT's create_loraplus_optimizer
    gives it B's rate, as to all that has one dimension.

    model: changed by add_lora, or a PeftModel with LoRA. Only parameters that require a gradient are in a group, each once.
    Raises ValueError where no B is trained, and for an lr or a ratio that is not above 0.
    """
    for name, value in (("lr", lr), ("ratio", ratio)):
        if not value > 0:
            raise ValueError(f"{name}: got {value}, expected a number above 0")
    groups: dict[str, list[nn.Parameter]] = {"lora_A": [], "lora_B": [], "other": []}
    for path, parameter in model.named_parameters():
        if parameter.requires_grad:
            side = next((SIDES[part] for part in path.split(".") if part in SIDES), "other")  # an adapter's name comes later
            groups[side].append(parameter)
    if not groups["lora_B"]:
        raise ValueError(
            f"model: {type(model).__name__} has no trainable lora_B; "
            "call add_lora or peft.get_peft_model first, and make an adapter active"
        )
    rates = {"lora_A": lr, "lora_B": lr * ratio, "other": lr}
    return [{"params": parameters, "lr": rates[side]} for side, parameters in groups.items() if parameters]
