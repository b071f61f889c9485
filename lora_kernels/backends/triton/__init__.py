"""The contract in Triton, for NVIDIA GPUs: one pass over x forward, one over dy and one over x backward.

linear.py glu_mlp.py nf4.py  what calls come to: which kernels, in which order
magnitude.py                 what DoRA puts around linear.py
planning.py                  which calls kernels compute, and PyTorch's functions where they do not compile
kernels/                     a kernel and its launch each
tuning.py tuned.py           tiles and dataflows: frozen tables, and what was measured on a GPU
kernels.json                 what the tiles compile to for every GPU family
launch.py                    what launches alike have in common, found out once: tile, numbers, compiled kernel
compilation.py               what did not compile on this machine's GPUs, and what takes its place
gpu.py                       whether these kernels run on a device
"""

import triton  # noqa: F401  # without it there is no such backend
