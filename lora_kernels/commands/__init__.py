"""What `lora-kernels` does, one file per command, and what they share; `cli.py` holds the options."""
