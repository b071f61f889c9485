"""What a terminal sees of `lora-kernels`: help with examples, completion, colours, narrow widths, pipes that close, Ctrl-C."""

import functools
import json
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
import typer
from command_line import in_a_shell

from lora_kernels import cli
from lora_kernels.commands.examples import CODES, EXAMPLES

COMMANDS = [command.name or command.callback.__name__ for command in cli.app.registered_commands]


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_shows_no_type_beside_a_flag(run, command):
    code, out, _ = run(*([command] if command else []), "--help")
    assert code == 0
    assert "--json" in out or command is None
    assert "bool" not in out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_ends_with_examples_that_can_be_typed(run, command):
    _, out, _ = run(command, "--help")
    parser = typer.main.get_command(cli.app).commands[command]
    for example in EXAMPLES[command]:
        assert example in " ".join(out.split())
        program, name, *arguments = shlex.split(example)
        assert (program, name) == ("lora-kernels", command)
        parser.make_context(command, arguments)
        with pytest.raises(Exception, match="No such option"):
            parser.make_context(command, [*arguments, "--no-such-option"])


def test_the_exit_codes_are_in_the_help(run):
    _, out, _ = run("--help")
    assert all(f"{code} {meaning}" in " ".join(out.split()) for code, meaning in CODES.items())
    assert cli.INTERRUPTED in CODES


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_completes_commands_and_options(run, monkeypatch, shell):
    for line, expected in (("lora-kernels be", "bench"), ("lora-kernels merge --we", "--weight")):
        monkeypatch.setenv("_LORA_KERNELS_COMPLETE", f"complete_{shell}")
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(len(line.split()) - 1))
        monkeypatch.setenv("_TYPER_COMPLETE_ARGS", line)
        monkeypatch.setenv("_TYPER_COMPLETE_FISH_ACTION", "get-args")
        code, out, err = run()
        assert (code, err) == (0, "")
        assert expected in out


def test_no_colour_where_none_is_wanted():
    colours = r"\x1b\[([0-9]+;)*(3|4|9|10)[0-9][;m]"
    shown = in_a_shell("lora-kernels memory --help", FORCE_COLOR="1", TERM="xterm-256color").stdout
    assert re.search(colours, shown)
    plain = in_a_shell("lora-kernels memory --help", FORCE_COLOR="1", TERM="xterm-256color", NO_COLOR="1").stdout
    assert "size" in plain
    assert not re.search(colours, plain)


@pytest.mark.parametrize("width", [80, 100])
@pytest.mark.parametrize("arguments", [["memory", "--size", "8b"], ["report", "--kernels"], ["bench", "--help"], ["--help"]])
def test_no_line_is_wider_than_the_terminal(run, monkeypatch, width, arguments):
    monkeypatch.setenv("COLUMNS", str(width))
    code, out, _ = run(*arguments)
    assert code == 0
    assert max(map(len, out.splitlines())) <= width


def test_a_pipe_that_closes_is_silent():
    done = in_a_shell("lora-kernels --help | true")
    assert (done.returncode, done.stderr) == (1, "")


def test_ctrl_c_is_one_line_and_leaves_no_half_written_file(tmp_path):
    target = tmp_path / "rows.json"
    command = [sys.executable, "-m", "lora_kernels", "bench", "--shape", "256x256", "--tokens", "64", "--tokens", "65"]
    options = ["--repeats", "100000", "--compare", "none", "--device", "cpu", "--json", str(target)]
    as_usual = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
    process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True, preexec_fn=as_usual)
    assert "Timing" in process.stderr.readline()
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == cli.INTERRUPTED
    assert err.splitlines()[-1] == "lora-kernels: interrupted"
    assert "Traceback" not in err
    assert not target.exists() or json.loads(target.read_text())
    assert [path for path in tmp_path.iterdir() if path != target] == []
