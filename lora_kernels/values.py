"""The values that travel from a call to its kernels; and, in pieces, through torch.library's operators."""

import ast
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .dtypes import FLOATS, dtype_name
from .nf4 import NF4Weight


class LoRAWeights(NamedTuple):
    """One projection y = x·Wᵀ + s·drop(x)·Aᵀ·Bᵀ + c, x[M, K] -> y[M, N].

    weight W[N, K] (an NF4Weight in 4 bits), lora_A[R, K], lora_B[N, R], bias c[N] or None, scaling s = alpha / r, a float or a
    0-d tensor. lora_A and lora_B are both None for a plain projection, x·Wᵀ + c, among adapted ones. With magnitude m[N] (DoRA)
    y = (m / n) ⊙ (x·Wᵀ + s·drop(x)·Aᵀ·Bᵀ) + c, n = ‖W + s·B·A‖ by rows. A new field goes here; a backend that does not name it
    in its FIELDS refuses calls that set it.
    """

    weight: Tensor | NF4Weight
    lora_A: Tensor | None
    lora_B: Tensor | None
    bias: Tensor | None = None
    scaling: float | Tensor = 1.0
    magnitude: Tensor | None = None


class LoRAAdapter(NamedTuple):
    """s·drop(x)·Aᵀ·Bᵀ, one of several over a shared weight: lora_A[R, K], lora_B[N, R], scaling s, a float or a 0-d tensor."""

    lora_A: Tensor
    lora_B: Tensor
    scaling: float | Tensor = 1.0
    dropout_p: float = 0.0


ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu2")  # of an MLP; what each is: reference/activation.py


class Dropout(NamedTuple):
    """drop(x) of member i: x · keep / (1 - p̂), with the mask of (seed, offset + i); seed is an int64 0-d tensor."""

    p: float
    seed: Tensor
    offset: int = 0


class Window(NamedTuple):
    """Where a 2-D convolution looks: pairs (lines, columns). beyond: zeros below and to the right, beside `padding` all round,
    of which "same" padding has one where it cannot be the same on both sides.
    """

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    beyond: tuple[int, int] = (0, 0)


def following(dropout: Dropout | None, number: int) -> Dropout | None:
    """That of a call whose member 0 is this one's member `number`."""
    return dropout if dropout is None or number == 0 else dropout._replace(offset=dropout.offset + number)


class Rows(NamedTuple):
    """What a call reads of `Segments`; order is None where x is sorted by segment.

    host: offsets on the CPU; None where the host does not know them, or a compiled graph must not depend on them.
    """

    offsets: Tensor
    order: Tensor | None
    host: Tensor | None

    @property
    def kind(self) -> tuple[object, ...]:
        """What a plan may depend on: nothing that differs from step to step."""
        return "rows", self.offsets.shape, self.offsets.device, self.order is None, self.host is None


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
    **{c.__name__: c for c in (LoRAWeights, Dropout, Needs, Rows)},
    "NF4Weight": lambda *fields: NF4Weight.from_fields(fields),
}
DTYPES = {dtype_name(dtype): dtype for dtype in FLOATS}
NF4_FIELDS = tuple(field.name for field in dataclasses.fields(NF4Weight))


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
    form = form_of(text)
    for name, got, expected in (("tensors", len(tensors), form.tensors), ("numbers", len(numbers), form.numbers)):
        if got != expected:
            raise ValueError(f"spec: got {got} {name}, but {text!r} names {expected}")
    return form.build(tensors, numbers)


class Form(NamedTuple):
    """A text as functions: read(value) -> (tensors, numbers) of a value that has this form, or more where it has None;
    build(tensors, numbers) -> the value.
    """

    tensors: int
    numbers: int
    read: Callable[[Any], tuple[list[Tensor], list[float]]]
    build: Callable[[Sequence[Tensor | None], Sequence[float]], Any]


@functools.lru_cache(maxsize=4096)
def form_of(text: str) -> Form:
    """The Form of `flatten`'s text; a text of any other kind is a ValueError, and nothing in it is executed."""
    paths: dict[str, list[str]] = {"T": [], "F": []}
    try:
        build = _source(ast.parse(text, mode="eval").body, "value", paths)
    except (SyntaxError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise ValueError(f"spec: got {text!r}, which is not a text of lora_kernels.values.flatten") from error
    read = f"lambda value: ([{', '.join(paths['T'])}], [{', '.join(paths['F'])}])"
    names = {**CLASSES, "torch": torch}
    return Form(len(paths["T"]), len(paths["F"]), eval(read, names), eval(f"lambda T, F: {build}", names))


def _source(node: ast.expr, path: str, paths: dict[str, list[str]]) -> str:
    """The Python source that builds what a node of the text means; `paths` gets where its tensors and numbers stand."""
    if isinstance(node, ast.Name):
        paths[node.id].append(path)
        return f"{node.id}[{len(paths[node.id]) - 1}]"
    if isinstance(node, ast.Tuple):
        inside = [_source(item, f"{path}[{i}]", paths) for i, item in enumerate(node.elts)]
        return f"({', '.join(inside)},)" if inside else "()"
    if isinstance(node, ast.Call):
        name = node.func.id  # type: ignore[attr-defined]
        CLASSES[name]  # or it is not a text of ours
        within = [f".{field}" for field in NF4_FIELDS] if name == "NF4Weight" else [f"[{i}]" for i in range(len(node.args))]
        inside = [_source(item, path + step, paths) for item, step in zip(node.args, within, strict=True)]
        return f"{name}({', '.join(inside)})"
    if isinstance(node, ast.Attribute):
        return str(DTYPES[node.attr])
    return repr(ast.literal_eval(node))
