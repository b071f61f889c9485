"""RankAllocator: which of an AdaLoRA adapter's singular values stay, and how many at which step."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...layers.adapters import check_integer
from ..distributed import is_sharded
from ..state import lora_state, refuse_if_merged, refuse_offloaded_adapters
from .config import AdaLoRAConfig, active_adalora
from .sensitivity import KINDS, Sensitivity, most_important


def budget_at(step: int, config: AdaLoRAConfig, layers: int) -> int:
    """b = init until step tinit, b = target + (init − target)·(1 − (step − tinit)/(end − tinit))³ until `end`, then target;
    init and target are those of all layers, and end = total_step − tfinal.
    """
    first, last = config.init_r * layers, config.target_r * layers
    end = config.total_step - config.tfinal  # type: ignore[operator]
    if step <= config.tinit:
        return first
    left = 1 - (min(step, end) - config.tinit) / (end - config.tinit)
    return int((first - last) * left**3 + last)


class RankAllocator:
    """Decides the ranks of the active AdaLoRA adapter while it is trained, as PEFT's allocator of the same schedule does:

        loss = model(x) + orthogonality_loss(model)
        loss.backward()
        optimizer.step()
        allocator.step(global_step)  # 0, 1, 2, …; after backward(), before zero_grad()
        optimizer.zero_grad()

    For the same gradients the same triplets stay as with PEFT's update_and_allocate, whose numbers its running means are to the
    bit, all layers in a few operations; a step waits for no device. Gradients have to be the true ones: with a GradScaler
    call its unscale_ before optimizer.step(), and leave out steps that it skips.

    DistributedDataParallel: every process calls step. Nothing is sent: parameters and, once they are reduced, gradients are
    equal in all processes, and so are scores that the same operations compute from them on devices of one kind. After a
    backward pass under no_sync(), when gradients are each process's own, do not call it.

    Raises ValueError where the active adapter is not one of AdaLoRA, its total_step is None, its target_r above
    init_r, or its parameters are sharded.
    """

    def __init__(self, model: nn.Module):
        refuse_offloaded_adapters(model, "allocate ranks")
        self.adapter, self.config, self._layers = active_adalora(model)
        self._model = model
        if self.config.total_step is None:
            raise ValueError(
                "total_step: got None, expected the number of training steps, by which ranks fall; give it to AdaLoRAConfig"
            )
        if self.config.target_r > self.config.init_r:
            raise ValueError(
                f"target_r: got {self.config.target_r}, expected at most init_r, {self.config.init_r}: ranks only fall"
            )
        if any(is_sharded(E) for E in self._parameters()["lora_E"]):
            raise ValueError(
                "model: FSDP2 has sharded its adapters, of which each process has other rows, expected whole ones; train it "
                "under DistributedDataParallel"
            )
        self._sensitivity: Sensitivity | None = None  # made where the parameters are at the first step
        self._keep: Tensor | None = None  # [layers, R], of the last decision

    @property
    def _end(self) -> int:
        return self.config.total_step - self.config.tfinal  # type: ignore[operator]

    def step(self, global_step: int) -> int:
        """Take in the gradients of this step, and where it is one for a decision set the E of the triplets that go to zero;
        how many singular values may stay in all.

        From step total_step − tfinal on the choice is final, and is applied at every step, since an optimizer's momentum goes
        on moving them. Raises RuntimeError where a gradient is missing, the model is merged, or ranks become final and no step
        was before.
        """
        check_integer(global_step, "global_step", 0)
        refuse_if_merged(self._layers, "allocate ranks")
        parameters, allocations = self._parameters(), lora_state(self._model).allocations
        budget = budget_at(global_step, self.config, len(self._layers))
        if global_step < self._end:
            self._check_gradients(parameters, global_step)
            if self._sensitivity is None:
                self._sensitivity = Sensitivity(parameters)
            decides = global_step > self.config.tinit and global_step % self.config.deltaT == 0
            scores = self._sensitivity.update(parameters, self.config.beta1, self.config.beta2, scored=decides)
            allocations[self.adapter] = {}
            if scores is not None:
                self._keep = most_important(scores, budget)
                _apply(self._keep, parameters["lora_E"])
            return budget
        if final := allocations.get(self.adapter):  # of this run, or of a file
            self._keep = torch.stack([final[path] for path in self._layers]).to(parameters["lora_E"][0].device)
        elif self._sensitivity is None:
            raise RuntimeError(
                f"global_step: got {global_step}, when ranks become final, but this RankAllocator has seen no gradient; call "
                "step in every step from 0 on, or load_state_dict what an earlier one had"
            )
        else:
            self._keep = most_important(self._sensitivity.scores(), budget)
            allocations[self.adapter] = dict(zip(self._layers, self._keep.unbind(), strict=True))
            self._sensitivity = None  # as large as two copies of the adapter
        _apply(self._keep, parameters["lora_E"])
        return budget

    def _parameters(self) -> dict[str, list[nn.Parameter]]:
        """{kind: [one of each layer]}, as the layers hold them now. Raises RuntimeError where the adapter is there no more."""
        if not isinstance(lora_state(self._model).configs.get(self.adapter), AdaLoRAConfig):
            raise RuntimeError(
                f"adapter {self.adapter!r}: deleted, or compacted to a plain LoRA, since this RankAllocator was made"
            )
        return {kind: [getattr(layer, kind)[self.adapter] for layer in self._layers.values()] for kind in KINDS}

    def _check_gradients(self, parameters: Mapping[str, list[nn.Parameter]], step: int) -> None:
        missing = [
            f"{path}.{kind}"
            for kind, own in parameters.items()
            for path, parameter in zip(self._layers, own, strict=True)
            if parameter.grad is None
        ]
        if missing:
            raise RuntimeError(
                f"step {step}: {missing[0]}{f' and {len(missing) - 1} more have' if missing[1:] else ' has'} no gradient; call "
                "step after loss.backward() and before zero_grad(), with A, B and E of every layer trained and used"
            )

    def ranks(self) -> dict[str, int]:
        """Singular values that the last decision kept, by the layer's path; init_r before the first."""
        if self._keep is None:
            return dict.fromkeys(self._layers, self.config.init_r)
        return dict(zip(self._layers, self._keep.sum(1).tolist(), strict=True))

    # ---- resuming ----

    def state_dict(self) -> dict[str, Any]:
        """Tensors in dicts, for torch.save: what a RankAllocator of the same model, with the same adapter, goes on from."""
        means = {} if self._sensitivity is None else self._named(self._sensitivity)
        return {
            "mean": {name: mean.clone() for name, (mean, _) in means.items()},
            "spread": {name: spread.clone() for name, (_, spread) in means.items()},
            "keep": {} if self._keep is None else dict(zip(self._layers, self._keep.clone().unbind(), strict=True)),
            "final": bool(lora_state(self._model).allocations.get(self.adapter)),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict()`; A, B and E are `load_lora_state_dict`'s. Raises ValueError, before anything changes, for a
        state of other layers or ranks.
        """
        sensitivity = Sensitivity(self._parameters())
        means = self._named(sensitivity)
        expected = {name: tuple(mean.shape) for name, (mean, _) in means.items()}
        for part in ("mean", "spread"):
            found = {name: tuple(tensor.shape) for name, tensor in state[part].items()}
            if found and found != expected:
                name = min({name for name, _ in found.items() ^ expected.items()})
                raise ValueError(
                    f"state[{part!r}]: got {found.get(name)} for {name}, expected {expected.get(name)}; make the model with "
                    "the AdaLoRAConfig that it had"
                )
        for name, (mean, spread) in means.items() if state["mean"] else ():
            mean.copy_(state["mean"][name])
            spread.copy_(state["spread"][name])
        device = self._parameters()["lora_E"][0].device
        self._sensitivity = sensitivity if state["mean"] else None
        self._keep = torch.stack([state["keep"][path] for path in self._layers]).to(device) if state["keep"] else None
        final = dict(zip(self._layers, self._keep.unbind(), strict=True)) if state["final"] and self._keep is not None else {}
        lora_state(self._model).allocations[self.adapter] = final

    def _named(self, sensitivity: Sensitivity) -> dict[str, tuple[Tensor, Tensor]]:
        """(Ī, Ū) of each parameter by its name."""
        tensors = sensitivity.tensors()
        return {f"{path}.{kind}": tensors[kind][i] for i, path in enumerate(self._layers) for kind in KINDS}


@torch.no_grad()
def _apply(keep: Tensor, parameters: Sequence[Tensor]) -> None:
    """Set the singular values E of triplets that are not kept, a row of `keep` for each layer, to zero."""
    for E, gone in zip(parameters, (~keep)[:, :, None].unbind(), strict=True):
        E.masked_fill_(gone.to(E.device), 0.0)
