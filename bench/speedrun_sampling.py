"""More about the weights that bench/speedrun.py trained: how best to sample them, and at which noise levels they err.

python bench/speedrun_sampling.py --scratch DIR               both of the following
python bench/speedrun_sampling.py --scratch DIR --sweep       the last weights sampled in several ways
python bench/speedrun_sampling.py --scratch DIR --from-real   test images under noise, denoised by the last weights

Denoised from little noise, a test image is nearly itself; from much noise, it is a sample like any other. The network
errs at the noise level from which on the distance grows.

Each row has 500 samples, in bf16, which is twice as fast on some CPUs, and from other noise than the record's, so that
what is best here is not tuned to that noise.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from fashion import Course
from record import machine, refuse, write_json
from speedrun import RECORDS, SAMPLING, Sampling, samples, trained, with_sampling_range
from torch import Tensor

from duotone.data.refusal import Refused
from duotone.engine import artifact

SAMPLES, SEED = 500, 2
NOWHERE, EVERYWHERE = replace(SAMPLING, guidance=1.0), replace(SAMPLING, interval=(0.0, math.inf))
LEVELS = [0.3, 1.0, 2.0, 4.0, 8.0]


def ways(first: int) -> list[Sampling]:
    """Ways of sampling; one of them is guided away from the checkpoint of `first` images."""
    return [
        SAMPLING,
        NOWHERE,
        replace(SAMPLING, guidance=1.5),
        replace(SAMPLING, guidance=2.0),
        replace(SAMPLING, guidance=3.0),
        EVERYWHERE,
        replace(EVERYWHERE, guidance=1.5),
        replace(SAMPLING, interval=(0.0, 1.5)),
        replace(SAMPLING, interval=(0.0, 6.0)),
        replace(SAMPLING, epsilon=1.0),
        replace(SAMPLING, epsilon=1.0, guidance=2.0),
        replace(SAMPLING, epsilon=1.0025),
        replace(SAMPLING, epsilon=1.01),
        replace(SAMPLING, guide=first),
        replace(SAMPLING, steps=20),
        replace(SAMPLING, sampler="heun", steps=9),
        replace(SAMPLING, sampler="ancestral", steps=24),
    ]


def sweep(course: Course, models: dict[int, artifact.Model]) -> list[dict]:
    rows = []
    for how in ways(min(models)):
        model = with_sampling_range(models[max(models)], how)
        guide = with_sampling_range(models[how.guide], how) if how.guide else None
        drawn = samples(model, course.labels_N, how, guide, seed=SEED)
        rows.append({"sampling": str(how), "forwards": round(model.forwards, 1)} | described(course, drawn))
        print_row(rows[-1], str(how))
    return rows


def from_real(course: Course, model: artifact.Model) -> list[dict]:
    """Test images under noise of each level, sampled from that level on without guidance and with it."""
    real = course.splits.held_out.drawn(SAMPLES)
    course = replace(course, labels_N=real.labels_N)
    rows = [{"level": 0.0, "guidance": None} | described(course, real.images_NHWC)]
    print_row(rows[-1], "test images")
    for how in (NOWHERE, SAMPLING):
        for level in LEVELS:
            down = replace(how, sigma_max=level)
            under_noise = StartFromNoised(real.images_NHWC, how.solver())
            drawn = samples(with_sampling_range(model, down), course.labels_N, down, seed=SEED, sampler=under_noise)
            rows.append({"level": level, "guidance": how.guidance} | described(course, drawn))
            print_row(rows[-1], f"from noise {level:g}, guidance {how.guidance:g}")
    return rows


class StartFromNoised:
    """A sampler that begins with given images under noise of the first level; every call takes the next chunk."""

    def __init__(self, images_NHWC: np.ndarray, solver: Callable):
        self.left_NCHW = torch.from_numpy(images_NHWC).permute(0, 3, 1, 2).float() / 127.5 - 1
        self.solver = solver

    def __call__(self, denoise: Callable, noise_NCHW: Tensor, sigmas: Tensor, **rest) -> Tensor:
        clean_NCHW, self.left_NCHW = self.left_NCHW.tensor_split([len(noise_NCHW)])
        return self.solver(denoise, clean_NCHW + noise_NCHW, sigmas, **rest)


def trained_last(scratch: Path) -> Path:
    """The folder of our side's last training, on a CPU or a GPU."""
    folders = [folder for folder in (scratch / "engine", scratch / "engine-gpu") if (folder / "metrics.jsonl").exists()]
    return max(folders, key=lambda folder: (folder / "metrics.jsonl").stat().st_mtime, default=scratch / "engine")


def described(course: Course, drawn: np.ndarray) -> dict:
    made_of = course.composed(drawn)
    return course.measured(drawn) | {
        "means": made_of.whole.means,
        "within": made_of.within,
        "between": made_of.between,
    }


def print_row(row: dict, what: str) -> None:
    spread = f"spread {row['within']:.2f} within, {row['between']:.2f} between classes"
    print(f"  {row['accuracy']['value']:6.1%}  Frechet {row['frechet']:6.2f}  {spread}  {what}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="folder of bench/speedrun.py")
    parser.add_argument("--sweep", action="store_true", help="only sample the last weights in several ways")
    parser.add_argument("--from-real", action="store_true", help="only denoise test images")
    arguments = parser.parse_args()
    both = arguments.sweep == arguments.from_real
    checkpoints = trained_last(arguments.scratch) / "checkpoints"
    paths = sorted(checkpoints.glob("images-*"))
    if not paths:
        refuse(f"{checkpoints} holds no checkpoint: python bench/speedrun.py --scratch {arguments.scratch} makes them")
    course = Course.prepared(arguments.scratch, SAMPLES)
    models = {model.images: model for model in (trained(path, course, torch.bfloat16) for path in paths)}
    last = models[max(models)]
    print(f"{SAMPLES} samples of the model of {last.images:,} images in each way; floor {course.floor:.2f}")
    about = {
        "images": last.images,
        "samples": SAMPLES,
        "precision": "bf16",
        "floor": course.floor,
        "classifier_digest": course.judge.key,
        "machine": machine(),
    }
    for name, wanted in {"sweep": arguments.sweep or both, "from-real": arguments.from_real or both}.items():
        if wanted:
            again = {"command": f"python bench/speedrun_sampling.py --scratch DIR --{name}"}
            rows = sweep(course, models) if name == "sweep" else from_real(course, last)
            write_json(RECORDS / f"{name}.json", again | about | {"rows": rows})


if __name__ == "__main__":
    try:
        main()
    except Refused as refused:
        refuse(str(refused))
