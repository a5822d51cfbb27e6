"""A race on class-conditional Fashion-MNIST, 28 px, two CPU cores: our engine against a well-known notebook's loop.

python bench/speedrun.py --scratch DIR                 both sides, one after the other
python bench/speedrun.py --scratch DIR --side engine   one of them
python bench/speedrun.py --scratch DIR --side engine --minutes 60          in parts: the same command resumes, the clock adds up
python bench/speedrun.py --scratch DIR --side engine --again --checks 1    measure the last weights once more
python bench/speedrun.py --scratch DIR --side engine --json FILE           write the record and its picture elsewhere
python bench/speedrun.py --scratch DIR --side engine --device cuda         our side on one GPU

The bar: of 1,000 samples, a classifier of the data recognises 90 %, and their Frechet distance from the training set,
in that classifier's features, is at most 1.5 times that of 1,000 real test images. The clock runs from the start of the
training process until the measured weights are on disk. It is kept twice: in wall seconds, and in core-seconds of the
process and its children, which a busy machine disturbs least. Shards and classifier are made before the clock starts;
samples are drawn after it has stopped, and their seconds are listed. Both sides have the same classifier and the same
labels.

The other side is a well-known notebook's loop (bench/speedrun_notebook.py). It has as many core-seconds as our side has
used in DIR, or those of --core-seconds, and is sampled in --notebook-steps steps of DDIM. bench/speedrun_sampling.py
and bench/speedrun_noises.py find out more from the last weights of our side.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from clocks import core_seconds_of_children
from fashion import CLASSES, DATA, SAMPLES, Course, shards
from record import RESULTS, machine, refuse, refuse_unwritable, write_json

from duotone.data.refusal import Refused
from duotone.engine import Recipe, artifact, checkpoint, main, pictures
from duotone.engine.checkpoint import Checkpoints
from duotone.engine.conditioning.base import Facts
from duotone.engine.conditioning.label import Label
from duotone.engine.evaluate.composition import Composition
from duotone.engine.log import Log
from duotone.engine.model.unet import UNetConfig
from duotone.engine.objectives.edm import EDM
from duotone.engine.optimizers.ema import Ema
from duotone.engine.optimizers.muon import Muon
from duotone.engine.preview import Previews
from duotone.engine.sample import sample
from duotone.engine.sampling.samplers.epsilon_scaling import epsilon_scaled
from duotone.engine.sampling.samplers.named import SAMPLERS
from duotone.engine.speed import Speed

RECORDS = RESULTS / "speedrun"
LEAST_ACCURACY, MOST_RATIO = 0.9, 1.5
IMAGES, CHECKS, SEED = 1_152_000, 3, 1
# Trying out an accumulation, compiling and waiting for log lines would all count in the time.
ON_A_GPU = ("--accumulation", "1", "--speed.whole-step", "--speed.compile", "False", "--log.every", "100")
IMAGES_ON_A_GPU = 2_304_000
TOLD = ("loss", "grad_norm", "learning_rate", "images_per_second")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How our side's samples are drawn."""

    sampler: str = "dpmpp_2m"
    steps: int = 10
    guidance: float = 1.75
    # With guidance from the first step on, a class's samples are too much alike: noise still hides what is drawn.
    interval: tuple[float, float] = (0.0, 3.0)
    # Steps below this level would be spent on what cannot be seen.
    sigma_min: float = 0.05
    sigma_max: float = 40.0
    # While sampling, the network predicts a little more noise than on training images of the same noise level.
    epsilon: float = 1.005
    """The predicted noise is divided by this number."""
    guide: int = 0
    """Unless 0, guidance leads away from the checkpoint of this many images instead of the null label."""

    def solver(self) -> Callable:
        solver = SAMPLERS[self.sampler]
        return solver if self.epsilon == 1 else epsilon_scaled(solver, self.epsilon)

    def __str__(self) -> str:
        said = f"{self.sampler}, {self.steps} steps from {self.sigma_max:g} to {self.sigma_min:g}, guidance {self.guidance:g}"
        bounded = self.guidance != 1 and self.interval != (0.0, math.inf)
        said += f" at noise {self.interval[0]:g} to {self.interval[1]:g}" if bounded else ""
        said += f", noise divided by {self.epsilon:g}" if self.epsilon != 1 else ""
        return said + (f" away from the checkpoint of {self.guide:,} images" if self.guide else "")


SAMPLING = Sampling()

recipe = Recipe(
    name="speedrun",
    data=DATA,
    conditioning=(Label(dropout=0.1),),
    # Variety within a class is lost at noise 1 to 5 (--from-real): these levels are drawn more often than by default.
    objective=EDM(sigma_data=0.7, log_mean=0.0, log_std=1.1, sigma_max=40.0, stratified=True),
    model=UNetConfig(
        channels=(32, 64, 128),
        attention=("none", "none", "none"),
        middle="single",
        heads=(1, 1, 1),
        blocks=(1, 1, 1),
        depth=(1, 1, 1),
        in_channels=1,
        out_channels=1,
        groups=8,
        film=True,
        time_width=256,
    ),
    # AdamW needs three times the images for the same loss (optimizers.json).
    optimizer=Muon(lr=3e-3, weight_decay=0.0, clip=1.0, warmup=12_800, schedule="cosine"),
    ema=Ema(half_life=6_400, rampup=0.1),
    # 64 on each of two cores: a third faster than 16 on each, for the same loss after as many images.
    batch_size=128,
    images=IMAGES,
    checkpoint=Checkpoints(every=IMAGES // CHECKS, keep=CHECKS + 10),
    preview=Previews(every=0, rows=1, columns=1, steps=1, sampler="euler", strips=False),
    log=Log(every=25),
    speed=Speed(precision="fp32", threads=1),
)


# ------------------------------------------------------------------------------------------------------- our side


def engine_side(scratch: Path, course: Course, images: int) -> dict:
    """Trains the recipe above, a rank on each core or one on the GPU, and measures every checkpoint's EMA weights."""
    out = scratch / f"engine{device_suffix()}"  # each device has weights and a clock of its own
    between = images // CHECKS
    launcher = (sys.executable, "-m", "deepspeed.launcher.runner")  # this environment's own, activated or not
    ranks, switches = ("1", ON_A_GPU) if parsed().device == "cuda" else ("2", ())
    command = [
        *launcher,
        "--num_accelerators",
        ranks,
        __file__,
        "--data.shards",
        str(shards(scratch, "train")),
        *switches,
    ]
    command += ["--images", str(images), "--checkpoint.every", str(between), "--out", str(out)]
    command += ["--checkpoint.stop-after", str(parsed().minutes)]
    log = out.with_suffix(".log")
    goes_on = log.with_suffix(".json").exists() and not (out / "ema.safetensors").exists()
    clock = clocked([*command, *([] if goes_on else ["--fresh"])], log, goes_on)
    if not (out / "ema.safetensors").exists():
        print(f"{clock.seconds:.0f} s, {clock.cpu_seconds:.0f} core-s so far: repeat the same command to resume")
        sys.exit()
    checks = []
    for path in last(out / "checkpoints", "images-*", between):
        model = with_sampling_range(trained(path, course, device=parsed().device), SAMPLING)
        began = time.monotonic()
        drawn = samples(model, course.labels_N, SAMPLING, seed=parsed().seed)
        took, at = time.monotonic() - began, clock.at((path / "manifest.json").stat().st_mtime)
        # All steps cost the same, so a checkpoint's share of the run's core-seconds is its share of the images.
        used = clock.cpu_seconds * model.images / images
        checks.append(check(course, drawn, (at, used), model.images, took))
    if not checks:
        refuse(
            f"{out / 'checkpoints'} holds no checkpoint to measure of a run of {images:,} images: train without --again"
        )
    picture(drawn, "engine")
    parameters = sum(p.numel() for p in model.network.parameters())
    log = log_by_parts(out / "metrics.jsonl")
    return record("engine", course, checks, clock, str(SAMPLING), parameters) | {"log": log}


def log_by_parts(metrics: Path, parts: int = 48) -> list[dict]:
    """The run's own log, averaged over the lines in each of `parts` equal parts."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    of_part = [math.ceil(line["images"] / lines[-1]["images"] * parts) for line in lines]
    rows = []
    for part in sorted(set(of_part)):
        here = [line for line, its in zip(lines, of_part) if its == part]
        rows.append({"images": here[-1]["images"], **{name: mean_of(name, here) for name in TOLD}})
    return rows


def mean_of(name: str, lines: list[dict]) -> float | None:
    """The mean over the lines that have a value: a skipped step has no gradient norm."""
    values = [line[name] for line in lines if line[name] is not None]
    return round(statistics.mean(values), 6) if values else None


def trained(path: Path, course: Course, dtype: torch.dtype = torch.float32, device: str = "cpu") -> artifact.Model:
    """The EMA weights of a checkpoint."""
    facts = Facts(classes=course.splits.train.classes)
    manifest, tensors = checkpoint.read(path)
    network = artifact.build(recipe, facts)
    artifact.fill(network, tensors["ema"], path)
    network.eval().requires_grad_(False).to(device, dtype)
    return artifact.Model(network, recipe.objective, facts, recipe, manifest["images"])


def with_sampling_range(model: artifact.Model, how: Sampling) -> artifact.Model:
    """The model, with the noise levels between which `how` samples it."""
    return replace(model, objective=replace(recipe.objective, sigma_min=how.sigma_min, sigma_max=how.sigma_max))


def samples(
    model: artifact.Model,
    labels_N: np.ndarray,
    how: Sampling,
    guide: artifact.Model | None = None,
    seed: int = SEED,
    **other,
) -> np.ndarray:
    """One sample per label; `other` arguments of `sample` override what `how` says."""
    steering = {"guidance": how.guidance, "interval": how.interval, "guide": guide}
    solving = {"steps": how.steps, "sampler": how.solver(), "seed": seed, "chunk": 100}
    return sample(model, labels=labels_N.tolist(), **(steering | solving | other))


# ------------------------------------------------------------------------------------------------- the other side


def notebook_side(scratch: Path, course: Course, core_seconds: float) -> dict:
    import speedrun_notebook

    out = scratch / "notebook"
    out.mkdir(exist_ok=True)
    for old in [] if parsed().again else out.glob("images-*.pt"):
        old.unlink()
    command = [sys.executable, str(Path(__file__).with_name("speedrun_notebook.py")), "--scratch", str(scratch)]
    command += ["--core-seconds", str(core_seconds), "--kept", str(CHECKS)]
    clock = clocked(command, scratch / "notebook.log")
    checks = []
    for path in last(out, "images-*.pt"):
        model = speedrun_notebook.ClassBesideImage().eval()
        model.load_state_dict(torch.load(path, weights_only=True))
        began = time.monotonic()
        drawn = speedrun_notebook.samples(model, course.labels_N, parsed().notebook_steps)
        took, at = time.monotonic() - began, clock.at(path.stat().st_mtime)
        _, images, used = path.stem.split("-")
        checks.append(check(course, drawn, (at, float(used)), int(images), took))
    if not checks:
        refuse(f"{out} holds no weights: train without --again")
    picture(drawn, "notebook")
    sampling = f"diffusers DDIMScheduler, x0 clipped, {parsed().notebook_steps} steps, no guidance"
    return record("notebook", course, checks, clock, sampling, sum(p.numel() for p in model.parameters()))


# ------------------------------------------------------------------------------------------------------ the clock


@dataclass(frozen=True)
class Part:
    """A training process from its start to its end."""

    began: float
    seconds: float
    cpu_seconds: float
    """Processor time of the process and its children."""
    load: float
    """The load average of the last five minutes at its end, including its own load."""


@dataclass(frozen=True)
class Clock:
    """All parts of one training."""

    parts: list[Part]

    @property
    def seconds(self) -> float:
        return sum(part.seconds for part in self.parts)

    @property
    def cpu_seconds(self) -> float:
        return sum(part.cpu_seconds for part in self.parts)

    def at(self, moment: float) -> float:
        """Seconds of training before a moment, given as time.time() counts."""
        return sum(min(part.seconds, max(0.0, moment - part.began)) for part in self.parts)


def clocked(command: list[str], log: Path, goes_on: bool = False) -> Clock:
    """Runs a training process to its end; the clock of a resumed one adds up."""
    kept = log.with_suffix(".json")
    if parsed().again and not kept.exists():
        refuse(f"--again: {kept} does not exist, so nothing was trained here; leave --again out")
    parts = stored(kept).parts if goes_on or parsed().again else []
    if parsed().again:
        return Clock(parts)
    kept.unlink(missing_ok=True)  # a part that is killed leaves no clock: the next training starts over
    before, began = core_seconds_of_children(), time.time()
    # One thread per process: on a busy machine, threads that wait for each other burn core time while they wait.
    environment = os.environ | {"DS_ACCELERATOR": parsed().device, "OMP_NUM_THREADS": "1"}
    with log.open("a" if goes_on else "w") as file:
        code = subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT).returncode
    load = round(os.getloadavg()[1], 2)
    parts.append(Part(began, time.time() - began, core_seconds_of_children() - before, load))
    write_json(kept, [asdict(part) for part in parts])  # also for a part that failed: its time was spent
    if code:
        refuse(f"the training ended with exit code {code}: its output is in {log}")
    return Clock(parts)


def stored(path: Path) -> Clock:
    return Clock([Part(**part) for part in json.loads(path.read_text())])


def last(folder: Path, pattern: str, between: int = 1) -> list[Path]:
    """The weights kept during training for which a check is due, oldest first; only the last --checks of them."""
    paths = [path for path in sorted(folder.glob(pattern)) if int(path.stem.split("-")[1]) % between == 0]
    return paths[-parsed().checks :]


def check(course: Course, drawn: np.ndarray, clock: tuple[float, float], images: int, sampling_seconds: float) -> dict:
    seconds, core_seconds = clock
    found = {"seconds": round(seconds, 1), "core_seconds": round(core_seconds, 1), "images": images}
    found |= course.measured(drawn)
    made_of = course.composed(drawn)
    found["composition"] = asdict(made_of)
    found["reached"] = reached(found)
    found["sampling_seconds"] = round(sampling_seconds, 1)
    print(
        f"  {seconds:6.0f} s  {core_seconds:6.0f} core-s  {images:8,} images  accuracy {found['accuracy']['value']:.1%}  "
        f"Frechet {found['frechet']:.2f} = {found['ratio_to_floor']:.1f} x the floor",
        flush=True,
    )
    print(table(made_of), flush=True)
    return found


def table(made_of: Composition) -> str:
    whole = made_of.whole
    head = f"    means {whole.means:.2f}, covariances {whole.frechet - whole.means:.2f}; spread as a share of the training set's: "
    rows = [f"{head}{made_of.within:.2f} within classes, {made_of.between:.2f} between them"]
    rows += [
        f"    {name:12}Frechet {p.frechet:5.1f}  means {p.means:5.1f}  spread {p.spread:.2f}"
        for name, p in made_of.by_class.items()
    ]
    return "\n".join(rows)


def reached(found: dict) -> bool:
    return found["accuracy"]["value"] >= LEAST_ACCURACY and found["ratio_to_floor"] <= MOST_RATIO


def record(side: str, course: Course, checks: list[dict], clock: Clock, sampling: str, parameters: int) -> dict:
    reached = next((c["seconds"] for c in checks if c["reached"]), None)
    command = f"python bench/speedrun.py --scratch DIR --side {side}"
    command += " --device cuda" if parsed().device == "cuda" else ""
    if side == "engine":
        command += f" --images {parsed().images or usual_images()}"
    else:
        command += f" --core-seconds {budget():g} --notebook-steps {parsed().notebook_steps}"
    command += f" --again --checks {parsed().checks}" if parsed().again else ""
    command += f" --seed {parsed().seed}" if parsed().seed != SEED else ""
    return {
        "command": command,
        "side": side,
        "bar": {"accuracy": LEAST_ACCURACY, "ratio_to_floor": MOST_RATIO, "samples": SAMPLES},
        "reached_after_seconds": reached,
        "checks": checks,
        "training_seconds": round(clock.seconds, 1),
        "training_cpu_seconds": round(clock.cpu_seconds, 1),
        "training_parts": len(clock.parts),
        "parameters": parameters,
        "sampling": sampling,
        "classifier": course.judge.accuracy.to_json(),
        "classifier_digest": course.judge.key,
        "floor": course.floor,
        "composition_of_real": asdict(course.composed_of_real()),
        "machine": machine() | {"load_average_5_minutes": clock.parts[-1].load},
    }


def budget() -> float:
    """Core-seconds of the notebook's side: --core-seconds, or as many as all parts of ours have used in this folder."""
    asked, ours = parsed().core_seconds, parsed().scratch / "engine.json"
    if asked is None and not ours.exists():
        refuse(f"{ours} does not exist, so our side's core-seconds are not known: give --core-seconds")
    seconds = stored(ours).cpu_seconds if asked is None else asked
    if seconds <= 0:
        refuse(f"--core-seconds {seconds:g}: it must be above 0")
    return seconds


def device_suffix() -> str:
    return "-gpu" if parsed().device == "cuda" else ""


def usual_images() -> int:
    return IMAGES_ON_A_GPU if parsed().device == "cuda" else IMAGES


def name(side: str) -> str:
    """The name of a side's record; with --again or other noise it has its own, so that the usual record stays."""
    again = "-again" if parsed().again else ""
    return (
        side
        + (device_suffix() if side == "engine" else "")
        + again
        + (f"-noise-{parsed().seed}" if parsed().seed != SEED else "")
    )


def result(side: str) -> Path:
    """The file of a side's record; its picture lies beside it."""
    return parsed().json if parsed().json is not None else RECORDS / f"{name(side)}.json"


def picture(drawn: np.ndarray, side: str) -> None:
    """Ten samples of each class, one row per class."""
    path = result(side).with_suffix(".png")
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = drawn.reshape(CLASSES, -1, *drawn.shape[1:])[:, :10]
    pictures.grid(rows.reshape(-1, *drawn.shape[1:]), 10, zoom=2).save(path)


def race(arguments: argparse.Namespace) -> None:
    if arguments.device == "cuda" and not torch.cuda.is_available():
        refuse("--device cuda: torch finds no CUDA device; leave it out to train on two CPU cores")
    if arguments.json is not None and arguments.side == "both":
        refuse("--json is for one side: give --side engine or --side notebook")
    between = CHECKS * recipe.batch_size
    if arguments.images is not None and (arguments.images < 1 or arguments.images % between):
        refuse(f"--images {arguments.images}: give a multiple of {between}, the batch times the checks")
    if arguments.checks < 1 or arguments.notebook_steps < 1:
        refuse("--checks and --notebook-steps must be at least 1")
    sides = ("engine", "notebook") if arguments.side == "both" else (arguments.side,)
    if sides == ("notebook",) or "notebook" in sides and arguments.device == "cuda":
        budget()  # refuses now: nothing in this call will make it known
    for side in sides:
        refuse_unwritable(result(side))
    course = Course.prepared(arguments.scratch)
    print(f"classifier {course.judge.accuracy}; floor {course.floor:.3f}, bar {MOST_RATIO * course.floor:.3f}")
    for side in sides:
        print(f"{side}:", flush=True)
        if side == "engine":
            found = engine_side(arguments.scratch, course, arguments.images or usual_images())
        else:
            found = notebook_side(arguments.scratch, course, budget())
        write_json(result(side), found)


@cache
def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="folder for shards, runs and the classifier")
    parser.add_argument("--side", choices=("engine", "notebook", "both"), default="both")
    parser.add_argument(
        "--images", type=int, help=f"budget of our side (default: {IMAGES}, on a GPU {IMAGES_ON_A_GPU})"
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="our side's device: two CPU cores or one GPU"
    )
    parser.add_argument(
        "--minutes", type=float, default=0, help="minutes after which our side's training stops; 0 = when it is done"
    )
    parser.add_argument(
        "--core-seconds",
        type=float,
        help="budget of the notebook's side (default: as many as ours used in this folder)",
    )
    parser.add_argument(
        "--again", action="store_true", help="train nothing; measure the weights of the last training once more"
    )
    parser.add_argument("--checks", type=int, default=CHECKS, help="measure only the last CHECKS of the kept weights")
    parser.add_argument("--seed", type=int, default=SEED, help="seed of the noise that our side's samples begin with")
    parser.add_argument("--json", type=Path, help="where one side's record goes (default: bench/results/speedrun/)")
    parser.add_argument("--notebook-steps", type=int, default=25, help="DDIM steps of the notebook's side")
    return parser.parse_args()


if __name__ == "__main__":
    if "LOCAL_RANK" in os.environ:  # started by deepspeed: this is the training process itself
        main(recipe)
    else:
        try:
            race(parsed())
        except Refused as refused:
            refuse(str(refused))
