"""lora_linear inside PyTorch's modes: a backward pass under autocast, the meta device, torch.func, forward-mode AD."""

import pytest
import torch
from accuracy import Case, ours
from kinds import every_dtype, every_kind
from torch.autograd import forward_ad

from lora_kernels import LoRAConfig, LoRALinear, accelerate, add_lora, lora_linear, quantize_nf4

BF16 = torch.bfloat16


@every_dtype
@pytest.mark.parametrize(("adapter_dtype", "p"), [(None, 0.3), (torch.float32, 0.0)])
def test_backward_inside_autocast_is_the_one_outside(kind, dtype, adapter_dtype, p, device):
    """loss.backward() within the block is a common mistake, which must not change a bit; autocast decides in the forward."""
    if dtype == torch.float64 and adapter_dtype is not None:
        adapter_dtype = torch.float64
    for autocast in (None, BF16):
        case = Case(M=33, dtype=dtype, adapter_dtype=adapter_dtype, p=p, autocast=autocast, device=device)
        problem = case.draw().quantized() if kind.quant_type and dtype != torch.float64 else case.draw()
        outside = ours(problem)
        with torch.autocast(device.type, BF16, enabled=autocast is not None):
            y = lora_linear(*problem.inputs.values(), scaling=case.scaling, dropout_p=p, seed=case.seed)
        with torch.autocast(device.type, BF16):
            grads = torch.autograd.grad(y, list(problem.leaves.values()), problem.dy.to(y.dtype))
        for name, grad in zip(problem.leaves, grads, strict=True):
            assert torch.equal(grad, outside[f"d{name}"]), (name, autocast)


@every_kind
def test_adapters_keep_their_dtype_inside_autocast(kind, device):
    """The forward under autocast has the bits of a call whose x, weight and bias were cast before."""
    problem = Case(M=33, p=0.3, adapter_dtype=torch.float32, device=device).draw()
    if kind.quant_type:
        problem = problem.quantized()
    x, W, A, B, c = problem.inputs.values()
    with torch.autocast(device.type, BF16):
        y = lora_linear(x, W, A, B, c, dropout_p=0.3, seed=1)
    cast = x.to(BF16), W if kind.quant_type else W.to(BF16), A, B, None if c is None else c.to(BF16)
    assert torch.equal(y, lora_linear(*cast, dropout_p=0.3, seed=1))


@pytest.mark.parametrize("compiled", [False, True])
def test_compiled_backward_inside_autocast(compiled, device):
    torch._dynamo.reset()
    problem = Case(M=33, dtype=torch.float32, p=0.3, device=device).draw()

    def layer(*inputs):
        return lora_linear(*inputs, dropout_p=0.3, seed=1)

    y = (torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer)(*problem.inputs.values())
    leaves = list(problem.leaves.values())
    outside = torch.autograd.grad(y, leaves, problem.dy, retain_graph=True)
    with torch.autocast(device.type, BF16):
        inside = torch.autograd.grad(y, leaves, problem.dy)
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


@pytest.mark.parametrize("base", [torch.float32, BF16])
@pytest.mark.parametrize("kind", ["add_lora", "nf4", "accelerate"])
def test_compiled_layers_inside_autocast(kind, base):
    """The second layer's x has autocast's dtype, not its weight's; the graph runs when autocast is off again."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 64)).to(base)
    options = {"r": 4, "target_modules": ["0", "2"], "init_lora_weights": False}
    if kind == "accelerate":
        peft = pytest.importorskip("peft")
        model = peft.get_peft_model(model, peft.LoraConfig(**options))
        assert accelerate(model).accelerated
    else:
        add_lora(model, LoRAConfig(**options), quantize="nf4" if kind == "nf4" else None)
    compiled, inputs = torch.compile(model, backend="aot_eager", fullgraph=True), torch.randn(3, 64, requires_grad=True)
    leaves = [inputs, *(p for p in model.parameters() if p.requires_grad)]
    found = []
    for compute in (model, compiled):
        with torch.autocast("cpu", BF16):
            y = compute(inputs)
        found.append([y, *torch.autograd.grad(y.float().square().sum(), leaves)])
    for eager, graph in zip(*found, strict=True):
        torch.testing.assert_close(graph, eager)


# ---- the meta device ----


@pytest.mark.parametrize("quant_type", [None, "nf4"])
@pytest.mark.parametrize("p", [0.0, 0.5])
def test_on_the_meta_device(p, quant_type):
    x, weight = torch.empty(2, 5, 64, device="meta", requires_grad=True), torch.empty(32, 64, device="meta")
    A, B = (torch.empty(*shape, device="meta", requires_grad=True) for shape in ((4, 64), (32, 4)))
    y = lora_linear(x, quantize_nf4(weight) if quant_type else weight, A, B, dropout_p=p)
    assert (y.shape, y.device.type) == ((2, 5, 32), "meta")
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert A.grad.shape == A.shape
    assert B.grad.shape == B.shape
    with torch.device("meta"):
        layer = LoRALinear.from_linear(torch.nn.Linear(64, 32), r=4, quantize=quant_type)
    assert layer(x).shape == y.shape


# ---- what autograd is not told ----

x, W, A, B = torch.ones(5, 64), torch.ones(32, 64), torch.ones(4, 64), torch.ones(32, 4)
TRANSFORMS = {
    "vmap": lambda weight: torch.func.vmap(lambda row: lora_linear(row[None], weight, A, B))(x),
    "grad": lambda weight: torch.func.grad(lambda A: lora_linear(x, weight, A, B).sum())(A),
    "jvp": lambda weight: torch.func.jvp(lambda A: lora_linear(x, weight, A, B), (A,), (A,)),
    "jacrev": lambda weight: torch.func.jacrev(lambda x: lora_linear(x, weight, A, B))(x),
}


@pytest.mark.parametrize("quant_type", [None, "nf4"])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_are_refused(transform, quant_type):
    with pytest.raises(RuntimeError, match=r"lora_linear: torch.func's transforms .* use torch.autograd for"):
        TRANSFORMS[transform](quantize_nf4(W) if quant_type else W)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("dual", ["x", "weight", "lora_A", "lora_B"])
def test_a_tangent_is_refused(dual, trained):
    """A tangent of x would otherwise be dropped where A is trained."""
    inputs = {"x": x, "weight": W, "lora_A": A.clone().requires_grad_(trained), "lora_B": B}
    with forward_ad.dual_level():
        y = lora_linear(**inputs)  # nothing has a tangent
        inputs[dual] = forward_ad.make_dual(inputs[dual].detach(), torch.ones_like(inputs[dual]))
        with pytest.raises(RuntimeError, match="lora_linear: forward-mode AD does not go through"):
            lora_linear(**inputs)
    assert torch.equal(y, lora_linear(x, W, A, B))


def test_batched_gradients_are_refused():
    """is_grads_batched=True, and torch.autograd.functional's vectorize=True."""
    trained = x.clone().requires_grad_()
    y = lora_linear(trained, W, A, B)
    with pytest.raises(RuntimeError, match="lora_linear: a backward pass of several gradients at once does not go through"):
        torch.autograd.grad(y.sum(0), trained, torch.eye(32), is_grads_batched=True)
