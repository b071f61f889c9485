"""RankAllocator: PEFT's numbers and ranks over whole runs, resuming, mistakes that the comparison catches, errors."""

import copy

import pytest
import torch
from adalora_case import SETTINGS, Pair, X, own, trained
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lora_kernels import (
    LoRAConfig,
    RankAllocator,
    add_lora,
    compact_ranks,
    load_lora_state_dict,
    lora_state_dict,
    merge_lora,
    orthogonality_loss,
    set_adapter,
)
from lora_kernels.models.adalora import sensitivity

RUNS = [
    {},
    {"tinit": 0, "tfinal": 0, "deltaT": 1},
    {"deltaT": 5, "beta1": 0.5, "beta2": 0.9},
    {"init_r": 6, "target_r": 1, "lora_dropout": 0.3},
    {"tinit": 15, "tfinal": 1, "deltaT": 3},
]


@pytest.mark.parametrize("options", RUNS, ids=str)
def test_a_whole_run_is_peft_s_to_the_bit(options):
    pair = Pair(**options)
    end = pair.allocator.config.total_step - pair.allocator.config.tfinal
    for number in range(pair.allocator.config.total_step):
        budget = pair.step(number)
        assert budget == pair.theirs.base_model.rankallocator.budget_schedule(number)[0]
        pair.assert_equal()
        if number < end:
            theirs = pair.theirs.base_model.rankallocator
            for name, (mean, spread) in pair.allocator._named(pair.allocator._sensitivity).items():
                assert torch.equal(mean, theirs.exp_avg_ipt[f"{name}.default"])
                assert torch.equal(spread, theirs.exp_avg_unc[f"{name}.default"])
    config = pair.allocator.config
    assert sum(pair.allocator.ranks().values()) <= config.target_r * 3 < config.init_r * 3
    pruned = [int((E == 0).sum()) for name, E in trained(pair.ours).items() if ".lora_E" in name]
    assert sum(pruned) >= (config.init_r - config.target_r) * 3


MISTAKES = {
    "sums in place of means": lambda self: (self.mean * self.spread).sum(sensitivity.OF_TRIPLETS[self.kind]),
    "no uncertainty": lambda self: self.mean.mean(sensitivity.OF_TRIPLETS[self.kind]),
    "no importance": lambda self: self.spread.mean(sensitivity.OF_TRIPLETS[self.kind]),
    "E alone": lambda self: (self.mean * self.spread).mean(sensitivity.OF_TRIPLETS[self.kind]) * (self.kind == "lora_E"),
    "triplets in reverse": lambda self: (self.mean * self.spread).mean(sensitivity.OF_TRIPLETS[self.kind]).flip(1),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_another_score_keeps_other_ranks(name, monkeypatch):
    monkeypatch.setattr(sensitivity.Block, "scores", MISTAKES[name])
    with pytest.raises(AssertionError):
        _run_ranks()


def test_the_two_betas_are_not_exchanged(monkeypatch):
    update = sensitivity.Block.update
    monkeypatch.setattr(sensitivity.Block, "update", lambda self, own, beta1, beta2: update(self, own, beta2, beta1))
    with pytest.raises(AssertionError):
        _run_ranks()


def test_without_a_mistake_they_are_peft_s():
    _run_ranks()


def _run_ranks():
    pair = Pair(init_r=8, target_r=2, deltaT=1, beta1=0.5, beta2=0.9, init_lora_weights=False)
    for number in range(20):
        pair.step(number, noise=True)
        pair.assert_equal()


def test_blocks_of_any_size_give_the_same(monkeypatch):
    expected = {name: p.detach().clone() for name, p in trained(_trained(own())).items()}
    for size in (1, 50, 100):
        monkeypatch.setattr(sensitivity, "BLOCK", {"cpu": size})
        found = trained(_trained(own()))
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def _train(model, allocator, optimizer, steps):
    for number in steps:
        torch.manual_seed(number)
        (model(torch.randn(9, 12)).sub(1).square().mean() + orthogonality_loss(model)).backward()
        optimizer.step()
        allocator.step(number)
        optimizer.zero_grad()


def _trained(model, steps=range(20)):
    _train(model, RankAllocator(model), torch.optim.AdamW(trained(model).values(), 0.05), steps)
    return model


@pytest.mark.parametrize("stop", [2, 9, 16, 18])
def test_a_run_that_was_saved_goes_on_as_if_it_had_not_stopped(stop, tmp_path):
    whole = _trained(own())
    model = own()
    allocator, optimizer = RankAllocator(model), torch.optim.AdamW(trained(model).values(), 0.05)
    _train(model, allocator, optimizer, range(stop))
    torch.save((lora_state_dict(model), optimizer.state_dict(), allocator.state_dict()), tmp_path / "state.pt")
    ranks = allocator.ranks()
    resumed = own()
    weights, moments, state = torch.load(tmp_path / "state.pt")
    load_lora_state_dict(resumed, weights)
    allocator, optimizer = RankAllocator(resumed), torch.optim.AdamW(trained(resumed).values(), 0.05)
    optimizer.load_state_dict(moments)
    allocator.load_state_dict(state)
    assert allocator.ranks() == ranks
    _train(resumed, allocator, optimizer, range(stop, 20))
    for name, parameter in trained(whole).items():
        assert torch.equal(trained(resumed)[name], parameter), name


class Synchronisations(TorchDispatchMode):
    """Counts reads of a device's values by the host, and copies to it that need not be."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "_local_scalar_dense" in str(func) or "nonzero" in str(func)
        return func(*args, **(kwargs or {}))


def test_a_step_waits_for_nothing_that_a_device_computes():
    model = own()
    allocator = RankAllocator(model)
    model(X).square().mean().backward()
    for number in (0, 4, 16, 17):
        with Synchronisations() as synchronisations:
            allocator.step(number)
        assert synchronisations.count == 0
    with Synchronisations() as synchronisations:
        allocator.ranks()[""] = allocator._keep.sum().item()
    assert synchronisations.count > 0, "it counts"


def test_orthogonality_is_peft_s():
    pair = Pair(orth_reg_weight=0.7)
    regular, parameters = torch.zeros(()), trained(pair.theirs)
    matrices = [p if "lora_A" in name else p.T for name, p in parameters.items() if "lora_E" not in name]
    for matrix in matrices:
        regular = regular + torch.norm(matrix @ matrix.T - torch.eye(4), p="fro")
    loss = orthogonality_loss(pair.ours)
    torch.testing.assert_close(loss, 0.7 * regular / len(matrices))
    loss.backward()
    (0.7 * regular / len(matrices)).backward()
    for name, parameter in parameters.items():
        grad = trained(pair.ours)[name].grad
        assert (grad is None) == (parameter.grad is None) == ("lora_E" in name)
        if grad is not None:
            torch.testing.assert_close(grad, parameter.grad)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(orthogonality_loss(pair.ours), loss)
    torch.nn.init.eye_(pair.parameters[1]["up.lora_A.default"])  # at a distance of zero the gradient is zero, not NaN
    orthogonality_loss(pair.ours).backward()
    assert pair.parameters[1]["up.lora_A.default"].grad.isfinite().all()


# ---- errors ----


def test_it_needs_gradients_and_says_whose_lack():
    model = own()
    allocator = RankAllocator(model)
    with pytest.raises(RuntimeError, match=r"step 0: up\.lora_A and 8 more have no gradient; call step after loss\.backward"):
        allocator.step(0)
    model(X).sum().backward()
    model.out.lora_E["default"].grad = None
    with pytest.raises(RuntimeError, match=r"step 1: out\.lora_E has no gradient"):
        allocator.step(1)


def test_it_needs_a_schedule():
    with pytest.raises(ValueError, match="total_step: got None, expected the number of training steps"):
        RankAllocator(own(total_step=None))
    with pytest.raises(ValueError, match="target_r: got 5, expected at most init_r, 4"):
        RankAllocator(own(target_r=5))
    allocator = RankAllocator(own())
    for number in (-1, 1.0, True, None):
        with pytest.raises(ValueError, match=r"global_step: got .*, expected an integer of at least 0"):
            allocator.step(number)
    with pytest.raises(RuntimeError, match=r"global_step: got 16, when ranks become final, but .* has seen no gradient"):
        allocator.step(16)


def test_it_is_for_the_active_adapter_of_adalora():
    model = own()
    add_lora(model, LoRAConfig(r=2, target_modules=["up"]), "plain")
    set_adapter(model, "plain")
    for call in (RankAllocator, orthogonality_loss):
        with pytest.raises(ValueError, match=r"its active adapter is 'plain', expected one of AdaLoRA; .*'default'"):
            call(model)
    plain = nn.Sequential(nn.Linear(4, 4))
    add_lora(plain, LoRAConfig())
    with pytest.raises(ValueError, match=r"expected one of AdaLoRA; call add_lora\(model, AdaLoRAConfig"):
        RankAllocator(plain)


def test_it_refuses_a_merged_model_and_another_s_state():
    model = own()
    allocator = RankAllocator(model)
    model(X).sum().backward()
    allocator.step(0)
    state = allocator.state_dict()
    other = RankAllocator(own(init_r=5))
    with pytest.raises(ValueError, match=r"state\['mean'\]: got \(4, 10\) for down.lora_A, expected \(5, 10\)"):
        other.load_state_dict(copy.deepcopy(state))
    assert other.ranks() == dict.fromkeys(["up", "down", "out"], 5)
    merge_lora(model.eval())
    with pytest.raises(RuntimeError, match="cannot allocate ranks: the model is merged"):
        allocator.step(1)


def test_an_adapter_that_is_gone_is_named():
    model = _trained(own())
    allocator = RankAllocator(model)
    compact_ranks(model)
    with pytest.raises(RuntimeError, match="adapter 'default': deleted, or compacted to a plain LoRA"):
        allocator.step(20)


def test_nothing_is_pruned_where_the_target_is_the_beginning():
    model = _trained(own(target_r=SETTINGS["init_r"]))
    assert all(p.count_nonzero() == 4 for name, p in trained(model).items() if "lora_E" in name)
