"""Tiles: the candidates of each kernel, their times, and the choice."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from ...cases.linear import wrong as wrong_results
from ...plan import use_backend
from ..timing import interleaved
from . import calls

KEEP = 0.98  # another tile than the table's must take at most this part of its time
GATE = 384, 512, 384  # rows and features of a layer whose results a tile is to get right: several tiles each way
FIELDS = ("rows", "columns", "warps", "stages", "depth", "maxnreg")  # of the candidates, beside the table's own tile
CANDIDATES: dict[str, tuple[tuple[int, ...], ...]] = {
    "project": ((64, 128, 8, 4), (64, 64, 8, 4), (64, 128, 4, 3), (128, 64, 8, 3), (32, 128, 4, 4), (32, 256, 8, 3)),
    "prefill": ((64, 128, 4), (128, 128, 8), (64, 256, 8), (32, 256, 4), (128, 64, 8)),
    "grad_dy": ((32, 512, 8, 2), (64, 128, 8, 3), (64, 256, 8, 2), (32, 256, 8, 3), (64, 128, 4, 3)),
    "grad_x": ((32, 128, 8, 3), (64, 128, 8, 2), (64, 128, 8, 2, 0, 128), (64, 64, 8, 3), (64, 64, 4, 2)),
    "lowrank_product": ((128, 128, 8, 4, 32), (128, 256, 8, 3, 64), (64, 256, 8, 3, 64), (64, 128, 4, 4, 64)),
    "lowrank_product_tma": ((128, 256, 8, 4, 64), (128, 128, 8, 4, 64), (256, 128, 8, 3, 64), (128, 128, 4, 4, 64)),
}


def candidate_tiles(kernel: str, arithmetic: str, rank: int, device: torch.device) -> list[Any]:
    """The table's own tile, then the others that are legal."""
    from ...backends.triton.tuned import Tile, illegal
    from ...backends.triton.tuning import gpu, tiles

    own, _ = tiles(kernel, arithmetic, rank, gpu(device).capability)
    others = [Tile(**dict(zip(FIELDS, numbers, strict=False)), tma=own.tma) for numbers in CANDIDATES[kernel]]
    return [own, *(tile for tile in others if tile != own and illegal(kernel, arithmetic, tile) is None)]


def time_tiles(
    kernel: str, arithmetic: str, rank: int, options: list[Any], sizes: calls.Sizes, device: torch.device
) -> dict[Any, float]:
    """tile -> median seconds of the kernel at M tokens; tiles that do not compile are left out."""
    from ...backends.triton.compilation import compile_failure
    from ...backends.triton.tuning import trial

    problem = calls.draw(sizes.M, sizes.width, sizes.width, calls.RANK[rank], arithmetic, device)
    call = calls.kernel_call(kernel, problem)

    def with_tile(tile: Any) -> Callable[[], None]:
        def run() -> None:
            trial[kernel] = tile
            try:
                call()
            finally:
                trial.pop(kernel, None)

        return run

    timed = {}
    for tile in options:
        try:
            with_tile(tile)()
            timed[tile] = with_tile(tile)
        except Exception as error:
            if compile_failure(error) is None:
                raise
    named = {str(number): fn for number, fn in enumerate(timed.values())}
    timings = interleaved(named, sizes.repeats, warmup=3, device=device)
    return {tile: timings[str(number)].median for number, tile in enumerate(timed)}


def choose_tile(
    kernel: str, arithmetic: str, rank: int, options: list[Any], seconds: dict[Any, float], device: torch.device
) -> dict[str, Any] | None:
    """The fastest tile whose results pass the gate; the table's own unless another is ahead of it by more than noise."""
    from ...backends.triton.tuning import trial

    own = options[0]
    ahead = [tile for tile in options if tile in seconds and seconds[tile] <= KEEP * seconds.get(own, float("inf"))]
    for tile in [*sorted(ahead, key=seconds.__getitem__), own]:
        if tile not in seconds:
            continue
        problem = calls.draw(*GATE, calls.RANK[rank], arithmetic, device)
        trial.update({kernel: tile, **({"dataflow": "lowrank_product"} if kernel.startswith("lowrank_product") else {})})
        try:
            with use_backend("triton"):
                wrong = wrong_results(problem)
        finally:
            trial.clear()
        if not wrong:
            microseconds = {label(option): 1e6 * value for option, value in seconds.items()}
            about = {"kernel": kernel, "arithmetic": arithmetic, "rank": rank}
            return {**about, "tile": asdict(tile), "us": 1e6 * seconds[tile], "measured_us": microseconds}
    return None


def label(tile: Any) -> str:
    """64x128 w8s4, with a product's depth 128x256x64 w8s3, with a limit of registers 64x128 w8s4 r128."""
    fields = tile if isinstance(tile, dict) else asdict(tile)
    sizes = [fields["rows"], fields["columns"], *([fields["depth"]] if fields["depth"] else [])]
    limit = f" r{fields['maxnreg']}" if fields.get("maxnreg") else ""
    return f"{'x'.join(map(str, sizes))} w{fields['warps']}s{fields['stages']}{limit}"
