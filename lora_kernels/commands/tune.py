"""`lora-kernels tune`: measure this GPU's tiles and dataflows, and write the file that dispatch reads (triton/tuned.py).

For each side kernel and fused product, dtype class and rank class, candidate tiles in turns; for each direction, contraction
and number of tokens, prefill and the vendor's product beside the fused kernel. A choice must be ahead by more than noise, and
its results must pass the correctness gate. The same measurements give the same file.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..plan import load, use_backend
from .accuracy_gate import Problem, gate
from .console import CommandError, Output
from .environment import environment
from .measure import interleaved

KEEP = 0.98  # another tile than the table's must take at most this part of its time
FUSE = 0.99  # and the fused kernel this part of prefill's, at every dtype class
DTYPES = {"16": (torch.bfloat16, torch.bfloat16), "mixed": (torch.bfloat16, torch.float32)}
RANK = {32: 16, 64: 64}  # the rank at which a class is measured
P, SEED = 0.1, 1
Seconds = dict[str, float]
FIELDS = ("rows", "columns", "warps", "stages", "depth")  # of the candidates; the table's own tile is always tried too
CANDIDATES: dict[str, tuple[tuple[int, ...], ...]] = {
    "project": ((64, 64, 8, 4), (64, 128, 8, 3), (64, 128, 4, 3), (128, 64, 8, 3), (32, 128, 4, 4), (64, 256, 8, 3)),
    "prefill": ((64, 128, 4), (128, 128, 8), (64, 256, 8), (32, 256, 4), (128, 64, 8)),
    "grad_dy": ((32, 128, 8, 3), (64, 128, 8, 3), (64, 256, 8, 2), (32, 256, 8, 3), (64, 128, 4, 3)),
    "grad_x": ((32, 128, 8, 3), (64, 128, 8, 2), (64, 64, 8, 3), (32, 256, 8, 2), (64, 128, 4, 2)),
    "fused": ((128, 128, 8, 4, 32), (128, 256, 8, 3, 64), (64, 256, 8, 3, 64), (64, 128, 4, 4, 64)),
    "fused_tma": ((128, 256, 8, 4, 64), (128, 128, 8, 4, 64), (256, 128, 8, 3, 64), (128, 128, 4, 4, 64)),
}


@dataclass(frozen=True)
class Sizes:
    """M of the tiles' cases; the other sizes by class, `width` where no class says which."""

    M: int = 8192
    width: int = 4096
    contractions: tuple[int, ...] = (4096, 8192, 14336)
    tokens: tuple[int, ...] = (512, 8192)
    repeats: int = 20


def run(output: Output, folder: Path | None, quick: bool) -> dict[str, Any]:
    """Measure, print the choices, write the file; returns its content. Raises CommandError without a GPU and Triton."""
    device = _device()
    from ..backends.triton.tuned import file_name, user_folder

    header = environment()
    gpu = torch.cuda.get_device_properties(device)
    about = {"device": gpu.name, "capability": [gpu.major, gpu.minor]}
    output.print(f"Tuning for {gpu.name}: {'three' if quick else 'six'} minutes or so, most of them compilation", markup=False)
    result = tune(device, about, header, Sizes(), (32,) if quick else (32, 64), output)
    target = (folder or user_folder()) / file_name(gpu.name)
    write(result, target)
    print_choices(result, output)
    output.print(f"written to {target}; dispatch reads it from the next process on", markup=False)
    return result


def _device() -> torch.device:
    if not torch.cuda.is_available():
        raise CommandError(f"tune: there is nothing to tune: torch {torch.__version__} sees no CUDA device")
    if isinstance(triton := load("triton"), str):
        raise CommandError(f"tune: the Triton backend is not there: {triton}")
    device = torch.device("cuda", torch.cuda.current_device())
    if reason := triton.why_not(torch.empty(16, 16, dtype=torch.bfloat16, device=device), None, None, None):
        raise CommandError(f"tune: the Triton backend cannot compute here: {reason}")
    return device


def tune(
    device: torch.device, about: dict[str, Any], header: dict[str, Any], sizes: Sizes, ranks: tuple[int, ...], output: Output
) -> dict[str, Any]:
    """The content of the file. Tiles come first: the dataflows are measured with the chosen ones."""
    from ..backends.triton import tuned, tuning

    chosen: dict[str, list[dict[str, Any]]] = {"dataflow": [], "tiles": []}
    products = "fused_tma" if tuning.gpu(device).capability in tuning.TMA_GPUS else "fused"
    for kernel in ("project", "prefill", "grad_dy", "grad_x", products):
        for arithmetic in DTYPES:
            for rank in ranks:
                options = candidate_tiles(kernel, arithmetic, rank)
                with output.console.status(f"{kernel}, {arithmetic}, rank {rank}"):
                    seconds = time_tiles(kernel, arithmetic, rank, options, sizes, device)
                    row = choose_tile(kernel, arithmetic, rank, options, seconds, device)
                chosen["tiles"] += [row] if row else []
    best = {(row["kernel"], row["arithmetic"], row["rank"]): tuned.Tile(**row["tile"]) for row in chosen["tiles"]}
    for direction in tuned.DIRECTIONS:
        for contraction in sizes.contractions:
            for M in sizes.tokens:
                with output.console.status(f"{direction}, contraction {contraction}, {M} tokens"):
                    times = time_flows(direction, contraction, M, best, sizes, device)
                classes = tuning.shape_class(M, contraction)
                chosen["dataflow"].append(choose_flow(direction, *classes, times))
    written_by = {name: header[name] for name in ("lora_kernels", "commit", "packages", "gpus")}
    return {"format": tuned.FORMAT, **about, "written_by": written_by, **chosen}


def candidate_tiles(kernel: str, arithmetic: str, rank: int) -> list[Any]:
    """The table's own tile, then the others that are legal."""
    from ..backends.triton.tuned import Tile, illegal
    from ..backends.triton.tuning import TILES

    own = TILES[kernel, arithmetic, rank]
    others = [Tile(**dict(zip(FIELDS, numbers, strict=False)), tma=own.tma) for numbers in CANDIDATES[kernel]]
    return [own, *(tile for tile in others if tile != own and illegal(kernel, arithmetic, tile) is None)]


def time_tiles(
    kernel: str, arithmetic: str, rank: int, options: list[Any], sizes: Sizes, device: torch.device
) -> dict[Any, float]:
    """tile -> median seconds of the kernel at M tokens; tiles that do not compile are left out."""
    from ..backends.triton.tuning import compile_failure, trial

    problem = _problem(sizes.M, sizes.width, sizes.width, RANK[rank], arithmetic, device)
    call = kernel_call(kernel, problem)

    def with_tile(tile: Any) -> Callable[[], None]:
        def run() -> None:
            trial[kernel] = tile
            try:
                call()
            finally:
                trial.pop(kernel, None)

        return run

    calls = {}
    for tile in options:
        try:
            with_tile(tile)()
            calls[tile] = with_tile(tile)
        except Exception as error:
            if compile_failure(error) is None:
                raise
    named = {str(number): fn for number, fn in enumerate(calls.values())}
    timings = interleaved(named, sizes.repeats, warmup=3, device=device)
    return {tile: timings[str(number)].median for number, tile in enumerate(calls)}


def choose_tile(
    kernel: str, arithmetic: str, rank: int, options: list[Any], seconds: dict[Any, float], device: torch.device
) -> dict[str, Any] | None:
    """The fastest tile whose results pass the gate; the table's own unless another is ahead of it by more than noise."""
    from ..backends.triton.tuning import trial

    own = options[0]
    ahead = [tile for tile in options if tile in seconds and seconds[tile] <= KEEP * seconds.get(own, float("inf"))]
    for tile in [*sorted(ahead, key=seconds.__getitem__), own]:
        if tile not in seconds:
            continue
        problem = _problem(384, 512, 384, RANK[rank], arithmetic, device)
        trial.update({kernel: tile, **({"dataflow": "fused"} if kernel.startswith("fused") else {})})
        try:
            with use_backend("triton"):
                wrong = gate(problem, SEED)
        finally:
            trial.clear()
        if not wrong:
            microseconds = {_label(option): 1e6 * value for option, value in seconds.items()}
            about = {"kernel": kernel, "arithmetic": arithmetic, "rank": rank}
            return {**about, "tile": asdict(tile), "us": 1e6 * seconds[tile], "measured_us": microseconds}
    return None


def time_flows(
    direction: str, contraction: int, M: int, best: dict[tuple[str, str, int], Any], sizes: Sizes, device: torch.device
) -> dict[str, Seconds]:
    """dtype class -> dataflow -> median seconds of what differs between the two, with the tiles chosen before."""
    from ..backends.triton.tuning import trial

    times = {}
    for arithmetic in DTYPES:
        K, N = (contraction, sizes.width) if direction == "forward" else (sizes.width, contraction)
        problem = _problem(M, K, N, RANK[32], arithmetic, device)
        trial.update({kernel: tile for (kernel, kind, rank), tile in best.items() if (kind, rank) == (arithmetic, 32)})
        try:
            timings = interleaved(dict(flow_calls(direction, problem)), sizes.repeats, warmup=3, device=device)
        finally:
            trial.clear()
        times[arithmetic] = {name: timing.median for name, timing in timings.items()}
    return times


def choose_flow(direction: str, contraction: str, tokens: str, times: dict[str, Seconds]) -> dict[str, Any]:
    """Fused where it is ahead of prefill by more than noise at every dtype class."""
    wins = all(seconds["fused"] <= FUSE * seconds["prefill"] for seconds in times.values())
    return {
        "direction": direction,
        "contraction": contraction,
        "tokens": tokens,
        "choice": "fused" if wins else "prefill",
        **{f"{flow}_us": {kind: 1e6 * t[flow] for kind, t in times.items()} for flow in ("prefill", "fused")},
    }


def kernel_call(kernel: str, problem: Problem) -> Callable[[], object]:
    """One call of a kernel over `problem`'s tensors; a fused product in both directions."""
    from ..backends.torch.linear import Needs
    from ..backends.triton import backward, forward, gemm

    x, W, A, B, dy = problem.x.detach(), problem.W, problem.A, problem.B, problem.dy
    seed, h = _seed(x.device), x.new_ones(len(x), problem.r, dtype=A.dtype)
    both = Needs(True, True, False, False)
    return {
        "project": lambda: forward.project(x, A, P, seed),
        "prefill": lambda: forward.prefill(h, B, 2.0, None, x.dtype),
        "grad_dy": lambda: backward.grad_dy(dy, h, B, 2.0, Needs(True, True, True, False)),
        "grad_x": lambda: backward.grad_x(x, h, A, P, seed, both, x.dtype),
    }.get(kernel) or (lambda: (gemm.forward(x, W, h, B, 2.0, None), gemm.backward(dy, W, h, A, P, seed)))


def flow_calls(direction: str, problem: Problem) -> Iterator[tuple[str, Callable[[], object]]]:
    """The two ways to a product with its low-rank term. Backward, dA is in both: prefill shares its pass over x."""
    from ..backends.torch.linear import Needs, add_product
    from ..backends.triton import backward, forward, gemm

    x, W, A, B, dy = problem.x.detach(), problem.W, problem.A, problem.B, problem.dy
    seed, h = _seed(x.device), x.new_ones(len(x), problem.r, dtype=A.dtype)
    both, only_dA = Needs(True, True, False, False), Needs(False, True, False, False)
    if direction == "forward":
        yield "prefill", lambda: add_product(forward.prefill(h, B, 2.0, None, x.dtype), x, W.T)
        yield "fused", lambda: gemm.forward(x, W, h, B, 2.0, None)
        return

    def prefill() -> None:
        dx, _ = backward.grad_x(x, h, A, P, seed, both, x.dtype)
        add_product(dx, dy, W)  # type: ignore[arg-type]

    yield "prefill", prefill
    yield "fused", lambda: (backward.grad_x(x, h, A, P, seed, only_dA, x.dtype), gemm.backward(dy, W, h, A, P, seed))


def write(result: dict[str, Any], target: Path) -> None:
    """Write the file whole or not at all: another process may read it meanwhile."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = target.with_suffix(".new")
        staging.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        staging.replace(target)
    except OSError as error:
        raise CommandError(f"tune: cannot write {target}: {error.strerror}") from error


def print_choices(result: dict[str, Any], output: Output) -> None:
    """The choices and the numbers behind them."""
    rows = [
        (row["direction"], row["contraction"], row["tokens"], *_pairs(row["prefill_us"], row["fused_us"]), row["choice"])
        for row in result["dataflow"]
    ]
    kinds = [f"{kind}: prefill / fused µs" for kind in (result["dataflow"][0]["prefill_us"] if rows else ())]
    output.table("Dataflow", ("direction", "contraction", "tokens", *kinds, "choice"), rows)
    tiles = [
        (row["kernel"], row["arithmetic"], row["rank"], f"{row['us']:,.1f}", f"{max(row['measured_us'].values()):,.1f}",
         len(row["measured_us"]), _label(row["tile"]))
        for row in result["tiles"]
    ]  # fmt: skip
    output.table("Tiles", ("kernel", "dtypes", "rank to", "µs", "slowest µs", "tried", "choice"), tiles)


def _pairs(prefill: Seconds, fused: Seconds) -> list[str]:
    return [f"{prefill[kind]:,.1f} / {fused[kind]:,.1f}" for kind in prefill]


def _label(tile: Any) -> str:
    """64x128 w8s4, with a product's depth: 128x256x64 w8s3."""
    fields = tile if isinstance(tile, dict) else asdict(tile)
    sizes = [fields["rows"], fields["columns"], *([fields["depth"]] if fields["depth"] else [])]
    return f"{'x'.join(map(str, sizes))} w{fields['warps']}s{fields['stages']}"


def _problem(M: int, K: int, N: int, R: int, arithmetic: str, device: torch.device) -> Problem:
    x, adapters = DTYPES[arithmetic]
    return Problem.draw(M, K, N, R, P, x, device, SEED).with_adapters(adapters)


def _seed(device: torch.device) -> torch.Tensor:
    return torch.full((), SEED, dtype=torch.int64, device=device)
