"""Eggroll: a model trained by the fitness of its perturbations alone."""

import copy

import pytest
import torch
from torch import nn

from lora_kernels import Eggroll, eggroll_gradient, eggroll_linear

POPULATION, SIGMA = 64, 0.1


def model_of(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 2)).to(dtype)


def adam(weights):
    return torch.optim.Adam(weights, lr=0.05)


def train(model, es, steps):
    """By how many signs of the results are those of another layer, which has no gradient; how many are at the end."""
    random = torch.Generator().manual_seed(1)
    x, W = torch.randn(100, 16, generator=random), torch.randn(8, 16, generator=random)
    signs, x = (x @ W.T).sign(), x.to(next(model.parameters()).dtype)
    for _ in range(steps):
        es.ask()
        es.tell((model(es.members(x)).sign().view(POPULATION, 100, 8) == signs).float().mean((1, 2)))
    return (model(x).sign() == signs).float().mean().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 4])
def test_it_learns_what_has_no_gradient(dtype, rank):
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(16, 8, bias=False)).to(dtype)
    es = Eggroll(model, adam, population=POPULATION, sigma=SIGMA, rank=rank)
    assert train(model, es, 0) < 0.7
    assert train(model, es, 60) > 0.9
    (master,) = es.masters
    assert master.dtype == torch.float32
    assert torch.equal(model[0].weight, master.to(dtype))
    assert (master is model[0].weight) == (dtype == torch.float32)


def test_small_steps_are_not_lost_in_16_bits():
    model = model_of(torch.bfloat16)
    es = Eggroll(model, lambda weights: torch.optim.SGD(weights, lr=1e-6), population=4, sigma=SIGMA)
    before = [master.detach().clone() for master in es.masters]
    es.ask()
    es.tell([1.0, 0.0, 0.0, 0.0])
    assert all(not torch.equal(a, b) for a, b in zip(before, es.masters, strict=True))


def test_a_step_is_the_estimate_of_the_normalised_fitness():
    model = model_of()
    es, x, f = (
        Eggroll(model, lambda w: torch.optim.SGD(w, lr=1.0), population=4, sigma=SIGMA),
        torch.randn(12, 2),
        torch.randn(4),
    )
    before = [layer.weight.detach().clone() for layer in (model[0], model[2])]
    torch.manual_seed(3)
    es.ask()
    seed, perturbed = es._seed, model(x)
    hidden = eggroll_linear(x, before[0], model[0].bias, population=4, sigma=SIGMA, seed=seed, offset=0).tanh()
    assert torch.equal(
        perturbed, eggroll_linear(hidden, before[1], model[2].bias, population=4, sigma=SIGMA, seed=seed, offset=1)
    )
    es.tell(f)
    f = (f - f.mean()) / f.std(correction=0)
    for number, layer in enumerate((model[0], model[2])):
        dW = eggroll_gradient(f, tuple(layer.weight.shape), sigma=SIGMA, seed=seed, offset=number)
        torch.testing.assert_close(layer.weight, before[number] + dW)
        assert layer.weight.grad is None
        assert "forward" not in vars(layer)


def test_every_draw_is_fresh_and_reproducible():
    def outputs():
        es, x = Eggroll(model_of(), adam, population=4, sigma=SIGMA), torch.ones(4, 2)
        torch.manual_seed(5)
        found = []
        for _ in range(2):
            es.ask()
            found.append(es.layers["0"](x))
            es.end()
        return found

    first, again = outputs(), outputs()
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.allclose(*first)


def test_going_on_from_a_saved_state_is_not_having_stopped():
    model, copied = nn.Sequential(nn.Linear(16, 8)), nn.Sequential(nn.Linear(16, 8))
    es = Eggroll(model, adam, population=POPULATION, sigma=SIGMA)
    train(model, es, 3)
    saved = copy.deepcopy(es.state_dict())
    copied.load_state_dict(model.state_dict())
    other = Eggroll(copied, adam, population=POPULATION, sigma=SIGMA)
    other.load_state_dict(saved)
    for trained, own in ((model, es), (copied, other)):
        torch.manual_seed(9)
        train(trained, own, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), copied.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"state: got weights of shapes \[\(8, 16\)\], expected \[\(4, 3\)\]"):
        Eggroll(nn.Linear(3, 4), adam, population=2, sigma=1.0).load_state_dict(saved)


def test_which_layers_are_trained():
    model = nn.ModuleDict({"embedding": nn.Embedding(9, 4), "head": nn.Linear(4, 9, bias=False), "inner": nn.Linear(4, 4)})
    model["head"].weight = model["embedding"].weight
    model["again"] = nn.Linear(4, 4)
    model["again"].weight = model["inner"].weight
    es = Eggroll(model, adam, population=2, sigma=1.0)
    assert list(es.layers) == ["inner", "again"]
    assert len(es.masters) == 1
    assert list(Eggroll(model, adam, population=2, sigma=1.0, target_modules=["again"]).layers) == ["again"]
    with pytest.raises(ValueError, match=r"model: got no nn\.Linear with a weight of its own for target_modules='head'"):
        Eggroll(model, adam, population=2, sigma=1.0, target_modules="head")


@pytest.mark.parametrize(
    ("fitness", "words"),
    [
        ([1.0, 2.0], r"fitness: got shape \(2,\), expected \(4,\)"),
        ([1.0, 2.0, 3.0, float("nan")], "fitness: got nan, expected finite"),
    ],
)
def test_a_wrong_fitness_changes_nothing(fitness, words):
    model = model_of()
    es, before = Eggroll(model, adam, population=4, sigma=SIGMA), copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match=r"call ask\(\) before"):
        es.tell([1.0] * 4)
    es.ask()
    with pytest.raises(ValueError, match=words):
        es.tell(fitness)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    es.tell([1.0, 2.0, 3.0, 4.0])
    assert not torch.equal(model[0].weight, before["0.weight"])


def test_a_fitness_that_is_the_same_for_all_moves_nothing():
    model = model_of()
    es, before = Eggroll(model, adam, population=4, sigma=SIGMA), model[0].weight.detach().clone()
    es.ask()
    es.tell([3.0] * 4)
    assert torch.equal(model[0].weight, before)
