"""Everything that needs a GPU, most valuable first, each stage with its own time limit and its own files.

    python bench/gpu_day.py                       # all stages, about two and a half hours
    python bench/gpu_day.py --minutes 10          # the same order, as far as the time allows
    python bench/gpu_day.py --only correctness kernels
    python bench/gpu_day.py --out FOLDER          # resume a day that was cut short: finished stages are not repeated
    python bench/gpu_day.py --dry-run             # the plan, and whether every command can start; needs no GPU

A stage that fails or runs out of time is recorded, and the next one begins. What it has written stays: it gets SIGTERM
before its time is over, and training answers that with a checkpoint. A stage whose packages (training needs deepspeed)
or input files are missing is skipped with one line.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from fashion import files
from record import RESULTS, command, machine, refuse, refuse_unwritable, write_json

ROOT = Path(__file__).parent.parent
LEAST = 0.5
"""Minutes that must be left for a stage to begin."""
GRACE = 45.0
"""A stage gets SIGTERM this many seconds before its time is over, but at most a third of its time before."""
TRAINING = ("deepspeed", "tyro", "transformers", "tqdm", "webdataset")


@dataclass(frozen=True)
class Stage:
    """A command and its share of the time."""

    name: str
    command: tuple[str, ...]
    minutes: float
    needs: tuple[str, ...] = ()
    """Packages that it needs."""
    inputs: tuple[Path, ...] = ()
    """Files or folders that must exist when it begins."""
    result: Path | None = None
    """The file or folder that exists once it has done its work."""

    @property
    def missing(self) -> list[str]:
        return [package for package in self.needs if not installed(package)]

    @property
    def absent(self) -> list[Path]:
        return [path for path in self.inputs if not path.exists()]

    @property
    def has_result(self) -> bool:
        return self.result is None or self.result.exists()

    def makes(self, path: Path) -> bool:
        return self.result is not None and path.is_relative_to(self.result)

    @property
    def start(self) -> tuple[str, ...]:
        """What can be run of the command without a GPU: its help, or the collection of its tests."""
        if "pytest" in self.command:
            return (*self.command, "--collect-only")
        if "-m" in self.command:  # a verb of duotone's
            return (*self.command[: self.command.index("-m") + 3], "--help")
        script = next(i for i, word in enumerate(self.command) if word.endswith(".py"))
        return (*self.command[: script + 1], "--help")


def installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except (ImportError, ValueError):  # something forbids the package
        return False


def stages(out: Path) -> list[Stage]:
    """What is worth most comes first: a wrong kernel makes every later figure worthless."""
    python = sys.executable

    def bench(script: str, name: str, *flags: str) -> dict:
        path = out / f"{name}.json"
        return {"command": (python, f"bench/{script}.py", *flags, "--json", str(path)), "result": path}

    def trained(recipe: str, name: str, minutes: float, *flags: str, inputs: tuple[Path, ...] = ()) -> Stage:
        folder = out / name.replace(" ", "_")
        command = (python, f"recipes/{recipe}.py", "--out", str(folder), *flags)
        return Stage(name, command, minutes, TRAINING, inputs, result=folder / "ema.safetensors")

    def tested(name: str, minutes: float, *flags: str, needs: tuple[str, ...]) -> Stage:
        return Stage(name, (python, "-m", "pytest", *flags, "-m", "gpu", "-q"), minutes, ("pytest", *needs))

    # Most of the tests' time is spent in the compiler, on one core each.
    together = ("-n", str(min(8, os.cpu_count() or 1))) if installed("xdist") else ()
    scratch, decoded = out / "speedrun", out / "shards"
    train, test = scratch / "shards" / "train", scratch / "shards" / "t10k"
    on_a_gpu = ("--side", "engine", "--device", "cuda", "--minutes", "6")
    return [
        trained("coco_clip", "first steps", 2, "--images", "3200", "--speed.whole-step"),
        tested("correctness", 12, "tests/kernels", "tests/engine/test_speed.py", *together, needs=("triton",)),
        Stage("ceilings", **bench("ceilings", "ceilings"), minutes=2),
        Stage("kernels", **bench("throughput", "throughput"), minutes=8, needs=("triton",)),
        Stage("course", (python, "bench/fashion.py", "--scratch", str(scratch)), 4, ("webdataset",),
              inputs=(*files("train"), *files("t10k")), result=scratch / "shards"),
        Stage("speedrun", **bench("speedrun", "speedrun", "--scratch", str(scratch), *on_a_gpu), minutes=8, needs=TRAINING,
              inputs=(train, test)),
        trained("fashion_mnist_edm", "100 epochs", 15, "--data.shards", str(train), "--accumulation", "1", "--speed.whole-step",
                "--speed.compile", "False", inputs=(train,)),
        Stage("their distance", (python, "-m", "duotone.engine.cli", "evaluate", *distance(out)), 3, TRAINING,
              inputs=(out / "100_epochs" / "ema.safetensors", test), result=out / "100_epochs.json"),
        Stage("convolution", **bench("conv", "conv"), minutes=10),
        Stage("step", **bench("train_step", "train_step"), minutes=8, needs=("diffusers",)),
        Stage("sampling", **bench("sampling", "sampling"), minutes=6),
        Stage("switches", **bench("switches", "switches"), minutes=10),
        Stage("step of sd15", **bench("train_step", "train_step_sd15", "--unet", "sd15", "--steps", "20"), minutes=8,
              needs=("diffusers",)),
        Stage("shards", (python, "bench/decoded_shapes.py", "--out", str(decoded), "--size", "128"), 3, ("webdataset",),
              result=decoded),
        trained("coco_clip", "demo", 5),
        Stage("guidance", **bench("sampling", "guidance", "--run", str(out / "demo"), "--quality"), minutes=5, needs=TRAINING,
              inputs=(out / "demo" / "ema.safetensors",)),
        trained("coco_clip", "reference", 20, "--small", *reference(out), inputs=(decoded,)),
        tested("whole step", 3, "tests/engine/test_whole_step.py", "tests/engine/test_muon.py", "tests/data/test_decoders.py",
               needs=TRAINING),
        trained("coco_clip", "reference whole", 10, "--small", *reference(out), "--speed.whole-step", inputs=(decoded,)),
    ]  # fmt: skip


def distance(out: Path) -> tuple[str, ...]:
    """How the 100 epochs are measured: by the published run's sampler, steps and guidance, on 9,000 samples, not 50,000.

    The features are those of a classifier of the data, because Inception's weights are not part of the package. The
    distance cannot be compared with the published one, only with its own floor.
    """
    return (
        *(str(out / "100_epochs"), "--test", str(out / "speedrun" / "shards" / "t10k")),
        *("--samples", "9000", "--floor", "9000", "--guidance", "1", "--steps", "50", "--sampler", "euler"),
        *("--json", str(out / "100_epochs.json")),
    )


def reference(out: Path) -> tuple[str, ...]:
    """Flags that train the reference network on the decoded shapes, with the real loop, optimizer, EMA and reader."""
    return (
        *("--data.shards", str(out / "shards"), "--data.size", "128", "--model.groups", "32"),
        *("--model.channels", "128", "128", "256", "384", "384", "--model.heads", "4", "4", "4", "4", "4"),
        *("--model.attention", "none", "cross", "cross", "cross", "cross"),
        *("--model.blocks", "2", "2", "2", "2", "2", "--model.depth", "1", "1", "1", "1", "1"),
        *("--batch-size", "64", "--images", "64000", "--checkpoint.every", "0", "--preview.every", "0"),
        *("optimizer:adam-w", "--optimizer.lr", "1e-3", "--optimizer.warmup", "1600"),
    )


def run(stage: Stage, out: Path, minutes: float) -> dict:
    """Runs one stage within its time limit; its output goes to a file beside its results."""
    record = {"stage": stage.name, "command": " ".join(stage.command)}
    if why := skipped(stage):
        return record | {"code": why, "seconds": 0.0}
    began = time.monotonic()
    with open(out / f"{stage.name.replace(' ', '_')}.log", "w") as log:
        code = boxed(stage.command, 60 * minutes, log)
    return record | {"code": code, "seconds": round(time.monotonic() - began, 1)}


def skipped(stage: Stage, earlier: Sequence[Stage] = ()) -> str:
    """Why a stage cannot begin even after the earlier ones have done their work; empty if it can."""
    if stage.missing:
        return f"skipped: {', '.join(stage.missing)} not installed"
    absent = [str(path) for path in stage.absent if not any(other.makes(path) for other in earlier)]
    return f"skipped: {', '.join(absent)} not there" if absent else ""


def boxed(words: tuple[str, ...], seconds: float, log) -> int | str:
    """The exit code, or what happened instead; a command out of time is ended with everything that it started."""
    process = subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    grace = min(GRACE, seconds / 3)
    try:
        return process.wait(seconds - grace)
    except subprocess.TimeoutExpired:
        pass
    finally:  # also if this process is interrupted: no training may be left running
        end(process, grace)
    return "out of time" if process.returncode else 0  # a command that ended well in its last seconds was in time


def end(process: subprocess.Popen, grace: float) -> None:
    """Sends SIGTERM to a process and all that it started, and SIGKILL after at most `grace` seconds."""
    try:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(grace)
    except subprocess.TimeoutExpired:
        pass
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def dry_run(chosen: list[Stage]) -> int:
    """Prints the plan and whether each stage's command starts here; returns the number of those that do not."""
    failed = 0
    for number, stage in enumerate(chosen):
        earlier = chosen[:number]
        verdict = skipped(stage, earlier) or start(stage)
        failed += verdict.startswith("does not start")
        print(f"{stage.name:14} {stage.minutes:5.1f} min  {verdict}\n    {' '.join(stage.command)}", flush=True)
        for path in stage.inputs:
            print(f"    begins with {path}: {origin(path, earlier)}", flush=True)
    return failed


def origin(path: Path, earlier: list[Stage]) -> str:
    """Where an input comes from: it exists already, an earlier stage makes it, or it is missing."""
    makers = [stage.name for stage in earlier if stage.makes(path)]
    return "there" if path.exists() else f"result of {makers[-1]}" if makers else "missing"


def start(stage: Stage) -> str:
    # Without a GPU, the kernels' tests can only be collected for the interpreter.
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    environment = os.environ | (interpreted if "pytest" in stage.command else {})
    done = subprocess.run(stage.start, cwd=ROOT, capture_output=True, text=True, env=environment)
    if done.returncode == 0:
        return "starts"
    return f"does not start: {(done.stderr or done.stdout).strip().splitlines()[-1]}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--minutes",
        type=float,
        help="for all stages together; those that no time is left for are left out (default: the sum of their limits)",
    )
    parser.add_argument("--only", nargs="*", help="run only these stages")
    parser.add_argument("--out", type=Path, help="where results go (default: bench/results/gpu-DATE)")
    parser.add_argument(
        "--dry-run", action="store_true", help="print the plan and check that each command can start; measure nothing"
    )
    return parser.parse_args()


def chosen_of(asked: argparse.Namespace, out: Path) -> list[Stage]:
    every = stages(out)
    unknown = set(asked.only or ()) - {stage.name for stage in every}
    if unknown:
        refuse(f"no stage is called {', '.join(sorted(unknown))}; there are {', '.join(s.name for s in every)}")
    return [stage for stage in every if not asked.only or stage.name in asked.only]


def begun(path: Path) -> dict:
    """The record of a day: the one at `path`, which must be of this device and commit, or a new one."""
    record = {"machine": machine(), "command": command(), "stages": []}
    if not path.exists():
        return record
    try:
        before = json.loads(path.read_text())
    except ValueError:
        refuse(f"{path} is not the record of a day: give another --out")
    for name in ("device", "commit"):
        was, here = before.get("machine", {}).get(name), record["machine"][name]
        if was != here:
            refuse(f"{path} records a day of another {name}, {was} instead of {here}: give another --out")
    return record | {"stages": before["stages"]}


def done(stage: Stage, record: dict) -> bool:
    return stage.has_result and any(row["stage"] == stage.name and row["code"] == 0 for row in record["stages"])


def outcome(stage: Stage, code: int | str) -> str:
    return str(code) if code else "ok" if stage.has_result else "ok, no result"


def main() -> None:
    asked = parse()
    out = (asked.out or RESULTS / f"gpu-{machine()['date']}").resolve()
    chosen = chosen_of(asked, out)
    if asked.dry_run:
        sys.exit(1 if dry_run(chosen) else 0)
    if not torch.cuda.is_available():
        refuse("no CUDA device here; bench/ledger.py says what can be known without one, --dry-run shows the plan")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    refuse_unwritable(out / "gpu_day.json", "--out")
    day(chosen, out, sum(stage.minutes for stage in chosen) if asked.minutes is None else asked.minutes)


def day(chosen: list[Stage], out: Path, minutes: float) -> None:
    """Runs one stage after another until the minutes are spent."""
    record, ends = begun(out / "gpu_day.json"), time.monotonic() + 60 * minutes
    for stage in chosen:
        left = (ends - time.monotonic()) / 60
        if done(stage, record):
            print(f"{stage.name:14} done before", flush=True)
            continue
        if left < LEAST:
            print(f"{stage.name:14} and what follows: no time left", flush=True)
            break
        last = run(stage, out, min(stage.minutes, left))
        record["stages"] = [row for row in record["stages"] if row["stage"] != stage.name] + [last]
        write_json(out / "gpu_day.json", record)
        print(f"{stage.name:14} {last['seconds']:8.1f} s   {outcome(stage, last['code'])}", flush=True)


if __name__ == "__main__":
    main()
