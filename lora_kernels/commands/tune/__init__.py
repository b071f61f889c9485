"""`lora-kernels tune`: the measurements that dispatch follows."""
