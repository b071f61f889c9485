"""Mistakes in PyTorch's backend of lora_glu_mlp and lora_linear_group that the rule must catch."""

import pytest
import torch

from lora_kernels import use_backend
from lora_kernels.backends.torch import activation, glu_mlp, linear, whole
from lora_kernels.cases.glu_mlp import Case
from lora_kernels.cases.linear_group import GroupCase
from lora_kernels.cases.members import ours, plain, truth
from lora_kernels.cases.rule import violations


def wrong_act(monkeypatch):
    monkeypatch.setattr(glu_mlp, "gated", lambda e, u, act, out=None: activation.gated(e, u, "gelu", out))


def gate_and_up_exchanged(monkeypatch):
    monkeypatch.setattr(glu_mlp, "gated", lambda e, u, act, out=None: activation.gated(u, e, act, out))


def de_and_du_exchanged(monkeypatch):
    def backward(da, e, u, act, de, du):
        activation.gated_backward(da, e, u, act, de, du)
        saved = de.clone()
        de.copy_(du), du.copy_(saved)

    monkeypatch.setattr(glu_mlp, "gated_backward", backward)


def derivative_of_another(monkeypatch):
    monkeypatch.setattr(
        glu_mlp, "gated_backward", lambda da, e, u, act, *out: activation.gated_backward(da, e, u, "gelu", *out)
    )


def masks_of_the_member_before(monkeypatch):
    monkeypatch.setattr(glu_mlp, "following", lambda dropout, number: dropout and dropout._replace(offset=number - 1))


def masks_of_every_chunk_from_row_0(monkeypatch):
    forward = linear.forward
    monkeypatch.setattr(linear, "forward", lambda x, members, dropout, first=0: forward(x, members, dropout))


def saved_output_overwritten(monkeypatch):
    """e's memory becomes de: the next backward pass of the same graph is wrong."""
    original = activation.gated_backward
    monkeypatch.setattr(glu_mlp, "gated_backward", lambda da, e, u, act, de, du: (original(da, e, u, act, e, du), de.copy_(e)))


def one_mask_for_all_members(monkeypatch):
    def drop(v, p, seed, offset=0, *, out=None):
        return whole_drop(v, p, seed, 0, out=out)

    whole_drop = whole.drop
    monkeypatch.setattr(whole, "drop", drop)


def dx_of_the_last_member_alone(monkeypatch):
    def backward(*args, original=whole.members_backward):
        *rest, of = args
        return original(*rest, lambda dy, x, member, h, dx, *more: of(dy, x, member, h, None, *more))

    monkeypatch.setattr(whole, "members_backward", backward)


GLU = {
    "another activation": wrong_act,
    "gate and up exchanged": gate_and_up_exchanged,
    "de and du exchanged": de_and_du_exchanged,
    "the derivative of another": derivative_of_another,
    "down's mask is up's": masks_of_the_member_before,
    "one mask for all members": one_mask_for_all_members,
    "dx of the last member alone": dx_of_the_last_member_alone,
}
GROUP = {name: GLU[name] for name in ("one mask for all members", "dx of the last member alone")}


def assert_caught(case, mutate, monkeypatch):
    problem = case.draw()
    expected, exact = plain(problem), truth(problem)
    with use_backend("torch"):
        assert not violations(ours(problem), expected, exact, case.dtype)
        mutate(monkeypatch)
        assert violations(ours(problem), expected, exact, case.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", GLU)
def test_a_mistake_in_an_mlp_is_caught(name, dtype, monkeypatch):
    assert_caught(Case(M=33, p=0.2, dtype=dtype), GLU[name], monkeypatch)


@pytest.mark.parametrize("name", GROUP)
def test_a_mistake_in_a_group_is_caught(name, monkeypatch):
    assert_caught(GroupCase(M=33, p=0.2), GROUP[name], monkeypatch)


def test_a_mistake_in_the_chunks_of_rows_is_caught(monkeypatch):
    """Each of them, of which there are three here."""
    case = Case(M=2500, K=8, I=1024, N=8, p=0.5, needs=("x", "lora_A"))
    assert_caught(case, masks_of_every_chunk_from_row_0, monkeypatch)


def test_an_overwritten_output_is_caught(monkeypatch):
    """By autograd itself, which counts what PyTorch's operations write to a saved tensor."""
    monkeypatch.setattr(activation, "_native", lambda *tensors: False)
    saved_output_overwritten(monkeypatch)
    problem = Case(M=33).draw()
    (y,) = problem.case.call(problem.x, problem.members)
    torch.autograd.grad(y, problem.x, problem.dys["y"], retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y, problem.x, problem.dys["y"])
