"""`lora-kernels demo | bench | tune | report | memory`: the command line. Heavy imports happen inside the commands."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from .commands.console import CommandError, Output, format_bytes

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Fused LoRA linear layers for PyTorch: see them train, measure them, ask what runs where.",
)

Json = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", help="Write results as JSON to FILE; - is stdout (tables go to stderr)."),
]
Rank = Annotated[int, typer.Option(help="Rank r of the adapters.")]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda where there is one.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        typer.echo(f"lora_kernels {__version__}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options of every command."""


@app.command()
def demo(
    model: Annotated[
        Path | None, typer.Option(help="Local Hugging Face causal LM directory; default: SmolLM2-135M-Instruct.")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text to train on; default: Python's help topics.")] = None,
    output: Annotated[Path, typer.Option(help="Where the adapter and the loss plot are written.")] = Path("lora-demo"),
    rank: Rank = 8,
    alpha: Annotated[float, typer.Option(help="lora_alpha; the adapter is scaled by alpha / rank.")] = 16.0,
    dropout: Annotated[float, typer.Option(help="Dropout probability of the adapters' input.")] = 0.1,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 40,
    tokens_per_step: Annotated[
        int | None, typer.Option(help="Tokens of one step; default: 256 on a CPU, 4096 on a GPU.")
    ] = None,
    lr: Annotated[float, typer.Option(help="Learning rate of AdamW.")] = 1e-3,
    quantize: Annotated[
        str | None, typer.Option(help="nf4: adapted layers in 4 bits (QLoRA), beside PEFT + bitsandbytes.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of initialisation, data order and dropout.")] = 0,
    json_file: Json = None,
) -> None:
    """Fine-tune a small language model on real text, beside PEFT, and read the adapter back bit for bit."""
    from .commands.demo import Settings, run

    settings = Settings(
        model=model,
        text=text,
        output=output,
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        steps=steps,
        tokens_per_step=tokens_per_step,
        lr=lr,
        seed=seed,
        quantize=quantize,
    )
    out = Output(json_file)
    out.write_json(run(settings, out))


@app.command()
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
    from .commands import benchmark, peers
    from .commands.cases import BOTH, FORWARD, Shape, choose_suite
    from .commands.memory import parse_shapes

    out = Output(json_file)
    on = _device(device)
    if repeats is None:
        repeats = 50 if on.type == "cuda" else 10
    if repeats < 1:
        raise CommandError(f"--repeats: got {repeats}, expected at least 1")
    axes: dict[str, tuple[Any, ...]] = {
        "tokens": tuple(tokens or ()),
        "ranks": tuple(rank or ()),
        "dropouts": tuple(dropout or ()),
        "dtypes": tuple(_dtype(name) for name in dtype or ()),
    }
    if model is not None:
        if shape or forward or len(axes["dtypes"]) > 1:
            raise CommandError("bench --model: got --shape, --forward or several --dtype, which are for single layers")
        result = _bench_model(model, on, axes, sequence_length, quantize, repeats, out, peers.parse(compare))
    else:
        shapes = tuple(Shape(layers.K, layers.N) for layers in parse_shapes(shape or (), rank=1))
        chosen = choose_suite(suite, on, FORWARD if forward else BOTH, shapes=shapes, **axes)
        result = benchmark.run(chosen, on, repeats, out, peers.parse(compare), lorafusion)
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
    from .commands import model_benchmark

    on_gpu = device.type == "cuda"
    settings = model_benchmark.Settings(
        model,
        axes["tokens"] or (4096 if on_gpu else 512,),
        axes["ranks"] or (16,),
        axes["dropouts"] or (0.1,),
        axes["dtypes"][0] if axes["dtypes"] else _dtype("bfloat16" if on_gpu else "float32"),
        length,
        quantize,
    )
    return model_benchmark.run(settings, device, repeats, out, compare)


@app.command()
def tune(
    folder: Annotated[
        Path | None, typer.Option(help="Where the file is written; default: the user's cache, where dispatch reads it.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Ranks up to 32 only.")] = False,
    json_file: Json = None,
) -> None:
    """Measure this GPU's tiles and dataflows in a few minutes; calls follow the measurements from then on."""
    from .commands import tune as tuner

    out = Output(json_file)
    out.write_json(tuner.run(out, folder, quick))


@app.command()
def report(
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Show the Triton kernels instead: machine code, bytes per pass, predicted times.")
    ] = False,
    target: Annotated[str, typer.Option(help="With --kernels: sm_80, sm_86, sm_89, sm_90, sm_100 or sm_120.")] = "sm_90",
    dtypes: Annotated[str, typer.Option(help="With --kernels: base and adapters, as in 'bf16 fp32'.")] = "bf16 bf16",
    shape: Annotated[str, typer.Option(help="With --kernels: KxN, in-features x out-features.")] = "4096x4096",
    tokens: Annotated[int, typer.Option(help="With --kernels: tokens M.")] = 8192,
    json_file: Json = None,
) -> None:
    """Show versions, devices and CPU capabilities, and for each backend whether it is used here, or why not."""
    if kernels:
        from .commands import kernel_report
        from .commands.memory import parse_shapes

        layers = parse_shapes([shape], rank=1)[0]
        out = Output(json_file)
        out.write_json(kernel_report.run(tokens, layers.K, layers.N, target, dtypes, out))
        return
    import torch

    from .commands.environment import environment
    from .dtypes import dtype_name
    from .plan import backend_report

    out = Output(json_file)
    found: dict[str, Any] = environment()
    cases = [("cpu", torch.float32), ("cpu", torch.bfloat16)]
    cases += [(f"cuda:{i}", torch.bfloat16) for i in range(len(found["gpus"]))]
    found["backends"] = [
        {"device": device, "dtype": dtype_name(dtype), **vars(row)}
        for device, dtype in cases
        for row in backend_report(torch.empty(16, 64, device=device, dtype=dtype))
    ]
    out.table("Environment", ("", "value"), _environment_rows(found))
    columns = ("device", "dtype", "backend", "usable", "used", "reason")
    rows = [[_yes_no(row[column]) for column in columns] for row in found["backends"]]
    out.table("Backends for a LoRA layer", columns, rows)
    out.write_json(found)


@app.command()
def memory(
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
    from .commands import memory as count
    from .models.config import LoRAConfig

    out = Output(json_file)
    base_dtype = _dtype(dtype)
    if [model is None, not shape, size is None].count(False) != 1:
        raise CommandError("memory: expected --model DIR, --size or --shape KxN:COUNT, one of the three")
    if model is not None:
        if rank < 1:
            raise CommandError(f"--rank: got {rank}, expected at least 1")
        config = LoRAConfig(r=rank, lora_alpha=rank, target_modules=target or "all-linear")
        layers, parameters = count.layers_of_model(model, config)
    elif size is not None:
        if size not in count.SIZES:
            raise CommandError(f"--size: got {size!r}, expected {', '.join(count.SIZES)}")
        layers, parameters = count.SIZES[size].adapted(rank), count.SIZES[size].parameters
        count.check_rank(layers)
    else:
        layers = count.parse_shapes(shape or (), rank)
        parameters = sum(group.K * group.N * group.count for group in layers)
    out.write_json(count.run(layers, parameters, tokens, dropout, base_dtype, _dtype(adapter_dtype), out))


def _device(name: str | None) -> Any:
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise CommandError(f"--device: got {name!r}, expected cpu or cuda")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise CommandError(f"--device: got {name!r}, but torch {torch.__version__} sees no CUDA device; use cpu")
    return torch.device(name)


def _dtype(name: str) -> Any:
    from .commands.cases import DTYPES

    if name not in DTYPES:
        raise CommandError(f"--dtype: got {name!r}, expected one of {', '.join(DTYPES)}")
    return DTYPES[name]


def _yes_no(value: Any) -> str:
    return {True: "yes", False: "no", None: "unknown"}.get(value, value) if not isinstance(value, str) else value


def _environment_rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    cpu = found["cpu"]
    capabilities = ", ".join(name for name, there in cpu["capabilities"].items() if there) or "none known"
    rows = [
        ("lora_kernels", f"{found['lora_kernels']}, commit {found['commit'] or 'unknown'}"),
        ("Python", f"{found['python']}, {found['platform']}"),
        *((name, version or "not installed") for name, version in found["packages"].items()),
        ("CPU", f"{cpu['name']}, {cpu['threads']} threads, {cpu['vector_level']}"),
        ("CPU instructions", capabilities),
        ("extensions", ", ".join(found["extensions"]) or "none was built"),
        ("bf16 products on the CPU", f"native: {_yes_no(cpu['native_bf16_matmul'])}"),
    ]
    if not found["gpus"]:
        rows.append(("CUDA devices", "none"))
    for index, gpu in enumerate(found["gpus"]):
        memory = format_bytes(gpu["memory_bytes"])
        name = f"{gpu['name']}, sm_{gpu['capability'].replace('.', '')}"
        rows.append((f"cuda:{index}", f"{name}, {memory}, driver {gpu['driver']}"))
    return rows


def main() -> None:
    """Run the command line; bad input is one line on stderr and exit code 2."""
    try:
        app(prog_name="lora-kernels")
    except CommandError as error:
        print(f"lora-kernels: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
