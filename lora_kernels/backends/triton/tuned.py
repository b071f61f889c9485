"""What was measured on a GPU: <device>.json, which `lora-kernels tune` writes and dispatch reads.

The user's own file, in $XDG_CACHE_HOME/lora_kernels/tuning (~/.cache by default), comes before the one of this package, in
tuned/ beside this file. A file that is corrupt, of another device or of another format is ignored with one warning that
says why; what is legal in one is stated here alone.
"""

import json
import os
import re
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FORMAT = 2
COMMITTED = Path(__file__).parent / "tuned"
DIRECTIONS = ("forward", "backward")
CONTRACTIONS = ("<=4096", "<=8192", ">8192")  # of the base product: K forward, N backward
TOKENS = ("<=1024", ">1024")
DATAFLOWS = ("prefill", "lowrank_product")
ARITHMETICS = ("16", "mixed", "32")
RANKS = (32, 64)  # classes: padded ranks up to these


@dataclass(frozen=True)
class Tile:
    """A program's tile [rows, columns] and how it is compiled."""

    rows: int
    columns: int
    warps: int
    stages: int = 1
    depth: int = 0  # of a matrix product's step
    tma: bool = False
    maxnreg: int = 0  # registers a thread may have; 0: as many as the compiler wants

    def options(self) -> dict[str, int | None]:
        """How Triton compiles it."""
        return {"num_warps": self.warps, "num_stages": self.stages, "maxnreg": self.maxnreg or None}


def illegal(kernel: str, arithmetic: str, tile: Tile) -> str | None:
    """None if `tile` may be compiled for `kernel`, otherwise what is wrong with it."""
    product = kernel in ("lowrank_product", "lowrank_product_tma", "nf4_product")
    sizes = (tile.rows, tile.columns, *([tile.depth] if product else []))
    if any(size < 16 or size & (size - 1) for size in sizes):
        return f"rows, columns and depth {sizes} must be powers of two from 16"
    if tile.rows * tile.columns > 128 * 256:
        return f"{tile.rows}x{tile.columns} is more than 128x256, whose accumulator fills the registers"
    if tile.warps not in (1, 2, 4, 8, 16) or not 1 <= tile.stages <= 8:
        return f"{tile.warps} warps and {tile.stages} stages, expected 1, 2, 4, 8 or 16 warps and 1 to 8 stages"
    if tile.maxnreg and (tile.maxnreg % 8 or not 32 <= tile.maxnreg <= 248):
        return f"a limit of {tile.maxnreg} registers, expected a multiple of 8 from 32 to 248, or 0 for none"
    if tile.tma != (kernel == "lowrank_product_tma") or (tile.depth > 0) != product:
        return f"tensor descriptors and a depth belong to matrix products, not to {kernel!r}"
    if tile.tma and arithmetic == "mixed" and tile.rows * tile.columns > 128 * 128:
        return "two accumulators over 128x128 do not fit sm_100's tensor memory, and Triton 3.6 then emits an empty kernel"
    return None


@dataclass(frozen=True)
class Measured:
    """The choices of one file and their numbers; `source` is its path."""

    source: str = ""
    dataflow: dict[tuple[str, str, str], dict[str, Any]] = field(default_factory=dict)  # direction, contraction, tokens
    tiles: dict[tuple[str, str, int], dict[str, Any]] = field(default_factory=dict)  # kernel, arithmetic, rank class

    def tile(self, kernel: str, arithmetic: str, rank: int) -> Tile | None:
        """The measured tile of a kernel, None where there is no measurement."""
        row = self.tiles.get((kernel, arithmetic, rank))
        return row["tile"] if row else None

    def flow(self, direction: str, contraction: str, tokens: str) -> str:
        """ "lowrank_product" where it was measured to win, otherwise "prefill"."""
        row = self.dataflow.get((direction, contraction, tokens))
        return row["choice"] if row else "prefill"


def file_name(device: str) -> str:
    """<device>.json with a name that every file system takes."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


def user_folder() -> Path:
    """Where `lora-kernels tune` writes."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora_kernels" / "tuning"


def read(device: str, capability: tuple[int, int]) -> Measured:
    """The user's file for `device`, otherwise the package's, otherwise nothing; a bad one is ignored aloud."""
    for folder in (user_folder, lambda: COMMITTED):
        place: Path | str = "the user's folder of tuning files"
        try:
            place = folder() / file_name(device)
            if place.is_file():
                return parse(json.loads(place.read_text(encoding="utf-8")), device, capability, str(place))
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:  # too deep, or no home
            reason = f"{type(error).__name__}: {error}"
            warnings.warn(f"{place} is ignored ({reason}); run `lora-kernels tune` to write it anew", stacklevel=2)
    return Measured()


def parse(data: dict[str, Any], device: str, capability: tuple[int, int], source: str) -> Measured:
    """The content of a file. Raises ValueError, TypeError or KeyError for anything that is not what `tune` writes."""
    for name, expected in (("format", FORMAT), ("device", device), ("capability", list(capability))):
        if data[name] != expected:
            raise ValueError(f"{name}: got {data[name]!r}, expected {expected!r}")
    flows, tiles = {}, {}
    for row in data["dataflow"]:
        for name, known in (
            ("direction", DIRECTIONS),
            ("contraction", CONTRACTIONS),
            ("tokens", TOKENS),
            ("choice", DATAFLOWS),
        ):
            _known(name, row[name], known)
        flows[row["direction"], row["contraction"], row["tokens"]] = row
    for row in data["tiles"]:
        _known("arithmetic", row["arithmetic"], ARITHMETICS)
        _known("rank", row["rank"], RANKS)
        tile = Tile(**row["tile"])
        if any(type(value) is not (bool if name == "tma" else int) for name, value in row["tile"].items()):
            raise TypeError(f"tile: got {row['tile']}, expected integers, and true or false for tma")
        if not isinstance(row["kernel"], str):
            raise TypeError(f"kernel: got {row['kernel']!r}, expected a name")
        if reason := illegal(row["kernel"], row["arithmetic"], tile):
            raise ValueError(f"tile of {row['kernel']}: {reason}")
        tiles[row["kernel"], row["arithmetic"], row["rank"]] = {**row, "tile": tile}
    return Measured(source, flows, tiles)


def _known(name: str, value: Any, known: tuple[Any, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}: got {value!r}, expected one of {known}")
