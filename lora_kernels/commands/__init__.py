"""What `lora-kernels` does: a folder per command, its options in `options.py`, and beside the folders what they share."""
