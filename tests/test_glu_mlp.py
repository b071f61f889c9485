"""lora_glu_mlp against float64: every activation, gated and plain, members of other ranks, scalings and adapters' dtypes."""

import itertools
from dataclasses import replace

import pytest
import torch
from kinds import DTYPES
from members_accuracy import check, every_dtype, every_kind

from lora_kernels import LoRAWeights, dropout_mask, lora_glu_mlp, lora_linear
from lora_kernels.cases.glu_mlp import DOWN, GATE, UP, Case
from lora_kernels.cases.members import ours
from lora_kernels.values import ACTIVATIONS

BF16, FP16, FP32, FP64 = DTYPES
PLAIN = {"gate": None}


def case_of(kind, **options):
    """A case whose weights are the kind's."""
    layers = {"gate": GATE, "up": UP, "down": DOWN, **{n: options.pop(n) for n in ("gate", "up", "down") if n in options}}
    own = {name: layer and replace(layer, quant_type=kind.quant_type) for name, layer in layers.items()}
    return Case(**own, **options)


every_form = pytest.mark.parametrize("form", [{}, PLAIN], ids=["gated", "plain"])


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@every_form
def test_gradcheck(p, activation, form):
    """Numerical differentiation, which shares nothing with the reference."""
    needs = ("x", "weight", "lora_A", "lora_B", "bias")
    problem = Case(M=(2, 2), K=5, I=6, N=4, p=p, activation=activation, dtype=FP64, needs=needs, **form).draw()
    leaves = list(problem.leaves.values())
    assert torch.autograd.gradcheck(lambda *_: problem.case.call(problem.x, problem.members), leaves)


@every_dtype
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("p", [0.0, 0.2])
@every_form
def test_activations(kind, dtype, activation, p, form, device):
    check(case_of(kind, M=33, K=64, I=70, activation=activation, p=p, dtype=dtype, device=device, **form))


@every_dtype
@pytest.mark.parametrize("sizes", [(1, 24, 40, 21), (33, 1, 3, 2), (129, 7, 131, 5), (40, 65, 33, 64)])
def test_sizes(kind, dtype, sizes, device):
    M, K, I, N = sizes  # noqa: E741
    check(case_of(kind, M=M, K=K, I=I, N=N, p=0.25, dtype=dtype, device=device))


@every_dtype
@pytest.mark.parametrize("shape", [(), (3, 4), (2, 0)])
@pytest.mark.parametrize("strided", [False, True])
def test_shapes_and_strides(kind, dtype, shape, strided, device):
    check(case_of(kind, M=shape, p=0.2, dtype=dtype, strided=strided, device=device))


@every_kind
@pytest.mark.parametrize(("dtype", "adapter"), [(BF16, FP32), (FP16, FP32), (FP32, BF16)])
@every_form
def test_adapters_of_another_dtype(kind, dtype, adapter, form, device):
    check(case_of(kind, M=40, K=64, I=96, p=0.1, dtype=dtype, adapter_dtype=adapter, device=device, **form))


WITHOUT = [names for k in range(1, 3) for names in itertools.combinations(("gate", "up", "down"), k)]


@every_kind
@pytest.mark.parametrize("plain", WITHOUT)
def test_members_without_adapter(kind, plain, device):
    layers = {"gate": GATE, "up": UP, "down": DOWN}
    check(case_of(kind, p=0.3, device=device, **{name: replace(layers[name], R=None) for name in plain}))


@every_kind
@pytest.mark.parametrize("frozen", [(), *WITHOUT])
@pytest.mark.parametrize("needs", [("x", "lora_A"), ("lora_B", "bias"), ("lora_A",), ("x",)])
def test_wanted_gradients(kind, frozen, needs, device):
    check(case_of(kind, p=0.3, needs=needs, frozen=frozen, device=device))


@every_kind
@pytest.mark.parametrize("frozen", [(), ("gate", "up"), ("down",)])
def test_trained_weights(kind, frozen, device):
    if kind.quant_type is None:
        check(case_of(kind, M=65, p=0.3, needs=("weight", "lora_B"), frozen=frozen, dtype=BF16, device=device))


@every_kind
def test_wide_ranks(kind, device):
    layers = {"gate": replace(GATE, R=80), "up": replace(UP, R=8), "down": replace(DOWN, R=72)}
    check(case_of(kind, M=40, K=96, I=100, p=0.1, dtype=BF16, device=device, **layers))


@every_kind
@pytest.mark.parametrize("scaling", [0, -3.0, torch.tensor(1.7)])
def test_scaling(kind, scaling, device):
    layers = {"gate": replace(GATE, scaling=scaling), "down": replace(DOWN, scaling=scaling)}
    check(case_of(kind, p=0.1, device=device, **layers))


@every_kind
@pytest.mark.parametrize("narrow", [BF16, FP16])
@every_form
def test_autocast(kind, narrow, form, device):
    check(case_of(kind, M=65, K=64, I=80, p=0.1, autocast=narrow, device=device, **form))


@every_kind
@pytest.mark.parametrize("M", [1100, 2500])
def test_several_chunks_of_rows(kind, M, device):
    """Of [M, I]: the masks of down's chunks begin at their rows."""
    if device.type == "cpu":
        check(case_of(kind, M=M, K=8, I=1024, N=8, p=0.5, dtype=FP32, needs=("x", "lora_A", "lora_B"), device=device))


@every_kind
@every_form
def test_it_is_the_layers_and_the_activation_between_them(kind, form, device):
    """With the masks of offsets 0, 1 and 2, gate's among them or not."""
    problem = case_of(kind, M=33, p=0.3, activation="gelu", device=device, **form).draw()

    def layer(x, name, offset):
        W, A, B, c, s, _ = problem.members[name]
        keep = dropout_mask(*x.shape, 0.3, problem.case.seed, offset=offset, device=device)
        dropped = x * keep * 65536 / (65536 - round(65536 * 0.3))
        return lora_linear(x, W, torch.zeros_like(A), B, c) + s * (dropped @ A.T) @ B.T

    a = torch.nn.functional.gelu(layer(problem.x, "up" if form else "gate", 1 if form else 0))
    a = a if form else a * layer(problem.x, "up", 1)
    assert torch.allclose(ours(problem)["y"], layer(a, "down", 2), atol=1e-4)


@every_kind
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_compiled(kind, dtype, device):
    torch._dynamo.reset()

    def mlp(x, members):
        own = [members.get(name) for name in ("gate", "up", "down")]
        return (lora_glu_mlp(x, *own, dropout_p=0.3, seed=20260),)

    compiled = torch.compile(mlp, fullgraph=True)
    for M in (17, (2, 3)):
        case = case_of(kind, M=M, p=0.3, dtype=dtype, up=replace(UP, R=None), device=device)
        check(case, lambda problem: problem.compute(compiled))


W, A, B = torch.ones(6, 4), torch.ones(2, 4), torch.ones(6, 2)
INNER, OUTER = LoRAWeights(W, A, B), LoRAWeights(W.T, B.T, A.T)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"activation": "tanh"}, ValueError, "activation: got 'tanh', expected one of 'silu', 'gelu', 'gelu_tanh', 'relu2'"),
        ({"up": None}, TypeError, "up: got NoneType, expected LoRAWeights"),
        ({"gate": INNER._replace(lora_B=B.T)}, ValueError, r"gate.lora_B: got shape \(2, 6\).*; use gate.lora_B.T"),
        ({"up": LoRAWeights(W[:5], A, B[:5])}, ValueError, r"up.weight: got shape \(5, 4\), expected \[6, 4\]"),
        ({"down": INNER}, ValueError, r"down.weight: got shape \(6, 4\), expected \[6, 6\]"),
        ({"down": OUTER._replace(scaling="1")}, TypeError, "down.scaling: got str"),
        ({"down": OUTER._replace(weight=W.T.double())}, TypeError, "expected torch.float64 as down.weight"),
        ({"dropout_p": 2.0}, ValueError, "dropout_p: got 2.0"),
    ],
)
def test_errors(arguments, error, words):
    state = torch.get_rng_state()
    with pytest.raises(error, match=words):
        lora_glu_mlp(torch.ones(3, 4), **{"gate": INNER, "up": INNER, "down": OUTER, **arguments})
    assert torch.equal(torch.get_rng_state(), state), "a refused call drew a seed"
