"""The options of `lora-kernels bench`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..console import CommandError, Output
from ..options import Device, Json, parse_device, parse_dtype


def bench(
    suite: Annotated[
        str, typer.Option(help="auto, small, smollm, llama, llama-70b, qwen, tokens, ranks, decoder or decoder-small.")
    ] = "auto",
    shape: Annotated[list[str] | None, typer.Option(help="KxN, in-features x out-features; repeatable.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Tokens M; repeatable.")] = None,
    rank: Annotated[list[int] | None, typer.Option(help="Rank; repeatable.")] = None,
    dropout: Annotated[list[float] | None, typer.Option(help="Dropout probability; repeatable.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="float32, bfloat16 or float16; repeatable.")] = None,
    compare: Annotated[
        str, typer.Option(help="Peers, by commas: peft, peft-compile, unsloth-style, bnb, lorafusion; or all, none.")
    ] = "peft",
    lorafusion: Annotated[Path | None, typer.Option(help="A checkout of LoRAFusion, for --compare lorafusion.")] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="Time a step of this local Hugging Face causal LM instead, LoRA on all its linear layers."),
    ] = None,
    sequence_length: Annotated[int, typer.Option(help="With --model: tokens of one sequence, at most.")] = 512,
    quantize: Annotated[str | None, typer.Option(help="With --model: nf4, beside bitsandbytes under PEFT.")] = None,
    forward: Annotated[bool, typer.Option("--forward", help="Time the forward pass alone, without gradients.")] = False,
    device: Device = None,
    repeats: Annotated[int | None, typer.Option(help="Timed rounds; default: 10 on a CPU, 50 on a GPU.")] = None,
    json_file: Json = None,
) -> None:
    """Time LoRA layers beside the bare linear and other implementations; exit 1 if a result is wrong."""
    from ..layer_shapes import parse_shapes
    from . import layers, peers
    from .suites import BOTH, FORWARD, Shape, choose_suite

    out = Output(json_file)
    on = parse_device(device)
    if repeats is None:
        repeats = 50 if on.type == "cuda" else 10
    if repeats < 1:
        raise CommandError(f"--repeats: got {repeats}, expected at least 1")
    axes: dict[str, tuple[Any, ...]] = {
        "tokens": tuple(tokens or ()),
        "ranks": tuple(rank or ()),
        "dropouts": tuple(dropout or ()),
        "dtypes": tuple(parse_dtype(name) for name in dtype or ()),
    }
    if model is not None:
        if shape or forward or len(axes["dtypes"]) > 1:
            raise CommandError("bench --model: got --shape, --forward or several --dtype, which are for single layers")
        result = _bench_model(model, on, axes, sequence_length, quantize, repeats, out, peers.parse(compare))
    else:
        shapes = tuple(Shape(group.K, group.N) for group in parse_shapes(shape or (), rank=1))
        chosen = choose_suite(suite, on, FORWARD if forward else BOTH, shapes=shapes, **axes)
        result = layers.run(chosen, on, repeats, out, peers.parse(compare), lorafusion)
    out.write_json(result)
    if result["failures"]:
        raise typer.Exit(1)


def _bench_model(
    model: Path,
    device: Any,
    axes: dict[str, tuple[Any, ...]],
    length: int,
    quantize: str | None,
    repeats: int,
    out: Output,
    compare: tuple[str, ...],
) -> dict[str, Any]:
    from .model import run
    from .model_settings import Settings

    on_gpu = device.type == "cuda"
    settings = Settings(
        model,
        axes["tokens"] or (4096 if on_gpu else 512,),
        axes["ranks"] or (16,),
        axes["dropouts"] or (0.1,),
        axes["dtypes"][0] if axes["dtypes"] else parse_dtype("bfloat16" if on_gpu else "float32"),
        length,
        quantize,
    )
    return run(settings, device, repeats, out, compare)
