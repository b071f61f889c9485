"""4-bit weights beside bitsandbytes on the CPU: quantise, dequantise, forward, and forward + backward beside PEFT.

Both read the same bytes. Variants are interleaved; medians with p20 and p80. A case whose result is wrong reports no times.
bitsandbytes' layer is in training mode, where it keeps its storage; "repacked" is in evaluation, where a CPU with AVX512-bf16
instructions reads another layout (absmax in bfloat16, bfloat16 products whatever x's dtype).

    PYTHONPATH=. python bench/nf4.py [--quick] [--json FILE] [--repeats N] [--dtype float32] [--dtype bfloat16]
"""

import argparse
import copy
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import torch
from torch import Tensor, nn

from lora_kernels import LoRALinear, NF4Weight, dequantize_nf4, quantize_nf4
from lora_kernels.cases.rule import violations
from lora_kernels.commands.console import write_whole
from lora_kernels.commands.environment import environment
from lora_kernels.commands.timing import interleaved

OURS, BNB, REPACKED, PEFT = "lora_kernels", "bitsandbytes", "bitsandbytes, repacked", "PEFT + bitsandbytes"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Variants = dict[str, Callable[[], Any]]


def linear4bit(K: int, N: int, dtype: torch.dtype) -> nn.Module:
    """A quantised Linear4bit without bias, nested absmax, blocks of 64, in training mode."""
    layer = bnb.nn.Linear4bit(K, N, bias=False, quant_type="nf4", compute_dtype=dtype)
    layer.weight.data = layer.weight.data.to(dtype)
    return layer.to("cpu").train()


def conversion_cases(K: int, N: int, dtype: torch.dtype) -> Iterator[tuple[dict, Variants]]:
    """Quantise and dequantise a whole weight, absmax in float32."""
    weight = torch.randn(N, K).mul_(0.02).to(dtype)
    w, (codes, state) = quantize_nf4(weight, double_quant=False), bnb.functional.quantize_4bit(weight, quant_type="nf4")
    if not (torch.equal(w.codes, codes.view(-1)) and torch.equal(w.dequantize(), bnb.functional.dequantize_4bit(codes, state))):
        raise SystemExit(f"nf4: {N}x{K} {dtype}: bytes differ from bitsandbytes'")
    out = torch.empty_like(weight)
    yield (
        {"op": "quantise"},
        {
            OURS: lambda: quantize_nf4(weight, double_quant=False),
            BNB: lambda: bnb.functional.quantize_4bit(weight, quant_type="nf4"),
        },
    )
    yield (
        {"op": "dequantise"},
        {
            OURS: lambda: w.dequantize(),
            f"{OURS}, out=": lambda: dequantize_nf4(w, out=out),
            BNB: lambda: bnb.functional.dequantize_4bit(codes, state),
        },
    )


def forward_cases(K: int, N: int, dtype: torch.dtype, tokens: list[int]) -> Iterator[tuple[dict, Variants]]:
    """The layer without an adapter, without gradients."""
    theirs = linear4bit(K, N, dtype)
    ours = LoRALinear.from_linear(theirs, r=None)
    repacked = copy.deepcopy(theirs).eval()
    for M in tokens:
        x = torch.randn(M, K).to(dtype)
        with torch.no_grad():
            W = ours.matrix.dequantize(dtype)
            gate(f"forward M={M}", {"y": ours(x)}, {"y": x @ W.T}, {"y": x.double() @ W.double().T}, dtype)
        yield {"op": "forward", "M": M}, {OURS: no_grad(ours, x), BNB: no_grad(theirs, x), REPACKED: no_grad(repacked, x)}


def no_grad(layer: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    def call() -> Tensor:
        with torch.no_grad():
            return layer(x)

    return call


def training_cases(K: int, N: int, dtype: torch.dtype, tokens: list[int]) -> Iterator[tuple[dict, Variants]]:
    """Forward and backward with LoRA r=16 in float32, as both packages make it."""
    for M in tokens:
        for p in (0.0, 0.1):
            theirs = linear4bit(K, N, dtype)
            ours = LoRALinear.from_linear(theirs, r=None).train()
            ours.add_adapter("default", 16, 32, lora_dropout=p, init_lora_weights=False, dtype=torch.float32)
            config = peft.LoraConfig(r=16, lora_alpha=32, lora_dropout=p, target_modules=["linear"], init_lora_weights=False)
            wrapped = peft.get_peft_model(nn.ModuleDict({"linear": theirs}), config).base_model.model["linear"].train()
            x, dy = torch.randn(M, K).to(dtype).requires_grad_(), torch.randn(M, N).to(dtype)
            if p == 0:
                gate_training(ours, x, dy, dtype)
            yield {"op": "forward+backward", "M": M, "p": p}, {OURS: step(ours, x, dy), PEFT: step(wrapped, x, dy)}


def step(layer: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    wanted = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
    return lambda: torch.autograd.grad(layer(x), wanted, dy)


def gate_training(layer: LoRALinear, x: Tensor, dy: Tensor, dtype: torch.dtype) -> None:
    """dx, dA and dB by the one tolerance rule, against float64 with the dequantised weight."""
    W, A, B = layer.matrix, layer.lora_A["default"], layer.lora_B["default"]
    assert isinstance(W, NF4Weight)

    def gradients(x: Tensor, W: Tensor, A: Tensor, B: Tensor, dy: Tensor) -> dict[str, Tensor]:
        x, A, B = (t.detach().clone().requires_grad_() for t in (x, A, B))
        y = x @ W.T + (2 * (x.to(A.dtype) @ A.T @ B.T)).to(x.dtype)
        return dict(zip(("dx", "dA", "dB"), torch.autograd.grad(y, (x, A, B), dy), strict=True))

    dense = W.dequantize(dtype)
    tested = dict(zip(("dx", "dA", "dB"), step(layer, x, dy)(), strict=True))
    exact = gradients(*(t.double() for t in (x, dense, A, B, dy)))
    gate("forward+backward", tested, gradients(x, dense, A, B, dy), exact, dtype)


def gate(case: str, tested: dict, plain: dict, exact: dict, dtype: torch.dtype) -> None:
    if wrong := violations(tested, plain, exact, dtype):
        raise SystemExit(f"nf4: {case}: no times, the result is wrong: {wrong}")


def measure(shapes: list[tuple[int, int]], dtypes: list[str], tokens: list[int], repeats: int) -> Iterator[dict]:
    for K, N in shapes:
        for name in dtypes:
            dtype = DTYPES[name]
            for cases in (
                conversion_cases(K, N, dtype),
                forward_cases(K, N, dtype, tokens),
                training_cases(K, N, dtype, tokens[-1:]),
            ):
                for case, variants in cases:
                    timings = interleaved(variants, repeats=repeats, warmup=2)
                    ours = timings[OURS].median
                    times = {variant: {**t.as_dict(), "times_ours": t.median / ours} for variant, t in timings.items()}
                    yield {"K": K, "N": N, "dtype": name, **case, "variants": times}


def show(row: dict) -> str:
    case = " ".join(f"{name}={row[name]}" for name in ("M", "p") if name in row)
    cells = "  ".join(f"{name} {t['median'] * 1e3:.2f} ms (x{t['times_ours']:.2f})" for name, t in row["variants"].items())
    return f"{row['op']:17}{row['K']}→{row['N']} {row['dtype']:9}{case:12}{cells}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small layer, for a test")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--dtype", action="append", choices=DTYPES)
    options = parser.parse_args()
    torch.manual_seed(0)
    shapes, tokens = ([(256, 128)], [1, 8]) if options.quick else ([(4096, 4096)], [1, 16, 512])
    header = {**environment(), "repeats": options.repeats}
    print(f"{header['cpu']['name']}, {header['cpu']['threads']} threads, {header['cpu']['vector_level']}", file=sys.stderr)
    rows = []
    for row in measure(shapes, options.dtype or list(DTYPES), tokens, options.repeats):
        rows.append(row)
        print(show(row), flush=True)
        if options.json:
            write_whole(options.json, json.dumps({"header": header, "rows": rows}, indent=2) + "\n", "--json")


if __name__ == "__main__":
    main()
