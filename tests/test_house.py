"""The package's layout: imports point down, one basename in every layer, files of a readable size."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from lora_kernels.operation import OPERATIONS
from lora_kernels.plan import BACKENDS, load

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "lora_kernels"
LAYERS = (  # from the top: a file imports from its own layer and those after it
    *("__main__", "cli", "commands", "lora_kernels", "integrations", "models", "layers", "cases", "functional", "operation"),
    *("backends", "reference", "values", "segments", "nf4", "normal", "mask", "plan", "cpu_extension", "scratch", "dtypes"),
)
LONGER: dict[str, str] = {}  # file -> the reason why it has more than 300 lines


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}


@cache
def imports(module: str) -> frozenset[str]:
    """The package's modules that one imports: at the top, in functions, for type checkers, and by a name in a string."""
    file = MODULES[module]
    here = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(here[: len(here) + 1 - node.level] if node.level else []) if node.level else ""
            base = ".".join(filter(None, (base, node.module)))
            for alias in node.names:
                inner = f"{base}.{alias.name}"
                found.add(inner if inner in MODULES else base)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "." in node.value and node.value in MODULES:
            found.add(node.value)
    return frozenset(name for name in found if name in MODULES and name != module)


def layer(module: str) -> int:
    return LAYERS.index(module.split(".")[1] if "." in module else module)


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    upwards = {name for name in imports(module) if layer(name) < layer(module)}
    assert not upwards, f"{module} is below {upwards}"


def test_no_circle():
    """Lazy imports and those for type checkers included."""

    def walk(module: str, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        if module in path:
            yield path[path.index(module) :]
        elif module not in seen:
            seen.add(module)
            for name in sorted(imports(module)):
                yield from walk(name, (*path, module))

    seen: set[str] = set()
    assert not [circle for module in MODULES for circle in walk(module, ())]


def test_the_registry_and_what_lies_below_import_nothing_of_ours():
    assert {name: imports(f"lora_kernels.{name}") for name in ("plan", "cpu_extension", "scratch", "dtypes")} == dict.fromkeys(
        ("plan", "cpu_extension", "scratch", "dtypes"), frozenset()
    )


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_has_its_basename_in_every_layer(operation):
    """docs/adding-an-operation.md says what each is."""
    for place in ("functional", "reference", "cases", "backends/torch"):
        assert (PACKAGE / place / f"{operation}.py").is_file(), f"{place} lacks {operation}.py"
    for backend in BACKENDS:
        found = load(backend, operation)
        stated = isinstance(found, str) and found
        assert stated or (PACKAGE / "backends" / backend / f"{operation}.py").is_file()
    for test in (f"test_{operation}.py", f"test_{operation}_mutants.py"):
        assert (ROOT / "tests" / test).is_file(), f"tests lack {test}"
    page = (ROOT / "docs/adding-an-operation.md").read_text(encoding="utf-8")
    assert f"| `{operation}` |" in page, f"docs/adding-an-operation.md has no row for {operation}"


def test_the_page_on_operations_names_files_that_exist():
    page = (ROOT / "docs/adding-an-operation.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w./-]+/[\w.-]+\.(?:py|cpp|cu|md|json))`", page)
    assert len(named) > 10
    for name in named:
        assert (PACKAGE / name).exists() or (ROOT / name).exists(), name


def test_files_are_short():
    sizes = {
        str(file.relative_to(ROOT)): len(file.read_text(encoding="utf-8").splitlines())
        for folder in ("lora_kernels", "tests", "bench", "csrc")
        for file in (ROOT / folder).rglob("*")
        if file.suffix in (".py", ".cu", ".cuh", ".h", ".cpp")
    }
    assert {name for name, lines in sizes.items() if lines > 300} == set(LONGER)
    assert {name for name in sizes if name.startswith("lora_kernels/reference/") and sizes[name] > 80} == set()
