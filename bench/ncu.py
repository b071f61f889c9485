"""What the GPU's counters say of the side kernels: Nsight Compute over one launch of each, after one that is not counted.

A row per kernel, as it is made: time, bytes from and to memory, registers, occupancy, issue. Left out (exit code 77) where
there is no ncu, or where this user may not read the counters.

    PYTHONPATH=. python bench/ncu.py [--json FILE]
"""

import argparse
import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

KERNELS = ("project", "prefill", "grad_dy", "grad_x", "sum")
METRICS = (
    *("gpu__time_duration.sum", "dram__bytes_read.sum", "dram__bytes_write.sum"),
    *("dram__throughput.avg.pct_of_peak_sustained_elapsed", "lts__t_sector_hit_rate.pct"),
    *("launch__registers_per_thread", "sm__warps_active.avg.pct_of_peak_sustained_active"),
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
)
LEFT_OUT = 77
FORBIDDEN = "ERR_NVGPUCTRPERM"
CASE = {"M": 8192, "K": 4096, "N": 4096, "R": 16, "p": 0.1}


def launch() -> None:
    """Each side kernel twice, at CASE; the sums are those of grad_dy and grad_x."""
    import torch
    from kernel_passes import variants

    from lora_kernels import use_backend
    from lora_kernels.cases.linear import Case

    case = Case(**CASE, bias=False, dtype=torch.bfloat16, needs=("x", "A", "B"), device=torch.device("cuda"))
    with use_backend("triton"), torch.no_grad():
        calls = variants(case.draw(torch.Generator("cuda").manual_seed(case.seed)))
        for _ in range(2):
            for name in KERNELS[:4]:
                calls[name][0]()
        torch.cuda.synchronize()


def profile(ncu: str, kernel: str) -> tuple[dict[str, float], str]:
    """(metric -> value of the second launch of `kernel`, all that ncu said)."""
    which = ["--kernel-name", f"regex:^{kernel}_kernel", "--launch-skip", "1", "--launch-count", "1"]
    what = ["--csv", "--print-units", "base", "--metrics", ",".join(METRICS)]
    command = [ncu, *what, *which, sys.executable, __file__, "--launch"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = result.stdout.splitlines()
    start = next((number for number, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    rows = csv.DictReader(lines[start:])
    found = {row["Metric Name"]: float(row["Metric Value"].replace(",", "")) for row in rows if row["Metric Value"]}
    return found, result.stdout + result.stderr


def main() -> int:
    """Profile every kernel; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--launch", action="store_true", help="only launch them, for ncu to look at")
    options = parser.parse_args()
    if options.launch:
        launch()
        return 0
    if (ncu := shutil.which("ncu") or shutil.which("ncu", path="/usr/local/cuda/bin")) is None:
        sys.stdout.write("ncu is neither on the PATH nor in /usr/local/cuda/bin\n")
        return LEFT_OUT
    from lora_kernels.commands.console import write_whole

    rows = []
    for kernel in KERNELS:
        found, said = profile(ncu, kernel)
        if FORBIDDEN in said:
            sys.stdout.write(f"{FORBIDDEN}: this user may not read the GPU's performance counters\n")
            return LEFT_OUT
        sys.stdout.write(f"{kernel}: {found or 'not profiled: ' + said[-1000:]}\n")
        sys.stdout.flush()
        rows.append({"kernel": kernel, **CASE, "metrics": found})
        if options.json:
            write_whole(options.json, json.dumps({"rows": rows}, indent=1) + "\n", "--json")
    return 0 if any(row["metrics"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
