"""A race on Fashion-MNIST, 28 px, by class, two CPU cores: our engine against the loop of a well-known notebook.

python bench/speedrun.py --scratch DIR                 both sides, one after the other
python bench/speedrun.py --scratch DIR --side engine   one of them

The bar: 1,000 samples that a classifier of the data recognises in 90 % of cases, and whose Frechet distance from the training
set, in that classifier's features, is at most 1.5 times that of 1,000 real test images. The clock runs from the start of
the training process to the moment when the weights that are measured lay on disk. It is kept twice: in seconds, and in the
seconds that the process and its children had a core, which a busy machine disturbs least. Shards and classifier are made
before, samples are drawn after, and their seconds are listed. Both sides see the same classifier and the same labels.

The other side is Hugging Face's diffusion-models-class, unit 2, written here from its description: diffusers' UNet2DModel
with the class as four embedded channels beside the image, DDPM with 1000 steps of the cosine schedule, Adam at 1e-3, batch
128. Its own sampling takes 1000 steps an image; here its samples come from diffusers' DDIM in 25, or
as many as --notebook-steps says, without guidance, since labels are never dropped in its training.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from fashion import CLASSES, DATA, SAMPLES, SIDE, Course, shards
from torch import nn

from duotone.engine import Recipe, artifact, checkpoint, main, pictures
from duotone.engine.checkpoint import Checkpoints
from duotone.engine.conditioning.base import Facts
from duotone.engine.conditioning.label import Label
from duotone.engine.evaluate.images import read_splits
from duotone.engine.log import Log
from duotone.engine.model.unet import UNetConfig
from duotone.engine.objectives.edm import EDM
from duotone.engine.optimizer import AdamW, Ema
from duotone.engine.preview import Previews
from duotone.engine.sample import pixels, sample
from duotone.engine.speed import Speed

RESULTS = Path(__file__).parent / "results" / "speedrun"
CPU = torch.device("cpu")
LEAST_ACCURACY, MOST_RATIO = 0.9, 1.5
GUIDANCE, STEPS, SAMPLER = 2.0, 12, "dpmpp_2m"
IMAGES, CHECKS = 216_000, 3

recipe = Recipe(
    name="speedrun",
    data=DATA,
    conditioning=(Label(dropout=0.1),),
    objective=EDM(sigma_data=0.7, log_mean=-0.5, log_std=1.3, sigma_max=40.0, stratified=True),
    model=UNetConfig(
        channels=(16, 64, 128),
        # No attention: in bf16 on a CPU PyTorch's takes over a tenth of a step for 49 tokens.
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
    optimizer=AdamW(lr=4e-3, weight_decay=0.0, clip=1.0, warmup=3_200, schedule="cosine"),
    ema=Ema(half_life=6_400, rampup=0.1),
    batch_size=32,
    images=IMAGES,
    checkpoint=Checkpoints(every=IMAGES // CHECKS, keep=CHECKS + 1),
    preview=Previews(every=0, rows=1, columns=1, steps=1, sampler="euler", strips=False),
    log=Log(every=100),
    speed=Speed(precision="bf16", threads=1),
)


# ------------------------------------------------------------------------------------------------------- our side


def engine_side(scratch: Path, course: Course, images: int) -> dict:
    """Trains by the recipe above, a rank on each core, and measures the EMA of every checkpoint."""
    out = scratch / "engine"
    command = ["deepspeed", "--num_accelerators", "2", __file__, "--data.shards", str(shards(scratch, "train"))]
    command += ["--images", str(images), "--checkpoint.every", str(images // CHECKS), "--out", str(out), "--fresh"]
    clock = clocked(command, out.parent / "engine.log")
    facts = Facts(classes=course.splits.train.classes)
    checks = []
    for path in last(out / "checkpoints", "images-*"):
        manifest, tensors = checkpoint.read(path)
        network = artifact.build(recipe, facts)
        artifact.fill(network, tensors["ema"], path)
        model = artifact.Model(network.eval().requires_grad_(False), recipe.objective, facts, recipe)
        began = time.monotonic()
        drawn = sample(
            model, labels=course.labels_N.tolist(), guidance=GUIDANCE, steps=STEPS, sampler=SAMPLER, seed=1, chunk=100
        )
        took, at = time.monotonic() - began, (path / "manifest.json").stat().st_mtime - clock["began"]
        # Steps cost alike, so a checkpoint's share of the run's core-seconds is its share of the images.
        used = clock["cpu_seconds"] * manifest["images"] / images
        checks.append(check(course, drawn, (at, used), manifest["images"], took))
        picture(drawn, "engine", path.name)
    sampling = f"{SAMPLER}, {STEPS} steps, guidance {GUIDANCE}"
    parameters = sum(p.numel() for p in network.parameters())
    return record("engine", course, checks, clock, sampling, parameters)


# ------------------------------------------------------------------------------------------------- the other side


class ClassBesideImage(nn.Module):
    """UNet2DModel on the image and four constant channels, the embedded class."""

    def __init__(self):
        from diffusers import UNet2DModel

        super().__init__()
        self.embedding = nn.Embedding(CLASSES, 4)
        self.unet = UNet2DModel(
            sample_size=SIDE,
            in_channels=1 + 4,
            out_channels=1,
            layers_per_block=2,
            block_out_channels=(32, 64, 64),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        )

    def forward(self, x_NCHW, time_N, labels_N):
        planes_N4HW = self.embedding(labels_N)[:, :, None, None].expand(-1, -1, *x_NCHW.shape[2:])
        return self.unet(torch.cat([x_NCHW, planes_N4HW], dim=1), time_N).sample


def notebook_training(scratch: Path, core_seconds: float) -> None:
    """The notebook's loop for so many seconds of a core, its weights kept at equal distances."""
    from diffusers import DDPMScheduler

    torch.manual_seed(0)
    train = read_splits(replace(DATA, shards=shards(scratch, "train")), shards(scratch, "t10k"), 60_000).train
    x_NCHW = torch.from_numpy(train.images_NHWC).permute(0, 3, 1, 2)
    labels_N, scheduler = torch.from_numpy(train.labels_N), DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2")
    model = ClassBesideImage()
    adam = torch.optim.Adam(model.parameters(), lr=1e-3)
    images, kept = 0, 0
    while kept < CHECKS:
        for places_B in torch.randperm(len(x_NCHW)).split(128):
            clean = x_NCHW[places_B].float() / 255 * 2 - 1
            noise, t = torch.randn_like(clean), torch.randint(0, 999, (len(clean),))
            loss = (model(scheduler.add_noise(clean, noise, t), t, labels_N[places_B]) - noise).square().mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
            images += len(places_B)
            used = time.process_time()
            if used >= core_seconds * (kept + 1) / CHECKS:
                kept += 1
                torch.save(model.state_dict(), scratch / "notebook" / f"images-{images:012d}-{used:.0f}.pt")
                print(f"{used:6.0f} core-seconds  {images:,} images  loss {loss.item():.4f}", flush=True)
                if kept == CHECKS:
                    return


@torch.inference_mode()
def notebook_samples(model: ClassBesideImage, labels_N: np.ndarray) -> np.ndarray:
    from diffusers import DDIMScheduler

    random, parts = torch.Generator().manual_seed(1), []
    for labels_B in torch.from_numpy(labels_N).split(100):
        # Clipping x0, as the notebook's own scheduler does: without it DPM-Solver++ saturates an epsilon model on this schedule.
        solver = DDIMScheduler(1000, beta_schedule="squaredcos_cap_v2", clip_sample=True)
        solver.set_timesteps(parsed().notebook_steps)
        x_NCHW = torch.randn(len(labels_B), 1, SIDE, SIDE, generator=random)
        for t in solver.timesteps:
            x_NCHW = solver.step(model(x_NCHW, t, labels_B), t, x_NCHW).prev_sample
        parts.append(pixels(x_NCHW))
    return np.concatenate(parts)


def notebook_side(scratch: Path, course: Course, core_seconds: float) -> dict:
    out = scratch / "notebook"
    out.mkdir(exist_ok=True)
    for old in [] if "--again" in sys.argv else out.glob("images-*.pt"):
        old.unlink()
    command = [sys.executable, __file__, "--scratch", str(scratch), "--notebook-seconds", str(core_seconds)]
    clock = clocked(command, scratch / "notebook.log")
    checks = []
    for path in last(out, "images-*.pt"):
        model = ClassBesideImage().eval()
        model.load_state_dict(torch.load(path, weights_only=True))
        began = time.monotonic()
        drawn = notebook_samples(model, course.labels_N)
        took, at = time.monotonic() - began, path.stat().st_mtime - clock["began"]
        _, images, used = path.stem.split("-")
        checks.append(check(course, drawn, (at, float(used)), int(images), took))
        picture(drawn, "notebook", path.stem)
    sampling = f"diffusers DDIMScheduler, x0 clipped, {parsed().notebook_steps} steps, no guidance"
    return record("notebook", course, checks, clock, sampling, sum(p.numel() for p in model.parameters()))


# ------------------------------------------------------------------------------------------------------ the clock


def clocked(command: list[str], log: Path) -> dict:
    """Runs a training process to its end: when it began, its seconds, and the seconds that it had a core."""
    kept = log.with_suffix(".json")
    if "--again" in sys.argv:
        return json.loads(kept.read_text())
    before, began = cpu_seconds(), time.time()
    # One thread a process: threads that wait for each other on a busy machine burn what they wait for.
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT, check=True)
    load = round(os.getloadavg()[1], 2)
    clock = {"began": began, "seconds": time.time() - began, "cpu_seconds": cpu_seconds() - before, "load": load}
    kept.write_text(json.dumps(clock))
    return clock


def last(folder: Path, pattern: str) -> list[Path]:
    """What was kept on the way, oldest first; with --checks, only the last of it."""
    return sorted(folder.glob(pattern))[-parsed().checks :]


def cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def check(course: Course, drawn: np.ndarray, clock: tuple[float, float], images: int, sampling_seconds: float) -> dict:
    seconds, core_seconds = clock
    found = {"seconds": round(seconds, 1), "core_seconds": round(core_seconds, 1), "images": images}
    found |= course.measured(drawn)
    found["reached"] = reached(found)
    found["sampling_seconds"] = round(sampling_seconds, 1)
    print(
        f"  {seconds:6.0f} s  {core_seconds:6.0f} core-s  {images:8,} images  accuracy {found['accuracy']['value']:.1%}  "
        f"Frechet {found['frechet']:.2f} = {found['ratio_to_floor']:.1f} x the floor",
        flush=True,
    )
    return found


def reached(found: dict) -> bool:
    return found["accuracy"]["value"] >= LEAST_ACCURACY and found["ratio_to_floor"] <= MOST_RATIO


def record(side: str, course: Course, checks: list[dict], clock: dict, sampling: str, parameters: int) -> dict:
    reached = next((c["seconds"] for c in checks if c["reached"]), None)
    return {
        "command": f"python bench/speedrun.py --scratch DIR --side {side}",
        "side": side,
        "bar": {"accuracy": LEAST_ACCURACY, "ratio_to_floor": MOST_RATIO, "samples": SAMPLES},
        "reached_after_seconds": reached,
        "checks": checks,
        "training_seconds": round(clock["seconds"], 1),
        "training_cpu_seconds": round(clock["cpu_seconds"], 1),
        "parameters": parameters,
        "sampling": sampling,
        "classifier": course.judge.accuracy.to_json(),
        "floor": course.floor,
        "machine": {
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "load_average_5_minutes": clock["load"],
            "commit": subprocess.run(
                ["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
            ).stdout.strip(),
        },
    }


def picture(drawn: np.ndarray, side: str, name: str) -> None:
    """Ten of each class, a row for each."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    rows = drawn.reshape(CLASSES, -1, *drawn.shape[1:])[:, :10]
    pictures.grid(rows.reshape(-1, *drawn.shape[1:]), 10, zoom=2).save(RESULTS / f"{side}.png")


def race(arguments: argparse.Namespace) -> None:
    course = Course.laid(arguments.scratch)
    print(f"classifier {course.judge.accuracy}; floor {course.floor:.3f}, bar {MOST_RATIO * course.floor:.3f}")
    for side in ("engine", "notebook") if arguments.side == "both" else (arguments.side,):
        print(f"{side}:", flush=True)
        if side == "engine":
            found = engine_side(arguments.scratch, course, arguments.images)
        else:
            found = notebook_side(arguments.scratch, course, arguments.core_seconds)
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f"{side}.json").write_text(json.dumps(found, indent=1) + "\n")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="folder for shards, runs and the classifier")
    parser.add_argument("--side", choices=("engine", "notebook", "both"), default="both")
    parser.add_argument("--images", type=int, default=IMAGES, help="budget of our side")
    parser.add_argument("--core-seconds", type=float, default=1000, help="budget of the notebook's side")
    parser.add_argument("--again", action="store_true", help="measure what was trained before once more")
    parser.add_argument("--checks", type=int, default=CHECKS, help="measure only the last so many of what was kept")
    parser.add_argument("--notebook-steps", type=int, default=25, help="DDIM steps of the notebook's side")
    parser.add_argument("--notebook-seconds", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    if "LOCAL_RANK" in os.environ:  # started by deepspeed: this is the training process itself
        main(recipe)
    elif (arguments := parsed()).notebook_seconds:
        notebook_training(arguments.scratch, arguments.notebook_seconds)
    else:
        race(arguments)
