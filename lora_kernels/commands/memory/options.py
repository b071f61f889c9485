"""The options of `lora-kernels memory`."""

from pathlib import Path
from typing import Annotated

import typer

from ..console import CommandError, Output
from ..options import Json, Rank, check_count, check_mode, check_probability, parse_dtype

MODES = {"memory --model DIR": ("model", "target"), "memory --size": ("size",), "memory --shape": ("shape",)}


def memory(
    ctx: typer.Context,
    model: Annotated[Path | None, typer.Option(help="Local Hugging Face causal LM; no weights are loaded.")] = None,
    shape: Annotated[list[str] | None, typer.Option(help="KxN:COUNT linear layers, as in 4096x14336:32; repeatable.")] = None,
    size: Annotated[str | None, typer.Option(help="7b, 8b or 70b: a Llama of that size, all linear layers adapted.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens M of one step.")] = 8192,
    rank: Rank = 16,
    dropout: Annotated[float, typer.Option(help="Dropout probability; above 0 a seed is saved per layer.")] = 0.1,
    dtype: Annotated[str, typer.Option(help="Base weights: float32, bfloat16 or float16.")] = "bfloat16",
    adapter_dtype: Annotated[str, typer.Option(help="Adapters; default: float32, as add_lora and PEFT make them.")] = "float32",
    target: Annotated[
        list[str] | None, typer.Option(help="Name pattern of layers to adapt in --model; default: all linear.")
    ] = None,
    json_file: Json = None,
) -> None:
    """Count the bytes of QLoRA and LoRA training beside full fine-tuning, for a model, a well-known size or shapes."""
    from ...models.config import LoRAConfig
    from ..layer_shapes import parse_shapes
    from .footprints import SIZES, Between, layers_of_model
    from .run import run

    given = [value is not None for value in (model, size, shape)]
    if given.count(True) != 1:
        raise CommandError("memory: expected --model DIR, --size or --shape KxN:COUNT, one of the three")
    check_mode(ctx, MODES, list(MODES)[given.index(True)])
    out = Output(json_file)
    base_dtype, adapters = parse_dtype(dtype), parse_dtype(adapter_dtype, "--adapter-dtype")
    check_count("--tokens", tokens)
    check_count("--rank", rank)
    check_probability("--dropout", dropout)
    if model is not None:
        config = LoRAConfig(r=rank, lora_alpha=rank, target_modules=target or "all-linear")
        layers, parameters, mlps = layers_of_model(model, config, "--target" if target else "--model")
    elif size is not None:
        if size not in SIZES:
            raise CommandError(f"--size: got {size!r}, expected {', '.join(SIZES)}")
        layers, parameters, mlps = SIZES[size].adapted(rank), SIZES[size].parameters, SIZES[size].between
    else:
        layers, mlps = parse_shapes(shape or (), rank), Between()
        parameters = sum(group.K * group.N * group.count for group in layers)
    out.write_json(run(layers, parameters, tokens, dropout, base_dtype, adapters, out, mlps))
