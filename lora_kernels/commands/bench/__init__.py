"""`lora-kernels bench`: layers or a whole model, beside other implementations."""
