"""lora-kernels tune: choices follow (fabricated) measurements, dispatch follows the file, and a bad file is ignored aloud."""

import json
import warnings
from dataclasses import asdict

import pytest
import torch
from accuracy import Case, check_contract
from triton_interpreter import DEVICE

from lora_kernels import cli, use_backend
from lora_kernels.backends.triton import launch, tuned, tuning
from lora_kernels.backends.triton.tuned import Tile
from lora_kernels.commands.console import CommandError, Output
from lora_kernels.commands.report import kernels as kernel_report
from lora_kernels.commands.tune import calls, flows, tiles
from lora_kernels.commands.tune import report as tune_report
from lora_kernels.commands.tune import run as tune

BF16, FP16 = torch.bfloat16, torch.float16
NAME, CAPABILITY = "Test GPU 80GB", (8, 0)
CPU = torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """The interpreter as a GPU with a name, and an empty user cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning, "gpu", lambda device: tuning.Gpu(CAPABILITY, 4, NAME))
    tuning.measured.cache_clear()
    yield tmp_path / "lora_kernels" / "tuning" / "test-gpu-80gb.json"
    tuning.measured.cache_clear()
    tuning.trial.clear()


def content(**changes):
    """A file with one measurement of each kind."""
    flow = {"direction": "forward", "contraction": "<=4096", "tokens": "<=1024", "choice": "lowrank_product"}
    times = {"prefill_us": {"16": 10.0, "mixed": 10.0}, "lowrank_product_us": {"16": 9.0, "mixed": 9.5}}
    tile = {"kernel": "project", "arithmetic": "16", "rank": 32, "tile": asdict(Tile(32, 64, 4, 2)), "us": 5.0,
            "measured_us": {"32x64 w4s2": 5.0}}  # fmt: skip
    whole = {"format": 2, "device": NAME, "capability": list(CAPABILITY), "dataflow": [{**flow, **times}], "tiles": [tile]}
    return {**whole, **changes}


def write(path, data):
    tune.write(data, path)
    tuning.measured.cache_clear()


def test_dispatch_follows_the_file(gpu):
    x, W = torch.empty(64, 128, dtype=BF16), torch.empty(96, 128, dtype=BF16)
    before = tuning.candidates("project", "16", 8, CPU)
    assert tuning.dataflow(x, W, "forward") == "prefill"
    write(gpu, content())
    assert tuning.dataflow(x, W, "forward") == "lowrank_product"
    assert tuning.dataflow(x, W, "backward") == "prefill"
    assert tuning.dataflow(torch.empty(2000, 128, dtype=BF16), W, "forward") == "prefill"  # another class of tokens
    assert tuning.dataflow(torch.empty(64, 5000, dtype=BF16), torch.empty(96, 5000, dtype=BF16), "forward") == "prefill"
    assert tuning.dataflow(x.float(), W.float(), "forward") == "prefill"  # there is no such kernel for float32
    assert tuning.candidates("project", "16", 8, CPU) == (Tile(32, 64, 4, 2), *before)
    assert tuning.candidates("project", "16", 40, CPU)[0] == tuning.TILES["project", "16", 64]  # another class of ranks


def test_a_call_takes_the_measured_tile_and_dataflow_and_is_right(gpu, monkeypatch):
    write(gpu, content())
    launched, first = [], launch.first_that_compiles

    def spy(kernel, kind, R, device, run):
        return first(kernel, kind, R, device, lambda tile: launched.append((kernel, tile)) or run(tile))

    monkeypatch.setattr(launch, "first_that_compiles", spy)
    with use_backend("triton"):
        check_contract(Case(M=40, K=48, N=56, R=8, p=0.3, dtype=FP16).draw())
    assert ("project", Tile(32, 64, 4, 2)) in launched
    kernels = {kernel for kernel, _ in launched}
    assert "lowrank_product" in kernels
    assert "prefill" not in kernels


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ("{", "JSONDecodeError"),
        ("[" * 100_000, "RecursionError"),
        ('{"format": 2, "device": ' + '{"a":' * 100_000, "RecursionError"),
        (content(tiles=[{**content()["tiles"][0], "arithmetic": []}]), "arithmetic: got []"),
        ([], "TypeError"),
        (content(format=99), "format: got 99, expected 2"),
        (content(device="Other GPU"), "device: got 'Other GPU'"),
        (content(capability=[9, 0]), "capability: got"),
        ({"format": 2, "device": NAME, "capability": list(CAPABILITY)}, "KeyError: 'dataflow'"),
        (content(dataflow=[{**content()["dataflow"][0], "choice": "magic"}]), "choice: got 'magic'"),
        (content(tiles=[{**content()["tiles"][0], "tile": asdict(Tile(48, 64, 4, 2))}]), "powers of two"),
        (content(tiles=[{**content()["tiles"][0], "tile": {"rows": 32}}]), "TypeError"),
        (content(tiles=[{**content()["tiles"][0], "rank": 7}]), "rank: got 7"),
    ],
)
def test_a_bad_file_is_ignored_with_one_warning(gpu, data, reason):
    gpu.parent.mkdir(parents=True)
    gpu.write_text(data if isinstance(data, str) else json.dumps(data))
    with pytest.warns(UserWarning, match="is ignored .*run `lora-kernels tune`") as caught:
        assert tuning.candidates("project", "16", 8, CPU) == tuning.tiles("project", "16", 8, CAPABILITY)
    assert reason in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuning.measured(CPU).source == ""  # said once


def no_home():
    raise RuntimeError("Could not determine home directory.")


def of_another_user(path):
    raise PermissionError(13, "Permission denied", str(path))


@pytest.mark.parametrize(("name", "fails"), [("home", no_home), ("is_file", of_another_user)])
def test_a_folder_that_cannot_be_read_is_ignored_with_one_warning(gpu, monkeypatch, name, fails):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(tuned.Path, name, fails)
    with pytest.warns(UserWarning, match=r"is ignored \((RuntimeError: Could not|PermissionError).*run `lora-kernels tune`"):
        assert tuning.measured(CPU).tiles == {}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuning.candidates("project", "16", 8, CPU) == tuning.tiles("project", "16", 8, CAPABILITY)


def test_a_limit_of_registers_is_read_and_a_file_without_one_too(gpu):
    row = {**content()["tiles"][0], "tile": {"rows": 64, "columns": 128, "warps": 8}}
    write(gpu, content(tiles=[row]))
    assert tuning.candidates("project", "16", 8, CPU)[0] == Tile(64, 128, 8)
    limited = Tile(64, 128, 8, maxnreg=128)
    write(gpu, content(tiles=[{**row, "tile": asdict(limited)}]))
    assert tuning.candidates("project", "16", 8, CPU)[0] == limited
    assert limited.options() == {"num_warps": 8, "num_stages": 1, "maxnreg": 128}
    assert tiles.label(limited) == "64x128 w8s1 r128"


def test_the_packages_file_is_read_where_the_user_has_none(gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(tuned, "COMMITTED", tmp_path / "committed")
    write(tmp_path / "committed" / gpu.name, content())
    assert tuning.measured(CPU).flow("forward", "<=4096", "<=1024") == "lowrank_product"
    write(gpu, content(dataflow=[]))
    assert tuning.measured(CPU).source == str(gpu)
    assert tuning.measured(CPU).flow("forward", "<=4096", "<=1024") == "prefill"


def test_the_interpreter_and_cpus_read_no_file(monkeypatch):
    monkeypatch.setattr(tuning, "read", lambda *args: pytest.fail("a file was looked for"))
    tuning.measured.cache_clear()
    assert tuning.INTERPRETED.name == ""
    if DEVICE.type == "cpu":
        assert tuning.measured(CPU) == tuned.Measured()


@pytest.mark.parametrize(
    ("kernel", "kind", "tile", "reason"),
    [
        ("project", "16", Tile(64, 96, 8), "powers of two"),
        ("project", "16", Tile(8, 64, 8), "powers of two"),
        ("project", "16", Tile(256, 256, 8), "more than 128x256"),
        ("project", "16", Tile(64, 64, 3), "3 warps"),
        ("project", "16", Tile(64, 64, 8, 0), "0 stages"),
        ("grad_x", "16", Tile(64, 64, 8, maxnreg=100), "limit of 100 registers"),
        ("grad_x", "16", Tile(64, 64, 8, maxnreg=256), "limit of 256 registers"),
        ("project", "16", Tile(64, 64, 8, 3, 64), "belong to matrix products"),
        ("lowrank_product", "16", Tile(64, 64, 8, 3), "powers of two"),
        ("lowrank_product", "16", Tile(64, 64, 8, 3, 64, True), "belong to matrix products"),
        ("lowrank_product_tma", "mixed", Tile(128, 256, 8, 3, 64, True), "tensor memory"),
    ],
)
def test_illegal_tiles(kernel, kind, tile, reason):
    assert reason in tuned.illegal(kernel, kind, tile)


def test_every_tile_of_the_tables_and_every_candidate_is_legal():
    for (kernel, kind, _), tile in [*tuning.TILES.items(), *tuning.SM_90.items()]:
        assert tuned.illegal(kernel, kind, tile) is None, (kernel, kind, tile)
    for kernel in tiles.CANDIDATES:
        for kind in calls.DTYPES:
            for rank in tuned.RANKS:
                options = tiles.candidate_tiles(kernel, kind, rank, CPU)
                assert options[0] == tuning.TILES[kernel, kind, rank]
                assert len(options) == len(set(options)) >= 2


def fabricated(monkeypatch, tile_seconds, flow_seconds):
    monkeypatch.setattr(tune, "time_tiles", tile_seconds)
    monkeypatch.setattr(tune, "time_flows", flow_seconds)
    monkeypatch.setattr(tiles, "wrong_results", lambda problem: [])
    monkeypatch.setattr(calls, "DTYPES", {"16": (FP16, FP16), "mixed": (FP16, torch.float32)})
    header = {"lora_kernels": "0", "commit": "c", "packages": {}, "gpus": []}
    about = {"device": NAME, "capability": list(CAPABILITY)}
    return lambda: tune.tune(CPU, about, header, calls.Sizes(tokens=(512, 8192)), (32,), Output())


def test_choices_follow_the_measurements_and_are_read_back(gpu, monkeypatch):
    def tile_seconds(kernel, arithmetic, rank, options, sizes, device):
        seconds = dict.fromkeys(options, 10e-6)
        if kernel == "project":
            seconds[options[2]] = 5e-6  # far ahead
        if kernel == "grad_x":
            seconds[options[2]] = 9.9e-6  # within noise: the table's tile stays
        if kernel == "grad_dy":
            del seconds[options[0]]  # the table's tile did not compile
            seconds[options[1]] = 8e-6
        return seconds

    def flow_seconds(direction, contraction, M, best, sizes, device):
        fused = 0.8 if (direction, M) == ("forward", 512) else 0.995
        mixed = 1.2 if contraction == 14336 else fused  # it must win at both dtypes
        return {"16": {"prefill": 1.0, "lowrank_product": fused}, "mixed": {"prefill": 1.0, "lowrank_product": mixed}}

    measure = fabricated(monkeypatch, tile_seconds, flow_seconds)
    result = measure()
    assert result == measure()
    write(gpu, result)
    found = tuning.measured(CPU)
    options = {kernel: tiles.candidate_tiles(kernel, "16", 32, CPU) for kernel in ("project", "grad_x", "grad_dy")}
    assert found.tile("project", "16", 32) == options["project"][2]
    assert found.tile("grad_x", "16", 32) == options["grad_x"][0]
    assert found.tile("grad_dy", "16", 32) == options["grad_dy"][1]
    fused = {key for key, row in found.dataflow.items() if row["choice"] == "lowrank_product"}
    assert fused == {("forward", "<=4096", "<=1024"), ("forward", "<=8192", "<=1024")}
    assert len(found.dataflow) == 12


def test_a_fast_tile_with_wrong_results_is_not_chosen(gpu, monkeypatch):
    monkeypatch.setattr(calls, "DTYPES", {"16": (FP16, FP16)})
    own, fast, *_ = options = tiles.candidate_tiles("project", "16", 32, CPU)
    monkeypatch.setattr(tiles, "wrong_results", lambda problem: ["y: wrong"] if tuning.trial["project"] == fast else [])
    row = tiles.choose_tile("project", "16", 32, options, {own: 2e-6, fast: 1e-6}, CPU)
    assert Tile(**row["tile"]) == own
    assert tuning.trial == {}
    monkeypatch.setattr(tiles, "wrong_results", lambda problem: ["y: wrong"])
    assert tiles.choose_tile("project", "16", 32, options, {own: 2e-6, fast: 1e-6}, CPU) is None


@pytest.mark.skipif(DEVICE.type == "cuda", reason="the interpreter's small sizes")
def test_what_is_timed_runs(gpu, monkeypatch):
    """Every kernel with a tile on trial, the gate behind a choice, and both dataflows, at tiny sizes."""
    monkeypatch.setattr(calls, "DTYPES", {"16": (FP16, FP16)})
    monkeypatch.setattr(tiles, "GATE", (40, 70, 90))
    sizes = calls.Sizes(M=32, width=64, contractions=(64,), tokens=(32,), repeats=1)
    for kernel in ("project", "prefill", "grad_dy", "grad_x", "lowrank_product"):
        own = tuning.TILES[kernel, "16", 32]
        small = Tile(32, 64, 4, 2, 32 if own.depth else 0)
        seconds = tiles.time_tiles(kernel, "16", 32, [own, small], sizes, CPU)
        assert set(seconds) == {own, small}
        row = tiles.choose_tile(kernel, "16", 32, [own, small], {own: 2.0, small: 1.0}, CPU)
        assert Tile(**row["tile"]) == small
    for direction in tuned.DIRECTIONS:
        times = flows.time_flows(direction, 64, 32, {("project", "16", 32): Tile(32, 64, 4, 2)}, sizes, CPU)
        assert set(times["16"]) == {"prefill", "lowrank_product"}


def test_the_report_prints_choices_with_their_numbers(gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tuned, "COMMITTED", tmp_path / "committed")
    assert kernel_report.choices("sm_80") == [("both", "any", "any", "prefill", kernel_report.choices("sm_80")[0][4])]
    write(tmp_path / "committed" / gpu.name, content())
    (row,) = kernel_report.choices("sm_80")
    assert row[:4] == ("forward", "<=4096", "<=1024", "lowrank_product")
    assert "9.5" in row[4]
    assert NAME in row[4]
    assert kernel_report.choices("sm_90")[0][0] == "both"  # another capability
    (tile,) = kernel_report.measured_tiles("sm_80")
    assert tile[:3] == ("project", "16", "32")
    tune_report.print_choices(content(), Output())
    assert "10.0 / 9.5" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to tune")
def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["lora-kernels", "tune"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "sees no CUDA device" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CommandError, match="--folder: cannot create"):
        tune.write({}, tmp_path / "file" / "x.json")
