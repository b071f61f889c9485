"""`lora-kernels merge`: the weighted sum of adapters' files as one."""
