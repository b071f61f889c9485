"""`lora-kernels` in the tests' own process, and in one of its own."""

import os
import subprocess
import sys

import pytest

from lora_kernels import cli


@pytest.fixture
def run(monkeypatch, capsys):
    """run(*arguments) -> (exit code, stdout, stderr) of main()."""
    monkeypatch.delenv("COLUMNS", raising=False)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["lora-kernels", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code or 0
        else:
            code = 0
        return code, *capsys.readouterr()

    return call


def in_a_shell(command: str, **environment: str) -> subprocess.CompletedProcess:
    """bash -c, with `lora-kernels` in `command` as python -m; a pipe ends as the part of it that failed."""
    command = command.replace("lora-kernels", f"{sys.executable} -m lora_kernels")
    own = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")} | environment
    return subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=60, env=own)
