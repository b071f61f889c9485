"""State dicts of a whole model: that of its adapters alone, and a check of 4-bit weights before any is loaded."""

from torch import Tensor, nn

from .adapter_checks import why_not_finite
from .distributed import full
from .names import parents
from .state import adapted_layers, lora_exchanges, lora_layers, refuse_if_merged, refuse_offloaded_adapters
from .wrappers import plain_names, plain_state_dict


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Every adapter's tensors, and nothing of the frozen base; detached, not copied.

    Keys: `<path>.lora_A.<adapter>`, `<path>.lora_B.<adapter>`, `<path>.lora_E.<adapter>` of AdaLoRA,
    `<path>.lora_magnitude.<adapter>` of DoRA, and `<path>.lora_bias.<adapter>` with lora_bias;
    `<path>.modules_to_save.<adapter>.<name>` for whole modules; `<path>.bias.<adapter>` for trained biases.
    """
    return {name: tensor.detach() for name, tensor in _own_tensors(model).items()}


def _own_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What lora_state_dict gives, as it is in the model."""
    state: dict[str, Tensor] = {}
    for path, layer in adapted_layers(model).items():
        for name in layer.adapters:
            state[f"{path}.lora_A.{name}"] = layer.lora_A[name]
            state[f"{path}.lora_B.{name}"] = layer.lora_B[name]
            for kind in ("lora_E", "lora_bias", "lora_magnitude"):
                if name in (named := getattr(layer, kind)):
                    state[f"{path}.{kind}.{name}"] = named[name]
    for exchange in lora_exchanges(model):
        for adapter, choice in exchange.choices.items():
            if isinstance(choice, nn.Module) and adapter is not None:
                saved = plain_state_dict(choice, keep_vars=True)
                state.update({f"{exchange.name}.modules_to_save.{adapter}.{key}": value for key, value in saved.items()})
            elif isinstance(choice, nn.Parameter) and adapter is not None:
                state[f"{exchange.name}.{adapter}"] = choice
    return state


def load_lora_state_dict(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy `state`, as from `lora_state_dict`, into the adapters of `model`.

    Raises, before anything changes, ValueError if a key is missing or unknown, a shape differs, or a trained value is NaN or
    infinite, or would be in the adapter's dtype, and RuntimeError while merged or where accelerate offloads the adapters.
    """
    own = _own_tensors(model)
    refuse_if_merged(lora_layers(model), "load an adapter")
    refuse_offloaded_adapters(model, "load an adapter")
    missing, unknown = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    problems = [f"missing {len(missing)}, such as {missing[:3]}"] * bool(missing)
    problems += [f"unknown {len(unknown)}, such as {unknown[:3]}"] * bool(unknown)
    for key in own.keys() & state.keys():
        if own[key].shape != state[key].shape:
            problems.append(f"{key}: got shape {tuple(state[key].shape)}, expected {tuple(own[key].shape)}")
    trained = [key for key, tensor in own.items() if key in state and isinstance(tensor, nn.Parameter)]
    if diverged := [why for key in trained for why in why_not_finite(key, full(state[key]), own[key].dtype)]:
        raise ValueError(f"state: nothing was changed, {len(diverged)} of its tensors are lost: {diverged[0]}")
    if problems:
        raise ValueError(
            "state does not fit this model's adapters: " + "; ".join(problems[:5]) + "; "
            "add_lora must have been called with the same config, adapter names and base model"
        )
    for key, value in own.items():
        value.detach().copy_(state[key])


def check_state(model: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    """For a pre-hook: raise, before load_state_dict changes any layer, ValueError if the state's 4-bit weights do not fit, and
    RuntimeError if a layer is merged.
    """
    plain = plain_names(model)
    layers = lora_layers(model)
    own: dict[str, dict[str, Tensor]] = {path: {} for path in layers}  # each layer looks through what it is given
    for key, value in state_dict.items():
        if key.startswith(prefix):
            name = plain(key.removeprefix(prefix))
            for path in parents(name):
                if path in own:
                    own[path][prefix + name] = value
    for path, layer in layers.items():
        layer.check_state(own[path], f"{prefix}{path}.")
