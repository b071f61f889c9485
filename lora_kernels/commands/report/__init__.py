"""`lora-kernels report`: what runs where."""
