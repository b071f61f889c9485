"""`pip install .` brings enough: every file of the package, and what it imports where nothing but the dependencies is."""

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution, distribution
from pathlib import Path

import pytest
import tomllib
from packaging.requirements import Requirement
from setuptools import Distribution as Project
from test_readme import EXAMPLES

ROOT = Path(__file__).parents[1]
EXTRAS = ("peft", "transformers", "bitsandbytes")  # an example that imports one needs more than the base install

TRAIN_AND_SAVE = """
import torch
from lora_kernels import *

def base():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 64)).to(dtype)

for dtype, quantize in ((torch.float32, None), (torch.bfloat16, None), (torch.bfloat16, "nf4")):
    model, x = base(), torch.randn(8, 64, dtype=dtype)
    config = LoRAConfig(lora_dropout=0.1, target_modules="all-linear")
    add_lora(model, config, quantize=quantize)
    optimizer = torch.optim.AdamW(lora_plus_param_groups(model, lr=1e-2))
    for _ in range(2):
        model(x).square().mean().backward()
        optimizer.step()
    state = lora_state_dict(model)
    torch.save(state, "state.pt")
    load_lora_state_dict(model, torch.load("state.pt"))
    save_adapter(model, "adapter")
    other = base()
    load_adapter(other, "adapter", quantize=quantize)
    assert torch.equal(other.eval()(x), model.eval()(x))
    save_merged(model, "merged")
    save_merged(model, "narrow", dtype=torch.float16, max_shard_size=1000)
    merge_lora(model)
"""


def closure(requirement: Requirement, seen: set[tuple[str, str]]) -> Iterator[Distribution]:
    """The distribution that a requirement names and, once each, those that it requires here."""
    found = distribution(requirement.name)
    for extra in ("", *requirement.extras):
        if (requirement.name, extra) not in seen:
            seen.add((requirement.name, extra))
            yield found
            for text in found.requires or []:
                needed = Requirement(text)
                if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                    yield from closure(needed, seen)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """A folder with the declared dependencies, and theirs, as links; what else this environment has is not in it."""
    folder = tmp_path_factory.mktemp("site")
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    seen: set[tuple[str, str]] = set()
    for found in [each for text in declared for each in closure(Requirement(text), seen)]:
        for name in {file.parts[0] for file in found.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            if not (folder / name).exists():
                (folder / name).symlink_to(Path(str(found.locate_file(name))).resolve())
    (folder / "lora_kernels").symlink_to(ROOT / "lora_kernels")
    return folder


def run(site: Path, folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-S", *arguments]  # -S: nothing of this environment's site-packages
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_extras_are_not_there(site, tmp_path):
    """Otherwise the other tests here could not fail."""
    code = f"import importlib.util as u; print([name for name in {(*EXTRAS, 'pytest')} if u.find_spec(name)])"
    assert run(site, tmp_path, "-c", code) == "[]\n"


def test_a_loop_trains_and_saves(site, tmp_path):
    run(site, tmp_path, "-c", TRAIN_AND_SAVE)


IN_PROCESSES = """
import os, sys
import torch

for name, text in {examples}.items():
    if os.fork() == 0:
        exec(text, {{"__name__": "__main__"}})
        os._exit(0)
    status = os.wait()[1]
    print(f"{{name}} ended with {{status}}", file=sys.stderr)
    assert not status
"""


def test_examples(site, tmp_path):
    """Each in a process of its own, which the first has brought PyTorch: its import takes as long as ten examples."""
    examples = {name: text for name, text in EXAMPLES.items() if not any(extra in text for extra in EXTRAS)}
    assert examples
    run(site, tmp_path, "-c", IN_PROCESSES.format(examples=examples))


@pytest.mark.parametrize(
    "arguments",
    [["report"], ["memory", "--size", "8b"], ["bench", "--shape", "64x64", "--tokens", "8", "--rank", "2"]],
    ids=lambda arguments: arguments[0],
)
def test_command(site, tmp_path, arguments):
    assert run(site, tmp_path, "-m", "lora_kernels", *arguments)


def test_importing_it_imports_nothing_but_it_and_torch():
    """It takes 0.2 s beyond torch's seconds; Triton, transformers, peft, rich and typer are imported where they are used."""
    code = """
import sys, torch
before = set(sys.modules)
import lora_kernels
print(sorted({name.partition(".")[0] for name in sys.modules.keys() - before} - sys.stdlib_module_names))
print(sorted(name for name in sys.modules.keys() - before if name.startswith("torch.")))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300, check=True)
    assert done.stdout.splitlines() == ["['lora_kernels']", "[]"]


def test_the_wheel_has_every_file_of_the_package(monkeypatch):
    """py.typed among them, without which type checkers ignore the annotations."""
    monkeypatch.chdir(ROOT)
    pytest.importorskip("setuptools", minversion="77", reason="older ones refuse a license of setup.py's in pyproject.toml")
    project = Project({"script_name": "setup.py", "license_expression": "Apache-2.0"})  # setup.py's part
    project.parse_config_files()
    project.include_package_data = False  # by MANIFEST.in, which only has csrc; asking it writes files
    build = project.get_command_obj("build_py")
    build.ensure_finalized()
    packed = {Path(folder, name) for _, folder, _, names in build.data_files for name in names}
    ours = {file.relative_to(ROOT) for file in (ROOT / "lora_kernels").rglob("*") if file.is_file()}
    built = (".py", ".pyc", ".so", ".pyd")
    assert Path("lora_kernels/py.typed") in packed
    assert packed == {file for file in ours if file.suffix not in built}
    assert {Path(file) for _, _, file in build.find_all_modules()} == {file for file in ours if file.suffix == ".py"}
