"""AdamW against Muon on Fashion-MNIST at 28 px: losses on held-out images, by images and by core-seconds.

python bench/optimizers.py --scratch DIR                     the speedrun's network, 9,600 images, each contender on a core
python bench/optimizers.py --scratch DIR --images 48000

Both have the same network, initial weights, images and random draws; the cosine schedule of each runs down to 0. EMA
weights are measured, always on the same 1,024 held-out images and noise, at eight noise levels that training draws
equally often.
"""

import argparse
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from fashion import shards
from record import RESULTS, machine, refuse, refuse_unwritable, table, write_json

from duotone.data.refusal import Refused

BATCH, MEASUREMENTS = 32, 6


@dataclass(frozen=True)
class Contender:
    name: str
    flags: tuple[str, ...]


SAME = ("--batch-size", str(BATCH), "--optimizer.weight-decay", "0", "--optimizer.warmup", "1600")
# Learning rates: AdamW's was the best of 2e-3, 4e-3 and 8e-3, Muon's of 3e-3, 6e-3 and 12e-3, both with 16 channels
# at full resolution.
CONTENDERS = (
    Contender("AdamW", ("optimizer:adam-w", "--optimizer.lr", "4e-3", *SAME)),
    Contender("Muon", ("optimizer:muon", "--optimizer.lr", "3e-3", *SAME)),
)


def flags_of(contender: Contender, data: Path, scratch: Path, images: int) -> list[str]:
    """The flags that differ from the speedrun's recipe."""
    every, out = str(images // MEASUREMENTS), scratch / "optimizers" / contender.name
    flags = [*contender.flags, "--data.shards", str(data), "--data.held-out", "0.05", "--images", str(images)]
    flags += ["--validation.every", every, "--validation.images", "1024", "--checkpoint.every", "0"]
    return [*flags, "--out", str(out)]


def started(contender: Contender, scratch: Path, images: int) -> subprocess.Popen:
    """Starts its training, in one process on one thread."""
    environment = os.environ | {"LOCAL_RANK": "0", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    flags = [*flags_of(contender, shards(scratch, "train"), scratch, images), "--fresh"]
    command = [sys.executable, str(Path(__file__).with_name("speedrun.py")), *flags]
    scratch.mkdir(parents=True, exist_ok=True)
    with (scratch / f"optimizers-{contender.name}.log").open("w") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def core_seconds(running: dict[str, subprocess.Popen]) -> dict[str, float]:
    """The core-seconds that each used until it ended; refuses as soon as one has failed."""
    named, seconds = {process.pid: (name, process) for name, process in running.items()}, {}
    while named:
        pid, status, used = os.wait4(-1, 0)
        if pid not in named:
            continue
        name, process = named.pop(pid)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            refuse(
                f"{' '.join(process.args)} ended with exit code {process.returncode}: its log is in the scratch folder"
            )
        seconds[name] = used.ru_utime + used.ru_stime
    return {name: seconds[name] for name in running}


def curve(folder: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]
    return [(line["images"], line["loss"]) for line in lines]


def images_until(loss: float, measured: list[tuple[int, float]]) -> float | None:
    """The images after which a curve first falls to a loss, interpolated in logarithms; None if it never does."""
    for (before, above), (after, below) in zip(measured, measured[1:]):
        if below <= loss <= above:
            share = math.log(above / loss) / math.log(above / below)
            return before * (after / before) ** share
    return None


def found(curves: dict[str, list[tuple[int, float]]], seconds: dict[str, float]) -> dict:
    rows = [{"images": images} for images, _ in curves["AdamW"]]
    for name, measured in curves.items():
        for row, (_, loss) in zip(rows, measured, strict=True):
            row[name] = loss
    images, loss = curves["AdamW"][-1]
    needed = images_until(loss, curves["Muon"])
    return {
        "rows": rows,
        "core_seconds": {name: round(value, 1) for name, value in seconds.items()},
        "muon_reaches_adamws_last_loss_after": needed and round(needed),
        "share_of_its_images": needed and needed / images,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="folder for shards and runs")
    parser.add_argument("--images", type=int, default=9_600, help="budget of each contender")
    parser.add_argument("--json", type=Path, default=RESULTS / "optimizers.json")
    arguments = parser.parse_args()
    between = BATCH * MEASUREMENTS
    if arguments.images < 1 or arguments.images % between:
        refuse(f"--images {arguments.images}: give a multiple of {between}, the batch times the measurements")
    refuse_unwritable(arguments.json)
    shards(arguments.scratch, "train")  # prepared before both contenders ask for them
    running = {c.name: started(c, arguments.scratch, arguments.images) for c in CONTENDERS}
    try:
        seconds = core_seconds(running)
    finally:  # if one has failed, the other is stopped
        for process in running.values():
            if process.returncode is None:
                process.terminate()
    curves = {name: curve(arguments.scratch / "optimizers" / name) for name in running}
    result = found(curves, seconds)
    print(table(result["rows"]))
    share = result["share_of_its_images"]
    print(f"core-seconds: {', '.join(f'{name} {used:.0f}' for name, used in seconds.items())}")
    print(
        f"Muon reaches AdamW's last loss after {share:.0%} of its images"
        if share
        else "Muon never reaches AdamW's last loss"
    )
    command = f"python bench/optimizers.py --scratch DIR --images {arguments.images}"
    contenders = {c.name: " ".join(c.flags) for c in CONTENDERS}
    write_json(arguments.json, {"command": command, "contenders": contenders} | result | {"machine": machine()})


if __name__ == "__main__":
    try:
        main()
    except Refused as refused:
        refuse(str(refused))
