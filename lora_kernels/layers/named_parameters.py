"""NamedParameters: a layer's parameters by the names of its adapters, which may be any."""

from collections.abc import ItemsView, Iterator, KeysView, ValuesView
from typing import Any, cast

from torch import nn


class NamedParameters(nn.Module):
    """A dict of parameters that is a module: its state-dict keys are the names.

    nn.ParameterDict makes each an attribute, so that names such as "keys" or "training" would hide, or be refused for, one of
    its own. Here a parameter is in `_parameters` alone, and any name goes that a state dict can hold: a string without a dot.
    """

    def __getitem__(self, name: str) -> nn.Parameter:
        return cast(nn.Parameter, self._parameters[name])

    def __setitem__(self, name: str, parameter: nn.Parameter) -> None:
        self._parameters[name] = parameter

    def __setattr__(self, name: str, value: Any) -> None:
        """load_state_dict(assign=True) sets parameters as attributes."""
        if isinstance(value, nn.Parameter):
            self[name] = value
        else:
            super().__setattr__(name, value)

    def __delitem__(self, name: str) -> None:
        del self._parameters[name]

    def __contains__(self, name: object) -> bool:
        return name in self._parameters

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)

    def get(self, name: str, default: nn.Parameter | None = None) -> nn.Parameter | None:
        return self._parameters.get(name, default)

    def keys(self) -> KeysView[str]:
        return self._parameters.keys()

    def values(self) -> ValuesView[Any]:
        return self._parameters.values()

    def items(self) -> ItemsView[str, Any]:
        return self._parameters.items()

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: {tuple(parameter.shape)} {parameter.dtype}" for name, parameter in self.items())
