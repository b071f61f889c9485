"""The backends, each a package with a module for every operation that it computes; importing this registers them.

Importing a backend's own package says whether it is there: it raises ImportError with the reason otherwise.
"""

import functools
import importlib
from types import ModuleType

from ..plan import register


def _load(backend: str, operation: str) -> ModuleType:
    return importlib.import_module(f"{__name__}.{backend}.{operation}")


for _name in ("cuda", "triton", "cpu", "torch"):
    register(_name, functools.partial(_load, _name))
