"""What the bugs of published systems cost: one small network on Fashion-MNIST, trained with and without each of them.

python bench/bugs.py --scratch DIR                   the sound run and every bug, one after another, each on one core
python bench/bugs.py --scratch DIR --only dropout    one of them, added to the record

Every run sees the same images, noise and budget: 28 px, DDPM's cosine schedule, v-prediction, 10 core-minutes. From
each, 1,000 samples are drawn from the same noise at guidance scales 1 and 3 and measured with a classifier of the data.
Networks trained in DIR before are reused and measured again; the record keeps the rows of earlier calls with the same
settings.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from clocks import core_seconds_of_children
from fashion import CLASSES, DATA, SAMPLES, Course, shards
from record import load_average, machine, refuse, result_path, write_json
from safetensors.torch import load_file
from torch import Tensor, nn

from duotone.data.batch import Batch
from duotone.data.refusal import Refused
from duotone.engine import Recipe, artifact, draws, pictures, register, train
from duotone.engine.checkpoint import Checkpoints
from duotone.engine.conditioning.base import Facts
from duotone.engine.conditioning.label import Label, LabelConditioner
from duotone.engine.doctor.examination import examine
from duotone.engine.evaluate.images import Images
from duotone.engine.evaluate.loss_table import Loss, cell, loss_table, losses, losses_of
from duotone.engine.log import Log
from duotone.engine.model.blocks import GroupNormSiLU
from duotone.engine.model.unet import UNet, UNetConfig
from duotone.engine.objectives.ddpm import DDPM
from duotone.engine.optimizers.adamw import AdamW
from duotone.engine.optimizers.ema import Ema
from duotone.engine.preview import Previews
from duotone.engine.sample import sample
from duotone.engine.speed import Speed
from duotone.engine.train import noise_levels

RECORDED_COMMAND = "python bench/bugs.py --scratch DIR"  # recorded as the command, whichever runs a call added
IMAGES = 28_800
GUIDANCE, STEPS, SAMPLER = 3.0, 12, "dpmpp_2m"
LEVELS, SEED = 8, 1
BATCHES_FOR_STATISTICS = 100  # batches from which batch norm's statistics are computed

sound = Recipe(
    name="sound",
    data=DATA,
    conditioning=(Label(dropout=0.1),),
    objective=DDPM(schedule="cosine", steps=1000, prediction="v", stratified=True),
    model=UNetConfig(
        channels=(16, 64, 128),
        attention=("none", "none", "self"),
        middle="single",
        heads=(1, 1, 4),
        blocks=(1, 1, 1),
        depth=(1, 1, 1),
        in_channels=1,
        out_channels=1,
        groups=8,
        film=True,
        time_width=256,
    ),
    optimizer=AdamW(lr=2e-3, weight_decay=0.0, clip=1.0, warmup=1_600, schedule="cosine"),
    ema=Ema(half_life=3_200, rampup=0.1),
    batch_size=32,
    images=IMAGES,
    checkpoint=Checkpoints(every=0, keep=1),
    preview=Previews(every=0, rows=1, columns=1, steps=1, sampler="euler", strips=False),
    log=Log(every=100),
    speed=Speed(threads=1),
)


# ----------------------------------------------------------------------------------------------------------- the bugs


class NormalDropout(LabelConditioner):
    """Drops labels where a normal number, not a uniform one, is below the rate.

    Both numbers come from the same draw, so every label that the sound run drops is dropped here too.
    """

    def of_batch(self, batch: Batch, seed: int = 0) -> dict[str, Tensor]:
        normal_N = torch.special.ndtri(draws.uniform(seed, batch.positions_N, draws.Purpose.DROP)[:, 0])
        return {"labels_N": torch.where(normal_N < self.dropout, len(self.classes), batch.labels_N)}


@register
@dataclass(frozen=True, kw_only=True)
class NormallyDroppedLabel(Label):
    def build(self, network: UNetConfig, facts: Facts) -> NormalDropout:
        built = super().build(network, facts)
        return NormalDropout(built.classes, built.embedding, built.dropout)


@register
@dataclass(frozen=True, kw_only=True)
class WithoutTheLast(DDPM):
    """Draws timesteps as randint(0, T - 1) does, whose upper end is exclusive: the last timestep is never drawn."""

    def draw_sigma(self, u_N: Tensor) -> Tensor:
        return self.sigmas[(u_N * (self.steps - 1)).long()]


class BatchNormSiLU(nn.BatchNorm2d):
    """Batch norm in place of group norm, followed by FiLM and SiLU as before; skips are joined before it."""

    joins_skips = False
    joining = GroupNormSiLU.joining

    def forward(self, x_NCHW: Tensor, *, silu: bool = True, add_NC=None, scale_NC=None, shift_NC=None) -> Tensor:
        h_NCHW = super().forward(x_NCHW if add_NC is None else x_NCHW + add_NC[:, :, None, None])
        if scale_NC is not None:
            h_NCHW = torch.addcmul(shift_NC[:, :, None, None], h_NCHW, 1 + scale_NC[:, :, None, None])
        return F.silu(h_NCHW) if silu else h_NCHW


@register
@dataclass(frozen=True, kw_only=True)
class BatchNormed(UNetConfig):
    def build(self) -> UNet:
        unet = super().build()
        for parent in list(unet.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, GroupNormSiLU):
                    setattr(parent, name, BatchNormSiLU(child.num_channels, eps=child.eps))
        return unet


@dataclass(frozen=True, kw_only=True)
class Bug:
    """A recipe with one thing wrong, and the system that published it that way."""

    name: str
    says: str
    system: str
    recipe: Recipe

    @classmethod
    def planted(cls, name: str, says: str, system: str, **changed) -> "Bug":
        return cls(name=name, says=says, system=system, recipe=replace(sound, name=name, **changed))


BUGS = (
    Bug.planted("sound", "none", "ours"),
    Bug.planted(
        "dropout",
        "labels dropped where randn < 0.1, not rand: 54 % of them",
        "priyammaz/PyTorch-Adventures, Conditional Diffusion",
        conditioning=(NormallyDroppedLabel(dropout=0.1),),
    ),
    Bug.planted(
        "timestep",
        "the last timestep, where sampling begins, is never trained",
        "huggingface/diffusion-models-class, unit 2",
        objective=WithoutTheLast(schedule="cosine", steps=1000, prediction="v", stratified=True),
    ),
    Bug.planted(
        "batchnorm",
        "batch normalisation in place of group normalisation",
        "Zenchiyu/diffusion",
        model=BatchNormed(**{name: getattr(sound.model, name) for name in UNetConfig.__dataclass_fields__}),
    ),
    Bug.planted(
        "sinusoid",
        "the class number fed as a sinusoid",
        "KetanMann's class-conditional trainer (diffusers' class_embed_type timestep)",
        conditioning=(Label(encoding="sinusoid", dropout=0.1),),
    ),
    Bug.planted("again", "none, another seed", "ours", seed=1),
)
NAMES = tuple(bug.name for bug in BUGS)


def bug_named(name: str) -> Bug:
    return BUGS[NAMES.index(name)]


def recipe_of(bug: Bug, scratch: Path, images: int) -> Recipe:
    data = replace(DATA, shards=shards(scratch, "train"))
    return replace(bug.recipe, data=data, images=images, out=scratch / "bugs" / bug.name)


# ----------------------------------------------------------------------------------------------------------- training


def trained(bug: Bug, scratch: Path, images: int) -> dict:
    """Trains in a separate process, unless that was done before; returns its wall seconds and its core-seconds."""
    kept = scratch / "bugs" / f"{bug.name}.json"
    if kept.exists() and (clock := json.loads(kept.read_text()))["images"] == images:
        return clock
    kept.parent.mkdir(parents=True, exist_ok=True)
    order = [sys.executable, __file__, "--scratch", str(scratch), "--images", str(images), "--train", bug.name]
    # One thread: on a busy machine, threads that wait for each other burn core time while they wait.
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    before, began, log = core_seconds_of_children(), time.time(), kept.with_suffix(".log")
    with log.open("w") as file:
        done = subprocess.run(order, env=environment, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        raise Refused(f"training {bug.name} ended with {done.returncode}: {last_line(log)}")
    used = core_seconds_of_children() - before
    clock = {"images": images, "core_seconds": used, "seconds": time.time() - began}
    write_json(kept, clock | {"load_average": load_average()})
    return json.loads(kept.read_text())


def last_line(log: Path) -> str:
    return (log.read_text().strip().splitlines() or ["it printed nothing"])[-1].removeprefix("duotone: refused: ")


# ---------------------------------------------------------------------------------------------------------- measuring


def model_of(bug: Bug, recipe: Recipe, course: Course) -> artifact.Model:
    """The EMA weights, to be sampled at the sound objective's noise levels, as every run is."""
    facts = Facts(classes=course.splits.train.classes)
    network = artifact.build(recipe, facts)
    path = recipe.out / "ema.safetensors"
    artifact.fill(network, load_file(path), path)
    model = artifact.Model(network.eval().requires_grad_(False), sound.objective, facts, recipe)
    recompute_batch_norm(model, course.splits.train)
    return model


def batch_norms(model: artifact.Model) -> list[BatchNormSiLU]:
    return [module for module in model.network.modules() if isinstance(module, BatchNormSiLU)]


@torch.inference_mode()
def recompute_batch_norm(model: artifact.Model, images: Images) -> None:
    """Recomputes batch norm's statistics on training batches: those kept in training are not the EMA weights'."""
    layers, size = batch_norms(model), model.recipe.batch_size
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # the plain mean over all batches that follow
        layer.train()
    for first in range(0, BATCHES_FOR_STATISTICS * size if layers else 0, size):
        sigma_N = noise_levels(model.recipe, np.arange(first, first + size))
        losses_of(model, images, slice(first, first + size), sigma_N, 0, 0)
    for layer in layers:
        layer.eval()


def drawn(model: artifact.Model, course: Course, guidance: float) -> np.ndarray:
    labels = course.labels_N.tolist()
    settings = {"guidance": guidance, "steps": STEPS, "sampler": SAMPLER, "seed": SEED}
    # Unclipped, as for the published table: v-prediction does not need clipping.
    return sample(model, labels=labels, **settings, clip=False, chunk=100)


def by_its_own_batch(model: artifact.Model, course: Course) -> np.ndarray:
    """Guided samples with batch norm using the statistics of the batch being sampled, which holds both branches."""
    for layer in batch_norms(model):
        layer.train()
    return drawn(model, course, GUIDANCE)


def measured(bug: Bug, recipe: Recipe, course: Course) -> dict:
    model = model_of(bug, recipe, course)
    sets = {"guided": drawn(model, course, GUIDANCE), "unguided": drawn(model, course, 1.0)}
    found = {"losses": [asdict(row) for row in losses_of_levels(model, course)], "last_step": last_step(model, course)}
    if batch_norms(model):
        sets["own_batch"] = by_its_own_batch(model, course)
    for kind, images_NHWC in sets.items():
        found[kind] = course.measured(images_NHWC) | {"brightness": float(images_NHWC.mean() / 255)}
        np.save(recipe.out / f"{kind}.npy", images_NHWC)
    return found


def losses_of_levels(model: artifact.Model, course: Course) -> list[Loss]:
    return [row for row in loss_table(model, some(course), levels=LEVELS) if row.name == "all"]


def last_step(model: artifact.Model, course: Course) -> dict:
    """The loss at the last timestep, on noise draws that no level of the table uses."""
    sigma, images = model.objective.sigmas[-1], some(course)
    return asdict(cell(sigma.item(), "all", losses(model, images, sigma, LEVELS * len(images), SEED)))


def some(course: Course) -> Images:
    """Half as many test images as samples, with each class in its proportion."""
    return course.splits.held_out.drawn(len(course.labels_N) // 2)


def diagnosis(recipe: Recipe) -> list[str]:
    """The doctor's faults and warnings, without those about this machine."""
    found = [finding for finding in examine(recipe) if finding.level in ("fault", "warning")]
    return [f"{f.level}: {f.subject}: {f.says}" for f in found if f.subject not in ("device", "xformers", "data")]


# ---------------------------------------------------------------------------------------------------------- the record


def row_of(bug: Bug, asked: argparse.Namespace, course: Course) -> dict:
    recipe = recipe_of(bug, asked.scratch, asked.images)
    clock = trained(bug, asked.scratch, asked.images)
    row = {"bug": bug.name, "says": bug.says, "system": bug.system, "doctor": diagnosis(recipe), "training": clock}
    row |= measured(bug, recipe, course)
    print(line_of(row), flush=True)
    return row


def line_of(row: dict) -> str:
    parts = [f"{row['bug']:10}{row['training']['core_seconds']:6.0f} core-s"]
    for kind in ("unguided", "guided", "own_batch"):
        if kind in row:
            accuracy, distance = row[kind]["accuracy"]["value"], row[kind]["frechet"]
            parts.append(f"{kind} {accuracy:.1%}, Frechet {distance:.1f}")
    return "  ".join([*parts, f"loss at the last timestep {row['last_step']['loss']:.4f}"])


def settings(asked: argparse.Namespace, course: Course) -> dict:
    real = some(course).images_NHWC
    return {
        "images": asked.images,
        "samples": asked.samples,
        "guidance": GUIDANCE,
        "steps": STEPS,
        "sampler": SAMPLER,
        "floor": course.floor,
        "classifier": course.judge.accuracy.to_json(),
        "classifier_digest": course.judge.key,
        "brightness_of_test_images": float(real.mean() / 255),
        "parameters": sum(p.numel() for p in sound.model.build().parameters()),
    }


def earlier(path: Path, same: dict) -> dict[str, dict]:
    """The rows of the record already at `path`, by bug; none if its settings differ."""
    stored = json.loads(path.read_text()) if path.exists() else {}
    alike = all(stored.get(name) == value for name, value in same.items())
    return {row["bug"]: row for row in stored["results"]} if stored and alike else {}


def picture(scratch: Path, path: Path) -> None:
    """A row for each set of samples, two of each class, all from the same noise."""
    rows = [samples_at(scratch, bug, kind) for bug, kind, _ in PICTURED]
    rows = [row[:: max(1, len(row) // (2 * CLASSES))][: 2 * CLASSES] for row in rows if row is not None]
    pictures.grid(np.concatenate(rows), len(rows[0]), zoom=2).save(path)


PICTURED = (
    ("sound", "guided", "none"),
    ("sound", "unguided", "guidance never applied"),
    ("dropout", "guided", "54 % of labels dropped"),
    ("dropout", "unguided", "54 % of labels dropped, guidance never applied"),
    ("timestep", "guided", "last timestep never trained"),
    ("batchnorm", "guided", "batch norm, stored statistics"),
    ("batchnorm", "own_batch", "batch norm, statistics of the batch of both branches"),
    ("sinusoid", "guided", "class number as a sinusoid"),
)


def samples_at(scratch: Path, bug: str, kind: str) -> np.ndarray | None:
    path = scratch / "bugs" / bug / f"{kind}.npy"
    return np.load(path) if path.exists() else None


def bench(asked: argparse.Namespace) -> None:
    course = Course.prepared(asked.scratch, asked.samples)
    same = settings(asked, course)
    rows = earlier(asked.json, same)
    for name in asked.only or NAMES:
        rows[name] = row_of(bug_named(name), asked, course)
        ordered = [rows[n] for n in NAMES if n in rows]
        head = {"machine": machine(), "command": RECORDED_COMMAND, **same, "pictured": PICTURED}
        write_json(asked.json, head | {"results": ordered})
    picture(asked.scratch, asked.json.parent / "bugs.png")
    print(f"written: {asked.json} and bugs.png")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="folder for shards, runs and the classifier")
    parser.add_argument("--only", action="append", choices=NAMES, help="one of the runs; may be given several times")
    parser.add_argument("--images", type=int, default=IMAGES, help="budget of every run")
    parser.add_argument(
        "--samples", type=int, default=SAMPLES, help="samples drawn from every run at each guidance scale"
    )
    parser.add_argument("--json", type=Path, help="where the result goes (default: bench/results/)")
    parser.add_argument("--train", choices=NAMES, help=argparse.SUPPRESS)
    return parser.parse_args()


def check(asked: argparse.Namespace) -> None:
    if asked.samples < 2 * CLASSES:
        raise Refused(f"--samples = {asked.samples}: it must be at least {2 * CLASSES}, two of each class")
    replace(sound, images=asked.images).check()


def main() -> None:
    asked = parsed()
    try:
        check(asked)
        if asked.train:  # the training process itself
            train(recipe_of(bug_named(asked.train), asked.scratch, asked.images))
        else:
            asked.json = result_path(asked.json, "bugs")
            bench(asked)
    except Refused as refusal:
        refuse(str(refusal))


if __name__ == "__main__":
    main()
