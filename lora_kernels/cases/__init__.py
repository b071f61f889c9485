"""What an operation is tested and timed on: one case type each, read by the tests, the accuracy gate and the benchmarks."""
