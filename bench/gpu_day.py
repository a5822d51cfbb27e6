"""Everything that a GPU is needed for, in order of value, each stage in its own time box and its own files.

    python bench/gpu_day.py                       # all stages, some two hours
    python bench/gpu_day.py --minutes 10          # the same order, as far as it goes
    python bench/gpu_day.py --only correctness kernels
    python bench/gpu_day.py --dry-run             # the plan, and whether every command can start; needs no GPU

A stage that fails or runs out of time is recorded and the next one begins; what it had written stays, and training ends with a
checkpoint before its time does. Stages whose packages are missing (training needs deepspeed) are skipped with one line.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from record import RESULTS, command, machine, refuse, write_json

ROOT = Path(__file__).parent.parent
LEAST = 0.5
"""Minutes for which a stage is begun."""
TRAINING = ("deepspeed", "tyro", "transformers", "tqdm", "webdataset")


@dataclass(frozen=True)
class Stage:
    """A command, its share of the time, and the packages that it cannot do without."""

    name: str
    command: tuple[str, ...]
    minutes: float
    needs: tuple[str, ...] = ()

    @property
    def missing(self) -> list[str]:
        return [package for package in self.needs if not installed(package)]

    @property
    def start(self) -> tuple[str, ...]:
        """The same command, as far as it goes without a GPU: its help, or the tests that it would run."""
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

    def bench(script: str, name: str, *flags: str) -> tuple[str, ...]:
        return python, f"bench/{script}.py", *flags, "--json", str(out / f"{name}.json")

    def trained(recipe: str, name: str, minutes: float, *flags: str) -> Stage:
        """A run that ends by itself, with a checkpoint, before its box does."""
        folder, stop_after = str(out / name.replace(" ", "_")), str(0.9 * minutes - 0.5)
        command = (python, f"recipes/{recipe}.py", "--out", folder, "--checkpoint.stop-after", stop_after, *flags)
        return Stage(name, command, minutes, TRAINING)

    tests = ("tests/kernels", "tests/engine/test_speed.py")
    # Most of their time is the compiler's, on one core each.
    together = ("-n", str(min(8, os.cpu_count() or 1))) if installed("xdist") else ()
    scratch = out / "speedrun"
    shards = str(scratch / "shards" / "train")
    return [
        trained("coco_clip", "first steps", 2, "--images", "3200", "--speed.whole-step"),
        Stage("correctness", (python, "-m", "pytest", *tests, "-m", "gpu", "-q", *together), 12, ("pytest", "triton")),
        Stage("ceilings", bench("ceilings", "ceilings"), 2),
        Stage("kernels", bench("throughput", "throughput"), 8, ("triton",)),
        Stage("speedrun", bench("speedrun", "speedrun", "--scratch", str(scratch), "--side", "engine", "--device", "cuda", "--minutes", "6"), 8, TRAINING),
        trained("fashion_mnist_edm", "100 epochs", 15, "--data.shards", shards, "--speed.whole-step", "--speed.compile", "False"),
        Stage("their distance", (python, "-m", "duotone.engine.cli", "evaluate", *distance(out)), 3, TRAINING),
        Stage("convolution", bench("conv", "conv"), 10),
        Stage("step", bench("train_step", "train_step"), 8, ("diffusers",)),
        Stage("sampling", bench("sampling", "sampling"), 6),
        Stage("switches", bench("switches", "switches"), 5),
        Stage("step of sd15", bench("train_step", "train_step-sd15", "--unet", "sd15", "--steps", "20"), 8, ("diffusers",)),
        Stage("shards", (python, "bench/decoded_shapes.py", "--out", str(out / "shards"), "--size", "128"), 3, ("webdataset",)),
        trained("coco_clip", "demo", 5),
        Stage("guidance", bench("sampling", "guidance", "--run", str(out / "demo"), "--quality"), 5, TRAINING),
        trained("coco_clip", "reference", 20, "--small", *reference(out)),
        Stage("whole step", (python, "-m", "pytest", "tests/engine/test_whole_step.py", "tests/engine/test_muon.py", "-m", "gpu", "-q"), 3, ("pytest", *TRAINING)),
        trained("coco_clip", "reference whole", 10, "--small", *reference(out), "--speed.whole-step"),
    ]  # fmt: skip


def distance(out: Path) -> tuple[str, ...]:
    """How the 100 epochs are measured: by the published run's sampler, steps and guidance, 9,000 of its 50,000 samples."""
    return (
        *(str(out / "100_epochs"), "--test", str(out / "speedrun" / "shards" / "t10k")),
        *("--samples", "9000", "--floor", "9000", "--guidance", "1", "--steps", "50", "--sampler", "euler"),
        *("--json", str(out / "100_epochs.json")),
    )


def reference(out: Path) -> tuple[str, ...]:
    """The reference network's shape on the decoded shapes: a rate with the real loop, optimizer, EMA and reader."""
    return (
        *("--data.shards", str(out / "shards"), "--data.size", "128", "--model.groups", "32"),
        *("--model.channels", "128", "128", "256", "384", "384", "--model.heads", "4", "4", "4", "4", "4"),
        *("--model.attention", "none", "cross", "cross", "cross", "cross"),
        *("--model.blocks", "2", "2", "2", "2", "2", "--model.depth", "1", "1", "1", "1", "1"),
        *("--batch-size", "64", "--images", "64000", "--checkpoint.every", "0", "--preview.every", "0"),
    )


def run(stage: Stage, out: Path, minutes: float) -> dict:
    """One stage within its box; its output goes to a file beside its results."""
    record = {"stage": stage.name, "command": " ".join(stage.command)}
    if stage.missing:
        return record | {"code": f"skipped: {', '.join(stage.missing)} not installed", "seconds": 0.0}
    began = time.monotonic()
    with open(out / f"{stage.name.replace(' ', '_')}.log", "w") as log:
        code = boxed(stage.command, 60 * minutes, log)
    return record | {"code": code, "seconds": round(time.monotonic() - began, 1)}


def boxed(words: tuple[str, ...], seconds: float, log) -> int | str:
    """The exit code, or what happened instead; a command out of time is ended with everything that it started."""
    process = subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        return "out of time"
    finally:  # also where this process is interrupted: nothing goes on training behind its back
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def dry_run(chosen: list[Stage]) -> int:
    """The plan, and for each stage whether its command starts here; the number of those that do not."""
    failed = 0
    for stage in chosen:
        verdict = f"skipped: {', '.join(stage.missing)} not installed" if stage.missing else start(stage)
        failed += verdict.startswith("does not start")
        print(f"{stage.name:14} {stage.minutes:5.1f} min  {verdict}\n    {' '.join(stage.command)}", flush=True)
    return failed


def start(stage: Stage) -> str:
    # Without a GPU the kernels' tests can be collected for the interpreter alone.
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    environment = os.environ | (interpreted if "pytest" in stage.command else {})
    done = subprocess.run(stage.start, cwd=ROOT, capture_output=True, text=True, env=environment)
    if done.returncode == 0:
        return "starts"
    return f"does not start: {(done.stderr or done.stdout).strip().splitlines()[-1]}"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--minutes", type=float, default=130, help="for all stages together: the last ones are left out"
    )
    parser.add_argument("--only", nargs="*", help="names of stages")
    parser.add_argument("--out", type=Path, help="where results go (default: bench/results/gpu-DATE)")
    parser.add_argument("--dry-run", action="store_true", help="run nothing; say what would be run")
    return parser.parse_args()


def chosen_of(asked: argparse.Namespace, out: Path) -> list[Stage]:
    every = stages(out)
    unknown = set(asked.only or ()) - {stage.name for stage in every}
    if unknown:
        refuse(f"no stage is called {', '.join(sorted(unknown))}; there are {', '.join(s.name for s in every)}")
    return [stage for stage in every if not asked.only or stage.name in asked.only]


def main() -> None:
    asked = parse()
    out = (asked.out or RESULTS / f"gpu-{machine()['date']}").resolve()
    chosen = chosen_of(asked, out)
    if asked.dry_run:
        sys.exit(1 if dry_run(chosen) else 0)
    if not torch.cuda.is_available():
        refuse("no CUDA device here; bench/ledger.py says what can be known without one, --dry-run shows the plan")
    if (out / "gpu_day.json").exists():
        refuse(f"{out} holds another day, whose runs would be taken for done: give another --out")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    out.mkdir(parents=True, exist_ok=True)
    record = {"machine": machine(), "command": command(), "stages": []}
    ends = time.monotonic() + 60 * asked.minutes
    for stage in chosen:
        left = (ends - time.monotonic()) / 60
        if left < LEAST:
            print(f"{stage.name:14} and what follows: no time left", flush=True)
            break
        last = run(stage, out, min(stage.minutes, left))
        record["stages"].append(last)
        write_json(out / "gpu_day.json", record)
        print(f"{stage.name:14} {last['seconds']:8.1f} s   {last['code'] or 'ok'}", flush=True)


if __name__ == "__main__":
    main()
