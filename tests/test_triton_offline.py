"""Every kernel compiles for every GPU family, and its registers, spills and shared memory are those written down."""

import json
import os
import re
from pathlib import Path

import pytest
import triton
import triton_offline
from typer.testing import CliRunner

from lora_kernels.backends.triton import tuning
from lora_kernels.cli import app
from lora_kernels.commands.console import CommandError
from lora_kernels.commands.report import kernels as kernel_report

# Local loads and stores that are known and accepted: key -> number. All others spill nothing. float16 beside float32 adapters
# takes the tiles of bfloat16: with them grad_dy has 26 instructions an element on sm_90, 45 with one that spills nothing.
# glu_backward has 61 with strips of 128 columns, of which it reloads a few, and 77 with half the rows and no spills. Those of
# float32 beside 64 ranks with 4 warps are the tiles that replace others, should they not compile.
SPILLS: dict[str, int] = {
    "glu | fp32 fp32 | r64 | sm_80 | 32x32 w4s2 drop": 6,
    "glu_backward | fp32 fp32 | r16 | sm_80 | 32x32 w8s2 drop": 16,
    "grad_x | fp32 fp32 | r64 | sm_80 | 16x32 w4s2 drop": 6,
    "grad_x | fp32 fp32 | r64 | sm_80 | 32x32 w8s2 drop": 11,
    "grad_dy | fp16 fp32 | r64 | sm_80 | 32x64 w8s2": 6,
    "segment_shrink | fp16 fp32 | r64 | sm_80 | 32x64 w4s2": 6,
    "grad_x | fp16 fp32 | r16 | sm_80 | 32x128 w8s3 drop": 20,
    "nf4_product | bf16 bf16 | r16 | sm_86 | 64x128x64 w8s3": 2,
    "glu_backward | bf16 fp32 | r64 | sm_86 | 16x32 w4s2 drop": 3,
    "nf4_product | bf16 fp32 | r16 | sm_86 | 64x128x64 w8s3": 2,
    "nf4_product | bf16 bf16 | r16 | sm_89 | 64x128x64 w8s3": 2,
    "glu_backward | bf16 fp32 | r64 | sm_89 | 16x32 w4s2 drop": 3,
    "nf4_product | bf16 fp32 | r16 | sm_89 | 64x128x64 w8s3": 2,
    "glu_backward | bf16 bf16 | r16 | sm_90 | 64x128 w8s2 drop": 17,
    "glu_backward | bf16 bf16 | r16 | sm_90 | 64x128 w8s2 drop gelu ungated dc": 20,
    "glu_backward | bf16 bf16 | r16 | sm_90 | 64x128 w8s2 drop gelu_tanh": 15,
    "glu | fp32 fp32 | r64 | sm_90 | 32x32 w4s2 drop": 12,
    "glu_backward | fp32 fp32 | r64 | sm_90 | 16x32 w4s2 drop": 249,
    "grad_x | fp32 fp32 | r64 | sm_90 | 16x32 w4s2 drop": 6,
    "grad_x | fp32 fp32 | r64 | sm_90 | 32x32 w8s2 drop": 14,
    "grad_dy | fp16 fp32 | r16 | sm_90 | 32x256 w4s3": 196,
    "lowrank_product_tma | bf16 bf16 | r16 | sm_100 | 128x256x64 w8s3 drop": 6,
    "lowrank_product_tma | fp16 fp16 | r16 | sm_100 | 128x256x64 w8s3 drop": 6,
    "glu | fp32 fp32 | r64 | sm_100 | 32x32 w4s2 drop": 3,
    "glu_backward | fp32 fp32 | r64 | sm_100 | 16x32 w4s2 drop": 103,
    "glu_backward | fp32 fp32 | r64 | sm_100 | 16x32 w8s2 drop": 8,
    "project | fp32 fp32 | r64 | sm_100 | 32x32 w4s2 drop x2": 163,
    "project | fp32 fp32 | r64 | sm_100 | 32x32 w4s2 drop x3": 31,
    "glu_backward | bf16 fp32 | r64 | sm_100 | 16x32 w4s2 drop": 18,
    "segment_shrink | fp16 fp32 | r64 | sm_100 | 32x64 w4s2 drop": 4,
    "glu_backward | bf16 bf16 | r16 | sm_120 | 32x128 w8s2": 3,
    "glu | fp32 fp32 | r64 | sm_120 | 32x32 w4s2 drop": 6,
    "glu_backward | fp32 fp32 | r64 | sm_120 | 16x32 w4s2 drop": 65,
    "grad_x | fp32 fp32 | r64 | sm_120 | 32x32 w8s2 drop": 10,
    "grad_dy | fp16 fp32 | r64 | sm_120 | 32x64 w8s2": 6,
    "segment_shrink | fp16 fp32 | r64 | sm_120 | 32x64 w4s2 drop": 4,
    "grad_x | fp16 fp32 | r16 | sm_120 | 32x128 w8s3 drop": 7,
    "grad_x | fp16 fp32 | r64 | sm_120 | 32x64 w8s2 drop": 14,
}


@pytest.fixture(scope="module")
def written() -> dict[str, dict]:
    return json.loads(triton_offline.TABLE.read_text())


def test_the_table_holds_every_tile(written: dict[str, dict]) -> None:
    everywhere = {(*key, 90 if tile.tma else 80): tile for key, tile in tuning.TILES.items()}
    for (kernel, kind, rank, capability), tile in (everywhere | {(*key, 90): t for key, t in tuning.SM_90.items()}).items():
        shape = f"{tile.rows}x{tile.columns}" + (f"x{tile.depth}" if tile.depth else "")
        pair = {"16": "bf16 bf16", "mixed": "bf16 fp32", "32": "fp32 fp32"}[kind]
        R = 16 if rank == 32 else rank
        limit = f" r{tile.maxnreg}" if tile.maxnreg else ""
        group, kernel = kernel.endswith("_group"), kernel.removesuffix("_group")
        stem = f"{kernel} | {pair} | r{R} | sm_{capability} | {shape} w{tile.warps}s{tile.stages}{limit}"
        assert any(key.startswith(stem) and (" x" in key[len(stem) :]) == group for key in written), stem


def test_what_is_written_fits_the_hardware(written: dict[str, dict]) -> None:
    """Where the best tile needs more shared memory than a GPU has, the next one is there for it."""
    for key, row in written.items():
        capability = int(key.split("sm_")[1].split()[0])
        fits = row["shared"] <= 1024 * triton_offline.SHARED_LIMIT[capability]
        assert fits or any(_replaces(other, key, written) for other in written), key
        assert row["registers"] <= 255
        assert row["spills"] == SPILLS.get(key, 0), key


def _replaces(other: str, key: str, written: dict[str, dict]) -> bool:
    """The tiles that replace others are compiled for one pair of each class of dtypes, the one that needs most."""
    (kernel, pair, *_), (other_kernel, other_pair, *_) = key.split(" | "), other.split(" | ")
    needs_most = {"fp16 fp16": "bf16 bf16", "bf16 fp32": "fp16 fp32", "fp32 fp32 tf32": "fp32 fp32"}
    same = kernel == other_kernel and other_pair in (pair, needs_most.get(pair))
    same = same and key.split(" | ")[3] == other.split(" | ")[3]
    capability = int(key.split("sm_")[1].split()[0])
    return same and written[other]["shared"] <= 1024 * triton_offline.SHARED_LIMIT[capability]


def test_the_products_use_the_matrix_instructions_of_their_gpu(written: dict[str, dict]) -> None:
    instruction = {90: "wgmma", 100: "tcgen05"}
    for key, row in written.items():
        capability = int(key.split("sm_")[1].split()[0])
        if key.startswith("lowrank_product_tma"):
            assert row["matrix"] == instruction[capability], key
        elif key.startswith(("sum", "drop", "nf4_dequantize")):
            assert row["matrix"] == "none", key
        elif key.startswith(("magnitude", "eggroll")):
            assert row["matrix"] == "fma", key  # v·u + c, sums of dy ⊙ v or of x ⊙ A_j: no matrix product; float32 factors
        elif " alone" in key:
            assert row["matrix"] in ("none", "fma"), key  # the activation of experts, element by element
        elif "fp32 fp32" in key and "tf32" not in key:
            assert row["matrix"] == "fma", key
        else:
            assert "mma" in row["matrix"] or row["matrix"] == "tcgen05", key


def test_every_rank_loads_asynchronously(written: dict[str, dict]) -> None:
    """Ranks below 16 and between powers of two, in the main loops of the kernels that have one: no load of two bytes."""
    found = {}
    for key, row in written.items():
        kernel, pair, rank, _, _ = key.split(" | ")
        if kernel in ("project", "grad_dy", "grad_x") and rank in ("r4", "r8", "r12", "r24"):
            found[kernel, pair, rank] = row
            assert row["two_byte_loads"] == 0, key
            assert row["asynchronous_loads"] > 0, key
    assert len(found) == 3 * (4 + 1)  # bfloat16 at each rank, and rank 8 with float32 adapters


def test_grad_x_shares_a_processor_with_another(written: dict[str, dict]) -> None:
    rows = [
        row
        for key, row in written.items()
        if re.match(r"grad_x \| bf16 \w+ \| r(8|16) \| sm_90 \| .* drop( dA| dx| few)?$", key)
    ]
    assert len(rows) >= 4
    assert all(row["ctas_per_sm"] >= 2 and row["spills"] == 0 for row in rows)


def test_float32_adapters_cost_a_prefill_little(written: dict[str, dict]) -> None:
    """Beside those of bfloat16: no search for NaN, and no sum of products through shared memory."""
    (plain,), (mixed,) = (
        [row["per_element"] for key, row in written.items() if re.match(rf"prefill \| bf16 {adapter} \| r8 \| sm_90", key)]
        for adapter in ("bf16", "fp32")
    )
    assert mixed <= 1.1 * plain


def test_the_mask_costs_about_ten_instructions_per_element(written: dict[str, dict]) -> None:
    """The same kernel with and without dropout, where the mask is used once."""
    for key, row in written.items():
        if key.startswith("project | bf16 bf16 | r16") and key.endswith(" drop"):
            assert row["per_element"] - written[key.removesuffix(" drop")]["per_element"] <= 11, key


# Compiled in every run: each kernel in 16 bits and in float32, at rank 16, so that none changes unseen. With
# LORA_KERNELS_EVERY_KERNEL set, as in the CI workflow, for every GPU and rank, which takes two processors ten minutes more.
USUAL = {(90, "fp16 fp16"), (100, "fp32 fp32")}
EVERY = "LORA_KERNELS_EVERY_KERNEL" in os.environ
JOBS = [
    (gpu, pairs, ranks if EVERY else ranks[:1])
    for gpu, pairs, ranks in triton_offline.jobs()
    if EVERY or (gpu, pairs[0]) in USUAL
]


@pytest.mark.skipif(triton.__version__ != "3.6.0", reason="the table was written by Triton 3.6.0")
@pytest.mark.parametrize("job", JOBS, ids=lambda job: f"sm_{job[0]}-{job[1][0]}".replace(" ", "-"))
def test_compiled_anew_it_is_the_same(written: dict[str, dict], job: tuple) -> None:
    compiled = triton_offline.compile_jobs([job])
    different = {key: (row, written.get(key)) for key, row in compiled.items() if row != written.get(key)}
    assert not different, different


def test_the_report_reads_it() -> None:
    rows = kernel_report.kernel_rows()
    assert {row.kernel for row in rows} >= {"project", "prefill", "grad_dy", "grad_x", "lowrank_product_tma", "sum", "drop"}
    project, grad_dy = (next(row for row in rows if (row.kernel, row.rank) == (name, "r16")) for name in ("project", "grad_dy"))
    assert project.megabytes == pytest.approx(8192 * (4096 + 16) * 2 / 1e6)  # its 256 programs leave nothing to add up
    assert project.h100_us_predicted >= 1e6 * project.megabytes * 1e6 / 3.0e12
    strips, ranges = 8, 32  # of 512 columns and of rows: g and dB in so many parts of 4 bytes, written and read
    of_parts = 8 * 16 * (strips * 8192 + ranges * 4096)
    assert grad_dy.megabytes == pytest.approx((8192 * (4096 + 2 * 16) * 2 + of_parts) / 1e6)
    assert {row.bound for row in rows} <= {"bytes", "issue", "occupancy", "flops"}


def test_the_report_cuts_as_the_kernels_do() -> None:
    for width, tile, programs in ((8192, 32, 8), (8192, 64, 32), (4096, 256, 256), (4096, 256, 1), (100, 32, 3)):
        wanted = 2 * kernel_report.PROCESSORS
        assert kernel_report.parts(width, tile, programs) == tuning.splits(width, tile, programs, wanted)[0]


def test_the_report_prints_it(tmp_path: Path) -> None:
    command = ["report", "--kernels", "--target", "sm_80", "--dtypes", "bf16 fp32", "--json", str(tmp_path / "kernels.json")]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "kernels.json").read_text())
    assert {row["kernel"] for row in found["kernels"]} >= {"project", "lowrank_product"}
    assert {row[3] for row in found["dataflow"]} == {"prefill"}
    assert "grad_dy" in result.output
    bad = CliRunner().invoke(app, ["report", "--kernels", "--target", "sm_75"])
    assert isinstance(bad.exception, CommandError)
    assert "sm_80" in str(bad.exception)
