"""`lora-kernels demo`: fine-tuning of a small model."""
