"""The values that travel from a call to its kernels; and, in pieces, through torch.library's operators."""

import ast
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from .dtypes import FLOATS, dtype_name
from .nf4 import NF4Weight


class LoRAWeights(NamedTuple):
    """One projection y = x·Wᵀ + s·drop(x)·Aᵀ·Bᵀ + c, x[M, K] -> y[M, N].

    weight W[N, K] (an NF4Weight in 4 bits), lora_A[R, K], lora_B[N, R], bias c[N] or None, scaling s = alpha / r, a float or a
    0-d tensor. A new field goes here; a backend that does not name it in its FIELDS refuses calls that set it.
    """

    weight: Tensor | NF4Weight
    lora_A: Tensor
    lora_B: Tensor
    bias: Tensor | None = None
    scaling: float | Tensor = 1.0


class Dropout(NamedTuple):
    """drop(x) of member i: x · keep / (1 - p̂), with the mask of (seed, offset + i); seed is an int64 0-d tensor."""

    p: float
    seed: Tensor
    offset: int = 0


class Needs(NamedTuple):
    """Which gradients a backward pass computes: x's, and of each member those of the fields named."""

    x: bool
    members: tuple[tuple[str, ...], ...]

    def any(self, *fields: str) -> bool:
        """Whether some member's gradient of one of these fields is wanted."""
        return any(field in member for member in self.members for field in fields)


class Grads(NamedTuple):
    """What a backward pass computes: x's gradient, and of each member those wanted, by field."""

    x: Tensor | None
    members: tuple[dict[str, Tensor], ...]


# ---- as lists and a text, which is what an operator of torch.library takes ----


class Flat(NamedTuple):
    """A value in pieces: its tensors and its floats in order, and a Python expression in which T and F are the next of each."""

    tensors: Sequence[Tensor]
    numbers: Sequence[float]
    text: str


CLASSES: dict[str, Callable[..., Any]] = {
    **{c.__name__: c for c in (LoRAWeights, Dropout, Needs)},
    "NF4Weight": lambda *fields: NF4Weight.from_fields(fields),
}
DTYPES = {dtype_name(dtype): dtype for dtype in FLOATS}


def flatten(value: Any) -> Flat:
    """The pieces of tensors, numbers, strings, dtypes, None, and tuples, LoRAWeights, NF4Weights … of such."""
    tensors: list[Tensor] = []
    numbers: list[float] = []
    return Flat(tensors, numbers, _flatten(value, tensors, numbers))


def _flatten(value: Any, tensors: list[Tensor], numbers: list[float]) -> str:
    if isinstance(value, Tensor):
        tensors.append(value)
        return "T"
    if isinstance(value, float):
        numbers.append(value)
        return "F"
    if isinstance(value, NF4Weight):
        return f"NF4Weight({','.join([_flatten(field, tensors, numbers) for field in value.fields()])})"
    if isinstance(value, tuple):
        inside = ",".join([_flatten(item, tensors, numbers) for item in value])
        return f"{type(value).__name__}({inside})" if hasattr(value, "_fields") else f"({inside},)" if value else "()"
    return repr(value)


def unflatten(tensors: Sequence[Tensor | None], numbers: Sequence[float], text: str) -> Any:
    """The value of `flatten`'s pieces. Raises ValueError for pieces that do not fit one another."""
    left = iter(tensors), iter(numbers)
    value = _builder(text)(*left)
    if any(next(rest, None) is not None for rest in left):
        raise ValueError(f"spec: got {len(tensors)} tensors and {len(numbers)} numbers, more than {text!r} names")
    return value


@functools.lru_cache(maxsize=4096)
def _builder(text: str) -> Callable[[Iterator[Tensor | None], Iterator[float]], Any]:
    try:
        return _build(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise ValueError(f"spec: got {text!r}, which is not a text of lora_kernels.values.flatten") from error


def _build(node: ast.expr) -> Callable[[Iterator[Tensor | None], Iterator[float]], Any]:
    """(tensors, numbers) -> the value that a node of the text means; nothing in a text is executed."""
    if isinstance(node, (ast.Tuple, ast.Call)):
        parts = [_build(item) for item in (node.elts if isinstance(node, ast.Tuple) else node.args)]
        make = CLASSES[node.func.id] if isinstance(node, ast.Call) else _tuple  # type: ignore[attr-defined]
        return lambda tensors, numbers: make(*[part(tensors, numbers) for part in parts])
    if isinstance(node, ast.Name):
        return {"T": _next_tensor, "F": _next_number}[node.id]
    value = DTYPES[node.attr] if isinstance(node, ast.Attribute) else ast.literal_eval(node)
    return lambda tensors, numbers: value


def _tuple(*items: Any) -> tuple[Any, ...]:
    return items


def _next_tensor(tensors: Iterator[Tensor | None], _: Iterator[float]) -> Tensor:
    return _next(tensors)


def _next_number(_: Iterator[Tensor | None], numbers: Iterator[float]) -> float:
    return _next(numbers)


def _next(left: Iterator[Any]) -> Any:
    for item in left:
        return item
    raise ValueError("spec: got fewer tensors or numbers than it names")
