"""bitsandbytes' layers keep their weight in evaluation, on every CPU, so that there is a peer to compare with.

On a CPU with AVX512-bf16 they repack it, which rounds absmax for good and fails where K < blocksize. A test that is about this
sets the layer's own `support_avx512bf16_for_cpu`.
"""

import importlib.abc
import importlib.machinery
import sys


class Finder(importlib.abc.MetaPathFinder):
    """Changes the module when it is imported: to import it takes two seconds, which most tests need not wait for."""

    def find_spec(self, name, path, target=None):
        if name != "bitsandbytes.nn.modules":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        load = spec.loader.exec_module

        def changed(module):
            load(module)
            module.has_avx512bf16 = lambda: False

        spec.loader.exec_module = changed
        return spec


def install() -> None:
    sys.meta_path.insert(0, Finder())
