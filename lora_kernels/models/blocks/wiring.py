"""What an MLP's forward does with its linear layers, found by running it and not by reading it.

Its linear layers are replaced by probes, in a copy of the module that shares its tensors: each returns random numbers in
float64 and keeps what it was given. So the activation, the order of gate and up, and every factor, clamp or norm in between
show to many digits, at the cost of no product with a weight. Only then are the results themselves compared, on a few rows.
"""

import copy
import inspect
import math
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...dtypes import FLOATS, without_autocast
from ...layers.projection import features
from ...reference.activation import act
from ...values import ACTIVATIONS
from .mlps import Wiring, computed

NO_MLP = "no MLP"  # although it has the children of one: attention with one projection of q, k and v may
ROWS = (2, 3)
# Of |a| + |gate·up|/1000, by the coarser dtype of a and x, as which an activation's result may be rounded. In float32 an erf is
# 1e-4 off in the tail, in 16 bits a is 4e-3 off; gelu and its tanh approximation differ there by 5e-2.
TOLERANCE = {torch.float64: 2e-4, torch.float32: 2e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}
# Of the result's norm, on the weights themselves: the wiring is known by then, and only gross differences are left
RESULT_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-2, torch.bfloat16: 0.1, torch.float16: 0.1}


def argument_of(module: nn.Module) -> str | None:
    """The name of the only argument that the module's forward has to be given."""
    try:
        parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    except (TypeError, ValueError):
        return None
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    return needed[0] if len(needed) == 1 else None


def wiring_of(module: nn.Module, names: tuple[str, ...]) -> Wiring | str:
    """The wiring over the children `names`; or why it is none that lora_glu_mlp computes, with the difference."""
    found: list[Wiring] = []
    for seed, training in ((1, False), (2, False), (3, True), (4, True)):
        run = _probed(module, names, training, seed)
        wiring = run if isinstance(run, str) else _read(run, training)
        if isinstance(wiring, str):
            return f"{wiring}, in training" if training else wiring
        found.append(wiring)
    same = len({wiring._replace(dropout=None) for wiring in found}) == 1 and found[2] == found[3]
    return found[3] if same else "its forward does something else at each call"


# ---- a run with probes ----


class Run(NamedTuple):
    """What a forward was given, gave to whom, and returned. A probe's inputs are a list, as it may be called again, or not."""

    x: Tensor
    y: Any
    linears: dict[str, "Probe"]
    dropouts: dict[str, "Probe"]


class Probe:
    """A child's forward that keeps what it is given, and returns what `result` makes of it, which it keeps too."""

    def __init__(self, result: Callable[[Tensor], Tensor]):
        self.result, self.inputs, self.outputs = result, [], []  # type: ignore[var-annotated]

    def __call__(self, x: Tensor) -> Tensor:
        self.inputs.append(x)
        self.outputs.append(self.result(x))
        return self.outputs[-1]


def _probed(module: nn.Module, names: tuple[str, ...], training: bool, seed: int) -> Run | str:
    """One run in float64 of a copy whose linear layers and dropouts are probes; the module and its weights are only read."""
    generator = torch.Generator().manual_seed(seed)
    device, dtype = device_of(module), dtype_of(module, names)

    def random(shape: tuple[int, ...]) -> Tensor:  # a few far out, where something may clamp
        v = torch.randn(2, *shape, generator=generator, dtype=torch.float64, device="cpu")
        return (2 * v[0] * torch.where(v[1] > 1.6, 20, 1)).to(device)

    linears = {name: Probe(_results_of(random, features(module._modules[name])[1])) for name in names}
    children = {name: child for name, child in module._modules.items() if name not in names and child is not None}
    dropouts = {
        name: Probe((lambda x: x * random(tuple(x.shape))) if training else (lambda x: x))
        for name, child in children.items()
        if type(child) is nn.Dropout
    }
    probes = {name: quiet(module._modules[name]) for name in (*linears, *dropouts)}
    for name, probe in (linears | dropouts).items():
        probes[name].__dict__["forward"] = probe

    def twin() -> nn.Module:
        rest = {name: _copied(child).train(training) for name, child in children.items() if name not in dropouts}
        found = with_children(module, probes | rest)
        found.training = training
        return found

    x = random((*ROWS, features(module._modules[names[0]])[0])).to(dtype)
    y = run_quietly(twin, x)
    return y if isinstance(y, str) else Run(x, y, linears, dropouts)


def _results_of(random: Callable[[tuple[int, ...]], Tensor], N: int) -> Callable[[Tensor], Tensor]:
    return lambda x: random((*x.shape[:-1], N))


def _copied(child: nn.Module) -> nn.Module:
    """A deep copy that shares all tensors."""
    return copy.deepcopy(child, {id(t): t for t in (*child.parameters(), *child.buffers())})


def quiet(child: Any) -> nn.Module:
    """A copy that shares all tensors but has no hooks, and counts for itself."""
    twin = copy.copy(child)
    twin.__dict__.update({name: OrderedDict() for name in child.__dict__ if name.endswith("_hooks")})
    twin.__dict__.update({name: Counter(value) for name, value in child.__dict__.items() if isinstance(value, Counter)})
    return twin


def with_children(module: nn.Module, children: dict[str, nn.Module]) -> nn.Module:
    """A copy of the module that shares all but these children."""
    twin = copy.copy(module)
    twin.__dict__["_modules"] = {**module._modules, **children}
    return twin


def run_quietly(make: Callable[[], nn.Module], x: Tensor) -> Any:
    """forward(x) of make()'s module, without gradients, autocast and a change of torch's generators; what it raises becomes a
    reason.
    """
    devices = [x.device] if x.device.type == "cuda" else []
    try:
        with torch.no_grad(), without_autocast(x.device), torch.random.fork_rng(devices):
            module = make()
            return type(module).forward(module, x)
    except Exception as error:  # of code that is not ours
        return f"its forward does more than an MLP's: it raises {type(error).__name__} for a random tensor"


def device_of(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def dtype_of(module: Any, names: tuple[str, ...]) -> torch.dtype:
    """In which the module is called: that of its linear layers."""
    for child in (module._modules[name] for name in names):
        for part in (child, getattr(child, "base_layer", child)):  # a PEFT layer's 4-bit weight says nothing
            dtype = getattr(part, "compute_dtype", None) or getattr(part, "base_dtype", None) or part.weight.dtype
            if dtype in FLOATS:
                return dtype
    return torch.float32


# ---- what a run shows ----


def _read(run: Run, training: bool) -> Wiring | str:
    """The wiring of which this run is; a str says how near the nearest comes."""
    if (wrong := [name for name, probe in run.linears.items() if len(probe.inputs) != 1]) != []:
        return f"it does not call {wrong[0]} exactly once"
    of_x = tuple(name for name, probe in run.linears.items() if _same(probe.inputs[0], run.x))
    ends = [name for name in run.linears if name not in of_x]
    if not ends:
        return NO_MLP
    if len(ends) != 1:
        return f"its input goes unchanged into {len(of_x)} of {len(run.linears)} linear layers, expected into all but the last"
    (down,) = ends
    a, width = run.linears[down].inputs[0], sum(run.linears[name].outputs[0].shape[-1] for name in of_x)
    if width not in (len(of_x) * a.shape[-1], 2 * a.shape[-1]):
        return NO_MLP
    dropout, factor_y = None, run.linears[down].outputs[0]
    for name, probe in run.dropouts.items() if training else ():
        if len(probe.inputs) > 1 or (probe.inputs and probe.inputs[0] is not factor_y):
            return f"{name}, an nn.Dropout, does not come last"
        if probe.inputs:
            dropout, factor_y = name, probe.outputs[0]
    if not isinstance(run.y, Tensor):
        return f"its result is a {type(run.y).__name__}"
    if run.y.numel() == factor_y.numel():  # it may have been computed as rows
        factor_y = factor_y.reshape(run.y.shape)
    if not (off := _off(run.y, factor_y)).within(TOLERANCE.get(run.y.dtype, 0.0)):
        return f"its result is not that of {down}: it is off by {off.most:.2g} of it"
    return _activation(run, of_x, down, dropout)


def _activation(run: Run, of_x: tuple[str, ...], down: str, dropout: str | None) -> Wiring | str:
    a, outputs = run.linears[down].inputs[0], [run.linears[name].outputs[0] for name in of_x]
    split = len(of_x) == 1 and outputs[0].shape[-1] == 2 * a.shape[-1]
    half = outputs[0].chunk(2, -1) if split else outputs
    tried: list[tuple[Off, Wiring]] = []
    for activation in ACTIVATIONS:
        if len(half) == 1:
            tried.append((_off(a, act(half[0], activation), half[0]), Wiring((*of_x, down), activation, None, dropout)))
            continue
        for gate in (0, 1):
            e, u = half[gate], half[1 - gate]
            members = (*of_x, down) if split else (of_x[gate], of_x[1 - gate], down)
            wiring = Wiring(members, activation, gate if split else None, dropout)
            tried.append((_off(a, act(e, activation) * u, e * u), wiring))
    off, nearest = min(tried, key=lambda each: each[0].most)
    if off.within(max(TOLERANCE.get(t.dtype, 0.0) for t in (a, run.x))):
        return nearest
    form = f"{nearest.activation}(gate)·up" if len(half) == 2 else f"{nearest.activation}(up)"
    return f"what {down} is given is none of {', '.join(ACTIVATIONS)}; the nearest, {form}, is off by {off.most:.2g} of it"


def _same(given: Any, x: Tensor) -> bool:
    if not isinstance(given, Tensor) or given.dtype != x.dtype or given.numel() != x.numel():
        return False
    return torch.equal(given.reshape(x.shape), x)


class Off(NamedTuple):
    """The largest difference and the mean one, of the value itself; near a zero, of a thousandth of `scale`."""

    most: float
    mean: float

    def within(self, tolerance: float) -> bool:
        """Rounding has hardly a mean; a factor has. NaN is not within."""
        return self.most <= tolerance and abs(self.mean) <= tolerance / 10


def _off(got: Tensor, expected: Tensor, scale: Tensor | None = None) -> Off:
    if got.shape != expected.shape:
        return Off(math.inf, math.inf)
    near_zero = 0.0 if scale is None else scale.abs() / 1000
    off = (got.double() - expected) / (expected.abs() + near_zero + 1e-30)
    return Off(off.abs().max().item(), (off * expected.sign()).mean().item())


# ---- the results themselves ----


def why_results_differ(module: nn.Module, wiring: Wiring) -> str | None:
    """Compare module(x) with lora_glu_mlp over its weights, in evaluation on a few rows in their dtype."""
    names = wiring.members
    x = torch.randn(*ROWS, features(module._modules[names[0]])[0], generator=torch.Generator().manual_seed(5), device="cpu")
    x = x.to(device_of(module), dtype_of(module, names))
    twin = with_children(module, {name: quiet(module._modules[name]) for name in names})
    modes = [(part, part.training) for part in {*module.modules(), *twin.modules()}]
    try:
        for part, _ in modes:
            part.__dict__["training"] = False
        with torch.no_grad(), without_autocast(x.device):
            ours = computed(twin, wiring, x)
        theirs = run_quietly(lambda: twin, x)
    finally:
        for part, training in modes:
            part.__dict__["training"] = training
    for y in (ours, theirs):
        if isinstance(y, str):
            return y
    off = ((ours.double() - theirs.double()).norm() / theirs.double().norm().clamp(min=1e-30)).item()  # type: ignore[union-attr]
    return None if off <= RESULT_TOLERANCE[x.dtype] else f"its result on a random input is off by {off:.2g} of it"
