"""lora_linear_group and lora_glu_mlp under random options: the rule holds for all of them."""

from kinds import DTYPES
from members_accuracy import check
from properties import given, settings, st

from lora_kernels import use_backend
from lora_kernels.cases.glu_mlp import Case
from lora_kernels.cases.linear_group import GroupCase
from lora_kernels.cases.members import Layer
from lora_kernels.values import ACTIVATIONS

LAYER = {
    "N": st.integers(1, 90),
    "R": st.none() | st.integers(1, 40),
    "bias": st.booleans(),
    "scaling": st.floats(-4, 4, allow_subnormal=False),
    "quant_type": st.sampled_from([None, None, "nf4", "fp4"]),
}
LAYERS = st.builds(Layer, **LAYER)
COMMON = {
    "M": st.integers(0, 70),
    "K": st.integers(1, 150),
    "p": st.sampled_from([0.0, 0.05, 0.5]),
    "dtype": st.sampled_from(DTYPES),
    "needs": st.sets(st.sampled_from(["x", "lora_A", "lora_B", "bias"]), min_size=1).map(tuple),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "strided": st.booleans(),
}
GROUP = {**COMMON, "members": st.lists(LAYERS, min_size=1, max_size=5).map(tuple), "frozen": st.sets(st.sampled_from("qkv"))}
MLP = {
    **COMMON,
    "I": st.integers(8, 150),
    "N": st.integers(1, 90),
    "activation": st.sampled_from(ACTIVATIONS),
    "gate": st.none() | LAYERS,
    "up": LAYERS,
    "down": LAYERS,
    "frozen": st.sets(st.sampled_from(["gate", "up", "down"])),
}


@settings(max_examples=60, deadline=None)
@given(st.builds(GroupCase, **GROUP))
def test_groups(device, case):
    run("torch", device, case)


@settings(max_examples=60, deadline=None)
@given(st.builds(Case, **MLP))
def test_mlps(device, case):
    run("torch", device, case)


def run(backend, device, case):
    case.device, case.frozen = device, tuple(case.frozen)
    with use_backend(backend):
        check(case)
