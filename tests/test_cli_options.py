"""Every option of every command in every mode of it: either it changes what runs, or it is an error that names it."""

import json
import sys

import pytest
from typer.main import get_command

from lora_kernels import cli
from lora_kernels.commands.bench import layers as bench_layers
from lora_kernels.commands.bench import model as bench_model
from lora_kernels.commands.bench import page as bench_page
from lora_kernels.commands.console import Output
from lora_kernels.commands.demo import run as demo_run
from lora_kernels.commands.memory import run as memory_run
from lora_kernels.commands.report import backends as report_backends
from lora_kernels.commands.report import kernels as report_kernels
from lora_kernels.commands.tune import run as tune_run

pytest.importorskip("transformers")
RUNS = (bench_layers, bench_model, demo_run, memory_run, report_backends, report_kernels, tune_run)
LLAMA = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 100}
LLAMA |= {"num_attention_heads": 4, "num_key_value_heads": 2}

# command -> mode -> (what selects it, the options that it takes: name -> a value that is not the default, None for a flag)
COMMON = {"tokens": "24", "rank": "3", "dropout": "0.3", "dtype": "float16", "compare": "none", "quantize": "nf4"}
COMMON |= {"repeats": "7", "json": "x.json", "html": "x.html", "device": "cpu", "variant": "dora"}
MEMORY = {"tokens": "24", "rank": "3", "dropout": "0.3", "dtype": "float16", "adapter-dtype": "float16", "json": "x.json"}
DEMO = {"model": "DIR", "text": "t", "output": "o", "rank": "3", "alpha": "3", "dropout": "0.3", "steps": "3", "lr": "3"}
DEMO |= {"tokens-per-step": "24", "quantize": "nf4", "variant": "adalora", "seed": "3", "json": "x.json"}
KERNELS = {"target": "sm_80", "dtypes": "bf16 fp32", "shape": "64x32", "tokens": "24", "json": "x.json"}
MODES = {
    "bench": {
        "bench": ((), COMMON | {"suite": "smollm", "shape": "64x32", "lorafusion": "DIR", "forward": None}),
        "bench --model DIR": (("--model", "DIR"), COMMON | {"model": "OTHER", "sequence-length": "24"}),
    },
    "demo": {"demo": ((), DEMO)},
    "memory": {
        "memory --model DIR": (("--model", "DIR"), MEMORY | {"model": "OTHER", "target": "q_proj"}),
        "memory --size": (("--size", "8b"), MEMORY | {"size": "7b"}),
        "memory --shape": (("--shape", "64x32:2"), MEMORY | {"shape": "64x32:3"}),
    },
    "report": {"report": ((), {"json": "x.json"}), "report --kernels": (("--kernels",), KERNELS | {"kernels": None})},
    "tune": {"tune": ((), {"folder": "DIR", "quick": None, "json": "x.json"})},
}
FILES = {"convert", "merge"}  # of one mode, with files in and out: tests/test_lora_files_commands.py
SELECTS = {  # of another mode: not an option that this one ignores
    ("bench", "model"), ("report", "kernels"), ("memory", "model"), ("memory", "size"), ("memory", "shape")
}  # fmt: skip
SAME_HERE = {("bench", "device"), ("bench --model DIR", "device"), ("report --kernels", "kernels")}  # no value changes the run
TAKEN = [(command, mode, option) for command, modes in MODES.items() for mode in modes for option in modes[mode][1]]
REFUSED = [
    (command, mode, option)
    for command, modes in MODES.items()
    for mode in modes
    for option in sorted({name for _, options in modes.values() for name in options} - set(modes[mode][1]))
    if (command, option) not in SELECTS
]


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """run(command, arguments) -> (exit code, stderr, what would run): nothing is measured."""
    calls = []

    def record(*arguments, module):
        shown = [(a.json_target, a.html_target) if isinstance(a, Output) else repr(a) for a in arguments]
        calls.append([module.__name__, *shown])
        return {"rows": [], "failures": [], "peers_not_measured": []}

    for module in RUNS:
        monkeypatch.setattr(module, "run", lambda *arguments, module=module: record(*arguments, module=module))
    monkeypatch.setattr(bench_page, "bench_page", lambda result: "")
    for name, layers in (("DIR", 1), ("OTHER", 2)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(LLAMA | {"num_hidden_layers": layers}))
    monkeypatch.chdir(tmp_path)

    def call(command, arguments):
        calls.clear()
        monkeypatch.setattr(sys, "argv", ["lora-kernels", command, *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code or 0, capsys.readouterr().err, list(calls)

    return call


def words(option, value):
    return [f"--{option}"] if value is None else [f"--{option}", value]


@pytest.mark.parametrize("command", MODES)
def test_the_table_has_every_option(command):
    there = get_command(cli.app).commands[command]
    options = {parameter.opts[0].removeprefix("--") for parameter in there.params if parameter.name != "help"}
    assert options == {option for _, taken in MODES[command].values() for option in taken}
    assert set(MODES) | FILES == set(get_command(cli.app).commands)


@pytest.mark.parametrize(("command", "mode", "option"), TAKEN)
def test_an_option_of_a_mode_changes_what_runs(run, command, mode, option):
    selects, options = MODES[command][mode]
    others = ["--compare", "all"] if option == "lorafusion" else []
    # What selects the mode is given once, with another value where it is what is tried.
    selected = () if selects and selects[0] == f"--{option}" else selects
    before, again = (run(command, [*selects, *others]) for _ in range(2))
    after = run(command, [*selected, *words(option, options[option]), *others])
    assert (before[0], after[0]) == (0, 0), after[1]
    assert len(before[2]) == len(after[2]) == 1
    assert before == again
    if (mode, option) not in SAME_HERE:
        assert before[2] != after[2]


@pytest.mark.parametrize(("command", "mode", "option"), REFUSED)
def test_an_option_of_another_mode_is_an_error(run, command, mode, option):
    selects, _ = MODES[command][mode]
    value = next(options[option] for _, options in MODES[command].values() if option in options)
    code, err, calls = run(command, [*selects, *words(option, value)])
    assert (code, calls) == (2, [])
    assert err.startswith(f"lora-kernels: --{option}: is for `{command}")
    assert err.endswith(f"and `{mode}` does not use it\n")


def test_a_target_that_is_in_no_layer_is_a_line_of_its_own(run):
    code, err, calls = run("memory", ["--model", "DIR", "--target", "q_proj", "--target", "nope"])
    assert (code, len(calls), err.count("\n")) == (0, 1, 1)
    assert err.startswith("lora-kernels: --target: target_modules: 'nope' matches no linear layer of LlamaForCausalLM; ")


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        (["--suite", "decoder-small", "--shape", "64x64"], "suite"),  # one layer in the place of its blocks
        (["--suite", "decoder-small", "--variant", "dora"], "suite"),  # which single layers are timed of
        (["--lorafusion", "DIR"], "lorafusion"),  # which is no peer of the run
        (["--forward", "--dropout", "0.1"], "dropout"),  # evaluation mode has none
        (
            ["--suite", "llama", "--shape", "8x8", "--tokens", "8", "--rank", "8", "--dropout", "0", "--dtype", "float32"],
            "suite",
        ),
        (["--suite", "llama", "--shape", "8x8", "--tokens", "8", "--rank", "8", "--dtype", "float32", "--forward"], "suite"),
        (["--model", "DIR", "--dtype", "float16", "--dtype", "float32"], "dtype"),
    ],
)
def test_an_option_that_others_leave_nothing_to_do_is_an_error(run, arguments, option):
    code, err, calls = run("bench", arguments)
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith(f"lora-kernels: --{option}: ")
    assert [module for module, *_ in calls] == []
