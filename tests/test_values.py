"""The values in pieces, as torch.library's operators take them."""

import math

import pytest
import torch

from lora_kernels import LoRAWeights, quantize_nf4
from lora_kernels.values import Dropout, Needs, flatten, unflatten


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a is b
    if isinstance(a, tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if hasattr(a, "fields"):
        return same(a.fields(), b.fields())
    return a == b and type(a) is type(b)


T = torch.ones(2)
VALUES = [
    T,
    None,
    (),
    (T,),
    ("auto", torch.bfloat16, -3, True, 0.5, math.inf, -0.25, (1, (T, None)), "it's"),
    LoRAWeights(T, T, T, None, 0.125),
    (LoRAWeights(T, T, T, T, T), LoRAWeights(quantize_nf4(torch.ones(3, 70)), T, T)),
    (Dropout(0.1, torch.tensor(3), 2), Needs(True, (("lora_A", "bias"), ()))),
]


@pytest.mark.parametrize("value", VALUES)
def test_pieces_make_up_the_value(value):
    pieces = flatten(value)
    assert all(isinstance(t, torch.Tensor) for t in pieces.tensors)
    assert all(isinstance(number, float) for number in pieces.numbers)
    found = unflatten(*pieces)
    if isinstance(value, tuple) and value and isinstance(value[-1], LoRAWeights):
        value, found = value[1:], found[1:]  # beside it, NF4Weight compares by identity
    assert same(value, found)


def test_the_text_says_nothing_of_values():
    """Graphs and cached parsers do not depend on tensors and numbers."""
    one, other = flatten((T, 0.5)), flatten((torch.zeros(3), 0.25))
    assert one.text == other.text == "(T,F,)"


@pytest.mark.parametrize(
    ("pieces", "words"),
    [
        (([], [], "T"), "got 0 tensors, but 'T' names 1"),
        (([], [], "(F,)"), r"got 0 numbers, but '\(F,\)' names 1"),
        (([T, T], [], "T"), "got 2 tensors, but 'T' names 1"),
        (([], [], "LoRAWeights("), "not a text of"),
        (([], [], "print('x')"), "not a text of"),
        (([], [], "__import__('os').system('true')"), "not a text of"),
        (([], [], "torch.load"), "not a text of"),
        (([], [], "[1 for _ in ()]"), "not a text of"),
    ],
)
def test_other_texts_are_refused_and_never_executed(pieces, words):
    with pytest.raises(ValueError, match=words):
        unflatten(*pieces)
