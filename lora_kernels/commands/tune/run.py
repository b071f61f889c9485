"""`lora-kernels tune`: measure this GPU's tiles and dataflows, and write the file that dispatch reads (triton/tuned.py).

For each side kernel and product, dtype class and rank class, candidate tiles in turns; for each direction, contraction
and number of tokens, prefill and the vendor's product beside both in one kernel. A choice must be ahead by more than noise, and
its results must pass the correctness gate. The same measurements give the same file.
"""

import json
from pathlib import Path
from typing import Any

import torch

from ...plan import load
from ..console import CommandError, Output, make_writable, write_whole
from ..environment import environment
from .calls import DTYPES, Sizes
from .flows import choose_flow, time_flows
from .report import print_choices
from .tiles import candidate_tiles, choose_tile, time_tiles


def run(output: Output, folder: Path | None, quick: bool) -> dict[str, Any]:
    """Measure, print the choices, write the file; returns its content. Raises CommandError without a GPU and Triton."""
    device = _device()
    from ...backends.triton.tuned import file_name, user_folder

    header = environment()
    gpu = torch.cuda.get_device_properties(device)
    about = {"device": gpu.name, "capability": [gpu.major, gpu.minor]}
    output.print(f"Tuning for {gpu.name}: {'three' if quick else 'six'} minutes or so, most of them compilation", markup=False)
    target = (folder or user_folder()) / file_name(gpu.name)
    make_writable(target.parent, "--folder")  # found out before the minutes of measuring
    result = tune(device, about, header, Sizes(), (32,) if quick else (32, 64), output)
    write(result, target)
    print_choices(result, output)
    output.print(f"written to {target}; dispatch reads it from the next process on", markup=False)
    return result


def _device() -> torch.device:
    if not torch.cuda.is_available():
        raise CommandError(f"tune: there is nothing to tune: torch {torch.__version__} sees no CUDA device")
    if isinstance(triton := load("triton", "linear"), str):
        raise CommandError(f"tune: the Triton backend is not there: {triton}")
    device = torch.device("cuda", torch.cuda.current_device())
    if reason := triton.gpu.why_not(device, "auto"):
        raise CommandError(f"tune: the Triton backend cannot compute here: {reason}")
    return device


def tune(
    device: torch.device, about: dict[str, Any], header: dict[str, Any], sizes: Sizes, ranks: tuple[int, ...], output: Output
) -> dict[str, Any]:
    """The content of the file. Tiles come first: the dataflows are measured with the chosen ones."""
    from ...backends.triton import tuned, tuning

    chosen: dict[str, list[dict[str, Any]]] = {"dataflow": [], "tiles": []}
    products = "lowrank_product_tma" if tuning.gpu(device).capability in tuning.TMA_GPUS else "lowrank_product"
    for kernel in ("project", "prefill", "grad_dy", "grad_x", products):
        for arithmetic in DTYPES:
            for rank in ranks:
                options = candidate_tiles(kernel, arithmetic, rank, device)
                with output.status(f"{kernel}, {arithmetic}, rank {rank}"):
                    seconds = time_tiles(kernel, arithmetic, rank, options, sizes, device)
                    row = choose_tile(kernel, arithmetic, rank, options, seconds, device)
                chosen["tiles"] += [row] if row else []
    best = {(row["kernel"], row["arithmetic"], row["rank"]): tuned.Tile(**row["tile"]) for row in chosen["tiles"]}
    for direction in tuned.DIRECTIONS:
        for contraction in sizes.contractions:
            for M in sizes.tokens:
                with output.status(f"{direction}, contraction {contraction}, {M} tokens"):
                    times = time_flows(direction, contraction, M, best, sizes, device)
                classes = tuning.shape_class(M, contraction)
                chosen["dataflow"].append(choose_flow(direction, *classes, times))
    written_by = {name: header[name] for name in ("lora_kernels", "commit", "packages", "gpus")}
    return {"format": tuned.FORMAT, **about, "written_by": written_by, **chosen}


def write(result: dict[str, Any], target: Path) -> None:
    """Write the file whole or not at all: another process may read it meanwhile."""
    make_writable(target.parent, "--folder")
    write_whole(target, json.dumps(result, indent=1, sort_keys=True) + "\n", "--folder")
