"""The CPU's backend: the low-rank part of a layer is one call of csrc/cpu each way, mask included."""
