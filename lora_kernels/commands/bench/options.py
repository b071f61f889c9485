"""The options of `lora-kernels bench`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..console import FAILED, CommandError, Output
from ..options import (
    Device,
    Html,
    Json,
    check_count,
    check_mode,
    check_probability,
    is_given,
    parse_device,
    parse_dtype,
    parse_quantize,
    parse_variant,
)

MODES = {"bench": ("suite", "shape", "lorafusion", "forward"), "bench --model DIR": ("model", "sequence_length")}


def bench(
    ctx: typer.Context,
    suite: Annotated[
        str, typer.Option(help="auto, small, smollm, llama, llama-70b, qwen, tokens, ranks, decoder or decoder-small.")
    ] = "auto",
    shape: Annotated[list[str] | None, typer.Option(help="KxN, in-features x out-features; repeatable.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Tokens M; repeatable.")] = None,
    rank: Annotated[list[int] | None, typer.Option(help="Rank; repeatable.")] = None,
    dropout: Annotated[list[float] | None, typer.Option(help="Dropout probability; repeatable.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="float32, bfloat16 or float16; repeatable.")] = None,
    compare: Annotated[
        str,
        typer.Option(
            help="Peers, by commas: peft, peft-compile, unsloth-style, bnb, lorafusion; or all, none. "
            "Exit 1 if one that is named here cannot be measured."
        ),
    ] = "peft",
    lorafusion: Annotated[Path | None, typer.Option(help="A checkout of LoRAFusion, for --compare lorafusion.")] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="Time a step of this local Hugging Face causal LM instead, LoRA on all its linear layers."),
    ] = None,
    sequence_length: Annotated[int, typer.Option(help="With --model: tokens of one sequence, at most.")] = 512,
    quantize: Annotated[str | None, typer.Option(help="nf4: over 4-bit weights, beside bitsandbytes under PEFT.")] = None,
    variant: Annotated[str, typer.Option(help="lora, or dora: DoRA's layers beside PEFT's, and beside plain LoRA.")] = "lora",
    forward: Annotated[bool, typer.Option("--forward", help="Time the forward pass alone, without gradients.")] = False,
    device: Device = None,
    repeats: Annotated[int | None, typer.Option(help="Timed rounds; default: 10 on a CPU, 50 on a GPU.")] = None,
    json_file: Json = None,
    html_file: Html = None,
) -> None:
    """Time LoRA layers beside the bare linear and other implementations; exit 1 if a result is wrong."""
    from ..layer_shapes import parse_shape
    from . import layers, peers
    from .suites import BOTH, FORWARD, Shape, choose_suite

    check_mode(ctx, MODES, "bench" if model is None else "bench --model DIR")
    out = Output(json_file, html_file)
    on = parse_device(device)
    if repeats is None:
        repeats = 50 if on.type == "cuda" else 10
    check_count("--repeats", repeats)
    parse_quantize(quantize)
    parse_variant(variant, "lora", "dora")
    compared = peers.parse(compare)
    if lorafusion is not None and "lorafusion" not in compared:
        raise CommandError("--lorafusion: is for --compare lorafusion, which is not asked for")
    axes = _axes(tokens, rank, dropout, dtype)
    if model is not None:
        result = _bench_model(model, on, axes, sequence_length, quantize, variant, repeats, out, compared)
    else:
        shapes = tuple(Shape(*parse_shape(text)) for text in shape or ())
        if forward and dropout:
            raise CommandError("--dropout: is not applied with --forward, which times evaluation mode")
        if is_given(ctx, "suite") and shapes and tokens and rank and dtype and (dropout or forward):
            raise CommandError("--suite: nothing of it is left: shape, tokens, rank, dropout and dtype are given")
        if shapes and suite.startswith("decoder"):
            raise CommandError(f"--suite: {suite} times blocks, of which --shape leaves one layer; pass one of the two")
        chosen = choose_suite(suite, on, FORWARD if forward else BOTH, variant == "dora", shapes=shapes, **axes)
        result = layers.run(chosen, on, repeats, out, compared, lorafusion, quantize)
    out.write_json(result)
    if html_file is not None:
        from .page import bench_page

        out.write_html(bench_page(result))
    if result["failures"]:
        raise typer.Exit(FAILED)
    if is_given(ctx, "compare") and compare != "all":
        peers.require_rows(compared, result, quantize)


def _axes(
    tokens: list[int] | None, ranks: list[int] | None, dropouts: list[float] | None, dtypes: list[str] | None
) -> dict[str, tuple[Any, ...]]:
    """The axes of a suite by name, empty where an option is not given. Raises CommandError for values that no layer has."""
    for value in tokens or ():
        check_count("--tokens", value)
    for value in ranks or ():
        check_count("--rank", value)
    for p in dropouts or ():
        check_probability("--dropout", p)
    values = {"tokens": tokens, "ranks": ranks, "dropouts": dropouts, "dtypes": [parse_dtype(name) for name in dtypes or ()]}
    return {axis: tuple(given or ()) for axis, given in values.items()}


def _bench_model(
    model: Path,
    device: Any,
    axes: dict[str, tuple[Any, ...]],
    length: int,
    quantize: str | None,
    variant: str,
    repeats: int,
    out: Output,
    compare: tuple[str, ...],
) -> dict[str, Any]:
    from .model import run
    from .model_settings import Settings

    on_gpu = device.type == "cuda"
    if len(axes["dtypes"]) > 1:
        raise CommandError(f"--dtype: got {len(axes['dtypes'])} of them, expected one with --model")
    settings = Settings(
        model,
        axes["tokens"] or (4096 if on_gpu else 512,),
        axes["ranks"] or (16,),
        axes["dropouts"] or (0.1,),
        axes["dtypes"][0] if axes["dtypes"] else parse_dtype("bfloat16" if on_gpu else "float32"),
        length,
        quantize,
        variant == "dora",
    )
    return run(settings, device, repeats, out, compare)
