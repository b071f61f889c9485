"""Test files that import a package which is not installed here: they are not collected, and named."""

import ast
import importlib.util
from functools import cache
from pathlib import Path

TESTS = Path(__file__).parent
# What a machine that runs the kernels' tests may lack. That torch, numpy and pytest are missing is an error; hypothesis and
# pytest's own plugins are needed by single tests.
OPTIONAL = (
    *("accelerate", "bitsandbytes", "diffusers", "gguf", "packaging", "peft", "rich", "safetensors", "setuptools", "tomllib"),
    *("transformers", "trl", "typer"),
)


@cache
def missing() -> frozenset[str]:
    """Those of OPTIONAL that are not installed."""
    return frozenset(name for name in OPTIONAL if importlib.util.find_spec(name) is None)


def left_out() -> dict[str, list[str]]:
    """Missing package -> the names of the files that need it to be imported, directly or through files of this repository."""
    found: dict[str, list[str]] = {}
    for file in sorted(TESTS.glob("test_*.py")) if missing() else ():
        for package in sorted(missing() & packages(file))[:1]:
            found.setdefault(package, []).append(file.name)
    return found


@cache
def packages(file: Path) -> frozenset[str]:
    """The top names of what importing `file` imports."""
    found: set[str] = set()
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        for module in _modules(node, file):
            found.add(module.partition(".")[0])
            for place in (TESTS / f"{module}.py", TESTS.parent / f"{module.replace('.', '/')}.py"):
                if place.exists() and place != file:
                    found |= packages(place)
    return frozenset(found)


def _modules(node: ast.stmt, file: Path) -> list[str]:
    """What an import statement names, whole; `from a import b` may name the module a.b."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ""
    if node.level:
        folder = file.parents[node.level - 1].relative_to(TESTS.parent)
        base = ".".join(filter(None, (*folder.parts, node.module)))
    return [base, *(f"{base}.{alias.name}" for alias in node.names)]
