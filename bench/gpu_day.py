"""Everything that a GPU is needed for, in order of value, each stage in its own time box and its own files.

    python bench/gpu_day.py                       # all stages, about an hour
    python bench/gpu_day.py --minutes 10          # the same order, boxes shrunk to fit
    python bench/gpu_day.py --only correctness kernels

A stage that fails or runs out of time is recorded and the next one begins; what it had written stays.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from harness import machine

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Stage:
    """A command and its share of the time."""

    name: str
    command: tuple[str, ...]
    minutes: float


def stages(out: Path) -> list[Stage]:
    python = sys.executable
    return [
        Stage("correctness", (python, "-m", "pytest", "tests/kernels", "-m", "gpu", "-q"), 10),
        Stage("kernels", (python, "bench/throughput.py", "--json", str(out / "throughput.json")), 12),
        Stage("step", (python, "bench/train_step.py", "--json", str(out / "train_step.json")), 8),
        Stage("demo", (python, "recipes/coco_clip.py", "--out", str(out / "captioned_shapes")), 5),
        Stage(
            "reference",
            (
                *(python, "recipes/coco_clip.py", "--small", "--out", str(out / "reference"), "--data.size", "128"),
                *("--model.channels", "128", "128", "256", "384", "384", "--model.heads", "4", "4", "4", "4", "4"),
                *("--model.attention", "none", "cross", "cross", "cross", "cross", "--model.groups", "32"),
                *("--model.blocks", "2", "2", "2", "2", "2", "--model.depth", "1", "1", "1", "1", "1"),
                *("--batch-size", "64", "--images", "64000", "--checkpoint.every", "0", "--preview.every", "0"),
            ),
            25,
        ),
    ]


def run(stage: Stage, out: Path, minutes: float) -> dict:
    """One stage within its box; its output goes to a file beside its results."""
    began = time.monotonic()
    with open(out / f"{stage.name}.log", "w") as log:
        try:
            code = subprocess.run(
                stage.command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, timeout=60 * minutes
            ).returncode
        except subprocess.TimeoutExpired:
            code = "out of time"
    return {
        "stage": stage.name,
        "command": " ".join(stage.command),
        "code": code,
        "seconds": round(time.monotonic() - began, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, help="for all stages together")
    parser.add_argument("--only", nargs="*", help="names of stages")
    parser.add_argument("--out", type=Path, help="where results go")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "duotone: refused: no CUDA device here; bench/ledger.py says what can be known without one", file=sys.stderr
        )
        sys.exit(2)
    out = arguments.out or ROOT / "bench" / "results" / f"gpu-{machine()['date']}"
    out.mkdir(parents=True, exist_ok=True)
    chosen = [s for s in stages(out) if not arguments.only or s.name in arguments.only]
    if not chosen:
        print(f"duotone: refused: no such stage; there are {', '.join(s.name for s in stages(out))}", file=sys.stderr)
        sys.exit(2)
    share = min(1.0, arguments.minutes / sum(s.minutes for s in chosen))
    record = {"machine": machine(), "stages": []}
    for stage in chosen:
        record["stages"].append(run(stage, out, stage.minutes * share))
        (out / "gpu_day.json").write_text(json.dumps(record, indent=1) + "\n")
        last = record["stages"][-1]
        print(f"{last['stage']:12} {last['seconds']:8.1f} s   {last['code'] or 'ok'}", flush=True)


if __name__ == "__main__":
    main()
