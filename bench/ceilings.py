"""This machine's ceilings: how fast it copies and how fast it multiplies matrices.

Every bench that reports a share of a peak measures that peak in the same way, in its own process.

python bench/ceilings.py --json out.json
"""

import argparse
from pathlib import Path

import torch
from clocks import copy_bandwidth, copy_bandwidth_on_cpu, matmul_rate
from record import command, machine, result_path, write_json


def measure() -> dict:
    cuda = torch.cuda.is_available()
    return {
        "copy_gigabytes_per_second": copy_bandwidth() if cuda else copy_bandwidth_on_cpu(),
        "matmul_teraflops": matmul_rate("cuda" if cuda else "cpu"),
        "matmul_dtype": "bf16" if cuda else "fp32",
        "clock": "device" if cuda else "processor time",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where the result goes (default: bench/results/)")
    asked = parser.parse_args()
    path = result_path(asked.json, "ceilings")
    found = measure()
    print(f"copy {found['copy_gigabytes_per_second']:.0f} GB/s, matrix product {found['matmul_teraflops']:.3g} TFLOP/s")
    write_json(path, {"machine": machine(), "command": command(), **found})
    print(f"written: {path}")


if __name__ == "__main__":
    main()
