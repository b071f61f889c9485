"""Eggroll: training by evolution strategies, where there is no gradient: ask for a population, tell how fit each member was."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..functional.eggroll import check_population, eggroll_gradient, eggroll_linear
from ..mask import draw_seed
from .names import names_match
from .wrappers import named_modules


class Eggroll:
    """Trains the weights of a model's linear layers by the fitness of low-rank perturbations of them (EGGROLL, eggroll_linear).

        es = Eggroll(model, lambda weights: torch.optim.Adam(weights, lr=1e-2), population=64, sigma=0.1)
        for _ in range(steps):
            es.ask()                                # from here on each layer computes the P perturbations of itself
            outputs = model(es.members(inputs))     # [P·M, …], the rows of member 0 first
            es.tell(fitness(outputs))               # [P], larger is better: a step of the optimizer; the model is itself again

    Any fitness will do: it needs no gradient. Each ask draws a fresh seed from torch's generator, of which each weight has
    factors of its own; nothing of W's shape is kept but the optimizer's state, and one gradient at a time while it is told.
    Weights of 16 bits, which small updates would not change, are trained as float32 copies and rounded from those.

    model: its nn.Linear layers are trained, those of `target_modules` (names or a regular expression, as in LoRAConfig) if
    given; `layers` lists them. A weight that another kind of module has too, such as a tied embedding, is left as it is.
    optimizer: makes an optimizer of the weights, or of their float32 copies. It is given -dW of the fitness less its mean, over
    its standard deviation; of population, sigma and rank as in eggroll_linear.
    Raises TypeError or ValueError for arguments that do not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[[list[nn.Parameter]], Optimizer],
        *,
        population: int,
        sigma: float,
        rank: int = 1,
        target_modules: str | Sequence[str] | None = None,
    ):
        check_population(population, sigma, rank, 0)
        self.population, self.sigma, self.rank = population, sigma, rank
        self.layers = _linear_layers(model, target_modules)
        weights = {id(layer.weight): layer.weight for layer in self.layers.values()}
        self._numbers = {key: number for number, key in enumerate(weights)}
        self._weights: list[nn.Parameter] = list(weights.values())  # type: ignore[arg-type]
        self.masters = [w if w.dtype.itemsize > 2 else nn.Parameter(w.detach().float()) for w in self._weights]
        self.optimizer = optimizer(self.masters)
        self._seed: int | None = None

    def ask(self) -> None:
        """Draw perturbations: until `tell` every layer takes rows of P members, and computes each with its own."""
        self._seed = int(draw_seed(torch.device("cpu")))
        for layer in self.layers.values():
            layer.__dict__["forward"] = functools.partial(self._perturbed, layer)

    def members(self, x: Tensor) -> Tensor:
        """x[B, …] once for each member: [P·B, …]."""
        return x.expand(self.population, *x.shape).flatten(0, 1)

    @torch.no_grad()
    def tell(self, fitness: Tensor | Sequence[float]) -> None:
        """fitness[P] of the members since `ask`: larger is better. The optimizer makes a step; the layers are themselves again.

        Raises RuntimeError before `ask`, ValueError unless there is a finite number for each member; nothing is changed then.
        """
        if self._seed is None:
            raise RuntimeError("tell: got a fitness of members that were not asked for; call ask() before")
        f = torch.as_tensor(fitness, dtype=torch.float32).detach()
        if f.shape != (self.population,):
            raise ValueError(f"fitness: got shape {tuple(f.shape)}, expected ({self.population},), a number for each member")
        if not f.isfinite().all():
            raise ValueError(f"fitness: got {f[~f.isfinite()][0].item()}, expected finite numbers")
        f, seed = f - f.mean(), self._seed
        f = f / f.std(correction=0).clamp_min(torch.finfo(f.dtype).tiny)
        for number, master in enumerate(self.masters):
            N, K = master.shape
            dW = eggroll_gradient(f.to(master.device), (N, K), sigma=self.sigma, rank=self.rank, seed=seed, offset=number)
            master.grad = dW.neg_().to(master.dtype)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for weight, master in zip(self._weights, self.masters, strict=True):
            if master is not weight:
                weight.copy_(master)
        self.end()

    def end(self) -> None:
        """Give up what was asked for: the layers are themselves again."""
        self._seed = None
        for layer in self.layers.values():
            layer.__dict__.pop("forward", None)

    def state_dict(self) -> dict[str, Any]:
        """What goes on with the same training beside the model's own state: the optimizer's state and the float32 copies."""
        return {"optimizer": self.optimizer.state_dict(), "masters": [master.detach().clone() for master in self.masters]}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from another one's `state_dict`: its weights too. Raises ValueError if it is of other weights."""
        shapes = [tuple(master.shape) for master in state["masters"]], [tuple(master.shape) for master in self.masters]
        if shapes[0] != shapes[1]:
            raise ValueError(f"state: got weights of shapes {shapes[0]}, expected {shapes[1]}")
        self.optimizer.load_state_dict(state["optimizer"])
        for weight, master, saved in zip(self._weights, self.masters, state["masters"], strict=True):
            master.copy_(saved)
            weight.copy_(master)

    def _perturbed(self, layer: nn.Linear, x: Tensor) -> Tensor:
        return eggroll_linear(
            x, layer.weight, layer.bias, population=self.population, sigma=self.sigma, rank=self.rank,
            seed=self._seed, offset=self._numbers[id(layer.weight)],  # type: ignore[arg-type]
        )  # fmt: skip


def _linear_layers(model: nn.Module, target_modules: str | Sequence[str] | None) -> dict[str, nn.Linear]:
    """The layers to train by path. Raises ValueError where there are none."""
    found = {
        path: module
        for path, module in named_modules(model)
        if type(module) is nn.Linear and (target_modules is None or names_match(path, target_modules))
    }
    elsewhere = {id(p) for module in model.modules() if type(module) is not nn.Linear for p in module.parameters(recurse=False)}
    found = {path: layer for path, layer in found.items() if id(layer.weight) not in elsewhere}
    if not found:
        raise ValueError(f"model: got no nn.Linear with a weight of its own for target_modules={target_modules!r}")
    return found
