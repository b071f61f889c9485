"""The hand-over of a group's results: to whom, and for which x; with mistakes that these tests catch."""

import pytest
import torch
from blocks_case import FUSED, Attention, X, attention_results, check_same
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_kernels import fuse_blocks, unfuse_blocks
from lora_kernels.models.blocks import groups

ALONE, LATE = groups.ANOTHER, groups.TAKEN


class Twice(nn.Module):
    """Self-attention and cross-attention, as a decoder's layer."""

    def __init__(self, p=0.0):
        super().__init__()
        self.self_attn, self.cross_attn = Attention(p), Attention(p)

    def forward(self, x, states):
        x = checkpoint(self.self_attn, x, use_reentrant=self.reentrant) if self.checkpointed else self.self_attn(x)
        if self.checkpointed:
            return checkpoint(self.cross_attn, x, states, use_reentrant=self.reentrant)
        return self.cross_attn(x, states)


def check(model, *inputs, calls, **options):
    """The same as without fuse_blocks, computed in the ways that `calls` says."""
    unfuse_blocks(model)
    expected = attention_results(model, *inputs, **options)
    report = fuse_blocks(model)
    check_same(attention_results(model, *inputs, **options), expected)
    assert report.calls() == {FUSED: 0, **calls}


def test_one_operation_for_three():
    check(Attention(), calls={FUSED: 1})


@pytest.mark.parametrize("ranks", [(2, 0, 2), (0, 0, 2), (0, 2, 0)])
def test_plain_layers_are_members(ranks):
    check(Attention(ranks=ranks), calls={FUSED: 1})


def test_a_member_that_is_not_called_costs_no_gradient():
    model = Attention()
    fuse_blocks(model)
    found = attention_results(model, cached=True)
    assert {name for name in found if "k_proj" in name or "v_proj" in name} == set()
    assert found["q_proj.lora_A.default"].abs().sum() > 0


# ---- the same tensor, unchanged ----


def in_place(x):
    with torch.no_grad():
        return x.mul_(2)


def of_another_mode(x):
    torch.set_grad_enabled(False)
    return x


@pytest.mark.parametrize("between", [in_place, torch.clone, lambda x: x.view(x.shape)], ids=["in place", "clone", "view"])
def test_k_and_v_of_a_changed_x_are_computed_from_it(between):
    model = Attention()
    model.between = between
    fuse_blocks(model)
    with torch.no_grad():
        expected = Attention()
        expected.between = between
        assert torch.allclose(model(X.clone()), expected(X.clone()), 1e-9, 1e-9), "k and v were handed over for what x was"


def test_a_hand_over_that_ignores_changes_is_caught(monkeypatch):
    original = groups.Group.result

    def result(self, scope, name, x):
        if scope.x is x:  # and never mind its version
            scope.state = x._version, torch.is_grad_enabled(), None
        return original(self, scope, name, x)

    monkeypatch.setattr(groups.Group, "result", result)
    with pytest.raises(AssertionError, match="for what x was"):
        test_k_and_v_of_a_changed_x_are_computed_from_it(in_place)


def test_results_of_another_gradient_mode_are_not_handed_over():
    model = Attention()
    model.between = of_another_mode
    fuse_blocks(model)
    try:
        y = model(X.clone().requires_grad_())
    finally:
        torch.set_grad_enabled(True)
    assert not y.requires_grad


def test_dropouts_that_differ_let_each_compute_alone():
    model = Attention(p=0.5)
    model.v_proj.adapters["default"].lora_dropout = 0.25
    report = fuse_blocks(model)
    torch.manual_seed(1)
    y = model(X)
    assert report.calls() == {FUSED: 0, "the members' lora_dropout differ": 3}
    unfuse_blocks(model)
    torch.manual_seed(1)
    assert torch.equal(y, model(X))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.k_proj.merge(), "an adapter is merged"),
        (lambda m: [each.set_adapter(None) for each in m.children()], "no adapted member"),
        (lambda m: m.q_proj.lora_A.__setitem__("default", Sub(m.q_proj.lora_A["default"])), "a Sub among the tensors"),
    ],
)
def test_reasons_of_the_present_state_are_counted(change, reason):
    model = Attention().eval()
    report = fuse_blocks(model)
    change(model)
    y = model(X)
    assert report.calls() == {FUSED: 0, reason: 3}
    unfuse_blocks(model)
    assert torch.equal(y, model(X))


class Sub(nn.Parameter):
    pass


def test_inference_tensors_and_extra_arguments():
    model = Attention()
    report = fuse_blocks(model)
    expected = model(X)
    with torch.inference_mode():
        torch.testing.assert_close(model(X.clone()), expected, rtol=1e-9, atol=1e-9)
    assert report.calls() == {FUSED: 1, "an inference tensor's changes are not counted": 3}
    with pytest.raises(TypeError, match="positional"):
        model.q_proj(X, 1)
    with pytest.raises(ValueError, match=r"expected \[\.\.\., 8\]"):
        model(X[..., :3])


def test_outside_of_the_parent_each_is_on_its_own():
    model = Attention()
    report = fuse_blocks(model)
    expected = model(X)
    torch.testing.assert_close(type(model).forward(model, X), expected, rtol=1e-9, atol=1e-9)  # no hook runs
    assert report.calls() == {FUSED: 1, groups.OUTSIDE: 3}


def test_hooks_on_members_run():
    model, seen = Attention(), []
    report = fuse_blocks(model)
    model.k_proj.register_forward_hook(lambda module, args, y: seen.append(y) or 2 * y)
    y = model(X)
    assert len(seen) == 1
    assert report.calls() == {FUSED: 1}
    unfuse_blocks(model)
    torch.testing.assert_close(y, model(X), rtol=1e-9, atol=1e-9)


# ---- cross-attention ----


def test_cross_attention_learns_who_shares():
    model, states = Attention(), X.flip(1) + 1
    check(model, states, calls={ALONE: 2, LATE: 1})  # two inputs: nothing is computed ahead until it is known
    report = fuse_blocks(model)
    attention_results(model, states)
    before = report.calls()
    attention_results(model, states)
    assert report.calls()[FUSED] == before[FUSED] + 1, "k and v are one operation over the states"
    model(X, states, cached=True)
    assert report.calls()[ALONE] == before[ALONE] + 2, "q computes nothing ahead, with a cache too"


def test_what_is_computed_in_vain_is_computed_once():
    model, counted = Attention(), []
    model.between = torch.clone
    fuse_blocks(model)
    original = groups.lora_linear_group
    try:
        groups.lora_linear_group = lambda x, members, **options: counted.append(len(members)) or original(x, members, **options)
        for _ in range(3):
            model(X)
    finally:
        groups.lora_linear_group = original
    assert counted == [3, 2, 2, 2], "q's call computes all once; then k and v alone share"


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_recompute_what_was_computed(reentrant):
    """Of two batches, the second is recomputed first: what that shows of who shares x must not change the first's masks."""
    grads = []
    for checkpointed in (True, False):
        model = Twice(p=0.5)
        model.checkpointed, model.reentrant = checkpointed, reentrant
        for each in (model.self_attn, model.cross_attn):
            each.between = torch.clone  # nobody shares q's x, which a first call cannot know
        fuse_blocks(model)
        if not checkpointed:  # nor may this one learn it, whose results are to be those of the other
            for module in model.modules():
                for group in groups.groups_of(module):
                    group.sharers = NothingLearned()
        torch.manual_seed(3)
        losses = [model(X.clone().requires_grad_(), X.flip(1) + i).square().sum() for i in range(2)]
        for loss in reversed(losses):
            loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
        assert all(not group.sharers for module in model.modules() for group in groups.groups_of(module))
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


class NothingLearned(dict):
    def __setitem__(self, key, value):
        pass


def test_a_group_that_learns_from_recomputations_is_caught(monkeypatch):
    monkeypatch.setattr(groups, "_is_never_repeated", lambda parent: True)
    with pytest.raises(AssertionError):
        test_checkpoints_recompute_what_was_computed(True)
