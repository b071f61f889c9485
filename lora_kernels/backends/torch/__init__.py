"""The contract by PyTorch operations, for any tensors on any device: the CPU's backend, and the fallback everywhere."""
