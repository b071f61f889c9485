"""`lora-kernels convert`: an adapter's file in another tool's format."""
