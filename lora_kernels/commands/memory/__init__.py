"""`lora-kernels memory`: bytes of training."""
