"""NamedParameters: a layer's parameters by the names of its adapters, which may be any."""

from collections.abc import ItemsView, Iterator, KeysView, ValuesView
from typing import Any

from torch import Tensor, nn


class NamedParameters(nn.Module):
    """A dict of parameters that is a module: its state-dict keys are the names.

    nn.ParameterDict makes each an attribute, so that names such as "keys" or "training" would hide, or be refused for, one of
    its own. Here a parameter is in `_parameters` alone, and any name goes that a state dict can hold: a string without a dot.
    torch.export's programs do make attributes and Python code of them, and take neither nn.Module's own nor keywords.
    """

    def __getitem__(self, name: str) -> nn.Parameter:
        if (found := self.get(name)) is None:
            raise KeyError(name)
        return found

    def __setitem__(self, name: str, parameter: nn.Parameter) -> None:
        self._parameters[name] = parameter

    def __setattr__(self, name: str, value: Any) -> None:
        """load_state_dict(assign=True) sets parameters as attributes, and FSDP1 does, in the place of the views in `get`.

        What is no tensor is the module's own attribute, such as `training`, beside a parameter of that name.
        """
        if isinstance(value, nn.Parameter):
            if isinstance(self.__dict__.get(name), Tensor):
                del self.__dict__[name]
            self[name] = value
        elif not isinstance(value, (Tensor, nn.Module, type(None))):
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)  # type: ignore[arg-type]  # None unregisters one

    def __delitem__(self, name: str) -> None:
        del self._parameters[name]

    def __contains__(self, name: object) -> bool:
        return self.get(name) is not None  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)

    def get(self, name: str, default: nn.Parameter | None = None) -> nn.Parameter | None:
        if (parameter := self._parameters.get(name)) is not None:
            return parameter
        view = self.__dict__.get(name)  # FSDP1 puts plain tensors in the place of parameters
        return view if isinstance(view, Tensor) else default  # type: ignore[return-value]

    def keys(self) -> KeysView[str]:
        return self._parameters.keys()

    def values(self) -> ValuesView[Any]:
        return self._parameters.values()

    def items(self) -> ItemsView[str, Any]:
        return self._parameters.items()

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: {tuple(parameter.shape)} {parameter.dtype}" for name, parameter in self.items())
