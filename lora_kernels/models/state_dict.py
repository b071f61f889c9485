"""State dicts of a whole model: that of its adapters alone, and a check of 4-bit weights before any is loaded."""

from torch import Tensor, nn

from .state import adapted_layers, lora_layers, lora_state, refuse_if_merged, refuse_offloaded_adapters
from .wrappers import plain_names, plain_state_dict


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Every adapter's tensors, and nothing of the frozen base; detached, not copied.

    Keys: `<path>.lora_A.<adapter>`, `<path>.lora_B.<adapter>`, and `<path>.lora_bias.<adapter>` with lora_bias;
    `<path>.modules_to_save.<adapter>.<name>` for whole modules; `<path>.bias.<adapter>` for trained biases.
    """
    state = {}
    for path, layer in adapted_layers(model).items():
        for name in layer.adapters:
            state[f"{path}.lora_A.{name}"] = layer.lora_A[name].detach()
            state[f"{path}.lora_B.{name}"] = layer.lora_B[name].detach()
            if name in layer.lora_bias:
                state[f"{path}.lora_bias.{name}"] = layer.lora_bias[name].detach()
    for exchange in lora_state(model).exchanges:
        owner = f"{exchange.path}.{exchange.attribute}".removeprefix(".")
        for adapter, choice in exchange.choices.items():
            if isinstance(choice, nn.Module) and adapter is not None:
                saved = plain_state_dict(choice)
                state.update({f"{owner}.modules_to_save.{adapter}.{key}": value for key, value in saved.items()})
            elif isinstance(choice, nn.Parameter) and adapter is not None:
                state[f"{owner}.{adapter}"] = choice.detach()
    return state


def load_lora_state_dict(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy `state`, as from `lora_state_dict`, into the adapters of `model`.

    Raises, before anything changes, ValueError if a key is missing or unknown or a shape differs, and RuntimeError while merged
    or where accelerate offloads the adapters.
    """
    own = lora_state_dict(model)
    refuse_if_merged(lora_layers(model), "load an adapter")
    refuse_offloaded_adapters(model, "load an adapter")
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    problems = [f"missing {len(missing)}, such as {missing[:3]}"] * bool(missing)
    problems += [f"unknown {len(unknown)}, such as {unknown[:3]}"] * bool(unknown)
    for key in own.keys() & state.keys():
        if own[key].shape != state[key].shape:
            problems.append(f"{key}: got shape {tuple(state[key].shape)}, expected {tuple(own[key].shape)}")
    if problems:
        raise ValueError(
            "state does not fit this model's adapters: " + "; ".join(problems[:5]) + "; "
            "add_lora must have been called with the same config, adapter names and base model"
        )
    for key, value in own.items():
        value.copy_(state[key])


def check_state(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    """For a pre-hook: raise, before load_state_dict changes any layer, ValueError if the state's 4-bit weights do not fit, and
    RuntimeError if a layer is merged.
    """
    plain = plain_names(model)
    named = {prefix + plain(key.removeprefix(prefix)): value for key, value in state_dict.items() if key.startswith(prefix)}
    for path, layer in lora_layers(model).items():
        layer.check_state(named, f"{prefix}{path}.")
