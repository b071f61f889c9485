"""Training of the demo's adapters: the loop, the held-out loss, and a sample of the model's text."""

import math
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from ...models.adalora.allocator import RankAllocator
from ...models.adalora.orthogonality import orthogonality_loss
from ...models.parameters import lora_parameters
from ..console import CommandError, Output
from ..model_step import loss as model_loss
from .corpus import Corpus
from .settings import Settings

HELD_OUT_BATCH = 4  # windows
EVALUATIONS = 4  # of the held-out loss during training
SAMPLE_TOKENS = 40
LINES = 10  # of progress, at least, where there is no terminal to draw a bar on


def train(model: nn.Module, corpus: Corpus, settings: Settings, output: Output) -> tuple[list[float], dict[int, float]]:
    """AdamW on the adapters: (training loss of each step, held-out loss after some numbers of steps, 0 and the last too).

    The seed decides data order and dropout. Raises CommandError where a loss is not finite: nothing is learnt from then on.
    """
    parameters = lora_parameters(model)
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, weight_decay=0.0)
    allocator = RankAllocator(model) if settings.variant == "adalora" else None
    order = torch.Generator().manual_seed(settings.seed)
    torch.manual_seed(settings.seed)
    evaluate_after = {round(settings.steps * i / EVALUATIONS) for i in range(1, EVALUATIONS + 1)}
    losses: list[float] = []
    status = TextColumn("{task.completed}/{task.total}  loss {task.fields[loss]}, held out {task.fields[held_out]}")
    bar, lines = ("training", BarColumn(), status, TimeRemainingColumn()), not output.progress.is_terminal
    with Progress(*bar, console=output.progress, disable=lines) as progress:
        task = progress.add_task("", total=settings.steps, loss="", held_out="")
        held_out = {0: held_out_loss(model, corpus)}
        if not math.isfinite(held_out[0]):
            raise CommandError(f"--model: its loss is {held_out[0]} before any training; pass one with sound weights")
        for step in range(1, settings.steps + 1):
            model.train()
            loss = model_loss(model, corpus.batch(settings.windows, order).to(parameters[0].device))
            (loss if allocator is None else loss + orthogonality_loss(model)).backward()
            optimizer.step()
            if allocator is not None:
                allocator.step(step - 1)
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            if step in evaluate_after:
                held_out[step] = held_out_loss(model, corpus)
            latest = next(reversed(held_out.values()))
            if not math.isfinite(losses[-1] + latest):
                raise CommandError(
                    f"--lr: got {settings.lr:g}, with which training diverged: step {step} of {settings.steps} has a loss of "
                    f"{losses[-1]}, held out {latest}; pass a smaller one"
                )
            progress.update(task, advance=1, loss=f"{losses[-1]:.3f}", held_out=f"{latest:.3f}")
            if lines and (step in evaluate_after or step % math.ceil(settings.steps / LINES) == 0):
                output.progress.print(f"step {step}/{settings.steps}  loss {losses[-1]:.3f}, held out {latest:.3f}")
    return losses, held_out


@torch.no_grad()
def held_out_loss(model: nn.Module, corpus: Corpus) -> float:
    """Mean loss per token over the held-out windows, in evaluation mode."""
    model.eval()
    device = next(model.parameters()).device
    batches = corpus.held_out.split(HELD_OUT_BATCH)
    total = sum(model_loss(model, ids.to(device)).item() * len(ids) for ids in batches)
    return total / len(corpus.held_out)


@torch.no_grad()
def sample(model: Any, tokenizer: Any, prompt: Tensor) -> str:
    """The greedy continuation of `prompt`."""
    model.eval()
    ids = prompt.to(next(model.parameters()).device)
    generated = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=SAMPLE_TOKENS,
        do_sample=False,
        repetition_penalty=1.2,  # small models repeat themselves without
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0,
    )
    return tokenizer.decode(generated[0, ids.shape[1] :].tolist())
