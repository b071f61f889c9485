"""`python -m lora_kernels` is `lora-kernels`."""

from .cli import main

main()
