"""Memory of one training step over the sequence length: the frozen model, this package with each layer alone and with
fused blocks, and PEFT; with and without gradient checkpointing.

held: what stays allocated between forward and backward. peak: allocated at once in the step. saved: what autograd keeps
(without checkpointing: its hooks do not see what that keeps). All beyond the model itself. The default model is a small
Llama with random weights, so that a run takes a minute on a CPU; `--model DIR` takes any causal language model.

    PYTHONPATH=. python bench/model_memory.py [--model DIR] [--lengths 128 256 512] [--quantize none nf4] [--json FILE]
"""

import argparse
import functools
import gc
import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_kernels import LoRAConfig
from lora_kernels.commands import model_step, pretrained
from lora_kernels.commands.bench.peers import BARE, BNB, FUSED, OURS, OURS_NF4, PEFT
from lora_kernels.commands.console import write_whole
from lora_kernels.commands.environment import environment
from lora_kernels.commands.measure import held_bytes, peak_bytes, saved_bytes
from lora_kernels.dtypes import dtype_name

SMALL = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def small_llama(dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A Llama of 6 layers with random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL)).to(device, dtype)


def rows(
    model: nn.Module, lengths: list[int], config: LoRAConfig, device: torch.device, quantize: str | None = None
) -> Iterator[dict[str, Any]]:
    """A row per way of training and length of one sequence, as it is made; quantize="nf4" for QLoRA."""
    mine, peer = (OURS_NF4, BNB) if quantize else (OURS, PEFT)
    ways = {mine: model_step.ours, mine + FUSED: model_step.fused, peer: model_step.peft_twin}
    bare = {} if quantize else {BARE: lambda model, *_: model_step.frozen_twin(model)}  # once: it has no 4-bit weights
    for name, build in {**bare, **ways}.items():
        for checkpointing in (False, True):
            candidate: Any = build(model, config, quantize).train()
            if checkpointing:
                candidate.gradient_checkpointing_enable({"use_reentrant": False})
            for length in lengths:
                ids = model_step.random_ids(model, length, length, seed=0)
                forward, step = functools.partial(model_step.loss, candidate, ids), model_step.step(candidate, ids)
                step()  # what the first call alone allocates
                candidate.zero_grad(set_to_none=True)
                yield {
                    "variant": name,
                    "checkpointing": checkpointing,
                    "tokens": length,
                    "saved_bytes": None if checkpointing else saved_bytes(forward, exclude=[ids, *candidate.buffers()]),
                    "held_bytes": held_bytes(forward, device),
                    "peak_bytes": peak_bytes(step, device),
                }
                candidate.zero_grad(set_to_none=True)
            del candidate
            gc.collect()


def main() -> int:
    """Print the rows and write the JSON; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, help="local causal language model (default: a small Llama, random weights)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512], help="tokens of the one sequence")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--quantize", choices=("none", "nf4"), nargs="+", default=["none"], help="nf4: QLoRA, none: LoRA")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--json", metavar="FILE", type=Path)
    options = parser.parse_args()
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = pretrained.load_model(options.model, dtype, device) if options.model else small_llama(dtype, device)
    config = LoRAConfig(r=options.rank, lora_alpha=2 * options.rank, lora_dropout=options.dropout)
    header = {**environment(), "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    name = options.model.name if options.model else "Llama, 6 layers of 256"
    about = {"model": name, "R": options.rank, "p": options.dropout, "dtype": dtype_name(dtype)}
    kinds = (None if quantize == "none" else quantize for quantize in options.quantize)
    found = []
    for row in itertools.chain.from_iterable(rows(model, options.lengths, config, device, quantize) for quantize in kinds):
        found.append(row)
        checkpointed = "checkpointed" if row["checkpointing"] else ""
        mib = [f"{row[name] / 2**20:9.1f}" for name in ("held_bytes", "peak_bytes")]
        sys.stdout.write(f"{row['variant']:26}{checkpointed:14}{row['tokens']:6} tokens, held and peak MiB {' '.join(mib)}\n")
        if options.json:
            write_whole(options.json, json.dumps({"header": header, **about, "rows": found}, indent=1) + "\n", "--json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
